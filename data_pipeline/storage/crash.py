"""Stores that stop at any chosen operation, for tests and drills of commit protocols.

At operation `stop_at` the store raises `Crashed`, and from then on every write does: the process is dead. Count a
protocol's operations with `stop_at=None`, then run it once for every number. CrashPointStore is a folder, of which
each step of the file system is one operation, and a stop inside a write leaves half of the bytes, as a real one does.
StoppingStore is any store: a write there is done or not done, so it can stop before it, and after it with the answer
never heard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from data_pipeline.storage.local import LocalStore
from data_pipeline.storage.store import ObjectInfo, ObjectStore

T = TypeVar("T")


class Crashed(BaseException):
    """The stop. Not an Exception, so that no handler on the way survives it; a killed process runs none either."""


class _Stopping:
    """`operations` counts steps; step number `stop_at` (from 0) does not happen, or only half."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.operations = 0

    def _step(self, partly: Callable[[], object] = lambda: None) -> None:
        if self.stop_at is not None and self.operations == self.stop_at:
            self.operations += 1
            partly()
            raise Crashed(f"stopped at operation {self.stop_at}")
        if self.stop_at is not None and self.operations > self.stop_at:
            raise Crashed("already stopped")
        self.operations += 1


class CrashPointStore(_Stopping, LocalStore):
    """A LocalStore that stops."""

    def __init__(self, root: Path, stop_at: int | None = None) -> None:
        _Stopping.__init__(self, stop_at)
        LocalStore.__init__(self, root)

    def _write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        data = b"".join(bytes(chunk) for chunk in chunks)
        self._step(partly=lambda: path.write_bytes(data[: len(data) // 2]))
        super()._write(path, [data])

    def _sync(self, path: Path) -> None:
        self._step()
        super()._sync(path)

    def _replace(self, temporary: Path, path: Path) -> None:
        self._step()
        super()._replace(temporary, path)

    def _link(self, temporary: Path, path: Path) -> None:
        self._step()
        super()._link(temporary, path)

    def _unlink(self, path: Path) -> None:
        self._step()
        super()._unlink(path)


class StoppingStore(_Stopping):
    """See ObjectStore: `store`, until it stops."""

    def __init__(self, store: ObjectStore, stop_at: int | None = None) -> None:
        super().__init__(stop_at)
        self.store, self.uri = store, store.uri

    def check(self) -> None:
        self.store.check()

    def put(self, key: str, chunks: Iterable[bytes | memoryview]) -> None:
        self._whole(lambda: self.store.put(key, chunks))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._whole(lambda: self.store.put_if_absent(key, data))

    def get(self, key: str) -> bytes:
        return self.store.get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self.store.get_range(key, start, length)

    def exists(self, key: str) -> bool:
        return self.store.exists(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self.store.list(prefix)

    def delete(self, key: str) -> None:
        self._whole(lambda: self.store.delete(key))

    def sweep_uploads(self, prefix: str = "", owned: Callable[[str], bool] = lambda key: True) -> int:
        return self._whole(lambda: self.store.sweep_uploads(prefix, owned))

    def local_path(self, key: str) -> Path | None:
        return self.store.local_path(key)

    def _whole(self, write: Callable[[], T]) -> T:
        self._step()
        done = write()
        self._step()
        return done
