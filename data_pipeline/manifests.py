"""Manifests: JSON documents that commit what they describe.

Always holds: a stored manifest is the canonical JSON of its content and carries the sha256 of the rest of itself, so
any changed byte is found; it is written once, by put-if-absent, after everything it names. Called by the corpus
builder (units, shards, families, datasets) and by readers.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage import ObjectNotFound, ObjectStore, canonical_json

Document = dict[str, Any]


def digest_of(document: Any) -> str:
    """sha256 (hex) of a document's canonical JSON."""
    return hashlib.sha256(canonical_json(document)).hexdigest()


def commit(store: ObjectStore, key: str, document: Document, same: str = "sha256") -> Document:
    """Store `document` as the manifest `key` and return what is stored there now, sealed by its sha256.

    Meeting a manifest with an equal value under the key `same` is success: a retry met its own write, or another writer
    committed the same bytes. Raises UserError on a different one.
    """
    sealed = document | {"sha256": digest_of(document)}
    if store.put_if_absent(key, canonical_json(sealed)):
        return sealed
    there = read(store, key) or {}
    if there.get(same) != sealed[same]:
        name, expected, found = f"manifest {store.uri}/{key}", f"{same} {sealed[same][:12]}", str(there.get(same))[:12]
        raise UserError(name, expected, found, "another version wrote it; delete its folder or choose another output")
    return there


def read(store: ObjectStore, key: str) -> Document | None:
    """The checked manifest, or None if there is none. Raises UserError if it is damaged."""
    try:
        data = store.get(key)
    except ObjectNotFound:
        return None
    name = f"manifest {store.uri}/{key}"
    try:
        document = json.loads(data)
        stated = document.pop("sha256")
        found = digest_of(document)
        canonical = canonical_json(document | {"sha256": stated}) == data
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UserError(name, "canonical JSON with its sha256", repr(error), "restore it, or build again") from None
    if not canonical or stated != found:
        raise UserError(name, f"sha256 {found[:12]}", str(stated)[:12], "restore it, or build again")
    return document | {"sha256": stated}
