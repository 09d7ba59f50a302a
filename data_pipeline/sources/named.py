"""Named pictures: what a parquet's column of names stands for, as files beside the parquet or objects of a bucket.

Always holds: a name is relative to the folder that the parquet lies in and leads nowhere out of it, or is a whole
`s3://bucket/key`; links to the web are refused, because what they give changes and takes a downloader's patience. A
picture that is not there costs its record; a store that fails stops the run. Called by parquet.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.digests import content_digest
from data_pipeline.errors import UserError
from data_pipeline.records import FILE_LIMIT_BYTES, text_key
from data_pipeline.sources.files import Unusable, is_safe, read_beneath
from data_pipeline.storage import ObjectNotFound

AT_ONCE = 4  # objects read, each whole in memory
ASKED_AT_ONCE = 16
OBJECT = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,62})/(.+)", re.DOTALL)
LINK = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

Result = TypeVar("Result")


class Pictures:
    """The pictures that a parquet at `uri` names. A context manager: leaving it ends its threads."""

    def __init__(self, uri: str, anonymous: bool) -> None:
        self._uri, self._folder, self._anonymous = uri, uri.rpartition("/")[0] or "/", anonymous
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Pictures:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def read(self, names: Sequence[bytes | None]) -> list[bytes | Unusable | None]:
        """Each picture's bytes, or why there is none; None for no name. Raises StoreError."""
        found: list[bytes | Unusable | None] = []
        for start in range(0, len(names), AT_ONCE):
            found += self._of_each(_read, _read_object, names[start : start + AT_ONCE])
        return found

    def versions(self, names: Sequence[bytes | None]) -> list[tuple[str, int]]:
        """Of each picture what another content would change, and its size in bytes. Raises StoreError.

        A file's is the digest of its content; an object's is its ETag and size, of which another one means other bytes.
        """
        versions = self._of_each(_file_version, _object_version, names)
        return [
            (f"none: {getattr(version, 'reason', 'null')}", 0) if isinstance(version, Unusable | None) else version
            for version in versions
        ]

    def _of_each(
        self, of_file: Callable[[Path, str], Result], of_object: Callable[[str, str, bool], Result],
        names: Sequence[bytes | None],
    ) -> list[Result | Unusable | None]:  # fmt: skip
        if any(name is not None and self._is_object(name) for name in names) and self._pool is None:
            self._pool = ThreadPoolExecutor(ASKED_AT_ONCE, thread_name_prefix="pictures")

        def one(name: bytes | None) -> Result | Unusable | None:
            try:
                return None if name is None else self._of(os.fsdecode(name), of_file, of_object)
            except Unusable as unusable:
                return unusable

        return list(self._pool.map(one, names) if self._pool is not None else map(one, names))

    def _is_object(self, name: bytes) -> bool:
        return self._folder.startswith("s3://") or name.startswith(b"s3://")

    def _of(
        self, name: str, of_file: Callable[[Path, str], Result], of_object: Callable[[str, str, bool], Result]
    ) -> Result:
        if not name.startswith("s3://"):
            if not LINK.match(name):
                if not is_safe(name):
                    raise Unusable("unsafe_name", text_key(name))
                if not LINK.match(self._folder):
                    return of_file(Path(self._folder), name)
                name = f"{self._folder}/{name}"
            if not name.startswith("s3://"):
                scheme = name.partition("://")[0]
                next_step = "download them first, for example with img2dataset, and give its output"
                raise UserError(
                    f"parquet {self._uri}", "names of files or s3:// objects", f"{scheme}:// links", next_step
                )
        parts = OBJECT.fullmatch(name)
        if parts is None or not is_safe(parts[2]):
            raise Unusable("unsafe_name", text_key(name))
        return of_object(parts[1], parts[2], self._anonymous)


def _read(folder: Path, name: str) -> bytes:
    try:
        return read_beneath(folder, name)
    except Unusable as unusable:
        if unusable.reason == "missing":
            raise Unusable("image_missing", unusable.detail) from None
        raise


def _file_version(folder: Path, name: str) -> tuple[str, int]:
    data = _read(folder, name)
    return content_digest(data).hex(), len(data)


def _read_object(bucket: str, key: str, anonymous: bool) -> bytes:
    data = bytearray()
    try:
        for piece in _bucket(bucket, anonymous).stream(key):
            data += piece
            if len(data) > FILE_LIMIT_BYTES:
                raise Unusable("file_too_large", f"s3://{bucket}/{text_key(key)}: more than {FILE_LIMIT_BYTES} bytes")
    except (ObjectNotFound, ValueError):
        raise Unusable("image_missing", f"s3://{bucket}/{text_key(key)}") from None
    return bytes(data)


def _object_version(bucket: str, key: str, anonymous: bool) -> tuple[str, int]:
    try:
        version, size = _bucket(bucket, anonymous).facts(key)
    except (ObjectNotFound, ValueError):  # ValueError: a key that no store of ours holds, such as a//b
        raise Unusable("image_missing", f"s3://{bucket}/{text_key(key)}") from None
    return f"{version} {size}", size


@lru_cache(maxsize=64)
def _bucket(bucket: str, anonymous: bool) -> Any:
    from data_pipeline.storage.s3 import S3Store

    return S3Store(f"s3://{bucket}", anonymous)
