"""Shards: a committed dataset in a store, written once, read by memory map, verified byte by byte.

Always holds: what is committed is complete. Shard data is stored before the shard's manifest, all shards before their
family's manifest, all families before the dataset's; a reader starts at the dataset manifest, so it never sees half a
dataset. Data without a manifest is ignored and may be swept. Called by the corpus builder, the loader and the commands.

    datasets/<dataset id>/manifest.json              identity, rows, families, configuration, funnel
    datasets/<dataset id>/<family>/manifest.json     producer, schema, every shard's rows, bytes and blake3
    datasets/<dataset id>/<family>/shard-00000.arrow and .json     rows; where each batch lies, with its crc32
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

from data_pipeline import manifests
from data_pipeline.arrow_files import (
    ArrowFile,
    ShardDamaged,
    damaged,
    digest_of_object,
    write_arrow,
)
from data_pipeline.errors import UserError
from data_pipeline.families import KNOWN_FAMILIES, Family
from data_pipeline.manifests import Document
from data_pipeline.open_shards import OPEN_SHARDS, OpenShards
from data_pipeline.order import SampleOrder
from data_pipeline.shard_reader import ShardReader
from data_pipeline.shard_table import ShardTable, shard_name
from data_pipeline.storage import ObjectStore, open_store
from data_pipeline.tokenizer import TOKENIZER_SHA256

__all__ = ["Bad", "Dataset", "ShardDamaged", "ShardReader", "open_dataset", "verify_dataset"]

FORMAT = "glidepath-dataset-2"


@dataclass(frozen=True)
class Bad:
    """One part of a dataset that is not as committed."""

    part: str
    expected: str
    found: str


class Dataset:
    """A committed dataset, opened by `open_dataset`. `shard_rows`: rows of each shard, the same in every family."""

    def __init__(self, store: ObjectStore, prefix: str, manifest: Document) -> None:
        self.store, self.prefix = store, prefix
        self.id: str = manifest["id"]
        self.rows: int = manifest["rows"]
        different = {rows: rows for rows in manifest["shard_rows"]}  # JSON makes an object of each
        self.shard_rows: tuple[int, ...] = tuple(map(different.__getitem__, manifest["shard_rows"]))
        self.manifest = manifest | {"shard_rows": self.shard_rows}
        self._families: dict[str, Document] = {}
        self.cached = True  # False: of a distant store, shards that are opened from now on are read batch by batch
        self.shard = OpenShards(self._open_shard)
        # Of shards fetched ahead too, so that opening one that lies in the cache asks the store nothing.
        self._described = lru_cache(maxsize=4 * OPEN_SHARDS)(self.shard_file)

    @property
    def uri(self) -> str:
        """What opens it again."""
        return f"{self.store.uri}/{self.prefix}".rstrip("/")

    def order(self, seed: int, batch: int) -> SampleOrder:
        """The sequence of this dataset's samples. Raises UserError if it cannot fill one global batch."""
        return SampleOrder(self.id, self.shard_rows, seed, batch)

    def families(self) -> tuple[str, ...]:
        """Names of the committed families, those that were added to the finished dataset included."""
        depth = self.prefix.count("/") + 2
        keys = [info.key.split("/") for info in self.store.list(self.prefix)]
        return tuple(sorted(key[-2] for key in keys if key[-1] == "manifest.json" and len(key) == depth))

    def _open_shard(self, family: str, index: int) -> ShardReader:
        """Shard `index` of a family. Raises UserError for a family that is not there, ShardDamaged."""
        description = self._described(family, index)
        key = f"{self.prefix}{family}/{shard_name(index)}.arrow"
        return ShardReader(self.store, key, KNOWN_FAMILIES[family].schema, description, cached=self.cached)

    def shard_label(self, index: int) -> tuple[str, str]:
        """(dataset id, name of the shard) by which people know shard `index`."""
        return self.id, shard_name(index)

    @property
    def distant(self) -> bool:
        """Whether shards are read through this machine's cache."""
        return self.store.local_path(f"{self.prefix}manifest.json") is None

    def shard_bytes(self, family: str, index: int) -> int:
        """Size of a shard's file. Raises UserError for a family that is not there."""
        return int(self.family_manifest(family)["shards"][index]["bytes"])

    def fetch(self, family: str, index: int) -> str | None:
        """Bring a shard of a distant store into the cache; its name there, None if it cannot be there.

        Raises as `shard` does, and OSError.
        """
        reader = self._open_shard(family, index)  # not kept: the readers that are kept are those in use
        return reader.cache_name() if reader.in_cache else None

    def shard_file(self, family: str, index: int) -> ArrowFile:
        """What the shard's manifest says of its file. Raises as `shard` does."""
        entry = self.family_manifest(family)["shards"][index]
        key = f"{self.prefix}{family}/{entry['name']}"
        document = manifests.read(self.store, f"{key}.json")
        description = ArrowFile.from_json(document["file"]) if document else None
        if description is None or description.blake3 != entry["blake3"]:
            found = f"blake3 {description.blake3}" if description else "no manifest"
            raise damaged(f"{self.store.uri}/{key}.json", f"blake3 {entry['blake3']}", found)
        return description

    def family_manifest(self, family: str) -> Document:
        """Raises UserError if the family is absent or unknown, or was replaced after the dataset was committed."""
        if family not in self._families:
            name = f"dataset {self.id[:12]} family {family}"
            document = manifests.read(self.store, f"{self.prefix}{family}/manifest.json")
            if document is None or family not in KNOWN_FAMILIES:
                raise UserError(name, f"one of {', '.join(self.families())}", "no such family", "choose one of them")
            if document["dataset_id"] != self.id:
                raise UserError(name, "one of this dataset", f"one of {document['dataset_id'][:12]}", "enrich it again")
            committed = self.manifest["families"].get(family, document["sha256"])
            if document["sha256"] != committed:
                raise UserError(
                    name, f"manifest {committed[:12]}", document["sha256"][:12], "restore it, or build again"
                )
            self._families[family] = document | {"shards": ShardTable(document["shards"])}
        return self._families[family]


def open_dataset(uri: str) -> Dataset:
    """The dataset that a URI names: `<output>/datasets/<id>`, or an output folder that holds exactly one.

    Raises UserError if there is none or there are several, if its manifest is damaged, or if its tokens come from
    another tokenizer than this one.
    """
    return open_from(open_store(uri))


def open_from(store: ObjectStore) -> Dataset:
    """`open_dataset` of a store."""
    prefix = "" if store.exists("manifest.json") else _only_dataset(store)
    manifest = manifests.read(store, f"{prefix}manifest.json")
    name = f"dataset {store.uri}/{prefix}".rstrip("/")
    if manifest is None or manifest.get("format") != FORMAT:
        found = str(manifest.get("format")) if manifest else "no manifest"
        raise UserError(name, f"a manifest of format {FORMAT}", found, "check the path, or build again")
    identity = manifest["identity"]
    if manifest["id"] != manifests.digest_of(identity):
        raise UserError(
            name, f"id {manifests.digest_of(identity)[:12]}", manifest["id"][:12], "restore it, or build again"
        )
    if identity["tokenizer"] != TOKENIZER_SHA256:
        expected, found = f"tokenizer {TOKENIZER_SHA256[:12]}", identity["tokenizer"][:12]
        raise UserError(name, expected, found, "build the dataset again with this version")
    return Dataset(store, prefix, manifest)


def output_of(dataset: Dataset) -> ObjectStore:
    """The store of the output folder in which a dataset lies. Raises UserError if it does not lie in one."""
    if dataset.prefix:
        return dataset.store
    folder = f"/datasets/{dataset.id}"
    if not dataset.store.uri.endswith(folder):
        raise UserError(f"dataset {dataset.store.uri}", f"a folder named …{folder}", "another name", "move it there")
    return open_store(dataset.store.uri.removesuffix(folder))


def dataset_ids(store: ObjectStore) -> list[str]:
    """Ids of the datasets committed in an output folder, sorted."""
    keys = [info.key.split("/") for info in store.list("datasets/")]
    return [key[1] for key in keys if len(key) == 3 and key[2] == "manifest.json"]


def _only_dataset(store: ObjectStore) -> str:
    ids = dataset_ids(store)
    if len(ids) != 1:
        found = f"{len(ids)}: {', '.join(ids)}" if ids else "none"
        next_step = "name one as <folder>/datasets/<id>" if ids else "build it with: glidepath corpus build"
        raise UserError(f"dataset {store.uri}", "one committed dataset", found, next_step)
    return f"datasets/{ids[0]}/"


def write_shard(
    store: ObjectStore, dataset_id: str, family: Family, index: int, batches: Iterable[pa.RecordBatch]
) -> Document:
    """Store and commit one shard; its manifest. Writing a shard again gives the same bytes."""
    key = f"datasets/{dataset_id}/{family.name}/{shard_name(index)}"
    file = write_arrow(store, f"{key}.arrow", family.schema, batches)
    document = {
        "format": FORMAT,
        "dataset_id": dataset_id,
        "family": family.name,
        "shard": index,
        "schema": family.fingerprint,
        "producer": family.producer,
        "tokenizer": TOKENIZER_SHA256,
        "file": file.to_json(),
    }
    return manifests.commit(store, f"{key}.json", document)


def read_shard_manifest(store: ObjectStore, dataset_id: str, family: Family, index: int) -> Document | None:
    """The manifest of a shard that is committed already, or None; also None when its data is gone, to be rewritten."""
    key = f"datasets/{dataset_id}/{family.name}/{shard_name(index)}"
    return manifests.read(store, f"{key}.json") if store.exists(f"{key}.arrow") else None


def commit_family(store: ObjectStore, dataset_id: str, family: Family, shards: list[Document]) -> Document:
    """The family's manifest, from the manifests of all its shards."""
    entries = [
        {"name": shard_name(shard["shard"])} | {key: shard["file"][key] for key in ("rows", "bytes", "blake3")}
        for shard in sorted(shards, key=lambda shard: shard["shard"])
    ]
    document = {
        "format": FORMAT,
        "dataset_id": dataset_id,
        "family": family.name,
        "schema": family.fingerprint,
        "producer": family.producer,
        "shards": entries,
    }
    return manifests.commit(store, f"datasets/{dataset_id}/{family.name}/manifest.json", document)


def commit_dataset(store: ObjectStore, identity: Document, families: list[Document], facts: dict[str, Any]) -> Document:
    """The dataset's manifest, which makes it visible. `facts` may differ between builds of one identity; first wins."""
    document = facts | {
        "format": FORMAT,
        "id": manifests.digest_of(identity),
        "identity": identity,
        "rows": identity["rows"],
        "shard_rows": [shard["rows"] for shard in families[0]["shards"]],
        "bytes": sum(shard["bytes"] for family in families for shard in family["shards"]),
        "families": {family["family"]: family["sha256"] for family in families},
    }
    return manifests.commit(store, f"datasets/{document['id']}/manifest.json", document, same="id")


def verify_dataset(dataset: Dataset | str) -> list[Bad]:
    """Every part, of an opened dataset or of the one that a URI names, that is not as it was committed.

    Reads every byte, and the table of rows that were judged out where it lies beside the dataset. An empty list means
    that all of them are those that the builder wrote.
    """
    try:
        opened = open_dataset(dataset) if isinstance(dataset, str) else dataset
        manifests.read(opened.store, f"{opened.prefix}manifest.json")
    except UserError as error:
        return [Bad(error.name, error.expected, error.found)]
    families = sorted({*opened.families(), *opened.manifest["families"]})
    return [bad for family in families for bad in _bad_in(opened, family)] + list(_bad_dropped(opened))


def _bad_in(dataset: Dataset, family: str) -> Iterator[Bad]:
    try:
        entries = Dataset(dataset.store, dataset.prefix, dataset.manifest).family_manifest(family)["shards"]
    except UserError as error:
        yield Bad(error.name, error.expected, error.found)
        return
    if (found_rows := [entry["rows"] for entry in entries]) != list(dataset.shard_rows):
        yield Bad(f"{dataset.store.uri}/{dataset.prefix}{family}", f"rows {list(dataset.shard_rows)}", str(found_rows))
    for index, entry in enumerate(entries):
        key = f"{dataset.prefix}{family}/{entry['name']}.arrow"
        found = digest_of_object(dataset.store, key)
        if found != entry["blake3"]:
            yield Bad(f"{dataset.store.uri}/{key}", f"blake3 {entry['blake3']}", found or "nothing")
        try:
            dataset.shard_file(family, index)
        except UserError as error:
            yield Bad(error.name, error.expected, error.found)


def _bad_dropped(dataset: Dataset) -> Iterator[Bad]:
    """The table of rows that were judged out. A dataset that was copied alone is whole without it."""
    about = dataset.manifest.get("dropped_rows")
    if about is None:
        return
    try:
        store = output_of(dataset)
    except UserError:
        return
    found = digest_of_object(store, about["key"], hashlib.sha256)
    if found is not None and found != about["sha256"]:
        yield Bad(f"{store.uri}/{about['key']}", f"sha256 {about['sha256']}", found)
