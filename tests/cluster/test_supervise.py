"""The driver: when a run whose workers died goes on, and when it is left to end. No workers, no clock, no waiting."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import supervise
from cluster.cli import run
from cluster.launch import Event, WorkerDied
from data_pipeline.errors import UserError
from data_pipeline.storage import LocalStore
from data_pipeline.storage.store import ObjectInfo
from trainer.checkpoint.attempts import Superseded, newest_attempt, take_attempt
from trainer.checkpoint.manifest import CheckpointName
from trainer.stop import AttemptEnd, read_end, record_end, request_stop

FINISHED: Event = {"stopped": False}


class Away(LocalStore):
    """Answers neither lists nor looks while `away`."""

    away: Callable[[], bool] = staticmethod(lambda: False)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._answer()
        return super().list(prefix)

    def exists(self, key: str) -> bool:
        self._answer()
        return super().exists(key)

    def _answer(self) -> None:
        if self.away():
            raise OSError("no answer")


class Driver:
    """A run of which attempt n does `attempts[n - 1]`; those after these finish."""

    def __init__(self, folder: Path, *attempts: Callable[[], None]) -> None:
        self.store = Away(folder)
        self.attempts = attempts
        self.stop = threading.Event()
        self.launched: list[int] = []
        self.events: list[Event] = []
        self.now_s = 0.0
        self.take = lambda: take_attempt(self.store, {"config": {}})

    def supervise(self, restart: bool = True) -> tuple[int, Event]:
        return supervise.supervise(
            self.store,
            lambda: self.take(),
            self.launch,
            self.events.append,
            restart,
            self.stop,
            clock=lambda: self.now_s,
            pause=self.pause,
        )

    def launch(self, attempt: int) -> Event:
        self.launched.append(attempt)
        for does in self.attempts[attempt - 1 : attempt]:
            does()
        return FINISHED

    def pause(self, seconds: float) -> None:
        self.now_s += seconds

    def outcomes(self) -> list[str | None]:
        self.store.away = lambda: False  # type: ignore[method-assign]
        ends = [read_end(self.store, attempt) for attempt in range(1, newest_attempt(self.store) + 1)]
        return [end.outcome if end else None for end in ends]


def die() -> None:
    raise WorkerDied("worker 1", "a result", "SIGKILL", "see its log")


@pytest.fixture(autouse=True)
def quick_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "RELAY_POLL_S", 0.001)


def test_a_run_goes_on_after_deaths_until_three_in_a_row_stored_nothing(tmp_path: Path) -> None:
    def commit_and_die() -> None:
        attempt = driver.launched[-1]
        driver.store.put_if_absent(CheckpointName(16 * attempt, attempt).manifest_key, b"{}")
        die()

    driver = Driver(tmp_path / "gets-on", die, die, commit_and_die, die, die)
    assert driver.supervise() == (6, FINISHED)
    assert driver.outcomes() == ["died"] * 5 + ["finished"]
    assert [(e["event"], e["attempt"]) for e in driver.events] == [("restart", attempt) for attempt in range(1, 6)]
    assert "SIGKILL" in driver.events[0]["reason"] and driver.now_s == 0

    driver = Driver(tmp_path / "does-not", die, commit_and_die, die, die, die)
    with pytest.raises(WorkerDied):
        driver.supervise()
    assert driver.outcomes() == ["died"] * 5
    driver = Driver(tmp_path / "local", die)
    with pytest.raises(WorkerDied):
        driver.supervise(restart=False)
    assert driver.outcomes() == ["died"]


def test_a_driver_does_not_take_the_run_back_from_a_newer_one(tmp_path: Path) -> None:
    def be_overtaken_and_die() -> None:
        take_attempt(driver.store, {"config": {}})
        die()

    driver = Driver(tmp_path, be_overtaken_and_die)
    with pytest.raises(Superseded, match="attempt 1: expected to be its newest attempt, found attempt 2"):
        driver.supervise()
    assert driver.launched == [1] and driver.outcomes() == ["died", None]


@pytest.mark.parametrize("asked", ["in the store", "of the driver"])
def test_a_run_that_was_asked_to_stop_is_not_started_again_when_it_dies_instead(tmp_path: Path, asked: str) -> None:
    def be_stopped_and_die() -> None:
        if asked == "in the store":
            request_stop(driver.store, 1)
        else:
            driver.stop.set()
        die()

    driver = Driver(tmp_path, be_stopped_and_die)
    with pytest.raises(WorkerDied):
        driver.supervise()
    assert driver.launched == [1] and driver.outcomes() == ["died"]


def test_a_store_that_is_away_when_workers_die_is_waited_for_and_the_death_counts_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def lose_the_store_and_die() -> None:
        back_s = driver.now_s + 100
        driver.store.away = lambda: driver.now_s < back_s  # type: ignore[method-assign]
        die()

    driver = Driver(tmp_path, lose_the_store_and_die, lose_the_store_and_die)
    assert driver.supervise() == (3, FINISHED)
    assert driver.now_s == 200 and caplog.text.count("no answer; trying again in 5 s") == 40
    assert driver.outcomes() == ["died", "died", "finished"]


def test_a_refusal_to_begin_ends_a_first_attempt_at_once_and_a_restart_after_ten_minutes(tmp_path: Path) -> None:
    def refuse() -> int:
        raise UserError("store", "an answer", "none", "mend it")

    def lose_the_store_and_die() -> None:
        driver.take = refuse
        die()

    driver = Driver(tmp_path, lose_the_store_and_die)
    with pytest.raises(UserError, match="store: expected an answer"):
        driver.supervise()
    assert driver.now_s == 600 and driver.outcomes() == ["died"]
    driver.now_s = 0
    with pytest.raises(UserError, match="store: expected an answer"):
        driver.supervise()
    assert driver.now_s == 0 and driver.launched == [1]


def test_a_stop_ends_the_wait_for_a_store(tmp_path: Path) -> None:
    def lose_the_store_and_die() -> None:
        driver.store.away = lambda: True  # type: ignore[method-assign]
        die()

    driver = Driver(tmp_path, lose_the_store_and_die)
    driver.pause = lambda seconds: driver.stop.set()  # type: ignore[method-assign]
    with pytest.raises(WorkerDied):
        driver.supervise()
    assert driver.launched == [1]


def test_a_stop_that_got_no_save_is_refused_and_so_is_one_of_a_run_that_never_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = LocalStore(tmp_path / "run")
    with pytest.raises(UserError, match="run tiny: expected to be running, found no attempts in"):
        supervise.stop_run(store, "tiny")

    def stop_ending(outcome: Any) -> tuple[int, dict[str, Any]]:
        """The command, on an attempt that answers the request by ending so."""
        take_attempt(store, {"config": {}})

        def answer(asked: LocalStore, attempt: int) -> None:
            request_stop(asked, attempt)
            record_end(asked, AttemptEnd(attempt, outcome, 32, "its/checkpoint"))

        monkeypatch.setattr(supervise, "request_stop", answer)
        return run(["stop", store.uri, "--json"]), json.loads(capsys.readouterr().out)

    for attempt, outcome in enumerate(("died", "failed"), 1):
        code, said = stop_ending(outcome)
        assert code == 1 and f"expected a save at the stop, found attempt {attempt}, which {outcome}" in said["error"]
    assert stop_ending("stopped")[1] | {"run": ""} == {
        "run": "", "attempt": 3, "outcome": "stopped", "position": 32, "checkpoint": "its/checkpoint",
    }  # fmt: skip
