"""ObjectStore: what Glidepath needs of a place that keeps bytes under names.

Always holds: an object appears whole or not at all; `put_if_absent` never replaces. Keys are relative POSIX paths
without `.` or `..`. Called by shards, checkpoints and attempts; nothing else in the project writes durable state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.errors import UsageError


class ObjectNotFound(Exception):
    """No object under that key."""


class StoreError(OSError):
    """The store failed: the object, and what happened. An OSError, as a failing disk's errors are."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(name, what)  # both, so that it is rebuilt from them in another process
        self.name, self.what = name, what

    # What handlers of OSError read of it.
    errno = None
    filename = property(lambda self: self.name)
    strerror = property(lambda self: self.what)

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: its key and size in bytes."""

    key: str
    bytes: int


class ObjectStore(Protocol):
    """A folder of a store. `uri` names it; keys are relative to it."""

    uri: str

    def check(self) -> None:
        """Before any work: raises UserError, in seconds, where the store cannot be used at all."""

    def put(self, key: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Store the concatenated chunks durably, replacing what was there."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store `data` durably if no object has this key. True: it is stored now. False: one was there already."""

    def get(self, key: str) -> bytes:
        """The whole object. Raises ObjectNotFound."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`; fewer only where the object ends. Raises ObjectNotFound."""

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, sorted by key."""

    def delete(self, key: str) -> None:
        """Remove the object; no error when it is not there."""

    def sweep_uploads(self, prefix: str = "", owned: Callable[[str], bool] = lambda key: True) -> int:
        """Remove what unfinished uploads left under `prefix`, of keys for which `owned` is true; how many.

        An upload that is still running fails by this: `owned` must name only those of writers known to be gone.
        """

    def local_path(self, key: str) -> Path | None:
        """A file to memory-map, where the store is on this machine; else None."""


def open_store(uri: str) -> ObjectStore:
    """The store that a URI names: a folder path, `file://…` or `s3://bucket/prefix`.

    Raises UsageError for a kind that is not built in, and for s3 where boto3 is not installed.
    """
    from data_pipeline.storage.local import LocalStore

    scheme, separator, rest = uri.partition("://")
    if not separator:
        return LocalStore(Path(uri))
    if scheme == "file":
        return LocalStore(Path(rest))
    if scheme == "s3":
        from data_pipeline.storage.s3 import S3Store

        return S3Store(uri)
    # The rest is not shown: it may be key:secret@bucket.
    raise UsageError(f"store {scheme}://…", "a folder, file://… or s3://…", f"scheme {scheme}://", "correct the URI")


def canonical_json(document: Any) -> bytes:
    """The one byte form of a JSON document: sorted keys, no spaces, UTF-8, no NaN. Digests are taken of this."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
