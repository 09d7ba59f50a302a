"""Executor: runs one function over many items, in this process, in others, or on a cluster.

Always holds: every item is computed exactly once or the error of one is raised; results come as they are finished, so a
caller must not depend on their order; at most a few items per worker are in flight. Called by the passes of the corpus
builder; the cluster floor provides one that runs Ray tasks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from typing import Any, NamedTuple, Protocol, TypeVar

from data_pipeline.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT_PER_WORKER = 2  # one running, one waiting, so that a worker that finishes never waits for the driver


class Executor(Protocol):
    """`map` yields function(item) of every item, in the order of completion. The function must be picklable."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]: ...


class InlineExecutor:
    """`workers` = 1: in this process, in order. More: that many fresh processes of one thread each."""

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        if self.workers == 1:
            yield from (function(item) for item in items)
            return
        # spawn: a forked child inherits locks held by threads (arrow, opencv, a test's) and can hang on them.
        with ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=one_thread) as pool:
            try:
                yield from _in_completion_order(pool, function, iter(items), self.workers * IN_FLIGHT_PER_WORKER)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _in_completion_order(
    pool: ProcessPoolExecutor, function: Callable[[Item], Result], items: Iterator[Item], in_flight: int
) -> Iterator[Result]:
    pending: set[Future[Any]] = set()
    while True:
        pending |= {pool.submit(_carrying_refusals, function, item) for item in islice(items, in_flight - len(pending))}
        if not pending:
            return
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            result = future.result()
            if isinstance(result, _Refusal):
                raise result.kind(*result.fields)
            yield result


class _Refusal(NamedTuple):
    kind: type[UserError]
    fields: tuple[str, str, str, str]


def _carrying_refusals(function: Callable[[Item], Result], item: Item) -> Result | _Refusal:
    # An exception whose constructor takes more than its message cannot be unpickled: it would break the pool.
    try:
        return function(item)
    except UserError as error:
        return _Refusal(type(error), (error.name, error.expected, error.found, error.next_step))


def one_thread() -> None:
    """Hold this worker process to one thread: the workers already fill the cores. Before numpy is first imported."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import cv2
    import pyarrow

    cv2.setNumThreads(1)
    pyarrow.set_cpu_count(1)
