"""Executor: runs one function over many items, in this process, in others, or on a cluster.

Always holds: every item is computed exactly once or the error of one is raised; results come as they are finished, so a
caller must not depend on their order; at most a few items per worker are in flight. Called by the passes of the corpus
builder; the cluster floor provides one that runs Ray tasks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any, Protocol, TypeVar

from data_pipeline.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

NAME_CHARACTERS = 80
IN_FLIGHT_PER_WORKER = 2  # one running, one waiting, so that a worker that finishes never waits for the driver


class Executor(Protocol):
    """`map` yields function(item) of every item, in the order of completion. The function must be picklable."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]: ...


class InlineExecutor:
    """`workers` = 1: in this process, in order. More: that many other processes of one thread each.

    A context manager: leaving it ends the processes, which are started once, at the first use.
    """

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> InlineExecutor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            # To end at once; the next call begins anew what they are at. If they were waited for, a second signal would
            # end the waiting but not them, and Python's own end would wait for ever for processes that wait for work.
            for process in list(pool._processes.values()):
                process.kill()
        pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See Executor. Raises the first error of an item, and UserError if a process was killed."""
        if self.workers == 1:
            yield from (function(item) for item in items)
            return
        if self._pool is None:
            # spawn: a forked child inherits locks held by threads (arrow, opencv, a caller's) and can hang on them.
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=_become_worker)
        try:
            yield from _in_completion_order(self._pool, function, iter(items), self.workers * IN_FLIGHT_PER_WORKER)
        except BrokenProcessPool:
            found = "one that was killed (out of memory?)"
            next_step = "run it again with fewer executor.workers; it goes on where it stopped"
            raise UserError("corpus worker", "a process that answers", found, next_step) from None


def _in_completion_order(
    pool: ProcessPoolExecutor, function: Callable[[Item], Result], items: Iterator[Item], in_flight: int
) -> Iterator[Result]:
    pending: set[Future[Any]] = set()
    try:
        while True:
            batch = islice(items, in_flight - len(pending))
            pending |= {pool.submit(function, item) for item in batch}
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        for future in pending:
            future.cancel()


def _become_worker() -> None:
    one_thread()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's process waits for its next item for ever when its parent was killed: no one closes the queue."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def name_of(item: Any) -> str:
    """What people know an item by: its `name`, else a shortened form of all of it."""
    name = getattr(item, "name", None)
    return name if isinstance(name, str) else repr(item)[:NAME_CHARACTERS]


def one_thread() -> None:
    """Hold this worker process to one thread: the workers already fill the cores. Before numpy is first imported."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import cv2
    import pyarrow

    cv2.setNumThreads(1)
    pyarrow.set_cpu_count(1)
