"""BackgroundTracker: hands everything to a thread that talks to a tracking server.

Always holds: a call puts something on the spool and returns; a server that is dead, slow or full costs no step, and
what it did not acknowledge stays in the spool until it does; no exception ends the thread. Made by `trainer.run` on
rank 0.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from trainer.tracking.spool import Delivery, Server, ServerFailed, Spool, Superseded
from trainer.tracking.tracker import Record

log = logging.getLogger(__name__)

GATHER_S = 2.0  # so that quick updates share a request: each costs about 25 ms of this process
BACKOFF_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
FLUSH_S = 60.0  # how long a run that has ended waits for its server
PICTURES = 16  # that wait at most: their bytes are in memory
PICTURE_TRIES = 8


class PictureServer(Server, Protocol):
    """A server that also keeps pictures. Raises ServerFailed."""

    def send_picture(self, images: int, key: str, png: bytes) -> None: ...


class BackgroundTracker:
    """See Tracker. `connect` is called on the thread, since importing a client takes seconds; raises ServerFailed.
    `attempt` may be raised: the driver's tracker goes on from attempt to attempt."""

    def __init__(self, connect: Callable[[], PictureServer], attempt: int, flush_s: float = FLUSH_S) -> None:
        self.attempt, self._connect, self._flush_s = attempt, connect, flush_s
        self._spool = Spool()
        self._pictures: deque[tuple[int, str, bytes]] = deque()
        self._said: Counter[tuple[int, str]] = Counter()
        self._closing = threading.Event()  # deliver what is left, then end
        self._given_up = threading.Event()  # the deadline of `close` has passed
        self._superseded = False
        self._lost_said = 0
        self._picture_tries = 0  # of the oldest one
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def log(self, images: int, values: Mapping[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._spool.put({"images": images, "ms": _now_ms(), "values": finite})
        for name in sorted(values.keys() - finite.keys()):
            self.event(images, "not-finite", f"{name} is {values[name]}")

    def event(self, images: int, kind: str, text: str) -> None:
        self._said[images, kind] += 1
        if self._said[images, kind] > 1:  # a server keeps one event per name
            kind = f"{kind}-{self._said[images, kind]}"
        self._spool.put({"images": images, "ms": _now_ms(), "attempt": self.attempt, "event": kind, "text": text})

    def picture(self, images: int, key: str, png: bytes) -> None:
        if len(self._pictures) < PICTURES:
            self._pictures.append((images, key, png))
            self._wake()
        else:
            self.event(images, "picture-lost", f"{key} is in the run's store only: {PICTURES} others wait")

    def undelivered(self) -> list[Record]:
        return self._spool.records()

    def replay(self, records: Sequence[Record]) -> None:
        for record in records:
            self._spool.put(record)

    def close(self) -> list[Record] | None:
        self._closing.set()
        self._wake()
        self._thread.join(self._flush_s)
        self._given_up.set()
        if self._superseded:
            return None
        left = self._spool.records()
        if left:
            log.warning("tracking: the server did not take %d records in %.0f s", len(left), self._flush_s)
        return left

    def _wake(self) -> None:
        with self._spool.filled:
            self._spool.filled.notify()

    def _run(self) -> None:
        failures = 0
        delivery: Delivery | None = None
        while not self._given_up.is_set():
            self._wait_for_work()
            try:
                if delivery is None:
                    server = self._connect()
                    delivery = Delivery(self._spool, server, self.attempt, self._given_up.wait)
                delivery.attempt = self.attempt
                while delivery.deliver():
                    self._say_what_was_lost()
                self._send_pictures(server)
            except Superseded as error:
                log.warning("tracking: %s; this attempt says nothing more", error)
                self._superseded = True
                return
            except Exception as error:  # noqa: BLE001  (without this thread the spool would only fill)
                if failures == 0:
                    # Of what nobody foresaw the type alone: its text may hold an address with credentials.
                    reason = error if isinstance(error, ServerFailed) else f"unforeseen {type(error).__name__}"
                    log.warning("tracking: %s; training goes on, the points wait", reason)
                failures += 1
                self._given_up.wait(BACKOFF_S[min(failures, len(BACKOFF_S)) - 1])
                continue
            if failures:
                log.info("tracking: the server answers again, everything that waited has arrived")
                failures = 0
            if self._closing.is_set() and self._spool.empty():
                return

    def _wait_for_work(self) -> None:
        with self._spool.filled:
            self._spool.filled.wait_for(
                lambda: not self._spool.empty() or bool(self._pictures) or self._closing.is_set()
            )
        self._closing.wait(GATHER_S)

    def _send_pictures(self, server: PictureServer) -> None:
        """A picture that the server will not take is given up with an event: the run's store has it."""
        while self._pictures:
            images, key, png = self._pictures[0]
            try:
                server.send_picture(images, key, png)
            except ServerFailed as error:
                self._picture_tries += 1
                if self._picture_tries < PICTURE_TRIES and not self._closing.is_set():
                    raise
                self.event(images, "picture-failed", f"{key} is in the run's store only: {error}")
            self._picture_tries = 0
            self._pictures.popleft()

    def _say_what_was_lost(self) -> None:
        lost = self._spool.lost
        if lost > self._lost_said:
            self._lost_said = lost
            newest = self._spool.records()
            self.event(newest[-1]["images"] if newest else 0, "tracking-overflow", f"{lost} records were lost so far")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
