"""Judge rows: what the judge pass knows of a record, in a fixed number of bytes, and how it is read from verdicts.

Always holds: a row depends on the record alone; digests are cut to 128 bits, of which two in 1e9 agree by chance once
in 1e20. Called by the judge pass.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from data_pipeline import decontaminate
from data_pipeline.arrow_files import damaged
from data_pipeline.draws import key64, mix64
from data_pipeline.filters import Judged
from data_pipeline.scorers import score_reasons
from data_pipeline.spills import Piece, Rows, section_of
from data_pipeline.storage import ObjectNotFound, ObjectStore

ROW = np.dtype(
    [
        ("id", "<u8"),
        ("picture", "<u8"),
        ("rank", "<u8"),  # of equal pictures the one with the lowest stays, then the one with the lowest id
        ("unit", "<u4"),  # its number among the units
        ("row", "<u4"),  # among the unit's staged rows
        ("hash", "<u8"),  # perceptual; 0: the picture is too plain to have one
        ("caption", "<u8", 2),  # digest of the normalised caption in lower case
        ("source", "<u8", 2),  # digest of the picture's source bytes
        ("pixels", "<u8", 2),  # digest of its stored pixels
    ]
)
KEPT = np.dtype([("id", "<u8"), ("unit", "<u4"), ("row", "<u4")])
DROPPED = np.dtype(
    [
        ("id", "<u8"),
        ("picture", "<u8"),
        ("unit", "<u4"),
        ("reason", "<u2"),  # its number in JudgeSettings.reasons
        ("distance", "i1"),  # bits by which the perceptual hashes differ; -1: they were not compared
        ("lost_to", "<u8"),  # `picture` of the one that stays; 0: none
    ]
)
REASONS = (*decontaminate.REASONS, "caption_frequent", "duplicate", "near_duplicate")

VERDICT_COLUMNS = (
    *("id", "picture", "caption", "width", "height", "file_bytes"),
    *("image_digest", "pixels_digest", "perceptual_hash", "row"),
)


@dataclass(frozen=True)
class JudgeSettings:
    """All that the judge's result depends on beside the scored records."""

    seed: int = 0
    exact: Literal["pair", "picture", "none"] = "pair"
    near: int | None = None  # most bits that may differ
    judged: Judged = field(default_factory=Judged)
    scorers: tuple[str, ...] = ()  # digests of those whose columns have thresholds
    evaluation: decontaminate.Rules | None = None

    def steps(self) -> tuple[str, ...]:
        """The shuffles in force."""
        chosen = {
            "caption": self.judged.max_caption_repeats is not None,
            "source": self.exact != "none",
            "pixels": self.exact != "none",
            "hash": self.near is not None,
        }
        return (*(name for name, wanted in chosen.items() if wanted), "order")

    def reasons(self) -> tuple[str, ...]:
        """Why rows are dropped; the numbers in DROPPED count along these."""
        return (*REASONS, *score_reasons(self.judged))


@dataclass(frozen=True)
class Verdicts:
    """A part of a committed unit's verdicts: the unit's number and folder, where the part lies, its rows and sha256."""

    unit: int
    prefix: str
    key: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class Task:
    """One task of a step: its number, and the pieces that it reads; for some steps two kinds of them."""

    step: str
    number: int
    pieces: Sequence[Piece] = ()
    more: Sequence[Piece] = ()
    verdicts: Sequence[Verdicts] = ()

    @property
    def name(self) -> str:
        return f"judge {self.step} {self.number}"


@dataclass(frozen=True)
class Work:
    """What all tasks of one judging share."""

    store: ObjectStore
    folder: str  # scratch
    settings: JudgeSettings
    sections: int
    evaluation_sha256: str = ""  # of the evaluation sets in the scratch folder

    def remove(self) -> None:
        """The scratch folder."""
        for info in list(self.store.list(f"{self.folder}/")):
            self.store.delete(info.key)

    @property
    def evaluation_key(self) -> str:
        return f"{self.folder}/evaluation.npz"

    def evaluation(self) -> decontaminate.Evaluation | None:
        """The evaluation sets, if there are any. Raises ShardDamaged."""
        if self.settings.evaluation is None:
            return None
        data = read_checked(self.store, self.evaluation_key, self.evaluation_sha256)
        return decontaminate.Evaluation.from_bytes(self.settings.evaluation, data)

    def sections_of(self, step: str, rows: Rows) -> NDArray[np.int64]:
        """To which task of `step` each row [n] goes."""
        if step == "order":
            key = self.order_key(rows)
        elif step == "hash":
            # Pictures without a hash are never compared: their ids spread them over the tasks.
            key = mix64(np.where(rows["hash"] == 0, rows["id"], rows["hash"]))
        else:
            key = rows[step][:, 0]
        return section_of(key, self.sections)

    def order_key(self, rows: Rows) -> NDArray[np.uint64]:
        """[n] by which the dataset is sorted: mix64 is a bijection, so different ids never tie."""
        return mix64(rows["id"] ^ np.uint64(key64("row order", self.settings.seed)))


def read_verdicts(store: ObjectStore, part: Verdicts, columns: Sequence[str] = VERDICT_COLUMNS) -> pa.Table:
    """Some columns, `row` among them, of the verdicts on staged rows. Raises ShardDamaged."""
    data = read_checked(store, part.key, part.sha256)
    table = pa.parquet.read_table(io.BytesIO(data), columns=list(columns))
    return table.filter(pa.compute.is_valid(table["row"]))


def read_checked(store: ObjectStore, key: str, sha256: str) -> bytes:
    """The whole object. Raises ShardDamaged unless it has this digest."""
    try:
        data = store.get(key)
    except ObjectNotFound:
        raise damaged(f"{store.uri}/{key}", f"sha256 {sha256[:12]}", "nothing") from None
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise damaged(f"{store.uri}/{key}", f"sha256 {sha256[:12]}", found[:12])
    return data


def rows_of(verdicts: pa.Table, unit: int) -> Rows:
    """ROW [n] of the verdicts [n] of one unit."""
    rows = np.zeros(len(verdicts), ROW)
    for name, column in (("id", "id"), ("picture", "picture"), ("row", "row"), ("hash", "perceptual_hash")):
        rows[name] = verdicts[column].to_numpy()
    rows["unit"] = unit
    width, height, file_bytes = (verdicts[name].to_numpy() for name in ("width", "height", "file_bytes"))
    rows["rank"] = rank_of(np.minimum(width, height), file_bytes)
    rows["caption"] = caption_digests(verdicts["caption"])
    rows["source"], rows["pixels"] = (digests(verdicts[name]) for name in ("image_digest", "pixels_digest"))
    return rows


def rank_of(shorter_side: NDArray[np.int64], file_bytes: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The order in which pictures are taken, lowest first: larger shorter side, then larger file. All [n].

    The stored square has the shorter side, so that is what a copy that was made smaller has lost; at equal size the
    larger file was compressed less.
    """
    most = np.int64(2**32 - 1)
    side, size = (most - np.minimum(values, most) for values in (shorter_side, file_bytes))
    return side.astype(np.uint64) << np.uint64(32) | size.astype(np.uint64)


def digests(column: Any) -> NDArray[np.uint64]:
    """The first 128 bits [n, 2] of a column of binary(32)."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    data = np.frombuffer(array.buffers()[1], np.uint8) if len(array) else np.empty(0, np.uint8)
    words = data[array.offset * 32 : (array.offset + len(array)) * 32].view("<u8").reshape(-1, 4)
    return words[:, :2]


def caption_digests(captions: Any) -> NDArray[np.uint64]:
    """128 bits [n, 2] of each caption in lower case, which is all that the tokenizer sees of it."""
    lower = pa.compute.utf8_lower(captions).cast(pa.binary()).to_pylist()
    data = b"".join(hashlib.blake2b(caption, digest_size=16).digest() for caption in lower)
    return np.frombuffer(data, "<u8").reshape(-1, 2)


def with_caption(words: NDArray[np.uint64], captions: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Digests [n, 2] of (picture, caption) from those of both."""
    mixed: NDArray[np.uint64] = mix64(words) ^ captions
    return mixed


def drop(rows: Rows, reason: Any, lost_to: Any = 0, distance: Any = -1) -> Rows:
    """DROPPED [n] of ROW [n]. `reason`: one of REASONS, or numbers in JudgeSettings.reasons [n]."""
    dropped = np.zeros(len(rows), DROPPED)
    for name in ("id", "picture", "unit"):
        dropped[name] = rows[name]
    dropped["reason"] = REASONS.index(reason) if isinstance(reason, str) else reason
    dropped["lost_to"], dropped["distance"] = lost_to, distance
    return dropped
