"""The driver of a run: takes attempts, launches workers, decides after a death, hands on stop requests, records ends.

Always holds: one attempt at a time; every attempt that this driver took has a record of how it ended, unless the driver
itself was killed; a run that was asked to stop, or that a newer driver has, is not started again; a store that is away
when workers die costs time, not the run. Called by cluster.training; `stop_run` by `glidepath stop`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.launch import Event, WorkerDied
from cluster.policy import Death, may_restart
from data_pipeline.errors import UsageError, UserError
from data_pipeline.storage import ObjectStore
from trainer.checkpoint.attempts import Superseded, newest_attempt
from trainer.checkpoint.manifest import committed
from trainer.stop import AttemptEnd, Outcome, read_end, record_end, request_stop, stop_requested

log = logging.getLogger(__name__)

RELAY_POLL_S = 0.5
STOP_TIMEOUT_S = 600.0  # a step, a save and its commit
STOP_POLL_S = 0.5
RESTART_PATIENCE_S = 600.0  # how long a restart waits for a store that does not answer
RESTART_PAUSE_S = 5.0


def supervise(
    store: ObjectStore,
    take_attempt: Callable[[], int],
    launch: Callable[[int], Event],
    on_event: Callable[[Event], None],
    restart: bool,
    stop: threading.Event,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], object] | None = None,
) -> tuple[int, Event]:
    """Attempts until one ends well; its number and rank 0's result. `stop`: set it to have the run saved and ended.

    With `restart` an attempt whose workers died is followed by another as long as the policy allows. Raises WorkerDied
    when it does not, Superseded when another driver has taken the run, and as `take_attempt` and `launch` do. Between
    tries `pause` waits that many seconds, by default less when `stop` is set; `clock` gives seconds.
    """
    restarts = _Restarts(store, take_attempt, stop, clock, pause or stop.wait)
    attempt = take_attempt()
    while True:
        outcome: Outcome = "failed"
        try:
            with _relayed(stop, store, attempt):
                result = launch(attempt)
            outcome = "stopped" if result["stopped"] else "finished"
            return attempt, result
        except WorkerDied as death:
            outcome = "died"
            if not restart:
                raise
            following = restarts.attempt_after(attempt, death)
            on_event({"event": "restart", "attempt": attempt, "reason": str(death)})
        finally:
            _record(store, attempt, outcome)
        attempt = following


class _Restarts:
    """Of one driver: whether a run whose workers died goes on, and as which attempt."""

    def __init__(
        self,
        store: ObjectStore,
        take_attempt: Callable[[], int],
        stop: threading.Event,
        clock: Callable[[], float],
        pause: Callable[[float], object],
    ) -> None:
        self._store, self._take_attempt, self._stop = store, take_attempt, stop
        self._clock, self._pause = clock, pause
        self._deaths: list[Death] = []

    def attempt_after(self, attempt: int, death: WorkerDied) -> int:
        """The next attempt, taken. Raises `death` when there is to be none, Superseded when there is one of another
        driver, and what the store says when it does not answer for RESTART_PATIENCE_S."""
        until = self._clock() + RESTART_PATIENCE_S
        while True:
            if self._stop.is_set():
                raise death
            try:
                self._refuse(attempt, death)
                following = self._take_attempt()
            except (WorkerDied, Superseded, UsageError):
                raise
            except (OSError, UserError) as error:
                if self._clock() >= until:
                    raise
                # What killed the workers may well keep the store from answering too.
                log.warning("restart after attempt %d: %s; trying again in %.0f s", attempt, error, RESTART_PAUSE_S)
                self._pause(RESTART_PAUSE_S)
            else:
                log.warning("restart: attempt %d: %s", attempt, death)
                return following

    def _refuse(self, attempt: int, death: WorkerDied) -> None:
        """Raise why this driver starts nothing more, if so."""
        newest = newest_attempt(self._store)
        if newest > attempt:
            raise Superseded(
                f"run store {self._store.uri}, attempt {attempt}",
                "to be its newest attempt",
                f"attempt {newest}",
                "this driver ends and leaves the run to that one",
            )
        if stop_requested(self._store, attempt):
            raise death
        own = any(name.attempt == attempt for name in committed(self._store))
        if not self._deaths or self._deaths[-1].attempt != attempt:  # once, however often it is tried
            self._deaths.append(Death(attempt, own))
        if not may_restart(self._deaths):
            raise death


def stop_run(store: ObjectStore, run: str) -> AttemptEnd:
    """Ask the newest attempt to save and end; how it ended. Raises UserError when it does not run, does not end, or
    ends without the save that was asked for."""
    attempt = newest_attempt(store)
    if not attempt:
        raise UserError(f"run {run}", "to be running", f"no attempts in {store.uri}", "there is nothing to stop")
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
    if ended.outcome in ("died", "failed"):
        raise UserError(
            f"run {run}",
            "a save at the stop",
            f"attempt {attempt}, which {ended.outcome}",
            f"its newest checkpoint is {ended.checkpoint or 'none'}; see the log of the run",
        )
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
