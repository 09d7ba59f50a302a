"""The driver of a run: takes attempts, launches workers, decides what follows, hands on stop requests, records ends.

Always holds: one attempt at a time; every attempt that this driver took has a record of how it ended, unless the driver
itself was killed; an end is recorded once it is known what follows, so an attempt that a stop finds without one will
heed it; a run that was asked to stop, or that a newer driver has, is not started again; a store that is away when
workers die costs time, not the run. What follows is decided in cluster/policy.py. Called by cluster.training.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from cluster.attempt_log import AttemptLog
from cluster.launch import Event, Launcher, NoRoom, WorkerDied
from cluster.lease import DriverLease
from cluster.policy import THE_RUNS_OWN, Death, GiveUp, after_death, node_to_exclude, reason_to_resize, size_for, sizes
from data_pipeline.errors import UsageError, UserError
from data_pipeline.storage import ObjectStore
from trainer.checkpoint.attempts import Superseded, newest_attempt
from trainer.checkpoint.manifest import committed, newest_committed
from trainer.config import LauncherSettings
from trainer.stop import asked_of, record_end, request_stop

log = logging.getLogger(__name__)
T = TypeVar("T")

RELAY_POLL_S = 0.5
WATCH_POLL_S = 2.0  # a cluster tells nobody when a node comes or is drained
ROOM_POLL_S = 2.0
RESTART_PATIENCE_S = 600.0  # how long a restart waits for a store that does not answer
RESTART_PAUSE_S = 5.0


@dataclass(frozen=True)
class SupervisedRun:
    """A run to drive. `take_attempt` makes the run ready and takes its next attempt; `begin` gives the arguments
    of `Launcher.launch` for it: spec, by attempt and number of workers. `took`: whether an attempt was taken so, be it
    that the store's answer was lost."""

    store: ObjectStore
    settings: LauncherSettings
    take_attempt: Callable[[], int]
    begin: Callable[[int, int], dict[str, Any]]
    on_event: Callable[[Event], None]
    took: Callable[[int], bool]


def supervise(
    run: SupervisedRun,
    launcher: Launcher,
    restart: bool,
    stop: threading.Event,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], object] | None = None,
) -> tuple[int, Event]:
    """Attempts until one ends well; its number and rank 0's result. `stop`: set it to have the run saved and ended.

    With `restart` an attempt whose workers died is followed by another as long as the policy allows, and the run takes
    another size when nodes leave or come. Without room for the least number of workers after a node left, the result
    says `stopped`, and `stop_reason` why. Raises WorkerDied when the policy gives the run up, Superseded when another
    driver has taken it, and as `take_attempt`, `begin` and the launcher do. Between tries `pause` waits that many
    seconds, by default less when `stop` is set; `clock` gives seconds.
    """
    with DriverLease(run.store) as lease:
        return _Driver(run, launcher, restart, stop, lease, clock, pause or partial(_sleep_unless, stop)).drive()


class _Driver:
    def __init__(
        self,
        run: SupervisedRun,
        launcher: Launcher,
        restart: bool,
        stop: threading.Event,
        lease: DriverLease,
        clock: Callable[[], float],
        pause: Callable[[float], object],
    ) -> None:
        self._run, self._launcher, self._restart, self._stop = run, launcher, restart, stop
        self._lease, self._clock, self._pause = lease, clock, pause
        self._store = run.store
        self._sizes = sizes(run.settings)
        self._deaths: list[Death] = []
        self._excluded: set[str] = set()

    def drive(self) -> tuple[int, Event]:
        following: tuple[int, int] | None
        if self._stop.is_set():
            return newest_attempt(self._store), _stopped_at_its_newest(self._store)
        workers = self._first_size()
        attempt = first = self._run.take_attempt()
        while True:
            with self._recorded(attempt, workers) as record:
                try:
                    result = self._launch(record)
                except WorkerDied as death:
                    record.outcome, record.death = "died", death
                    if not self._restart or (isinstance(death, NoRoom) and attempt == first):
                        raise
                    following = self._after_death(record, death)
                    if following is None:
                        return attempt, self._stopped_since(record, death)
                    happened = {"event": "restart", "attempt": attempt, "reason": str(death)}
                else:
                    following = self._after_end(record, result)
                    if following is None:
                        return attempt, result
                    happened = {"event": "resize", "attempt": attempt, "from": workers, "reason": record.resize}
                    happened["to"] = following[1]
                self._run.on_event(happened)
            attempt, workers = following

    def _first_size(self) -> int:
        """What there is room for; the launcher says it when that is not enough."""
        if self._sizes.least == self._sizes.most:
            return self._sizes.most
        return size_for(self._launcher.room(self._sizes.most), self._sizes) or self._sizes.least

    def _launch(self, record: AttemptLog) -> Event:
        def on_event(event: Event) -> None:
            record.saw(event)
            self._run.on_event(event)

        spec = self._run.begin(record.attempt, record.workers)
        with _meanwhile("stop-relay", lambda over: self._relay_stop(record, over)):
            if not self._restart:
                return self._launcher.launch(spec, record.workers, on_event)
            with _meanwhile("resize-watch", lambda over: self._watch_size(record, over)):
                return self._launcher.launch(spec, record.workers, on_event)

    def _after_end(self, record: AttemptLog, result: Event) -> tuple[int, int] | None:
        """The attempt that follows and its size, when the one that ended was asked to by this driver; else None."""
        record.outcome = "stopped" if result["stopped"] else "finished"
        if not result["stopped"] or record.resize is None or self._asked_to_stop(record):
            return None
        log.warning("resize: attempt %d saved and ended: %s", record.attempt, record.resize)
        workers = self._await_room(record)
        if workers is None:
            if not self._asked_to_stop(record):
                result["stop_reason"] = f"{record.resize}; {self._no_room()}"
                log.warning("stopped: %s", result["stop_reason"])
            return None
        attempt = self._patiently(record, lambda: self._take(record))
        if attempt is None:
            return None
        record.outcome, record.error = "resized", record.resize
        return attempt, workers

    def _after_death(self, record: AttemptLog, death: WorkerDied) -> tuple[int, int] | None:
        """The attempt that follows and its size; None when a stop was asked for since the death. Raises `death`, told
        as the reason to give up, when there is to be none, or when it came instead of the save that was asked for;
        Superseded when there is one of another driver, and what the store says when it does not answer for
        RESTART_PATIENCE_S."""
        if self._asked_to_stop(record):
            raise death
        own = self._patiently(record, lambda: self._committed_by(record))
        if own is None:
            return None
        # A node that had announced its end is no fault of the run, whether or not the save came in time.
        if record.resize is None or death.cause in THE_RUNS_OWN:
            self._deaths.append(record.as_death(death, own))
            decision = after_death(self._deaths, self._run.settings.restart)
            if isinstance(decision, GiveUp):
                raise self._given_up(decision, death)
            self._exclude_bad_node()
            self._wait_unless_stopped(decision.pause_s)
        workers = self._await_room(record)
        attempt = self._patiently(record, lambda: self._take(record)) if workers is not None else None
        if attempt is not None and workers is not None:
            log.warning("restart: attempt %d: %s", record.attempt, death)
            return attempt, workers
        if self._asked_to_stop(record):
            return None
        raise NoRoom("Ray cluster", *self._no_room_fields()) from death

    def _stopped_since(self, record: AttemptLog, death: WorkerDied) -> Event:
        """What the run ends with. Raises `death` when the store does not say where the run stands."""
        try:
            result = _stopped_at_its_newest(self._store)
        except OSError:
            raise death from None
        record.outcome = "stopped"
        return result

    def _given_up(self, decision: GiveUp, death: WorkerDied) -> WorkerDied:
        next_step = "see the log for the whole error; the same command tries again from the newest checkpoint"
        name = f"{death.name}, attempt {self._deaths[-1].attempt}"
        return WorkerDied(name, decision.expected, decision.found, next_step, death.cause, death.rank, death.node)

    def _exclude_bad_node(self) -> None:
        """Only where the least number of workers fits without it."""
        node = node_to_exclude(self._deaths, self._run.settings.restart)
        if node is None or node in self._excluded:
            return
        if size_for(self._launcher.room(self._sizes.most, without=node), self._sizes) is not None:
            self._excluded.add(node)
            log.warning("node %s: %d deaths in a row; left out", node, self._run.settings.restart.exclude_after)
            self._launcher.exclude(node)

    def _await_room(self, record: AttemptLog) -> int | None:
        """The size of the next attempt; None when there was none in time, or a stop was asked for meanwhile."""
        patience_s = self._run.settings.restart.wait_for_room_s
        until = self._clock() + patience_s
        while True:
            workers = size_for(self._launcher.room(self._sizes.most), self._sizes)
            if workers is not None or self._clock() >= until or self._asked_to_stop(record):
                return workers
            self._pause(ROOM_POLL_S)

    def _no_room(self) -> str:
        expected, found, next_step = self._no_room_fields()
        return f"expected {expected}, found {found}; {next_step}"

    def _no_room_fields(self) -> tuple[str, str, str]:
        waited_s = self._run.settings.restart.wait_for_room_s
        expected = f"room for {self._sizes.least} workers within {waited_s:.0f} s"
        found = f"room for {self._launcher.room(self._sizes.most)}"
        return expected, found, "the same command goes on from the newest checkpoint when there is room"

    def _committed_by(self, record: AttemptLog) -> bool:
        """Whether the attempt stored a checkpoint of its own. Raises Superseded if it is not the newest."""
        self._refuse_superseded(record)
        return any(name.attempt == record.attempt for name in committed(self._store))

    def _take(self, record: AttemptLog) -> int:
        self._refuse_superseded(record)
        return self._run.take_attempt()

    def _refuse_superseded(self, record: AttemptLog) -> None:
        newest = newest_attempt(self._store)
        if newest > record.attempt and not self._run.took(newest):
            raise Superseded(
                f"run store {self._store.uri}, attempt {record.attempt}",
                "to be its newest attempt",
                f"attempt {newest}",
                "this driver ends and leaves the run to that one",
            )

    def _patiently(self, record: AttemptLog, do: Callable[[], T]) -> T | None:
        """`do`, again while the store does not answer; None once the run was asked to stop."""
        until = self._clock() + RESTART_PATIENCE_S
        while True:
            if self._stop.is_set():
                return None
            try:
                return None if asked_of(self._store, record.attempt) == "stop" else do()
            except (WorkerDied, Superseded, UsageError):
                raise
            except (OSError, UserError) as error:
                if self._clock() >= until:
                    raise
                # What killed the workers may well keep the store from answering too.
                log.warning("after attempt %d: %s; trying again in %.0f s", record.attempt, error, RESTART_PAUSE_S)
                self._pause(RESTART_PAUSE_S)

    def _asked_to_stop(self, record: AttemptLog) -> bool:
        """By a signal, or in the store. A store that does not answer has not asked."""
        if self._stop.is_set():
            return True
        try:
            return asked_of(self._store, record.attempt) == "stop"
        except OSError as error:
            log.warning("looking for a stop request: %s", error)
            return False

    def _wait_unless_stopped(self, seconds: float) -> None:
        if seconds:
            log.warning("restart in %.0f s", seconds)
            self._pause(seconds)

    def _relay_stop(self, record: AttemptLog, over: threading.Event) -> None:
        """Turn `stop` into a request in the store. On a thread: a signal handler must not talk to a store, since it may
        have interrupted a call of it."""
        while not over.is_set():
            if not self._stop.wait(RELAY_POLL_S):
                continue
            try:
                request_stop(self._store, record.attempt)
                return
            except OSError as error:
                log.warning("stop request of attempt %d: %s; trying again", record.attempt, error)
                over.wait(RELAY_POLL_S)

    def _watch_size(self, record: AttemptLog, over: threading.Event) -> None:
        """Ask the attempt to save and end once the run is to go on with another size."""
        roomy_since: float | None = None
        while not over.wait(WATCH_POLL_S):
            try:
                room, leaving = self._launcher.room(self._sizes.most), self._launcher.leaving()
                now_s = self._clock()
                if room <= record.workers:
                    roomy_since = None
                elif roomy_since is None:
                    roomy_since = now_s
                roomy_s = 0.0 if roomy_since is None else now_s - roomy_since
                grow_after_s = self._run.settings.grow_after_s
                reason = reason_to_resize(record.workers, room, roomy_s, leaving, self._sizes, grow_after_s)
                if reason is None:
                    continue
                record.resize = reason  # before the request, whose answer may come at once
                request_stop(self._store, record.attempt, resize=True)
                log.warning("resize: attempt %d is asked to save and end: %s", record.attempt, reason)
                return
            except Exception as error:  # noqa: BLE001  (of Ray or the store: without this thread no size ever changes)
                log.warning("looking for room and leaving nodes: %s: %s", type(error).__name__, error)

    @contextmanager
    def _recorded(self, attempt: int, workers: int) -> Iterator[AttemptLog]:
        """The attempt's notes; meanwhile the driver's sign of life shows them, at the end they become its record."""
        record = AttemptLog(attempt, workers, self._clock)
        self._lease.hold(attempt, record.figures)
        try:
            yield record
        except BaseException as error:
            record.error = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise
        finally:
            self._record(record)

    def _record(self, record: AttemptLog) -> None:
        if record.death is not None:
            record.error = str(record.death)
        try:
            record_end(self._store, record.end(newest_committed(self._store), self._store))
        except OSError as error:
            # What the attempt itself came to matters more: a later `stop` looks at the driver, nothing else.
            log.warning("attempt %d %s, but its end could not be recorded: %s", record.attempt, record.outcome, error)


def _sleep_unless(stop: threading.Event, seconds: float) -> None:
    """Not `stop.wait`: a signal handler that came while this very thread holds the event's lock could never set it."""
    until = time.monotonic() + seconds
    while not stop.is_set() and time.monotonic() < until:
        time.sleep(RELAY_POLL_S)


def _stopped_at_its_newest(store: ObjectStore) -> Event:
    """The result of a run that was stopped while nothing of it ran, in the keys of rank 0's. Raises OSError."""
    newest = newest_committed(store)
    uri = newest.uri(store) if newest else None
    result: Event = {"event": "result", "images": newest.position if newest else 0, "checkpoint": uri, "stopped": True}
    result |= {"samples": None, "heldout": {}, "heldout_at_0": {}, "substituted_rows": 0}
    return result | {"failed_saves": 0, "delayed_saves": 0, "removed_checkpoints": 0, "failed_removals": 0}


@contextmanager
def _meanwhile(name: str, work: Callable[[threading.Event], None]) -> Iterator[None]:
    """`work` on a thread, until the event that it is given is set."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
