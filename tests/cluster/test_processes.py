"""Ending a service reaches all that came of it, and nothing else."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import processes

# A leader with a child that takes a session of its own, loses its parent, and will not hear SIGTERM.
FAMILY = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(sys.argv[1], "w").write(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
time.sleep(600)
"""


@pytest.fixture
def family(tmp_path: Path) -> Iterator[tuple[processes.Identity, str, int]]:
    """A leader, its mark, and the pid of the grandchild that went its own way."""
    mark, told = f"{tmp_path}/family", tmp_path / "pid"
    leader = processes.start(
        [sys.executable, "-c", FAMILY, str(told)],
        os.environ | {processes.MARK: mark},
        tmp_path,
        tmp_path / "log",
    )
    assert wait_until(lambda: told.exists() and told.read_text() != ""), (tmp_path / "log").read_text()
    yield leader, mark, int(told.read_text())
    for row in processes.members(leader, mark):
        os.kill(row.pid, signal.SIGKILL)


def wait_until(done: Callable[[], bool], seconds: float = 30) -> bool:
    """Poll, since other processes cannot tell."""
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(0.02)
    return done()


def test_what_left_the_session_and_lost_its_parents_is_ended_too(family: tuple[processes.Identity, str, int]) -> None:
    leader, mark, stray = family
    os.kill(leader.pid, signal.SIGKILL)
    assert wait_until(lambda: not processes.is_alive(leader))
    assert [row.pid for row in processes.members(leader, mark)] == [stray]
    assert processes.end(leader, mark, grace_s=0.2) == 1
    assert processes.members(leader, mark) == []


def test_a_pid_that_came_to_mean_another_process_is_left_alone(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        recorded = processes.Identity(bystander.pid, started_ticks=1, boot=processes.boot_id())
        assert not processes.is_alive(recorded)
        for stale in (recorded, dataclasses.replace(recorded, boot="an earlier boot")):
            assert processes.end(stale, mark=f"{tmp_path}/nobody", grace_s=0) == 0
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_leader_that_hears_is_asked_first_and_its_family_goes_with_it(
    family: tuple[processes.Identity, str, int],
) -> None:
    leader, mark, stray = family
    assert {leader.pid, stray} <= {row.pid for row in processes.members(leader, mark)}
    assert processes.age_s(leader) < 600
    assert processes.end(leader, mark, grace_s=0.2) >= 2
    assert not processes.is_alive(leader)
    assert processes.age_s(leader) == float("inf")
