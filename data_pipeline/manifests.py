"""Manifests: JSON documents that commit what they describe.

Always holds: a stored manifest is the canonical JSON of its content and carries the sha256 of the rest of itself, so
any changed byte is found; it is written once, by put-if-absent, after everything it names. Called by the corpus
builder (units, shards, families, datasets), by readers, and by checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage import ObjectNotFound, ObjectStore, canonical_json

Document = dict[str, Any]


def digest_of(document: Any) -> str:
    """sha256 (hex) of a document's canonical JSON."""
    return hashlib.sha256(canonical_json(document)).hexdigest()


class NotSealed(Exception):
    """Bytes that are not a sealed document: what was expected, what was found."""

    def __init__(self, expected: str, found: str) -> None:
        self.expected, self.found = expected, found
        super().__init__(f"expected {expected}, found {found}")


def sha256_of(file: Path) -> str:
    """Of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def seal(document: Document) -> bytes:
    """The canonical JSON of a document with the sha256 of the rest of itself."""
    return canonical_json(document | {"sha256": digest_of(document)})


def unseal(data: bytes) -> Document:
    """The inverse of `seal`, the digest included. Raises NotSealed for any other bytes, whatever bit differs."""
    try:
        document = json.loads(data)
        stated = document.pop("sha256")
        found = digest_of(document)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise NotSealed("canonical JSON with its sha256", "other bytes") from None
    if stated != found or canonical_json(document | {"sha256": found}) != data:
        raise NotSealed(f"sha256 {found[:12]}", str(stated)[:12])
    return {**document, "sha256": found}


def commit(store: ObjectStore, key: str, document: Document, same: str = "sha256") -> Document:
    """Store `document` as the manifest `key` and return what is stored there now, sealed by its sha256.

    Meeting a manifest with an equal value under the key `same` is success: a retry met its own write, or another writer
    committed the same bytes. Raises UserError on a different one.
    """
    sealed = seal(document)
    mine = unseal(sealed)
    if store.put_if_absent(key, sealed):
        return mine
    there = read(store, key) or {}
    if there.get(same) != mine[same]:
        name, expected, found = f"manifest {store.uri}/{key}", f"{same} {mine[same][:12]}", str(there.get(same))[:12]
        raise UserError(name, expected, found, "another version wrote it; delete its folder or choose another output")
    return there


def read(store: ObjectStore, key: str) -> Document | None:
    """The checked manifest, or None if there is none. Raises UserError if it is damaged."""
    try:
        return unseal(store.get(key))
    except ObjectNotFound:
        return None
    except NotSealed as fault:
        name = f"manifest {store.uri}/{key}"
        raise UserError(name, fault.expected, fault.found, "restore it, or build again") from None
