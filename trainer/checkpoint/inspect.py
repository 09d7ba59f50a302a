"""Looking at a run's checkpoints: list them, and verify every byte. Called by `glidepath checkpoints`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from data_pipeline.storage import ObjectStore, open_store
from trainer.checkpoint.manifest import (
    CheckpointName,
    committed,
    missing_or_cut,
    read_manifest,
    stored_bytes,
)
from trainer.checkpoint.parts import CheckpointDamaged, PartInfo, PartReader


def list_checkpoints(store_uri: str) -> list[dict[str, Any]]:
    """Every committed checkpoint, newest first. `verified`: its manifest is whole and its parts have their sizes;
    reading every byte is `verify_checkpoints`."""
    store = open_store(store_uri)
    return [_row(store, name) for name in committed(store)]


def _row(store: ObjectStore, name: CheckpointName) -> dict[str, Any]:
    uri = f"{store.uri}/{name.folder.rstrip('/')}"
    try:
        manifest = read_manifest(store, name.manifest_key)
    except CheckpointDamaged:
        unknown = dict.fromkeys(("bytes", "world_size", "zero_stage", "committed_at"))
        return {"uri": uri, "images": name.position, **unknown, "verified": False}
    return {
        "uri": uri,
        "images": manifest.position,
        "bytes": stored_bytes(manifest),
        "world_size": manifest.world_size,
        "zero_stage": manifest.zero_stage,
        "committed_at": manifest.committed_at,
        "verified": not missing_or_cut(store, name, manifest),
    }


def verify_checkpoints(store_uri: str) -> list[dict[str, str]]:
    """[{"part", "expected", "found"}] of every manifest and part that is not as committed, in all checkpoints."""
    store = open_store(store_uri)
    return [
        {"part": f"{name}/{damage.part}", "expected": damage.expected, "found": damage.found}
        for name in committed(store)
        for damage in _damages(store, name)
    ]


def _damages(store: ObjectStore, name: CheckpointName) -> Iterator[CheckpointDamaged]:
    try:
        manifest = read_manifest(store, name.manifest_key)
    except CheckpointDamaged as damage:
        yield damage
        return
    for part in manifest.parts:
        try:
            _verify_part(PartReader(store, name.folder + part.file, part), part)
        except CheckpointDamaged as damage:
            yield damage


def _verify_part(reader: PartReader, part: PartInfo) -> None:
    digest = hashlib.sha256()
    for block in reader.blocks():
        digest.update(block)
    if digest.hexdigest() != part.sha256:
        raise CheckpointDamaged(part.file, f"sha256 {part.sha256}", digest.hexdigest())
