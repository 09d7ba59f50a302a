"""OpenShards: the readers of a dataset that are kept open, so that a record batch is checked once, not at every use.

Always holds: at most OPEN_SHARDS are kept, and of files in this machine's cache at most `limit_bytes`, or a single one.
A mapped file takes room on the disk even after the cache removed it, so without that bound the cache has none either.
A reader that is let go while somebody uses it lives until that use ends. Called as `Dataset.shard`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from data_pipeline.shard_reader import ShardReader
from data_pipeline.storage.cache import machine_cache

OPEN_SHARDS = 512  # a lane reads up to five at a time, and one process may have 64 lanes


class OpenShards:
    """Readers by family and index, made by `opener`; the least recently asked for go first. For several threads."""

    def __init__(self, opener: Callable[[str, int], ShardReader]) -> None:
        """`limit_bytes` may be set by one that shares the cache with others; None: half of it."""
        self.limit_bytes: int | None = None
        self._opener = opener
        self._kept: OrderedDict[tuple[str, int], tuple[ShardReader, int]] = OrderedDict()  # and its bytes in the cache
        self._bytes = 0
        self._opening: dict[tuple[str, int], threading.Lock] = {}
        self._lock = threading.Lock()  # for all of the above; never held while a shard is opened

    def __call__(self, family: str, index: int) -> ShardReader:
        """Shard `index` of a family. Raises as the opener does."""
        key = family, index
        if (reader := self._find(key)) is not None:
            return reader
        with self._lock:
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:  # so that of several who want it one opens it
            if (reader := self._find(key)) is not None:
                return reader
            try:
                reader = self._opener(family, index)
                self._keep(key, reader)
            finally:
                with self._lock:
                    self._opening.pop(key, None)
        return reader

    def _find(self, key: tuple[str, int]) -> ShardReader | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def _keep(self, key: tuple[str, int], reader: ShardReader) -> None:
        size = reader.description.bytes if reader.in_cache else 0
        with self._lock:
            if size and self.limit_bytes is None:
                self.limit_bytes = machine_cache().limit_bytes // 2
            if key in self._kept:  # after a failure two can have opened it at once
                self._bytes -= self._kept.pop(key)[1]
            self._kept[key] = reader, size
            self._bytes += size
            while len(self._kept) > 1 and (len(self._kept) > OPEN_SHARDS or self._bytes > (self.limit_bytes or 0)):
                _, (_, freed) = self._kept.popitem(last=False)
                self._bytes -= freed
