"""CrashPointStore: a LocalStore that stops at any chosen operation, for tests of commit protocols.

Each file-system step of LocalStore is one operation. At operation `stop_at` the store raises `Crashed`, and from then
on every call does: the process is dead. A stop inside a write leaves half of the bytes, as a real one does. Count a
protocol's operations with `stop_at=None`, then run it once for every number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from data_pipeline.storage.local import LocalStore


class Crashed(BaseException):
    """The stop. Not an Exception, so that no handler on the way survives it; a killed process runs none either."""


class CrashPointStore(LocalStore):
    """`operations` counts steps; step number `stop_at` (from 0) does not happen, or only half."""

    def __init__(self, root: Path, stop_at: int | None = None) -> None:
        super().__init__(root)
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
