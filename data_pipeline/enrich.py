"""Enrich: add a family of columns to a finished dataset, shard by shard.

Always holds: an added family has the dataset's rows in the dataset's order under its ids, and the dataset keeps its id;
a committed shard is not made again; the family's manifest, stored last, makes it visible; columns that were made from
something else are never mixed with it. Called by the command line. To add a family, add its schema to ADDED_FAMILIES
and what computes it to ENRICHMENTS.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from data_pipeline.build import Progress, unheard
from data_pipeline.clip_tokenizer import BPE_SHA256, CLIP_CONTEXT_TOKENS, MERGES, WORDS, clip_tokens
from data_pipeline.errors import UsageError, UserError
from data_pipeline.executor import Executor
from data_pipeline.families import ADDED_FAMILIES, Family
from data_pipeline.manifests import Document
from data_pipeline.shards import (
    Dataset,
    ShardReader,
    commit_family,
    open_dataset,
    output_of,
    read_shard_manifest,
    write_shard,
)
from data_pipeline.storage import ObjectStore

NO_LABEL = -1


class Enrichment(Protocol):
    """What computes a family. Picklable: it goes to the workers."""

    @property
    def family(self) -> Family: ...

    def columns(self, rows: pa.RecordBatch) -> list[pa.Array]:
        """The family's columns after the id, for rows of the family `base`."""


@dataclass(frozen=True)
class ClipTokens:
    """The tokens of the noised CLIP, from the captions."""

    family: Family

    def columns(self, rows: pa.RecordBatch) -> list[pa.Array]:
        tokens, n_tokens = clip_tokens(rows.column("caption").to_pylist())
        flat = pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), type=self.family.schema.field(1).type)
        return [flat, pa.array(n_tokens.astype(np.uint16))]


@dataclass(frozen=True)
class Labels:
    """Labels of a table, by id; rows that it does not name get NO_LABEL."""

    path: str
    digest: str
    family: Family

    def columns(self, rows: pa.RecordBatch) -> list[pa.Array]:
        ids, labels = read_labels(self.path)
        if _digest_of(ids, labels) != self.digest:
            raise UserError(f"labels {self.path}", "the content it had before", "another", "run it again")
        wanted = rows.column("id").to_numpy()
        places = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
        return [pa.array(np.where(ids[places] == wanted, labels[places], np.int32(NO_LABEL)))]


def make_labels(path: str | None) -> Labels:
    if path is None:
        raise UsageError("enrich labels", "--labels with a csv or parquet of id and label", "none", "name the file")
    digest = _digest_of(*read_labels(str(Path(path).absolute())))
    return Labels(str(Path(path).absolute()), digest, replace(ADDED_FAMILIES["labels"], made_from=[digest]))


def make_clip_tokens(path: str | None) -> ClipTokens:
    if path is not None:
        raise UsageError("enrich tokens_clip", "no --labels", repr(path), "leave it out")
    # Captions are repaired by ftfy first, and another version of it may repair otherwise.
    made_from = [BPE_SHA256, MERGES, WORDS, CLIP_CONTEXT_TOKENS, importlib.metadata.version("ftfy")]
    return ClipTokens(replace(ADDED_FAMILIES["tokens_clip"], made_from=made_from))


ENRICHMENTS: dict[str, Callable[[str | None], Enrichment]] = {"tokens_clip": make_clip_tokens, "labels": make_labels}


def enrich(
    uri: str,
    family: str,
    labels: str | None,
    executor: Executor,
    progress: Progress = unheard,
) -> dict[str, Any]:
    """Add `family` to the dataset that `uri` names; {dataset_id, family, rows, shards, bytes, …}.

    `labels`: for the family `labels`, the path of its table. Raises UsageError for an unknown family, UserError where
    the family is there already but was made from something else, and as `open_dataset` does.
    """
    if family not in ENRICHMENTS:
        raise UsageError("enrich", f"one of {', '.join(sorted(ENRICHMENTS))}", repr(family), "choose one of them")
    enrichment = ENRICHMENTS[family](labels)
    dataset = open_dataset(uri)
    root = output_of(dataset)
    if family in dataset.families():
        _refuse_other(dataset.id, enrichment.family, dataset.family_manifest(family)["producer"])
    if isinstance(enrichment, Labels):
        _refuse_strangers(dataset, enrichment)
    shards: list[Document] = []
    images = 0
    progress("enrich", 0, len(dataset.shard_rows))
    for shard in executor.map(partial(enrich_shard, root, dataset.id, enrichment), range(len(dataset.shard_rows))):
        shards.append(shard)
        images += shard["file"]["rows"]
        progress("enrich", len(shards), len(dataset.shard_rows), images)
    committed = commit_family(root, dataset.id, enrichment.family, shards)
    return {
        "dataset_id": dataset.id,
        "family": family,
        "producer": committed["producer"],
        "rows": dataset.rows,
        "shards": len(shards),
        "bytes": sum(shard["bytes"] for shard in committed["shards"]),
        "uri": f"{root.uri}/datasets/{dataset.id}",
    }


def enrich_shard(root: ObjectStore, dataset_id: str, enrichment: Enrichment, index: int) -> Document:
    """Make and commit one shard of the family; its manifest. Raises UserError as `enrich` does."""
    committed = read_shard_manifest(root, dataset_id, enrichment.family, index)
    if committed is not None:
        _refuse_other(dataset_id, enrichment.family, committed["producer"])
        return committed
    base = _opened(f"{root.uri}/datasets/{dataset_id}").shard("base", index)
    return write_shard(root, dataset_id, enrichment.family, index, _batches(base, enrichment))


@lru_cache(maxsize=2)
def _opened(uri: str) -> Dataset:
    return open_dataset(uri)


def _batches(base: ShardReader, enrichment: Enrichment) -> Iterator[pa.RecordBatch]:
    for number in range(len(base)):
        rows = base.batch(number)
        columns = [rows.column("id"), *enrichment.columns(rows)]
        yield pa.RecordBatch.from_arrays(columns, schema=enrichment.family.schema)


def _refuse_other(dataset_id: str, family: Family, producer: str) -> None:
    if producer != family.producer:
        raise UserError(
            f"dataset {dataset_id[:12]} family {family.name}",
            f"made by producer {family.producer[:12]}",
            producer[:12],
            f"it was made from something else; to make it anew, delete datasets/{dataset_id}/{family.name} first",
        )


def _refuse_strangers(dataset: Dataset, labels: Labels) -> None:
    """A table of another dataset's ids would label nothing, and nobody would notice before training."""
    ids, _ = read_labels(labels.path)
    for index in range(len(dataset.shard_rows)):
        base = dataset.shard("base", index)
        for number in range(len(base)):  # as a rule the first batch settles it
            if np.isin(base.batch(number).column("id").to_numpy(), ids).any():
                return
    raise UserError(f"labels {labels.path}", "ids of this dataset", "none of them", "name the table that belongs to it")


@lru_cache(maxsize=1)
def read_labels(path: str) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """(ids uint64 [n] sorted, labels int32 [n]) of a csv with a header or a parquet; 12 bytes a row in memory.

    Ids are decimal numbers, as a dataset's column `id` gives them. Raises UserError for a file that is not such a
    table, and for an id that comes twice with different labels.
    """
    name = f"labels {path}"
    try:
        table = _read_table(path)
        ids, labels = (table.column(field.name).cast(field.type) for field in ADDED_FAMILIES["labels"].schema)
    except KeyError:
        found = ", ".join(table.column_names)
        raise UserError(name, "columns id and label", found, "rename them in the table") from None
    except (pa.ArrowException, OSError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(
            name, "a .csv or .parquet of id (uint64) and label (int32)", what, "correct the table"
        ) from None
    if ids.null_count or labels.null_count or not len(ids):
        found = "an empty table" if not len(ids) else f"{ids.null_count + labels.null_count} empty cells"
        raise UserError(name, "an id and a label in each row", found, "correct the table")
    pairs = np.empty(len(ids), [("id", np.uint64), ("label", np.int32)])
    pairs["id"], pairs["label"] = ids.to_numpy(), labels.to_numpy()
    pairs = np.unique(pairs)
    twice = np.flatnonzero(pairs["id"][1:] == pairs["id"][:-1])
    if len(twice):
        first, second = pairs[twice[0]], pairs[twice[0] + 1]
        found = f"{first['label']} and {second['label']} for {first['id']}"
        raise UserError(name, "one label for an id", found, "correct the table")
    return np.ascontiguousarray(pairs["id"]), np.ascontiguousarray(pairs["label"])


def _read_table(path: str) -> pa.Table:
    if path.endswith(".parquet"):
        return pyarrow.parquet.read_table(path)
    # As text would do too, but an id above 2**63 must not become a float on the way.
    types = {field.name: field.type for field in ADDED_FAMILIES["labels"].schema}
    return pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(column_types=types))


def _digest_of(ids: NDArray[np.uint64], labels: NDArray[np.int32]) -> str:
    """Of the content: a csv and a parquet of the same labels make the same family."""
    return hashlib.sha256(ids.astype("<u8").tobytes() + labels.astype("<i4").tobytes()).hexdigest()
