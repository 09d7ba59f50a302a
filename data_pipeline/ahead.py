"""Ahead: threads that bring shards of a distant store into this machine's cache before they are needed.

Always holds: what the next global batches need is known exactly, since the order is a closed form; shards come in the
order in which they are needed, and those that came and are still needed take at most `limit_bytes`. It changes when
bytes arrive, never which rows are read: where it is late or fails, the reader fetches for itself, and its failure
counts. Ranks of one machine that want one shard fetch it once, by the cache's lock. Called by the loader.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.order import SampleOrder
from data_pipeline.shards import Dataset
from data_pipeline.storage.cache import Cache

log = logging.getLogger(__name__)

THREADS = 2  # one waits for the network while the other checks and writes
ROWS_AT_ONCE = 4096  # positions looked up together
HORIZON = 1000  # global batches beyond the reader: looking further would only compete with it for Python's lock

Shard = tuple[str, int]  # family, index


def shards_needed(
    order: SampleOrder, places: tuple[int, int], families: Sequence[str], position: int, until: int
) -> Iterator[tuple[int, list[Shard]]]:
    """(start, shards) of each global batch in [position, until): those that hold the rows of its `places` [begin, end).

    Within a batch in the order of their first row. Each position is looked up once.
    """
    begin, end = places
    batches = max(1, ROWS_AT_ONCE // (end - begin))
    for first in range(position, until, order.batch * batches):
        starts = np.arange(first, min(first + order.batch * batches, until), order.batch, dtype=np.int64)
        positions = starts[:, None] + np.arange(begin, end, dtype=np.int64)
        shards, _ = order.rows_at(positions.ravel())
        for start, row in zip(starts.tolist(), shards.reshape(positions.shape), strict=True):
            yield start, [(family, shard) for shard in dict.fromkeys(row.tolist()) for family in families]


class Ahead:
    """Fetches for one rank while it is entered; `reached` tells it how far the reader is."""

    def __init__(
        self,
        dataset: Dataset,
        needs: Iterator[tuple[int, list[Shard]]],
        cache: Cache,
        limit_bytes: int,
        position: int,
        horizon: int,
    ) -> None:
        """`needs` as `shards_needed` gives them. `limit_bytes`: at most half of the cache, for all ranks together.
        `position`: where the reader begins. `horizon`: how many positions beyond the reader it looks.

        Half, because what was opened after a shard that is still needed is needed too, or was when that one came: at
        most twice the limit. So the cache, which drops what was opened longest ago, keeps it.
        """
        self.dataset, self.cache, self.limit_bytes = dataset, cache, limit_bytes
        self.horizon = horizon
        self._needs = needs
        self._due: deque[tuple[int, Shard]] = deque()  # (start of the batch, shard): to be fetched when there is room
        self._until: dict[Shard, int] = {}  # shards that were fetched, or are: start of the last batch known to need it
        self._names: dict[Shard, str] = {}  # in the cache
        self._bytes = 0  # of _until
        self._looked_at = self._let_go_at = position  # the last batch taken from _needs; where _let_go was called last
        self._planning = threading.Lock()  # for all of the above; a reader never waits for it
        self._moved = threading.Condition()
        self._position, self._ended = position, False
        self._threads = [threading.Thread(target=self._run, name="ahead", daemon=True) for _ in range(THREADS)]

    def __enter__(self) -> Ahead:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Does not wait for a fetch that is under way: it ends with its shard, or harmlessly with the process."""
        with self._moved:
            self._ended = True
            self._moved.notify_all()

    def reached(self, position: int) -> None:
        """The reader needs nothing of the batches before `position` any more."""
        with self._moved:
            self._position = position
            self._moved.notify_all()

    def _run(self) -> None:
        try:
            while (shard := self._next()) is not None:
                self._fetch(shard)
        except (UserError, OSError) as error:  # of the manifest that holds the sizes
            log.warning("%s; nothing more is fetched ahead", error)

    def _fetch(self, shard: Shard) -> None:
        try:
            name = self.dataset.fetch(*shard)
        except (UserError, OSError) as error:
            log.warning("%s; not fetched ahead, its reader will ask again", error)
        else:
            with self._planning:
                if name is not None and shard in self._until:
                    self._names[shard] = name

    def _next(self) -> Shard | None:
        """The next shard to fetch, as soon as there is room for it; None at the end."""
        while not self._ended:
            with self._planning:
                position = self._position
                shard = self._plan(position)
            if shard is not None:
                return shard
            with self._moved:
                while not self._ended and self._position == position:
                    self._moved.wait()
        return None

    def _plan(self, position: int) -> Shard | None:
        """The next shard to fetch, if there is one and room for it while the reader is at `position`."""
        if position != self._let_go_at:
            self._let_go(position)
        while not self._ended:
            if not self._due:
                if not self._look_further(position):
                    return None
                continue
            start, shard = self._due[0]
            size = self._size(shard)
            if self._bytes + size > self.limit_bytes:
                return None
            self._due.popleft()
            if start >= position:  # else it was overtaken
                self._until[shard] = start
                self._bytes += size
                return shard
        return None

    def _look_further(self, position: int) -> bool:
        """Take in what one more batch needs; False if there is no such batch within the horizon."""
        found = next(self._needs, None) if self._looked_at < position + self.horizon else None
        if found is None:
            return False
        start, shards = found
        self._looked_at = start
        if (needed := sum(map(self._size, shards))) > self.limit_bytes:
            log.warning(
                "dataset %s: a batch needs %d bytes of shards, its share of the cache is %d (GLIDEPATH_CACHE_BYTES / 2 "
                "/ ranks on this machine); reading from the store instead, record batch by record batch",
                self.dataset.id[:12],
                needed,
                self.limit_bytes,
            )
            self.dataset.cached, self._ended = False, True
        for shard in shards:
            if shard in self._until:
                self._until[shard] = start
            else:
                self._due.append((start, shard))
        return True

    def _let_go(self, position: int) -> None:
        """Give up the room of shards that no batch from `position` on is known to need; keep the others cached."""
        for shard in [shard for shard, until in self._until.items() if until < position]:
            del self._until[shard]
            self._names.pop(shard, None)
            self._bytes -= self._size(shard)
        for name in self._names.values():
            self.cache.touch(name)
        self._let_go_at = position

    def _size(self, shard: Shard) -> int:
        return self.dataset.shard_bytes(*shard)
