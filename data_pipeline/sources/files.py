"""Files: one file of an input, on this machine or elsewhere, and files that an input names.

Always holds: a file that cannot be opened is a UserError that names it; what an input names is looked for under the
input's own folder alone, and no link on the way is followed; of nothing more than a stated size is read; a folder here
and a prefix of a bucket that hold the same are the same files. Called by the readers of each kind.
"""

from __future__ import annotations

import errno
import logging
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

log = logging.getLogger(__name__)

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
        known = next((known for known in endings if self.uri.lower().endswith(known)), "")
        stem = self.uri[: len(self.uri) - len(known)]
        if self.remote is None:
            return SourceFile(stem + ending) if Path(stem + ending).is_file() else None
        remote = sibling(self.remote, stem + ending)
        return None if remote is None else SourceFile(remote.uri, remote)


def find_files(uri: str, anonymous: bool, endings: tuple[str, ...], name: str) -> list[SourceFile]:
    """The file that a URI names, or those with one of the endings anywhere in the folder, or under the `s3://` prefix,
    but for what begins with a dot.

    `endings` are in lower case, and hold for names in any. `name` is the input's in messages. Raises UserError where
    there is none, or something else under such a name.
    """
    listed = ", ".join(endings)
    if is_remote(uri):
        found = find_remote(uri, anonymous, endings)
        if not found:
            raise UserError(name, f"objects ending in {listed}", "none with that prefix", "correct uri")
        return [SourceFile(file.uri, file) for file in found]
    path = Path(uri).absolute()
    if path.is_dir():
        files = _files_beneath(path, endings, name)
        if not files:
            raise UserError(name, f"files ending in {listed}", "none in that folder", "correct uri")
        return files
    if not path.is_file():
        raise UserError(name, f"a file, or a folder of files ending in {listed}", "nothing", "correct uri")
    return [SourceFile(str(path))]


def _files_beneath(folder: Path, endings: tuple[str, ...], input_: str) -> list[SourceFile]:
    found = []
    for name in names_beneath(folder):
        path = folder / name
        if name.lower().endswith(endings):
            # A link to a file is one: Hugging Face's cache is made of such.
            if not path.is_file():
                next_step = "remove it, or mend what it links to"
                raise UserError(f"input {path}", "a file", "a link to none, a pipe or a device", next_step)
            found.append(SourceFile(str(path)))
        elif path.is_dir():
            log.warning("%s: %s is a link to a folder and not followed; give it as an input of its own", input_, path)
    return found


def names_beneath(folder: Path) -> list[str]:
    """The path in the folder of everything that is not a folder, links to folders included, sorted as a bucket does.

    Without what begins with a dot: the state of programs, such as this one's. Raises UserError for a folder within that
    cannot be listed.
    """
    found = []
    for parent, folders, files in os.walk(folder, onerror=_refuse, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if Path(parent, name).is_symlink()]
        found += [Path(parent, name) for name in (*files, *links) if not name.startswith(".")]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _refuse(error: OSError) -> None:
    """os.walk would pass over a folder that cannot be listed, and all files in it."""
    found = error.strerror or str(error)
    raise UserError(
        f"input folder {error.filename}", "a folder that can be listed", found, "make it readable"
    ) from None


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
