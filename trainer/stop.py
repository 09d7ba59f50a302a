"""Stopping a run: a request in its store, which every rank heeds at the same step, and a record of how attempts ended.

Always holds: a request names one attempt, so it never stops a later one; both are small objects outside the checkpoints
and are never deleted: `stop/00003.json` asks attempt 3 to save and end, `ended/00003.json` says how it ended. A driver
asks as well, to go on with another number of workers; a stop takes the place of that, never the other way round. Called
by the training loop (rank 0 watches), and by the driver and `glidepath stop` (they ask and record).
"""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Literal

from data_pipeline.errors import UserError
from data_pipeline.storage import ObjectNotFound, ObjectStore, canonical_json

log = logging.getLogger(__name__)

POLL_S = 1.0  # a store tells nobody when an object appears

Outcome = Literal["finished", "stopped", "resized", "failed", "died"]  # resized: goes on with another size
Asked = Literal["stop", "resize"]


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended. `position`: images of the run's newest committed checkpoint then, None without one.

    What records of before have not is None.
    """

    attempt: int
    outcome: Outcome
    position: int | None
    checkpoint: str | None  # its URI
    cause: str | None = None  # of a death: killed, node-lost, hung, out-of-memory or raised
    error: str | None = None  # one line, of what did not end well; of a resize its reason
    rank: int | None = None  # where that began
    node: str | None = None
    workers: int | None = None
    began_at: str | None = None  # UTC, ISO 8601: for people
    seconds: float | None = None  # from when it was taken to its end
    from_images: int | None = None  # consumed when its first step began
    images: int | None = None  # consumed when its last step ended
    counted_s: float | None = None  # of the seconds, those of steps up to `position`


def request_stop(store: ObjectStore, attempt: int, resize: bool = False) -> None:
    """Ask `attempt` to save at its next step and to end. Asking twice is asking once.

    `resize`: the run goes on by itself with another number of workers; gives way to whoever wants it stopped.
    """
    if resize:
        store.put_if_absent(_stop_key(attempt), canonical_json({"attempt": attempt, "resize": True}))
    else:
        store.put(_stop_key(attempt), [canonical_json({"attempt": attempt})])


def stop_requested(store: ObjectStore, attempt: int) -> bool:
    """Whether `attempt` is to save and end, for whatever reason."""
    return store.exists(_stop_key(attempt))


def asked_of(store: ObjectStore, attempt: int) -> Asked | None:
    """What was asked of `attempt`. A request that cannot be read is one to stop."""
    try:
        document = json.loads(store.get(_stop_key(attempt)))
    except ObjectNotFound:
        return None
    except ValueError:
        return "stop"
    return "resize" if isinstance(document, dict) and document.get("resize") is True else "stop"


def record_end(store: ObjectStore, end: AttemptEnd) -> None:
    """Say how an attempt ended. Called by the driver that took it, once."""
    store.put_if_absent(_end_key(end.attempt), canonical_json(asdict(end)))


def read_end(store: ObjectStore, attempt: int) -> AttemptEnd | None:
    """How `attempt` ended; None while it runs (or when its driver was killed). Raises UserError if it is damaged."""
    key = _end_key(attempt)
    try:
        return AttemptEnd(**json.loads(store.get(key)))
    except ObjectNotFound:
        return None
    except (ValueError, TypeError):
        raise UserError(f"{store.uri}/{key}", "an attempt's JSON record", "other bytes", "delete it") from None


class StopAsked(Exception):
    """Work that can be left out was left when a stop was asked for. Caught by the loop."""


class StopWatch:
    """`asked` turns true some time after a stop of `attempt` was requested. A context manager: a thread looks.

    With `watching` false it never does: one rank looks, and the loop makes all agree.
    """

    def __init__(self, store: ObjectStore, attempt: int, watching: bool) -> None:
        self.store, self.attempt = store, attempt
        self.asked = False
        self._over = threading.Event()
        # A daemon: a request to a dead store must not keep a finished worker from ending.
        self._thread = threading.Thread(target=self._watch, name="stop-watch", daemon=True) if watching else None

    def __enter__(self) -> StopWatch:
        if self._thread is not None:
            self._look()  # a request may have come while the run was starting
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def leave(self) -> None:
        """Raise StopAsked if so. For what one rank does alone, between its steps."""
        if self.asked:
            raise StopAsked

    def _watch(self) -> None:
        while not self.asked and not self._over.wait(POLL_S):
            self._look()

    def _look(self) -> None:
        try:
            self.asked = stop_requested(self.store, self.attempt)
        except OSError as error:
            # Training must not end because nobody can be heard; the next look may succeed.
            log.warning("looking for a stop request: %s", error)


def _stop_key(attempt: int) -> str:
    return f"stop/{attempt:05d}.json"


def _end_key(attempt: int) -> str:
    return f"ended/{attempt:05d}.json"
