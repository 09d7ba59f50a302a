"""Looking at a run's checkpoints: list them, and verify every byte. Called by `glidepath checkpoints`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.storage import ObjectStore, open_store
from trainer.checkpoint.attempts import run_of
from trainer.checkpoint.manifest import (
    CheckpointName,
    OtherFormat,
    committed,
    missing_or_cut,
    names_in,
    part_key,
    part_sizes,
    read_manifest,
    stored_bytes,
)
from trainer.checkpoint.parts import CheckpointDamaged, PartInfo, PartReader, digest_of_part
from trainer.checkpoint.retention import protected


def list_checkpoints(store_uri: str) -> list[dict[str, Any]]:
    """Every committed checkpoint, newest first. `verified`: its manifest is whole and its parts have their sizes;
    reading every byte is `verify_checkpoints`. `protected`: retention never removes it."""
    store = open_store(store_uri)
    sizes, marked, run = part_sizes(store), protected(store), run_of(store)
    return [_row(store, name, sizes, run) | {"protected": name in marked} for name in names_in(sizes)]


def _row(store: ObjectStore, name: CheckpointName, sizes: Mapping[str, int], run: str | None) -> dict[str, Any]:
    uri = name.uri(store)
    try:
        manifest = read_manifest(store, name.manifest_key, run)
    except (CheckpointDamaged, OtherFormat):
        unknown = dict.fromkeys(("bytes", "world_size", "zero_stage", "committed_at"))
        return {"uri": uri, "images": name.position, **unknown, "verified": False}
    return {
        "uri": uri,
        "images": manifest.position,
        "bytes": stored_bytes(manifest),
        "world_size": manifest.world_size,
        "zero_stage": manifest.zero_stage,
        "committed_at": manifest.committed_at,
        "verified": not missing_or_cut(name, manifest.parts, sizes),
    }


def verify_checkpoints(store_uri: str) -> list[dict[str, str]]:
    """[{"part", "expected", "found"}] of every manifest and part that is not as committed, in all checkpoints."""
    store = open_store(store_uri)
    run = run_of(store)
    return [
        {"part": f"{name}/{damage.part}", "expected": damage.expected, "found": damage.found}
        for name in committed(store)
        for damage in _damages(store, name, run)
    ]


def _damages(store: ObjectStore, name: CheckpointName, run: str | None) -> Iterator[CheckpointDamaged]:
    try:
        manifest = read_manifest(store, name.manifest_key, run)
    except CheckpointDamaged as damage:
        yield damage
        return
    except OtherFormat as other:
        yield CheckpointDamaged("manifest.json", other.expected, other.found)
        return
    for part in manifest.parts:
        try:
            _verify_part(PartReader(store, part_key(name, part), part), part)
        except CheckpointDamaged as damage:
            yield damage


def _verify_part(reader: PartReader, part: PartInfo) -> None:
    found = digest_of_part(reader.blocks(), like=part.digest)
    if found != part.digest:
        raise CheckpointDamaged(part.file, part.digest, found)
