"""The inline executor: every item once, errors raised, user errors kept readable across processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import alive

from data_pipeline.errors import UserError
from data_pipeline.executor import IN_FLIGHT_PER_WORKER, InlineExecutor


def square(number: int) -> int:
    return number * number


def refuse(number: int) -> int:
    raise UserError(f"item {number}", "another", "this", "give up")


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.fixture(scope="module")
def two_workers() -> Iterator[InlineExecutor]:
    with InlineExecutor(2) as executor:
        yield executor


def test_every_item_is_computed_once(two_workers: InlineExecutor) -> None:
    expected = [number**2 for number in range(30)]
    assert list(InlineExecutor(1).map(square, range(30))) == expected
    assert sorted(two_workers.map(square, range(30))) == expected


def test_items_are_taken_as_workers_get_free(two_workers: InlineExecutor) -> None:
    taken = []
    results = two_workers.map(square, (taken.append(number) or number for number in range(100)))
    next(results)
    assert len(taken) <= 2 * IN_FLIGHT_PER_WORKER


def test_a_user_error_of_a_worker_is_raised_as_it_was(two_workers: InlineExecutor) -> None:
    with pytest.raises(UserError, match="item 7: expected another, found this; give up"):
        list(two_workers.map(refuse, [7]))
    assert list(two_workers.map(square, [3])) == [9]


DRIVER = """
import os, time
from data_pipeline.executor import InlineExecutor

def pid_of(number):
    time.sleep(0.1)
    return os.getpid()

if __name__ == "__main__":
    with InlineExecutor(2) as executor:
        for pid in executor.map(pid_of, range(1000)):
            print(pid, flush=True)
"""


def test_the_processes_of_a_driver_that_is_killed_end(tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    driver = subprocess.Popen([sys.executable, str(tmp_path / "driver.py")], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pids = {driver.stdout.readline() for _ in range(10)}
    driver.kill()
    # Their end of the pipe closes only with them.
    assert len(pids) >= 1 and driver.communicate(timeout=20)


INTERRUPTED = """
import os, time
from data_pipeline.executor import InlineExecutor

def work(number):
    print(os.getpid(), flush=True)
    time.sleep(120)

if __name__ == "__main__":
    with InlineExecutor(2) as executor:
        list(executor.map(work, range(4)))
"""


def test_a_driver_that_is_interrupted_twice_ends_at_once_and_its_processes_with_it(tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(INTERRUPTED)
    driver = subprocess.Popen(
        [sys.executable, str(tmp_path / "driver.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    pids = [int(driver.stdout.readline()) for _ in range(2)]
    for _ in range(2):
        driver.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, stderr = driver.communicate(timeout=20)
    assert driver.returncode == -signal.SIGINT and "KeyboardInterrupt" in stderr and not any(map(alive, pids))


def test_a_killed_worker_is_reported_in_one_line() -> None:
    with InlineExecutor(2) as executor, pytest.raises(UserError, match=r"corpus worker: .* killed"):
        list(executor.map(die, [1]))
