"""Scorers: models that add numbers to the staged rows of a corpus, between the score pass and the judge pass.

Always holds: what a scorer says of a unit is stored once per digest of the scorer, beside the unit, and committed by a
manifest of its own; it is computed from the staged rows alone, so neither thresholds nor more inputs compute it again.
The models live on higher floors, which hand them in. Called by the corpus builder and by the judge pass.

    units/<unit digest>-<settings digest>/scores-<scorer digest>.json  scores-<scorer digest>.parquet
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray
from pydantic import Field

from data_pipeline import manifests
from data_pipeline.arrow_files import BATCH_ROWS, damaged
from data_pipeline.config import Settings
from data_pipeline.errors import UsageError
from data_pipeline.families import BASE_SIDE, FAMILIES
from data_pipeline.filters import Judged
from data_pipeline.images import Pixels
from data_pipeline.manifests import Document
from data_pipeline.staging import StagedUnit
from data_pipeline.storage import ObjectNotFound, ObjectStore

FORMAT = "glidepath-scores-1"


class ScorerSettings(Settings):
    """A model that scores the pairs of a corpus. It adds the column `clip_similarity`: a cosine, -1 to 1."""

    kind: Literal["noised_clip"]
    checkpoint: str  # URI of a checkpoint, or of a run: its newest
    device: Literal["cpu", "cuda"] = "cpu"
    actors: int = Field(default=1, ge=1)  # copies at work on a Ray cluster; with executor.kind inline there is one


class Scorer(Protocol):
    """A loaded model. Raises UserError from its constructor where the model cannot be had.

    `columns`: what it says of a row; `digest`: sha256 of all that its numbers depend on besides the row.
    """

    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def digest(self) -> str: ...
    def __call__(self, captions: Sequence[str], images64: Pixels) -> Mapping[str, NDArray[np.float32]]:
        """Each column as float32 [b], of b captions and pictures uint8 [b, 64, 64, 3]; nan where it cannot tell."""


class AddsColumns(Protocol):
    """What a threshold on scores needs to know of a scorer."""

    @property
    def columns(self) -> tuple[str, ...]: ...


class ScorerPool(AddsColumns, Protocol):
    """A scorer wherever it runs: `map` yields score_columns(store, prefix, scorer) of each prefix, in any order."""

    @property
    def digest(self) -> str: ...
    def map(self, store: ObjectStore, prefixes: Sequence[str]) -> Iterator[Document]: ...


class InlineScorer:
    """The pool of one scorer, in this process."""

    def __init__(self, scorer: Scorer) -> None:
        self.columns, self.digest, self._scorer = scorer.columns, scorer.digest, scorer

    def map(self, store: ObjectStore, prefixes: Sequence[str]) -> Iterator[Document]:
        yield from (score_columns(store, prefix, self._scorer) for prefix in prefixes)


def score_columns(store: ObjectStore, prefix: str, scorer: Scorer) -> Document:
    """Score the staged rows of the committed unit under `prefix` and commit the numbers; their manifest.

    Committed numbers are only looked up. Raises UserError if the unit is damaged.
    """
    name = _name(prefix, scorer.digest)
    committed = manifests.read(store, f"{name}.json")
    if committed is not None and store.exists(f"{name}.parquet"):
        return committed
    unit = manifests.read(store, f"{prefix}manifest.json")
    if unit is None:
        raise damaged(f"{store.uri}/{prefix}manifest.json", "a manifest", "nothing")
    table = _score(StagedUnit(store, prefix, unit["rows"], unit["out"]), unit["out"], scorer)
    sink = io.BytesIO()
    pa.parquet.write_table(table, sink)
    data = sink.getvalue()
    if not store.put_if_absent(f"{name}.parquet", data):
        # Another writer was first. Its numbers may differ from these in the last bit, and its manifest names its bytes.
        data = store.get(f"{name}.parquet")
    document = {
        "format": FORMAT,
        "unit": unit["unit"],
        "scorer": scorer.digest,
        "columns": list(scorer.columns),
        "rows": table.num_rows,
        "scores": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
    }
    return manifests.commit(store, f"{name}.json", document)


def read_scores(store: ObjectStore, prefix: str, digests: Collection[str]) -> dict[str, NDArray[np.float32]]:
    """By column, what the scorers of these digests said of a unit: float32 [rows], in the order of its staged rows.

    Raises UserError when they are absent or damaged.
    """
    scores: dict[str, NDArray[np.float32]] = {}
    for digest in digests:
        name = _name(prefix, digest)
        manifest = manifests.read(store, f"{name}.json")
        try:
            data = store.get(f"{name}.parquet")
        except ObjectNotFound:
            data = b""
        found = hashlib.sha256(data).hexdigest()
        if manifest is None or found != manifest["scores"]["sha256"]:
            expected = manifest["scores"]["sha256"][:12] if manifest else "of a manifest"
            raise damaged(f"{store.uri}/{name}.parquet", f"sha256 {expected}", found[:12])
        table = pa.parquet.read_table(io.BytesIO(data))
        scores |= {column: table[column].to_numpy() for column in manifest["columns"]}
    return scores


def score_reasons(judged: Judged) -> tuple[str, ...]:
    """Every reason that thresholds on scorers' columns can give, in the words of filters.reason_of."""
    return tuple(f"column_{word}_{column}" for column, _, _ in judged.columns for word in ("missing", "low", "high"))


def first_failed(scores: Mapping[str, NDArray[np.float32]], judged: Judged) -> NDArray[np.int64]:
    """The number in `score_reasons` of the first limit that a row does not meet, -1 where it meets all: int64 [n].

    `scores`: float32 [n] by column. A number that the scorer could not tell (nan) drops its row.
    """
    count = len(next(iter(scores.values()))) if scores else 0
    reasons = np.full(count, -1, np.int64)
    for place, (column, least, greatest) in enumerate(judged.columns):
        values = scores[column]
        missing = np.isnan(values)
        low = values < (-np.inf if least is None else least)
        high = values > (np.inf if greatest is None else greatest)
        for number, failed in enumerate((missing, low, high)):
            reasons[failed & (reasons < 0)] = 3 * place + number
    return reasons


def refuse_unscored(judged: Judged, scorers: Sequence[AddsColumns]) -> None:
    """Raise UsageError for a threshold on a column that no scorer adds, or a column that two add."""
    columns = [column for scorer in scorers for column in scorer.columns]
    for column, _, _ in judged.columns:
        if column not in columns:
            there = ", ".join(columns) or "none, for `scorers` is empty"
            raise UsageError(f"filters.scores.{column}", "a column of a scorer", "another", f"there are: {there}")
    for column in columns:
        if columns.count(column) > 1:
            raise UsageError("scorers", f"one scorer of the column {column}", "more", "leave one of them out")


def digests_in_force(judged: Judged, pools: Sequence[ScorerPool]) -> list[str]:
    """Of the scorers whose columns have thresholds, sorted: what the dataset's content depends on."""
    judging = {column for column, _, _ in judged.columns}
    return sorted(pool.digest for pool in pools if judging & set(pool.columns))


def _name(prefix: str, digest: str) -> str:
    return f"{prefix}scores-{digest[:16]}"


def _score(staged: StagedUnit, rows: int, scorer: Scorer) -> pa.Table:
    """The ids and the scorer's columns of all staged rows, a batch in memory at a time."""
    schema = pa.schema([("id", pa.uint64()), *((column, pa.float32()) for column in scorer.columns)])
    batches = []
    for start in range(0, rows, BATCH_ROWS):
        batch = staged.rows(FAMILIES["base"], start, min(start + BATCH_ROWS, rows))
        images64 = np.frombuffer(b"".join(row["image64"] for row in batch), np.uint8)
        scores = scorer(
            [bytes(row["caption"]).decode() for row in batch], images64.reshape(-1, BASE_SIDE, BASE_SIDE, 3)
        )
        ids = np.frombuffer(b"".join(row["id"] for row in batch), "<u8")
        columns = [np.asarray(scores[column], np.float32) for column in scorer.columns]
        batches.append(pa.RecordBatch.from_arrays([pa.array(values) for values in (ids, *columns)], schema=schema))
    return pa.Table.from_batches(batches, schema)
