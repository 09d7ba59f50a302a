"""A bounded cache of files on this machine, for what must be a local file: shards to map, tars to seek in.

Always holds: a file has its final name only when it is whole; a name stands for one content for ever, so nothing is
ever refreshed. Several processes share the folder. Each locks the file that it fills, and the kernel takes that lock
back when the process ends in whatever way, so a kill leaves neither a torn file nor a lock. Called by arrow_files.py,
ahead.py and sources/remote.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

from data_pipeline.config import state_folder
from data_pipeline.errors import UsageError

T = TypeVar("T")

DEFAULT_BYTES = 20 * 2**30
FILLING = ".part"  # ending of a file that is not whole yet
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NAME = re.compile(r"[0-9a-f]{64}")


class CacheFull(Exception):
    """There is no room for this file, on the disk or within the bound, even with every other file removed."""


class Cache:
    """Files named by 64 hexadecimal digits; together at most `limit_bytes`, the least recently opened go first.

    A removed file that somebody has open or mapped lives on, outside the bound, until it is closed.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes

    def open(self, name: str, size_bytes: int, pieces: Callable[[], Iterable[bytes]], opener: Callable[[Path], T]) -> T:
        """`opener(path)` of the file, filled from `pieces()` first if it is not there.

        While `opener` runs nobody removes the file. Raises CacheFull, and ValueError if the pieces are not
        `size_bytes` together.
        """
        assert NAME.fullmatch(name), name
        try:
            return self._open(self.folder / name, size_bytes, pieces, opener)
        except OSError as error:  # of the content, or of the entry in a folder
            if error.errno not in NO_ROOM:
                raise
            raise CacheFull(f"no space left in {self.folder}") from None

    def _open(
        self, path: Path, size_bytes: int, pieces: Callable[[], Iterable[bytes]], opener: Callable[[Path], T]
    ) -> T:
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            with self._folder_lock(fcntl.LOCK_SH):
                if _is_whole(path, size_bytes):
                    os.utime(path)
                    return opener(path)
            part = path.with_name(path.name + FILLING)
            with self._filling(part) as file:
                # Asked again: it may have been finished after the first look, before this one's part was made.
                if file is not None and not _is_whole(path, size_bytes):
                    self._fill(file, size_bytes, pieces())
                    with self._folder_lock(fcntl.LOCK_SH):
                        part.rename(path)
                        return opener(path)

    def touch(self, name: str) -> None:
        """Count a file, if it is there, as opened just now, so that others go before it."""
        with suppress(FileNotFoundError):
            os.utime(self.folder / name)

    def forget(self, name: str) -> None:
        """Remove a file, because its content was found damaged."""
        with self._folder_lock(fcntl.LOCK_EX):
            (self.folder / name).unlink(missing_ok=True)

    def _fill(self, file: IO[bytes], size_bytes: int, pieces: Iterable[bytes]) -> None:
        filled = 0
        self._reserve(file, size_bytes)
        for piece in pieces:
            filled += len(piece)
            if filled > size_bytes:
                break
            file.write(piece)
        file.flush()
        if filled != size_bytes:
            raise ValueError(f"expected {size_bytes} bytes, found {filled if filled < size_bytes else 'more'}")

    @contextmanager
    def _filling(self, part: Path) -> Iterator[IO[bytes] | None]:
        """The file at `part`, locked; None if another process finished it while this one waited.

        If it has no other name at the end it is removed.
        """
        # Neither mode "w", which would empty a file that another process is filling, nor "a", which writes at the end.
        with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, part):
                yield None
                return
            try:
                yield file
            finally:
                with self._folder_lock(fcntl.LOCK_EX):
                    if _is_at(file, part):
                        part.unlink()

    def _reserve(self, file: IO[bytes], size_bytes: int) -> None:
        """Take room for a file that is to be filled, removing others; two that are filled at once both count."""
        with self._folder_lock(fcntl.LOCK_EX):
            file.truncate(0)  # what a killed process left
            files = []
            for path in self.folder.iterdir():
                facts = path.stat()
                if path.suffix != FILLING or not _remove_if_abandoned(path):
                    files.append((facts.st_mtime_ns, facts.st_size, path))
            excess = sum(size for _, size, _ in files) + size_bytes - self.limit_bytes
            excess = max(excess, size_bytes - _free_bytes(self.folder))
            removable = [(path, size) for _, size, path in sorted(files) if NAME.fullmatch(path.name)]
            if excess > sum(size for _, size in removable):
                raise CacheFull(f"{size_bytes} bytes do not fit into {self.folder} (at most {self.limit_bytes} bytes)")
            for path, size in removable:
                if excess > 0:
                    path.unlink()
                    excess -= size
            if size_bytes:
                os.posix_fallocate(file.fileno(), 0, size_bytes)

    @contextmanager
    def _folder_lock(self, kind: int) -> Iterator[None]:
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)


def machine_cache() -> Cache:
    """The cache of this machine: `cache` in the state folder, bounded by GLIDEPATH_CACHE_BYTES (default 20 GiB)."""
    stated = os.environ.get("GLIDEPATH_CACHE_BYTES", str(DEFAULT_BYTES))
    if not stated.isdecimal():
        raise UsageError("GLIDEPATH_CACHE_BYTES", "a number of bytes", repr(stated), "correct or unset it")
    return Cache(state_folder() / "cache", int(stated))


def _is_whole(path: Path, size_bytes: int) -> bool:
    try:
        # The size may be wrong after a power cut: names can reach the disk before content.
        return path.stat().st_size == size_bytes
    except FileNotFoundError:
        return False


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether `path` is this open file, rather than nothing or another one."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_if_abandoned(part: Path) -> bool:
    """Remove a half-filled file unless somebody is filling it."""
    with part.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if _is_at(file, part):
            part.unlink()
        return True


def _free_bytes(folder: Path) -> int:
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize
