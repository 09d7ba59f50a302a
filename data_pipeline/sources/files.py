"""Files: one file of an input, on this machine or elsewhere, and files that an input names.

Always holds: a file that cannot be opened is a UserError that names it; what an input names is looked for under the
input's own folder alone, and no link on the way is followed; of nothing more than a stated size is read. Called by the
readers of each kind.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO

from data_pipeline.digests import ContentHash
from data_pipeline.errors import UserError
from data_pipeline.records import FILE_LIMIT_BYTES, text_key
from data_pipeline.sources.remote import RemoteFile, asked, find_remote, is_remote, open_remote, sibling

READ_BYTES = 2**20

# What stands in a file's place and is none; other errors are of the machine.
NOT_A_FILE = (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENODEV, errno.EISDIR, errno.EACCES, errno.EPERM)
NOTHING = (errno.ENOENT, errno.ENAMETOOLONG)


class Unusable(Exception):
    """A named file that a record cannot have. `reason` is counted; `detail` is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


@dataclass(frozen=True)
class SourceFile:
    """A file of an input. `digest` and `size_bytes` are of its content, known by `with_content`."""

    uri: str
    remote: RemoteFile | None = None  # how to get at it, if it does not lie on this machine
    digest: str = ""
    size_bytes: int = 0

    def with_content(self) -> SourceFile:
        """The file with digest and size; reads all of it. Raises UserError."""
        file = replace(self, remote=asked(self.remote)) if self.remote is not None else self
        with file.open() as content:
            digest, size_bytes = _digest(content)
        return replace(file, digest=digest, size_bytes=size_bytes)

    def open(self) -> IO[bytes]:
        """Raises UserError if it cannot be opened, or, read from elsewhere, is not what it was."""
        file = _open(self.uri) if self.remote is None else open_remote(self.remote)
        if self.digest and not self._is_as_before(file):
            file.close()
            raise UserError(f"unit {self.uri}", "the content it had before", "another", "run it again")
        return file

    def _is_as_before(self, file: IO[bytes]) -> bool:
        # Of a file on this machine the size tells whether somebody still writes it; to read it twice would cost more.
        if self.remote is None:
            return os.fstat(file.fileno()).st_size == self.size_bytes
        return _digest(file)[0] == self.digest

    def beside(self, endings: Sequence[str], ending: str) -> SourceFile | None:
        """The file of the same name but for its ending, if there is one; of an http(s):// address there is none."""
        stem = next(self.uri.removesuffix(known) for known in (*endings, "") if self.uri.endswith(known))
        if self.remote is None:
            return SourceFile(stem + ending) if Path(stem + ending).is_file() else None
        remote = sibling(self.remote, stem + ending)
        return None if remote is None else SourceFile(remote.uri, remote)


def find_files(uri: str, anonymous: bool, endings: tuple[str, ...], name: str) -> list[SourceFile]:
    """The file that a URI names, or those with one of the endings in the folder, or under the `s3://` prefix.

    `name` is the input's in messages. Raises UserError where there is none.
    """
    listed = ", ".join(endings)
    if is_remote(uri):
        found = find_remote(uri, anonymous, endings)
        if not found:
            raise UserError(name, f"objects ending in {listed}", "none with that prefix", "correct uri")
        return [SourceFile(file.uri, file) for file in found]
    path = Path(uri).absolute()
    if path.is_dir():
        files = sorted(child for child in path.iterdir() if child.name.endswith(endings) and child.is_file())
        if not files:
            raise UserError(name, f"files ending in {listed}", "none in that folder", "correct uri")
        return [SourceFile(str(file)) for file in files]
    if not path.is_file():
        raise UserError(name, f"a file, or a folder of files ending in {listed}", "nothing", "correct uri")
    return [SourceFile(str(path))]


def is_safe(name: str) -> bool:
    """Whether a name that stands in an input leads nowhere out of the folder it is looked for in."""
    parts = set(name.split("/"))
    return not name.startswith("/") and ".." not in parts and "\0" not in name and bool(parts - {"", "."})


def read_beneath(folder: Path, name: str, limit_bytes: int = FILE_LIMIT_BYTES) -> bytes:
    """The file `name` under `folder`. Raises Unusable as `open_beneath` does, and file_too_large."""
    with open_beneath(folder, name) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit_bytes:
            raise Unusable("file_too_large", f"{text_key(name)}: {size} bytes, at most {limit_bytes}")
        return file.read(limit_bytes)


def open_beneath(folder: Path, name: str) -> IO[bytes]:
    """The file `name` under `folder`, open. Raises Unusable: unsafe_name, missing or not_a_file.

    No link is followed on any level, and a pipe is not waited for.
    """
    if not is_safe(name):
        raise Unusable("unsafe_name", text_key(name))
    try:
        descriptor = _open_beneath(folder, PurePosixPath(name).parts)
    except OSError as error:
        if error.errno in NOTHING:
            raise Unusable("missing", text_key(name)) from None
        if error.errno in NOT_A_FILE:
            raise Unusable("not_a_file", f"{text_key(name)}: {error.strerror}") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unusable("not_a_file", text_key(name))
    return open(descriptor, "rb")


def _open(path: str) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        found = error.strerror or str(error)
        raise UserError(f"input {path}", "a file that can be opened", found, "correct uri") from None


def _open_beneath(folder: Path, parts: tuple[str, ...]) -> int:
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for part in parts[:-1]:
        try:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
        finally:
            os.close(at)
        at = inner
    try:
        return os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)


def _digest(file: IO[bytes]) -> tuple[str, int]:
    content, size = ContentHash(), 0
    while piece := file.read(READ_BYTES):
        content.update(piece)
        size += len(piece)
    file.seek(0)
    return content.hexdigest(), size
