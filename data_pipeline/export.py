"""Export: a dataset as webdataset tars, for tools that read those.

Always holds: the same dataset and rows per tar give the same bytes; a tar appears whole or not at all, so an export
that was stopped goes on with the tars that are missing; a folder takes one export only. Called by the command line.

    export.json         which dataset, how many rows in a tar; written first, it claims the folder
    00000.tar …         per row, in the dataset's order: <id>.jpg (256 px, as stored), <id>.txt, <id>.json
    manifest.json       rows, bytes and sha256 of every tar; written last
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

from data_pipeline import manifests
from data_pipeline.arrow_files import VERIFY_CHUNK_BYTES
from data_pipeline.build import Progress, unheard
from data_pipeline.errors import UsageError, UserError
from data_pipeline.executor import Executor
from data_pipeline.manifests import Document
from data_pipeline.shards import Dataset, open_dataset
from data_pipeline.storage import ObjectStore, canonical_json, open_store

FORMAT = "glidepath-export-1"
CLAIM, MANIFEST = "export.json", "manifest.json"


def export_webdataset(
    uri: str,
    out: str,
    shard_rows: int | None,
    executor: Executor,
    progress: Progress = unheard,
) -> dict[str, Any]:
    """Write the dataset that `uri` names to the folder `out`; {dataset_id, rows, shards, bytes, out}.

    `shard_rows`: rows in a tar; None: as many as in the dataset's shards. Raises UserError if the folder holds anything
    but this export, and as `open_dataset` does.
    """
    dataset, store = open_dataset(uri), open_store(out)
    per_tar = dataset.shard_rows[0] if shard_rows is None else shard_rows
    if per_tar < 1:
        raise UsageError("--shard-rows", "1 or more", str(per_tar), "correct it")
    store.check()
    numbers = range(-(-dataset.rows // per_tar))
    claim = {"format": FORMAT, "dataset_id": dataset.id, "shard_rows": per_tar}
    _claim(store, claim, {CLAIM, MANIFEST, *map(tar_name, numbers)})
    tars: list[Document] = []
    images = 0
    progress("export", 0, len(numbers))
    for tar in executor.map(partial(export_tar, dataset.uri, store, per_tar), numbers):
        tars.append(tar)
        images += tar["rows"]
        progress("export", len(tars), len(numbers), images)
    tars.sort(key=lambda tar: tar["name"])
    manifests.commit(store, MANIFEST, claim | {"rows": dataset.rows, "tars": tars})
    return {
        "dataset_id": dataset.id,
        "rows": dataset.rows,
        "shards": len(tars),
        "bytes": sum(tar["bytes"] for tar in tars),
        "out": store.uri,
    }


def _claim(store: ObjectStore, claim: Document, own_keys: set[str]) -> None:
    """Take the folder for this export. Raises UserError where it holds anything else: what reads a folder of tars, or
    opens a dataset by its manifest, would take the one for the other."""
    wanted = f"dataset {claim['dataset_id'][:12]} in tars of {claim['shard_rows']} rows"
    keys = {info.key for info in store.list()}
    if CLAIM in keys or not keys:
        store.put_if_absent(CLAIM, manifests.seal(claim))
        there = manifests.read(store, CLAIM) or {}
        found = f"dataset {str(there.get('dataset_id'))[:12]} in tars of {there.get('shard_rows')} rows"
        strangers = keys - own_keys if there.get("format") == FORMAT and found == wanted else {found}
    else:
        strangers = keys
    if strangers:
        expected = f"an empty folder, or one with {wanted}"
        raise UserError(f"export {store.uri}", expected, min(strangers), "choose another --out")


def tar_name(number: int) -> str:
    return f"{number:05d}.tar"


def export_tar(uri: str, store: ObjectStore, per_tar: int, number: int) -> Document:
    """Write tar `number`, unless it is there; {name, rows, bytes, sha256}. Raises ShardDamaged."""
    dataset = _opened(uri)
    name, digest, size = tar_name(number), hashlib.sha256(), 0
    begin, end = number * per_tar, min((number + 1) * per_tar, dataset.rows)
    # What is there is whole, for an object appears at once; and the folder is this export's alone.
    there = store.exists(name)

    def noted(chunks: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal size
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            yield chunk

    if there:
        for _ in noted(_stored(store, name)):
            pass
    else:
        store.put(name, noted(_tar(dataset, begin, end)))
    return {"name": name, "rows": end - begin, "bytes": size, "sha256": digest.hexdigest()}


@lru_cache(maxsize=2)
def _opened(uri: str) -> Dataset:
    return open_dataset(uri)


def _stored(store: ObjectStore, key: str) -> Iterator[bytes]:
    position = 0
    while piece := store.get_range(key, position, VERIFY_CHUNK_BYTES):
        position += len(piece)
        yield piece


def _tar(dataset: Dataset, begin: int, end: int) -> Iterator[bytes]:
    """The bytes of a tar of the rows [begin, end), piece by piece."""
    import webdataset

    sink = _Sink()
    # Everything that could differ between two runs is fixed: times, owners, mode and the order of a row's files.
    with webdataset.TarWriter(sink, user="", group="", mtime=0.0, encoder=False, format="USTAR_FORMAT") as tar:
        for row in _rows(dataset, begin, end):
            tar.write(row)
            yield from sink.drain()
    yield from sink.drain()


class _Sink(io.RawIOBase):
    """Hands on what the tar writer writes, which it does in blocks."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, data: Any) -> int:
        self.pieces.append(bytes(data))
        return len(data)

    def drain(self) -> list[bytes]:
        pieces, self.pieces = self.pieces, []
        return pieces


def _rows(dataset: Dataset, begin: int, end: int) -> Iterator[dict[str, Any]]:
    """The samples of the rows [begin, end) of the dataset's order. The key is the id as 16 hexadecimal digits: JSON has
    no integers of 64 bits that every reader keeps."""
    first = 0
    for shard, shard_rows in enumerate(dataset.shard_rows):
        start = first
        first += shard_rows
        if first <= begin or start >= end:
            continue
        base, upsampler = (dataset.shard(family, shard) for family in ("base", "upsampler"))
        for number in range(len(base)):
            low = max(begin - start - number * base.batch_rows, 0)
            high = min(end - start - number * base.batch_rows, base.description.batches[number].rows)
            if low < high:
                yield from _samples(base.batch(number), upsampler.batch(number), range(low, high))


def _samples(base: Any, upsampler: Any, rows: range) -> Iterator[dict[str, Any]]:
    captions, ids, n_tokens, pictures = (
        batch.column(name)
        for batch, name in ((base, "caption"), (base, "id"), (base, "n_tokens"), (upsampler, "image256"))
    )
    for row in rows:
        key = f"{ids[row].as_py():016x}"
        yield {
            "__key__": key,
            "jpg": pictures[row].as_py(),
            "txt": captions[row].as_py().encode(),
            "json": canonical_json({"id": key, "n_tokens": n_tokens[row].as_py()}),
        }
