"""`glidepath stop`: ask a run to save and end, and wait until it has.

Always holds: what is waited for is the record of its end, as long as its driver lives; an attempt that only made way
for another size is followed by asking the next one. Called by the command line.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.lease import is_here, lives, newest_with_end, read_beat
from data_pipeline.errors import UserError
from data_pipeline.storage import ObjectStore
from trainer.checkpoint.attempts import newest_attempt, read_record, record_key
from trainer.config import CheckpointSettings
from trainer.stop import AttemptEnd, read_end, request_stop

STEP_S = 600.0  # patience for a step and the request's way, besides that for the save
POLL_S = 0.5


def stop_run(store: ObjectStore, run: str, pause: Callable[[float], object] = time.sleep) -> AttemptEnd:
    """Ask the newest attempt to save and end; how it ended. Raises UserError when it does not run, when its driver is
    dead, when it does not end, or ends without the save that was asked for."""
    attempt, ended = newest_with_end(store)
    if not attempt:
        raise UserError(f"run {run}", "to be running", f"no attempts in {store.uri}", "there is nothing to stop")
    if ended is not None:
        raise UserError(
            f"run {run}", "to be running", f"its attempt {attempt}, which {ended.outcome}", "there is nothing to stop"
        )
    while True:
        request_stop(store, attempt)
        ended = _end_of(store, run, attempt, pause)
        newest = newest_attempt(store)
        if newest == attempt or ended.outcome in ("stopped", "finished"):
            break
        attempt = newest  # it had saved or died already, and its driver went on before it could hear
    if ended.outcome in ("died", "failed"):
        raise UserError(
            f"run {run}",
            "a save at the stop",
            f"attempt {attempt}, which {ended.outcome}",
            f"its newest checkpoint is {ended.checkpoint or 'none'}; see the log of the run",
        )
    return ended


def _end_of(store: ObjectStore, run: str, attempt: int, pause: Callable[[float], object]) -> AttemptEnd:
    """The record of the attempt's end, once there is one."""
    patience_s = STEP_S + _save_deadline_s(store, attempt)
    until = time.monotonic() + patience_s
    beat = read_beat(store, attempt)
    while (ended := read_end(store, attempt)) is None:
        # A driver elsewhere is watched for a while, which is time spent waiting for the end all the same.
        if beat is not None and not lives(store, beat, pause) and read_end(store, attempt) is None:
            where = "of this machine" if is_here(beat) else f"of {beat.host}, from which nothing comes"
            raise UserError(
                f"run {run}",
                "to be running",
                f"attempt {attempt}, whose driver is gone (process {beat.pid} {where})",
                "there is nothing to stop; the same command goes on from the newest checkpoint",
            )
        if time.monotonic() > until:
            raise UserError(
                f"run {run}, attempt {attempt}",
                f"to end within {patience_s:.0f} s",
                "no record of its end",
                "look whether its driver still runs; the request stands",
            )
        pause(POLL_S)  # a store tells nobody when an object appears
        beat = read_beat(store, attempt) or beat
    return ended


def _save_deadline_s(store: ObjectStore, attempt: int) -> float:
    """As long as the attempt itself waits for its save."""
    settings = read_record(store, record_key(attempt))["config"].get("checkpoint", {})
    return float(settings.get("deadline_s", CheckpointSettings().deadline_s))
