"""LocalStore: an ObjectStore in a folder of this machine.

Always holds: an object is written to a temporary file in its own folder, flushed to disk, then given its name in one
file-system operation; so a power cut leaves whole objects and temporary files, never a torn object. The primitive steps
are methods of their own (`_write`, `_sync`, `_replace`, `_link`, `_unlink`, `_sync_folder`) so that the crash-point
double can stop at each of them.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, takewhile
from pathlib import Path, PurePosixPath

from data_pipeline.errors import UserError
from data_pipeline.storage.store import ObjectInfo, ObjectNotFound

WRITEBACK_BYTES = 8 * 2**20
TEMPORARY = ".upload-"  # then 32 hexadecimal digits, "-" and the name that the upload is for


class LocalStore:
    """See ObjectStore. The folder is made on the first write."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self.uri = str(self.root)

    def check(self) -> None:
        """Raises UserError if the folder cannot be made or written to."""
        try:
            self._make_folder(self.root)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            found = error.strerror or str(error)
            raise UserError(f"store {self.uri}", "a folder that can be written", found, "choose another") from None

    def put(self, key: str, chunks: Iterable[bytes | memoryview]) -> None:
        path = self._path(key)
        temporary = self._write_temporary(path, chunks)
        self._replace(temporary, path)
        self._sync_folder(path.parent)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        # link() fails if the name exists, and is atomic; rename() would silently replace what another writer committed.
        path = self._path(key)
        temporary = self._write_temporary(path, [data])
        try:
            self._link(temporary, path)
            stored = True
        except FileExistsError:
            stored = False
        self._unlink(temporary)
        self._sync_folder(path.parent)
        return stored

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ObjectNotFound(f"{self.uri}/{key}") from None

    def get_range(self, key: str, start: int, length: int) -> bytes:
        try:
            with self._path(key).open("rb") as file:
                file.seek(start)
                return file.read(length)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ObjectNotFound(f"{self.uri}/{key}") from None

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for path in self._files(prefix):
            if path.name.startswith(TEMPORARY):
                continue
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                continue  # deleted meanwhile
            yield ObjectInfo(path.relative_to(self.root).as_posix(), size)

    def delete(self, key: str) -> None:
        path = self._path(key)
        if path.is_file():
            self._unlink(path)
            self._sync_folder(path.parent)

    def sweep_uploads(self, prefix: str = "", owned: Callable[[str], bool] = lambda key: True) -> int:
        swept = 0
        for path in self._files(prefix):
            if path.name.startswith(TEMPORARY) and owned(self._target_key(path)):
                self._unlink(path)
                swept += 1
        return swept

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def _files(self, prefix: str) -> Sequence[Path]:
        """Sorted files (temporary ones too) whose key, or for temporary ones whose folder, starts with `prefix`."""
        folder = self.root / prefix.rpartition("/")[0]
        found = []
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                if path.relative_to(self.root).as_posix().startswith(prefix):
                    found.append(path)
        return sorted(found, key=lambda path: path.relative_to(self.root).as_posix())

    def _target_key(self, temporary: Path) -> str:
        name = temporary.name[len(TEMPORARY) + 33 :]
        return (temporary.parent / name).relative_to(self.root).as_posix()

    def _path(self, key: str) -> Path:
        return _path_of(self.root, key)

    def _write_temporary(self, path: Path, chunks: Iterable[bytes | memoryview]) -> Path:
        self._make_folder(path.parent)
        temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}-{path.name}"
        try:
            self._write(temporary, chunks)
            self._sync(temporary)
        except OSError as error:
            # A full disk must not be made fuller by what could not be finished.
            temporary.unlink(missing_ok=True)
            if error.filename is None:  # writing to an open file names none
                error.filename = str(path)
            raise
        return temporary

    def _make_folder(self, folder: Path) -> None:
        """A folder that a power cut does not take back: the entry of each new one is flushed in its parent."""
        missing = list(takewhile(lambda path: not path.exists(), chain([folder], folder.parents)))
        folder.mkdir(parents=True, exist_ok=True)
        for new in reversed(missing):
            self._sync_folder(new.parent)

    def _write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        with path.open("xb") as file:
            begun, end = 0, 0
            for chunk in chunks:
                file.write(chunk)
                end += len(chunk)
                if end - begun >= WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
                    # Starts the writing to disk and does not wait: otherwise the flush at the end waits for all of it.
                    os.posix_fadvise(file.fileno(), begun, end - begun, os.POSIX_FADV_DONTNEED)
                    begun = end

    def _sync(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _replace(self, temporary: Path, path: Path) -> None:
        os.replace(temporary, path)

    def _link(self, temporary: Path, path: Path) -> None:
        os.link(temporary, path)

    def _unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def _sync_folder(self, folder: Path) -> None:
        self._sync(folder)


@lru_cache(4096)  # a shard asks for thousands of rows of as many objects
def _path_of(root: Path, key: str) -> Path:
    parts = PurePosixPath(key).parts
    if not parts or key.startswith("/") or ".." in parts or parts[-1].startswith(TEMPORARY):
        raise ValueError(f"object key {key!r}: expected a relative path inside the store")
    return root.joinpath(*parts)
