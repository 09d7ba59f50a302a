"""Launchers: how the workers of a run come to run, and what happens when one dies.

Always holds: the workers of a run live and die together - one that ends badly ends all, since a collective would wait
for it for ever; nothing is restarted here: the same command goes on from the newest checkpoint. Called by the command
line and the demo.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError

Event = dict[str, Any]  # "event": started | progress | result | error, and what belongs to it
END_GRACE_S = 5.0


class WorkerDied(UserError):
    """A worker ended without a result and without saying why."""


def launch_local(spec: dict[str, Any], workers: int, on_event: Callable[[Event], None]) -> Event:
    """Train on `workers` processes of this machine, without Ray. Returns rank 0's result event.

    `spec`: the arguments of `trainer.run.train` other than group and report. `on_event` is called on this thread for
    every event, first with {"event": "started", "pids": [...]}. Raises UserError as a worker reported it, or
    WorkerDied. Each worker has one OpenMP thread: two threads in each of two workers on two cores are several times
    slower than one.
    """
    with tempfile.TemporaryDirectory(prefix="glidepath-") as folder:
        path = Path(folder, "spec.json")
        path.write_text(json.dumps({"rendezvous": f"file://{folder}/rendezvous", "train": spec}))
        processes = [_start(path, rank, workers) for rank in range(workers)]
        try:
            on_event({"event": "started", "pids": [process.pid for process in processes]})
            return _supervise(processes, on_event)
        except WorkerDied:
            raise
        except UserError:
            _wait(processes, END_GRACE_S)  # what one worker refused, the others do too, once their saves are done
            raise
        finally:
            _end(processes)


def _start(spec: Path, rank: int, workers: int) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "LOCAL_RANK": str(rank),
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a trainer.py in the user's folder is not ours (Python 3.11 and later)
    }
    # stdin is never written to: its end tells the worker that this process is gone, however it went.
    command = [sys.executable, "-m", "cluster.worker", str(spec), str(rank), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=environment)


def _supervise(processes: list[subprocess.Popen[str]], on_event: Callable[[Event], None]) -> Event:
    """Hand on events until every worker has ended well, or one has not."""
    events: queue.Queue[tuple[int, Event | None]] = queue.Queue()
    for rank, process in enumerate(processes):
        threading.Thread(target=_read_events, args=(rank, process, events), daemon=True).start()
    result: Event | None = None
    running = set(range(len(processes)))
    while running:
        rank, event = events.get()
        if event is None:
            running.discard(rank)
            _refuse_bad_end(rank, processes[rank])
        elif event["event"] == "error":
            raise UserError(*event["fields"])
        else:
            on_event(event)
            result = event if event["event"] == "result" else result
    if result is None:
        raise WorkerDied("rank 0", "a result", "none", "see its log above")
    return result


def _read_events(rank: int, process: subprocess.Popen[str], events: queue.Queue[tuple[int, Event | None]]) -> None:
    assert process.stdout is not None
    try:
        for line in process.stdout:
            events.put((rank, json.loads(line)))
    except ValueError:
        process.kill()  # it died in the middle of a line, or something else wrote there
    finally:
        process.wait()
        events.put((rank, None))


def _refuse_bad_end(rank: int, process: subprocess.Popen[str]) -> None:
    code = process.returncode
    if code:
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise WorkerDied(
            f"worker {rank} (process {process.pid})",
            "exit code 0",
            how,
            "the other workers were ended; run the same command again to go on from the newest checkpoint",
        )


def _end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.terminate()
    _wait(processes, END_GRACE_S)
    for process in processes:
        process.kill()
        process.wait()


def _wait(processes: list[subprocess.Popen[str]], seconds: float) -> None:
    """Until all have ended, or that long."""
    until = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
