"""Signals to the driver of a run, on real processes: the first has it saved and ended, a second ends it at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import alive

from cluster import signals
from cluster.signals import Interrupted, stop_on_signals
from data_pipeline.storage import LocalStore
from trainer.checkpoint.attempts import newest_attempt
from trainer.checkpoint.inspect import verify_checkpoints
from trainer.checkpoint.manifest import committed
from trainer.loop import CONSUMED
from trainer.stop import read_end
from trainer.tracking.jsonl import read_events, read_lines

Values = Callable[..., dict[str, Any]]


class Run:
    """A run of two workers that never ends by itself, and its command."""

    def __init__(self, values: dict[str, Any], folder: Path) -> None:
        self.store = LocalStore(Path(values["store"]))
        self.tracking = Path(values["store"], "tracking")
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(values))
        self.command = [sys.executable, "-m", "cluster.cli", "train", str(config), "--json"]
        self.driver: subprocess.Popen[str] | None = None

    def start(self) -> int:
        """A driver in a session of its own, as from a terminal; its next attempt's number."""
        attempt = newest_attempt(self.store) + 1
        self.driver = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        return attempt

    def wait(self, done: Callable[[], bool], seconds: float = 60.0) -> None:
        """Polled, since other processes cannot tell."""
        assert self.driver is not None
        until = time.monotonic() + seconds
        while not done():
            assert self.driver.poll() is None and time.monotonic() < until, "it never came to that"
            time.sleep(0.02)

    def end(self) -> tuple[int, dict[str, Any], str]:
        assert self.driver is not None
        stdout, stderr = self.driver.communicate(timeout=60)
        assert "Traceback" not in stderr, stderr
        assert stdout, (self.driver.returncode, stderr)
        return self.driver.returncode, json.loads(stdout), stderr

    def workers(self) -> list[int]:
        assert self.driver is not None
        pids = Path(f"/proc/{self.driver.pid}/task/{self.driver.pid}/children").read_text().split()
        return [int(pid) for pid in pids]

    def positions(self, attempt: int) -> list[int]:
        """Images consumed before each step that the attempt began."""
        lines = read_lines(self.tracking / CONSUMED) if (self.tracking / CONSUMED).exists() else []
        return [line["position"] for line in lines if line["attempt"] == attempt]


@pytest.fixture
def endless(train_values: Values, tmp_path: Path) -> Iterator[Run]:
    values = train_values(images=10**6, launcher={"workers": 2}, checkpoint={"every_images": 64})
    run = Run(values, tmp_path)
    yield run
    if run.driver is not None:
        run.driver.kill()
        run.driver.wait()


def test_a_signal_to_all_saves_at_that_step_one_before_any_step_ends_too_and_a_second_one_ends_at_once(
    endless: Run,
) -> None:
    # Ctrl-C reaches the group, and what ends a service or a job step signals every process of it.
    first = endless.start()
    endless.wait(lambda: len(endless.positions(first)) > 1)
    assert endless.driver is not None
    workers = endless.workers()
    assert len(workers) == 2
    os.killpg(endless.driver.pid, signal.SIGINT)
    for pid in (endless.driver.pid, *workers):
        os.kill(pid, signal.SIGTERM)
    code, said, stderr = endless.end()
    assert code == 0 and said["stopped"] and stderr.count(signals.SAVING.decode()) == 1
    newest = committed(endless.store)[0]
    assert said["images"] == newest.position == endless.positions(first)[-1] + 16
    assert said["checkpoint"].endswith(newest.folder.rstrip("/")) and not any(map(alive, workers))

    second = endless.start()
    endless.wait(lambda: newest_attempt(endless.store) == second)
    endless.driver.send_signal(signal.SIGTERM)
    code, said, _ = endless.end()
    assert code == 0 and said["stopped"] and said["images"] == committed(endless.store)[0].position >= newest.position
    ends = [read_end(endless.store, attempt) for attempt in (first, second)]
    assert [end.outcome for end in ends if end] == ["stopped", "stopped"]

    # A worker that hangs never comes to save.
    newest = committed(endless.store)[0]
    third = endless.start()
    endless.wait(lambda: bool(endless.positions(third)))
    workers = endless.workers()
    os.kill(workers[1], signal.SIGSTOP)
    endless.driver.send_signal(signal.SIGTERM)
    time.sleep(signals.AGAIN_AFTER_S + 0.1)
    endless.driver.send_signal(signal.SIGINT)
    code, said, stderr = endless.end()
    assert code == 1 and "interrupted" in said["error"] and stderr.count("error: interrupted") == 1
    assert not any(map(alive, workers)) and not verify_checkpoints(endless.store.uri)
    resumes = read_events(endless.tracking, "resume")
    assert resumes[-1]["attempt"] == third and resumes[-1]["text"].startswith(f"from {newest},")
    assert endless.positions(third)[0] == newest.position


def test_signals_that_come_in_one_breath_are_one_and_a_later_one_interrupts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    now_s = 0.0
    with pytest.raises(Interrupted), stop_on_signals(clock=lambda: now_s) as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        now_s = signals.AGAIN_AFTER_S
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_interrupts_the_handler_of_the_first_is_the_same_breath(
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked = 0

    def clock() -> float:
        nonlocal asked
        asked += 1
        if asked == 2:  # within the handler
            signal.raise_signal(signal.SIGINT)
        return 100.0 * asked

    with stop_on_signals(clock) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
    assert capfd.readouterr().err == signals.SAVING.decode()
