"""The driver of a run: takes attempts, launches workers, decides after a death, hands on stop requests, records ends.

Always holds: one attempt at a time; every attempt that this driver took has a record of how it ended, unless the driver
itself was killed; a run that was asked to stop is not started again. Called by cluster.training; `stop_run` by
`glidepath stop`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.launch import Event, WorkerDied
from cluster.policy import Death, may_restart
from data_pipeline.errors import UserError
from data_pipeline.storage import ObjectStore
from trainer.checkpoint.attempts import newest_attempt
from trainer.checkpoint.manifest import committed
from trainer.stop import AttemptEnd, Outcome, read_end, record_end, request_stop

log = logging.getLogger(__name__)

RELAY_POLL_S = 0.5
STOP_TIMEOUT_S = 600.0  # a step, a save and its commit
STOP_POLL_S = 0.5


def supervise(
    store: ObjectStore,
    take_attempt: Callable[[], int],
    launch: Callable[[int], Event],
    on_event: Callable[[Event], None],
    restart: bool,
    stop: threading.Event,
) -> tuple[int, Event]:
    """Attempts until one ends well; its number and rank 0's result. `stop`: set it to have the run saved and ended.

    With `restart` an attempt whose workers died is followed by another as long as the policy allows. Raises WorkerDied
    when it does not, and UserError as `take_attempt` and `launch` do.
    """
    deaths: list[Death] = []
    while True:
        attempt = take_attempt()
        outcome: Outcome = "failed"
        try:
            with _relayed(stop, store, attempt):
                result = launch(attempt)
            outcome = "stopped" if result["stopped"] else "finished"
            return attempt, result
        except WorkerDied as death:
            outcome = "died"
            deaths.append(Death(attempt, any(name.attempt == attempt for name in committed(store))))
            if not restart or stop.is_set() or not may_restart(deaths):
                raise
            log.warning("restart: attempt %d: %s", attempt, death)
            on_event({"event": "restart", "attempt": attempt, "reason": str(death)})
        finally:
            _record(store, attempt, outcome)


def stop_run(store: ObjectStore, run: str) -> AttemptEnd:
    """Ask the newest attempt to save and end; how it ended. Raises UserError when it does not run or does not end."""
    attempt = newest_attempt(store)
    ended = read_end(store, attempt)
    if ended is not None:
        raise UserError(
            f"run {run}", "to be running", f"its attempt {attempt}, which {ended.outcome}", "there is nothing to stop"
        )
    request_stop(store, attempt)
    until = time.monotonic() + STOP_TIMEOUT_S
    while (ended := read_end(store, attempt)) is None:
        if time.monotonic() > until:
            raise UserError(
                f"run {run}, attempt {attempt}",
                f"to end within {STOP_TIMEOUT_S:.0f} s",
                "no record of its end",
                "look whether its driver still runs; the request stands",
            )
        time.sleep(STOP_POLL_S)  # a store tells nobody when an object appears
    return ended


@contextmanager
def _relayed(stop: threading.Event, store: ObjectStore, attempt: int) -> Iterator[None]:
    """Meanwhile turn `stop` into a request in the store. A thread: a signal handler must not talk to a store, since it
    may have interrupted a call of it."""
    over = threading.Event()

    def relay() -> None:
        while not over.is_set():
            if not stop.wait(RELAY_POLL_S):
                continue
            try:
                request_stop(store, attempt)
                return
            except OSError as error:
                log.warning("stop request of attempt %d: %s; trying again", attempt, error)
                over.wait(RELAY_POLL_S)

    thread = threading.Thread(target=relay, name="stop-relay", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _record(store: ObjectStore, attempt: int, outcome: Outcome) -> None:
    try:
        newest = next(iter(committed(store)), None)
        uri = f"{store.uri}/{newest.folder.rstrip('/')}" if newest else None
        record_end(store, AttemptEnd(attempt, outcome, newest.position if newest else None, uri))
    except OSError as error:
        # What the attempt itself came to matters more: a later `stop` waits in vain, nothing else.
        log.warning("attempt %d %s, but its end could not be recorded: %s", attempt, outcome, error)
