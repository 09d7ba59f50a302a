"""The sign of life of a run's driver, `driver/<attempt>.json` in the run's store: so that a second driver refuses.

Always holds: it is a courtesy, not the fence - attempts are that, and whoever has the newest one may commit; no clocks
of two machines are compared: a driver elsewhere lives while its count moves. Written by the driver of a run, off its
main thread; read by the next driver before it starts anything, by `glidepath stop` and `glidepath status RUN`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from types import TracebackType
from typing import Any

from cluster.processes import Identity, is_alive, this_process
from data_pipeline.errors import UserError
from data_pipeline.storage import ObjectNotFound, ObjectStore, canonical_json
from trainer.checkpoint.attempts import newest_attempt
from trainer.stop import AttemptEnd, read_end

log = logging.getLogger(__name__)

EVERY_S = 10.0
QUIET_BEATS = 2  # intervals without a beat, after which a driver elsewhere is taken for dead
LOOK_S = 0.5


@dataclass(frozen=True)
class Beat:
    """One sign of life. `machine`: host, boot and process namespace, within which a pid means one process."""

    attempt: int
    host: str
    machine: str
    pid: int
    started_ticks: int
    count: int
    every_s: float
    figures: dict[str, Any] = field(default_factory=dict)  # of AttemptLog

    @property
    def process(self) -> Identity:
        return Identity(self.pid, self.started_ticks, this_process().boot)


KNOWN = frozenset(known.name for known in fields(Beat))


class DriverLease:
    """A driver's signs of life. A context manager; `hold` each attempt that it has taken."""

    def __init__(self, store: ObjectStore, every_s: float = EVERY_S) -> None:
        self._store, self._every_s = store, every_s
        self._process, self._machine = this_process(), machine()
        self._held: tuple[int, Callable[[], dict[str, Any]]] = (0, dict)
        self._count = 0
        self._over = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="driver-lease", daemon=True)

    def hold(self, attempt: int, figures: Callable[[], dict[str, Any]] = dict) -> None:
        """From now on this driver has that attempt. Returns when the first one is told; of others a thread tells, since
        recovery is not to wait for it. `figures` is called on that thread."""
        self._held = attempt, figures
        if self._thread.is_alive():
            self._wake.set()
        else:
            self._beat()
            self._thread.start()

    def __enter__(self) -> DriverLease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over = True
        self._wake.set()  # not waited for: a write to a store that is away must not keep the driver from its end

    def _beat_on(self) -> None:
        while not self._over:
            if self._wake.wait(self._every_s):
                self._wake.clear()
            if not self._over:
                self._beat()

    def _beat(self) -> None:
        (attempt, figures), self._count = self._held, self._count + 1
        process = self._process
        try:
            beat = Beat(
                attempt, socket.gethostname(), self._machine, process.pid, process.started_ticks,
                self._count, self._every_s, figures(),
            )  # fmt: skip
            self._store.put(_key(attempt), [canonical_json(asdict(beat))])
        except (OSError, UserError) as error:
            log.warning("driver's sign of life: %s; training goes on", error)


def refuse_second_driver(store: ObjectStore, run: str, pause: Callable[[float], object] = time.sleep) -> None:
    """Raise UserError while another driver has the run. A driver elsewhere is watched for two of its intervals."""
    attempt, ended = newest_with_end(store)
    beat = read_beat(store, attempt) if attempt and ended is None else None
    if beat is None or is_this_process(beat):
        return
    if not is_here(beat):
        log.info("attempt %d has no end; watching whether its driver on %s still lives", attempt, beat.host)
    if lives(store, beat, pause):
        raise UserError(
            f"run {run}",
            "no other driver",
            f"process {beat.pid} on {beat.host}, which drives its attempt {attempt}",
            "wait for its end, or stop it: glidepath stop RUN",
        )


def newest_with_end(store: ObjectStore) -> tuple[int, AttemptEnd | None]:
    """The newest attempt and how it ended, None when it has not; (0, None) before the first. One that ended while this
    looked is followed by the next one, which its driver took before it recorded the end."""
    newest = newest_attempt(store)
    while True:
        attempt, ended = newest, read_end(store, newest) if newest else None
        if ended is None or (newest := newest_attempt(store)) == attempt:
            return attempt, ended


def lives(store: ObjectStore, beat: Beat, pause: Callable[[float], object] = time.sleep) -> bool:
    """Whether the driver whose beat this is still drives: at once on its own machine; else whether another beat, or the
    end of its attempt, comes within two intervals."""
    if is_here(beat):
        return is_alive(beat.process)
    waited_s = 0.0
    while waited_s < QUIET_BEATS * beat.every_s:
        pause(LOOK_S)  # a store tells nobody when an object changes
        waited_s += LOOK_S
        if read_end(store, beat.attempt) is not None:
            return False
        newer = read_beat(store, beat.attempt)
        if newer is not None and newer.count != beat.count:
            return True
    return False


def read_beat(store: ObjectStore, attempt: int) -> Beat | None:
    """The newest sign of life of the driver of `attempt`; None without one that can be read. What a newer version of
    Glidepath says besides is passed over: its driver lives all the same."""
    try:
        document = json.loads(store.get(_key(attempt)))
        return Beat(**{name: value for name, value in document.items() if name in KNOWN})
    except ObjectNotFound:
        return None
    except (ValueError, TypeError, AttributeError) as error:  # the attempts stay the fence
        log.warning("%s/%s is no sign of life: %s", store.uri, _key(attempt), error)
        return None


def is_here(beat: Beat) -> bool:
    """Whether that driver runs, or ran, where its process can be looked at."""
    return beat.machine == machine()


def is_this_process(beat: Beat) -> bool:
    return is_here(beat) and beat.process == this_process()


def machine() -> str:
    """What a process id holds good for: this host since its boot, in this container."""
    return f"{socket.gethostname()} {this_process().boot} {os.readlink('/proc/self/ns/pid')}"


def _key(attempt: int) -> str:
    return f"driver/{attempt:05d}.json"
