"""Workers of this machine that stop, raise or run out of memory: real processes, really stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.drills.hanging_worker import Trap
from cluster.launch import Event, WorkerDied
from cluster.local_launch import LocalLauncher
from cluster.watching import Hung
from tests.cluster.test_launch import alive
from trainer.recipes import parse_train_config
from trainer.run import prepare_run

Values = Callable[..., dict[str, Any]]
SILENT_S = 5.0


def launch(values: dict[str, Any], on_event: Callable[[Event], None], worker: str = "cluster.worker") -> Event:
    config = parse_train_config(values, "test")
    spec = {"values": config.model_dump(mode="json"), "attempt": prepare_run(config), "mlflow_run_id": None}
    return LocalLauncher(worker).launch(spec, config.launcher.workers, on_event)


def test_a_stopped_rank_is_named_and_the_gang_is_ended(train_values: Values) -> None:
    events: list[Event] = []

    def stop_rank_1(event: Event) -> None:
        events.append(event)
        if event["event"] == "progress" and event["images"] == 32:
            os.kill(events[0]["pids"][1], signal.SIGSTOP)

    values = train_values(images=10**6, launcher={"workers": 2}, watch={"silent_s": SILENT_S})
    with pytest.raises(Hung) as caught:
        launch(values, stop_rank_1)
    death, here = caught.value, socket.gethostname()
    assert (death.cause, death.rank, death.node, death.section) == ("hung", 1, here, "silent")
    assert str(death).startswith(f"rank 1 on {here}: expected a heartbeat within 5 s, found none for")
    assert events[-1] == {"event": "hung", "rank": 1, "node": here, "section": "silent", "seconds": death.seconds}
    assert not any(alive(pid) for pid in events[0]["pids"])
    assert "beat" not in {event["event"] for event in events}  # those are between workers and launcher


@pytest.mark.parametrize(
    ("how", "cause", "found"),
    [
        ("memory", "out-of-memory", "can't allocate memory"),
        pytest.param("raise", "raised", "ArithmeticError: a defect", marks=pytest.mark.drill),
    ],
)
def test_the_exception_that_came_first_is_told_and_not_its_echo_in_the_other_rank(
    how: Any,
    cause: str,
    found: str,
    train_values: Values,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in Trap(1, "forward", 1, how, str(tmp_path / "fell")).variable().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WorkerDied, match=re.escape(found)) as caught:
        launch(train_values(launcher={"workers": 2}), lambda event: None, "cluster.drills.hanging_worker")
    assert (caught.value.cause, caught.value.rank) == (cause, 1)
    if cause == "out-of-memory":
        assert "GiB at most, as planned of" in str(caught.value)
        assert "go on with zero.stage=2 or fewer launcher.workers" in str(caught.value)
        assert "a new run may take micro_batch=2 (it was 4)" in str(caught.value)
        assert "memory of a worker: activations" in caplog.text and "there is" in caplog.text
