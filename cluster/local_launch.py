"""The local launcher: the workers of a run as processes of this machine, without Ray.

Always holds: what launch.py says of launchers; workers hear their end from the pipe that this process holds, however it
ends; one that is stopped, hangs or runs out of memory is told apart from one that was killed. Called by the driver of a
run (cluster/training.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.environment import Device, NodeFacts, node_environment, rank_environment, threads_of_rank
from cluster.launch import END_GRACE_S, Cause, Event, WorkerDied
from cluster.out_of_memory import KernelKills, machine_bytes, out_of_memory
from cluster.watching import GangWatch
from data_pipeline.errors import UserError
from trainer.config import WatchSettings

log = logging.getLogger(__name__)

LOOK_S = 0.5  # between looks at who hangs
SETTLE_S = 2.0  # after an exception, which may be the echo of another worker's death: that is heard of within this
GO_ON = "the other workers were ended; run the same command again to go on from the newest checkpoint"


class LocalLauncher:
    """See Launcher: processes of this machine, of which there are as many as are asked for.

    `worker`: the module that is run.
    """

    def __init__(self, worker: str = "cluster.worker") -> None:
        self._worker = worker

    def launch(self, spec: dict[str, Any], workers: int, on_event: Callable[[Event], None]) -> Event:
        with tempfile.TemporaryDirectory(prefix="glidepath-") as folder:
            path = Path(folder, "spec.json")
            path.write_text(json.dumps({"rendezvous": f"file://{folder}/rendezvous", "train": spec}))
            device = spec["values"]["launcher"]["device"]
            processes = [_start(self._worker, path, rank, workers, device) for rank in range(workers)]
            try:
                nodes = [socket.gethostname()] * workers
                pids = [process.pid for process in processes]
                on_event({"event": "started", "pids": pids, "node_ids": nodes})
                return _Gang(spec["values"], processes, nodes, on_event).run()
            except WorkerDied:
                raise
            except UserError:
                _wait(processes, END_GRACE_S)  # what one worker refused, the others do too, once their saves are done
                raise
            finally:
                _end(processes)

    def room(self, at_most: int, without: str | None = None) -> int:
        return at_most

    def leaving(self) -> dict[str, float]:
        return {}

    def exclude(self, node: str) -> None:
        pass

    def close(self) -> None:
        pass


def _start(worker: str, spec: Path, rank: int, workers: int, device: Device) -> subprocess.Popen[str]:
    facts = NodeFacts(device, threads_of_rank(device, os.cpu_count() or 1, workers), interface="lo")
    environment = {
        **os.environ,
        **node_environment(facts, os.environ),
        **rank_environment(rank, workers, rank),
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a trainer.py in the user's folder is not ours (Python 3.11 and later)
    }
    # stdin is never written to: its end tells the worker that this process is gone, however it went.
    command = [sys.executable, "-m", worker, str(spec), str(rank), str(workers)]
    # A session of its own: Ctrl-C in the terminal is for the driver, which has the run saved first.
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


class _Gang:
    """The running workers of one attempt, and what is known of them."""

    def __init__(
        self,
        values: dict[str, Any],
        processes: list[subprocess.Popen[str]],
        nodes: list[str],
        on_event: Callable[[Event], None],
    ) -> None:
        self._values, self._processes, self._nodes, self._on_event = values, processes, nodes, on_event
        self._watch = GangWatch(WatchSettings.model_validate(values["watch"]), len(processes), nodes)
        self._kills = KernelKills()
        self._events: queue.Queue[tuple[int, Event | None]] = queue.Queue()
        self._running = set(range(len(processes)))
        self._raised: dict[int, WorkerDied] = {}
        self._result: Event | None = None
        for rank, process in enumerate(processes):
            threading.Thread(target=_read_events, args=(rank, process, self._events), daemon=True).start()

    def run(self) -> Event:
        """Hand on events until every worker has ended well, or one has not. Returns rank 0's result."""
        looked_s = time.monotonic()
        while self._running:
            if (death := self._heed(LOOK_S)) is not None:
                raise self._root_cause(death)
            if time.monotonic() - looked_s >= LOOK_S:
                self._look()
                looked_s = time.monotonic()
        if self._result is None:
            raise WorkerDied("rank 0", "a result", "none", "see its log above", "raised", 0, self._nodes[0])
        return self._result

    def _look(self) -> None:
        self._kills.look()
        self._watch.tell_stragglers(self._on_event)
        if hung := self._watch.hung():
            self._on_event(hung.event())
            raise hung

    def _heed(self, seconds: float) -> WorkerDied | None:
        """The next event, if one comes within so long: a death if it tells of one. Raises what a worker refused."""
        try:
            rank, event = self._events.get(timeout=seconds)
        except queue.Empty:
            return None
        if event is None:
            self._running.discard(rank)
            return self._bad_end(rank)
        if event["event"] == "error":
            raise UserError(*event["fields"])
        if event["event"] == "raised":
            self._raised[rank] = self._exception(event)
            return self._raised[rank]
        if event["event"] == "beat":
            self._watch.saw(event)
        elif event["event"] != "met":
            self._on_event(event)
            self._result = event if event["event"] == "result" else self._result
        return None

    def _root_cause(self, death: WorkerDied) -> WorkerDied:
        """What came first: an exception may be that of a collective whose peer died, of which is heard only now."""
        until = time.monotonic() + SETTLE_S
        while death.cause == "raised" and self._running and (left_s := until - time.monotonic()) > 0:
            later = self._heed(left_s)
            if later is not None and later.cause != "raised":
                return later
        return death

    def _exception(self, event: Event) -> WorkerDied:
        rank = event["rank"]
        if event["cause"] == "out-of-memory":
            return self._out_of_memory(rank, event["error"], event["memory"])
        return WorkerDied(f"worker {rank}", "to end well", event["error"], GO_ON, "raised", rank, self._nodes[rank])

    def _bad_end(self, rank: int) -> WorkerDied | None:
        process, node = self._processes[rank], self._nodes[rank]
        code = process.returncode
        if not code or rank in self._raised:
            return None
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL and self._kills.recent():
            return self._out_of_memory(rank, "ended by the kernel, for want of memory")
        cause: Cause = "killed" if code < 0 else "raised"
        return WorkerDied(f"worker {rank} (process {process.pid})", "exit code 0", how, GO_ON, cause, rank, node)

    def _out_of_memory(self, rank: int, found: str, memory: dict[str, int] | None = None) -> WorkerDied:
        workers = len(self._processes)
        return out_of_memory(self._values, workers, rank, self._nodes[rank], found, memory, machine_bytes() // workers)


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


def _end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()  # they hear no SIGTERM
    _wait(processes, END_GRACE_S)
    for rank, process in enumerate(processes):
        if process.poll() is None:
            log.error("worker %d (process %d) does not end: the kernel holds it", rank, process.pid)


def _wait(processes: list[subprocess.Popen[str]], seconds: float) -> None:
    """Until all have ended, or that long."""
    until = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
