"""RayExecutor: the passes of a corpus build as Ray tasks, and the choice of an executor by configuration.

Always holds: what an executor promises (data_pipeline/executor.py); a task holds one CPU and one thread; a task whose
process or node dies is tried again and the log says so; one that dies TASK_TRIES times is left out until all others are
done, and then fails the pass by name, so that it costs nothing but itself; results are manifests, so no picture enters
Ray's object store. Called by cluster.training and by the command line.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import islice
from typing import Any, TypeVar

from data_pipeline.corpus import ExecutorSettings
from data_pipeline.errors import UserError
from data_pipeline.executor import Executor, InlineExecutor, name_of, one_thread

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

TASK_TRIES = 4  # of one item, when its process or node dies under it
NAMED_POISONED = 10  # in the message; the log has all


@contextmanager
def executor_of(settings: ExecutorSettings) -> Iterator[Executor]:
    """The executor that a corpus configuration asks for; for Ray this process is connected to a cluster meanwhile."""
    if settings.kind == "inline":
        with InlineExecutor(settings.workers) as inline:
            yield inline
        return
    from cluster.ray_cluster import connected

    # Ray prints what its workers and its autoscaler say; stdout is for the result alone.
    with redirect_stdout(sys.stderr), connected():
        yield RayExecutor(settings.workers)


class RayExecutor:
    """At most `workers` tasks at once, of one CPU each. In a process that is connected to Ray."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See Executor. Raises the first error of an item as it was, and at the end UserError for those that never
        lived to their end.

        Leaving early cancels what runs.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        # Tried again here, not by Ray, so that it is seen.
        task: Any = ray.remote(num_cpus=1, max_retries=0)(_run)
        shared = ray.put(function)
        waiting = iter(items)
        running: dict[Any, tuple[Item, int]] = {}
        poisoned: list[str] = []

        def start(item: Item, tries: int) -> None:
            running[task.remote(shared, item)] = (item, tries)

        try:
            while True:
                for item in islice(waiting, self.workers - len(running)):
                    start(item, 1)
                if not running:
                    break
                [done], _ = ray.wait(list(running), num_returns=1)
                item, tries = running.pop(done)
                try:
                    result = ray.get(done)
                except RayTaskError as error:
                    raise error.cause or error from None
                except RayError as error:
                    if _is_hopeless(name_of(item), tries, error):
                        poisoned.append(name_of(item))
                    else:
                        start(item, tries + 1)
                    continue
                yield result
        finally:
            # Not what is over: Ray may abort a driver that cancels a task whose reply it is taking in.
            _, unfinished = ray.wait(list(running), num_returns=len(running) or 1, timeout=0)
            for ref in unfinished:
                ray.cancel(ref, force=True)
        _refuse_poisoned(poisoned)


def _run(function: Callable[[Item], Result], item: Item) -> Result:
    one_thread()
    return function(item)


def _is_hopeless(name: str, tries: int, error: Exception) -> bool:
    """Whether a task that died was tried often enough; says what happens next."""
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if tries == TASK_TRIES:
        log.error("poison: the task of %s died %d times (%s); going on with the others", name, tries, what)
        return True
    log.warning("retry: the task of %s died (%s); starting it again, try %d of %d", name, what, tries + 1, TASK_TRIES)
    return False


def _refuse_poisoned(names: list[str]) -> None:
    if names:
        more = f" and {len(names) - NAMED_POISONED} more" if len(names) > NAMED_POISONED else ""
        found = f"{len(names)} that died each time: {', '.join(sorted(names)[:NAMED_POISONED])}{more}"
        next_step = "take them out of the inputs, or run it again on nodes with more memory; all others are done"
        raise UserError("corpus tasks", f"to live through one of {TASK_TRIES} tries", found, next_step)
