"""SIGTERM and Ctrl-C: most work ends at once and goes on from what is committed; training saves first.

Always holds: an end comes as an exception, so that `finally` blocks end what was started; what a terminal, `timeout` or
a supervisor sends twice in one breath counts once. Called by the command line and by the driver inside a Ray job.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGAIN_AFTER_S = 1.0  # GNU timeout signals its child and then the group; a wrapper hands on what the terminal also sent
SAVING = b"stopping: the run saves and ends; a second signal ends it at once, without a save\n"


class Interrupted(KeyboardInterrupt):
    """The work is to end at once. A KeyboardInterrupt: Ray's waits swallow any other exception of a handler."""


def end_on_signals() -> None:
    """From now on a signal raises Interrupted on the main thread."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)


@contextmanager
def stop_on_signals(clock: Callable[[], float] = time.monotonic) -> Iterator[threading.Event]:
    """An event that the first signal sets. Another one, AGAIN_AFTER_S or more later, raises Interrupted. Called on the
    main thread."""
    stop = threading.Event()
    first_s = clock()
    heard = threading.Lock()  # of the first signal: another one may interrupt this very handler at any place

    def heed(*_: object) -> None:
        nonlocal first_s
        if heard.acquire(blocking=False):
            first_s = clock()
            stop.set()
            os.write(2, SAVING)  # print may be what the signal has interrupted, and refuses to be entered again
        elif stop.is_set() and clock() - first_s >= AGAIN_AFTER_S:
            raise Interrupted

    before = {number: signal.signal(number, heed) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    raise Interrupted
