"""Files that lie elsewhere, as open files of this machine's cache: `s3://` objects, and `http(s)://` addresses.

Always holds: a download ends, within a time that follows from its size, and never exceeds the size that the server
stated; a connection that is cut is taken up where it stopped. The query of an address, where a signed link carries its
signature, is sent to the server and nowhere else: names, messages and cache entries have the address without it. Called
by files.py.
"""

from __future__ import annotations

import hashlib
import http.client
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from socket import gaierror
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

from data_pipeline.errors import UserError
from data_pipeline.storage import ObjectNotFound, canonical_json
from data_pipeline.storage.cache import CacheFull, machine_cache

SCHEMES = ("s3", "http", "https")
PIECE_BYTES = 128 * 2**10
ANSWER_TIMEOUT_S = 30.0
PATIENCE_S = 60.0  # without a new byte, or without an answer
PAUSE_S = 0.5
LEAST_BYTES_PER_S = 100_000  # an average below this, after the first ten minutes, is given up
GRACE_S = 600.0


@dataclass(frozen=True)
class RemoteFile:
    """`uri` is safe to show; `query` is the rest of a signed link. `version` and `bytes` are known by `asked`."""

    uri: str
    query: str = ""
    anonymous: bool = False
    version: str = ""
    bytes: int = 0

    def __repr__(self) -> str:
        return f"RemoteFile({self.uri})"


def is_remote(uri: str) -> bool:
    return urlsplit(uri).scheme in SCHEMES


def public_uri(uri: str) -> str:
    """The URI without query, fragment and user: what may be shown and stored. Other than remote ones as they are."""
    if not is_remote(uri):
        return uri
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def find_remote(uri: str, anonymous: bool, endings: tuple[str, ...]) -> list[RemoteFile]:
    """The file that a URI names, or of `s3://bucket/prefix/` those under it; nothing is asked about each yet.

    Raises UserError if the bucket cannot be listed.
    """
    parts = urlsplit(uri)
    if parts.scheme != "s3":
        return [RemoteFile(public_uri(uri), parts.query, anonymous)]
    if uri.lower().endswith(endings):
        return [RemoteFile(uri, anonymous=anonymous)]
    from data_pipeline.storage.s3 import S3Store

    folder = S3Store(uri, anonymous)
    folder.check()
    return [
        RemoteFile(f"{folder.uri}/{info.key}", anonymous=anonymous)
        for info in folder.list()
        if info.key.lower().endswith(endings) and "/." not in f"/{info.key}"
    ]


def sibling(file: RemoteFile, uri: str) -> RemoteFile | None:
    """The object at another URI of the same bucket, if there is one; nothing is guessed about http(s):// servers."""
    if not uri.startswith("s3://"):
        return None
    other = RemoteFile(uri, anonymous=file.anonymous)
    store, key = _store_and_key(other)
    return other if store.exists(key) else None


def asked(file: RemoteFile) -> RemoteFile:
    """The file with its version and size, from its server. Raises UserError if there is none."""
    if file.uri.startswith("s3://"):
        store, key = _store_and_key(file)
        try:
            version, size = store.facts(key)
        except (ObjectNotFound, ValueError):  # ValueError: a key that no store of ours holds, such as a//b
            raise UserError(
                f"input {file.uri}", "a file, or a prefix that ends with /", "nothing", "correct uri"
            ) from None
        return RemoteFile(file.uri, file.query, file.anonymous, version, size)
    with _answer(file, 0) as response:
        stated = response.headers.get("Content-Length", "")
        # Without either header nothing tells one content from another, so a name of its own keeps the cache honest.
        version = response.headers.get("ETag") or response.headers.get("Last-Modified") or f"unknown {uuid.uuid4()}"
    if not stated.isdecimal():
        raise UserError(f"input {file.uri}", "an answer that states its size", "none", "give it from another server")
    return RemoteFile(file.uri, file.query, file.anonymous, version, int(stated))


def open_remote(file: RemoteFile) -> IO[bytes]:
    """An `asked` file as a local one. It stays readable while it is open, even if the cache drops it.

    Raises UserError where it cannot be downloaded whole, OSError for a failing store.
    """
    name = hashlib.sha256(canonical_json([file.uri, file.version, file.bytes])).hexdigest()
    if file.uri.startswith("s3://"):
        store, key = _store_and_key(file)
        pieces: Callable[[], Iterable[bytes]] = lambda: store.stream(key)  # noqa: E731
    else:
        pieces = lambda: _http_pieces(file)  # noqa: E731
    try:
        return machine_cache().open(name, file.bytes, lambda: _in_time(file, pieces()), _open_file)
    except CacheFull as full:
        next_step = "raise GLIDEPATH_CACHE_BYTES, or make room on the disk"
        raise UserError(f"input {file.uri}", "room for it in the cache", str(full), next_step) from None
    except ValueError as error:
        raise UserError(f"input {file.uri}", f"{file.bytes} bytes", str(error), "run it again") from None


def _open_file(path: Path) -> IO[bytes]:
    return path.open("rb")


def _store_and_key(file: RemoteFile) -> tuple[Any, str]:
    from data_pipeline.storage.s3 import S3Store

    bucket, _, key = file.uri.removeprefix("s3://").partition("/")
    return S3Store(f"s3://{bucket}", file.anonymous), key


def _in_time(file: RemoteFile, pieces: Iterable[bytes]) -> Iterator[bytes]:
    deadline = time.monotonic() + GRACE_S + file.bytes / LEAST_BYTES_PER_S
    for piece in pieces:
        if time.monotonic() > deadline:
            expected = f"{LEAST_BYTES_PER_S} bytes per second"
            raise UserError(f"input {file.uri}", expected, "a slower server", "copy it to a folder or a bucket first")
        yield piece


def _http_pieces(file: RemoteFile) -> Iterator[bytes]:
    position, patient_until = 0, time.monotonic() + PATIENCE_S
    while position < file.bytes:
        with _answer(file, position) as response, suppress(OSError, http.client.HTTPException):  # cut: it is taken up
            while piece := response.read1(PIECE_BYTES):
                position, patient_until = position + len(piece), time.monotonic() + PATIENCE_S
                yield piece
        if time.monotonic() > patient_until:
            raise UserError(f"input {file.uri}", f"{file.bytes} bytes", f"no more after {position}", "try again")
        if position < file.bytes:
            time.sleep(PAUSE_S)


def _answer(file: RemoteFile, position: int) -> Any:
    """The response whose body begins at `position`, asked for again while a failure may pass. Raises UserError."""
    patient_until = time.monotonic() + PATIENCE_S
    while True:
        try:
            response = _ask(file, position)
            break
        except urllib.error.HTTPError as error:
            error.close()
            found, may_pass = f"HTTP {error.code}", error.code >= 500 or error.code in (408, 429)
        except (OSError, http.client.HTTPException, ValueError) as error:
            # Its text is not passed on: it may hold the whole address.
            reason = getattr(error, "reason", error)
            found, may_pass = f"no answer ({type(reason).__name__})", not isinstance(reason, ValueError | gaierror)
        if not may_pass or time.monotonic() > patient_until:
            next_step = "check the link; a signed one may have expired"
            raise UserError(f"input {file.uri}", "a file", found, next_step) from None
        time.sleep(PAUSE_S)  # the server may be starting again
    if position and response.status != 206:
        response.close()
        found = f"HTTP {response.status}: it was replaced meanwhile, or the server knows no ranges"
        raise UserError(f"input {file.uri}", f"the bytes from {position}", found, "run it again")
    return response


def _ask(file: RemoteFile, position: int) -> Any:
    request = urllib.request.Request(f"{file.uri}?{file.query}" if file.query else file.uri)
    if position:
        request.add_header("Range", f"bytes={position}-")
        if not file.version.startswith(("unknown", "W/")):
            request.add_header("If-Range", file.version)
    return urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S)
