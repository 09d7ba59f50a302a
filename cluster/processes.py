"""Long-running processes of the local stack: start one in a session of its own, find all that came of it, end them all.

Always holds: a signal reaches only a process that is still the recorded one (same pid, same start time, same boot), or
one that came of it; `end` returns when none is left. What came of a service is known by a mark in its environment,
which children inherit, however often they leave their session or lose their parent, and by descent, for a child that
overwrote its environment. Reads Linux's /proc. Called by `cluster.stack`; `this_process` and `is_alive` by the lease.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "GLIDEPATH_SERVICE"
POLL_S = 0.05
KILL_WAIT_S = 10.0  # a killed process goes at once, unless the kernel holds it in a system call

PROC = Path("/proc")


@dataclass(frozen=True)
class Identity:
    """A process as recorded on disk: a pid is used again, a pid with its start time and boot is not."""

    pid: int
    started_ticks: int
    boot: str


@dataclass(frozen=True)
class Row:
    """One line of the process table. Zombies are left out of it: they run nothing and hold nothing."""

    pid: int
    parent: int
    started_ticks: int


def start(argv: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> Identity:
    """Start `argv` in a new session, output to `log`. The parent's end does not end it. Raises OSError."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            argv, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, umask=0o077,
        )  # fmt: skip
    row = _read_row(child.pid)
    # Ended already: a start time that no process has.
    return Identity(child.pid, row.started_ticks if row else 0, boot_id())


def this_process() -> Identity:
    row = _read_row(os.getpid())
    assert row is not None
    return Identity(row.pid, row.started_ticks, boot_id())


def is_alive(process: Identity) -> bool:
    """Whether that very process still runs."""
    row = _read_row(process.pid)
    return row is not None and row.started_ticks == process.started_ticks and process.boot == boot_id()


def age_s(process: Identity) -> float:
    """Seconds since it started; infinite when it does not run."""
    if not is_alive(process):
        return float("inf")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - process.started_ticks / os.sysconf("SC_CLK_TCK")


def members(leader: Identity | None, mark: str) -> list[Row]:
    """All running processes of a service: its leader, if known, and everything that came of it."""
    table = {row.pid: row for row in _read_table()}
    found = {pid for pid in table if _has_mark(pid, mark)}
    if leader and is_alive(leader):
        found |= {leader.pid} & set(table)
    grown = set(found)
    while grown:
        grown = {row.pid for row in table.values() if row.parent in grown} - found
        found |= grown
    return [table[pid] for pid in sorted(found)]


def end(leader: Identity | None, mark: str, grace_s: float) -> int:
    """End a service: SIGTERM to its leader, then to what the leader left, SIGKILL after the grace time. Number ended.

    Raises TimeoutError when a process outlives SIGKILL (the kernel holds it, for example in a hung disk).
    """
    deadline_s = time.monotonic() + grace_s
    asked: set[Row] = set()
    ended: set[Row] = set()
    while left := members(leader, mark):
        ended.update(left)
        now_s = time.monotonic()
        if now_s > deadline_s + KILL_WAIT_S:
            raise TimeoutError(f"process {left[0].pid} outlives SIGKILL")
        if now_s > deadline_s:
            _signal_all(left, signal.SIGKILL)
        else:
            heads = [row for row in left if leader and row.pid == leader.pid] or left
            _signal_all(set(heads) - asked, signal.SIGTERM)
            _signal_all(set(heads) - asked, signal.SIGCONT)  # one that was stopped cannot hear
            asked.update(heads)
        # The processes are not our children, so the system has no way to wait for them but to look again.
        time.sleep(POLL_S)
    return len(ended)


def boot_id() -> str:
    """Names this boot of the machine: start times count from it."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def _signal_all(rows: Iterable[Row], number: signal.Signals) -> None:
    for row in rows:
        try:
            handle = os.pidfd_open(row.pid)  # from here on the pid cannot come to mean another process
        except ProcessLookupError:
            continue
        try:
            now = _read_row(row.pid)
            if now and now.started_ticks == row.started_ticks:
                signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            continue
        finally:
            os.close(handle)


def _read_table() -> list[Row]:
    rows = (_read_row(int(entry.name)) for entry in PROC.iterdir() if entry.name.isdigit())
    return [row for row in rows if row]


def _read_row(pid: int) -> Row | None:
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses, and may itself hold spaces and parentheses.
    state, parent, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else Row(pid, int(parent), int(rest[17]))


def _has_mark(pid: int, mark: str) -> bool:
    try:
        environment = (PROC / str(pid) / "environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or another user's
        return False
    return f"{MARK}={mark}".encode() in environment.split(b"\0")
