"""RayExecutor: the passes of a corpus build as Ray tasks, and the choice of an executor by configuration.

Always holds: what an executor promises (data_pipeline/executor.py); a task holds one CPU and one thread; a task whose
process is killed is tried again and the log says so; results are manifests, so no picture enters Ray's object store.
Called by cluster.training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from data_pipeline.corpus import ExecutorSettings
from data_pipeline.errors import UserError
from data_pipeline.executor import Executor, InlineExecutor, one_thread

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

TASK_TRIES = 4  # of one item, when its process or node dies under it


@contextmanager
def executor_of(settings: ExecutorSettings) -> Iterator[Executor]:
    """The executor that a corpus configuration asks for; for Ray this process is connected to a cluster meanwhile."""
    if settings.kind == "inline":
        with InlineExecutor(settings.workers) as inline:
            yield inline
        return
    from cluster.ray_cluster import connected

    with connected():
        yield RayExecutor(settings.workers)


class RayExecutor:
    """At most `workers` tasks at once, of one CPU each. In a process that is connected to Ray."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See Executor. Raises the first error of an item as it was, and UserError for one that never lived to its end.

        Leaving early cancels what runs.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        # Tried again here, not by Ray, so that it is seen.
        task: Any = ray.remote(num_cpus=1, max_retries=0)(_run)
        shared = ray.put(function)
        waiting = iter(items)
        running: dict[Any, tuple[Item, int]] = {}

        def start(item: Item, tries: int) -> None:
            running[task.remote(shared, item)] = (item, tries)

        try:
            while True:
                for item in islice(waiting, self.workers - len(running)):
                    start(item, 1)
                if not running:
                    return
                [done], _ = ray.wait(list(running), num_returns=1)
                item, tries = running.pop(done)
                try:
                    result = ray.get(done)
                except RayTaskError as error:
                    raise error.cause or error from None
                except RayError as error:
                    _refuse_hopeless(tries, error)
                    start(item, tries + 1)
                    continue
                yield result
        finally:
            for ref in running:
                ray.cancel(ref, force=True)


def _run(function: Callable[[Item], Result], item: Item) -> Result:
    one_thread()
    return function(item)


def _refuse_hopeless(tries: int, error: Exception) -> None:
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if tries == TASK_TRIES:
        next_step = "run it again with fewer executor.workers or on nodes with more memory; it goes on where it stopped"
        raise UserError("corpus task", f"to live through one of {TASK_TRIES} tries", what, next_step) from None
    log.warning("retry: a corpus task died (%s); starting it again, try %d of %d", what, tries + 1, TASK_TRIES)
