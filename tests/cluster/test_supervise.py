"""The driver: when a run whose workers died goes on, and when it is left to end. No workers, no clock, no waiting."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import wait_for

from cluster import stopping, supervise
from cluster.cli import run
from cluster.launch import Event, NoRoom, WorkerDied
from cluster.supervise import SupervisedRun
from data_pipeline.config import parse
from data_pipeline.errors import UserError
from data_pipeline.storage import LocalStore
from data_pipeline.storage.store import ObjectInfo
from trainer.checkpoint.attempts import Superseded, newest_attempt, take_attempt
from trainer.checkpoint.manifest import CheckpointName
from trainer.config import LauncherSettings
from trainer.stop import AttemptEnd, asked_of, read_end, record_end, request_stop

FINISHED: Event = {"stopped": False}
STOPPED: Event = {"stopped": True}


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
    """A run of which attempt n does `attempts[n - 1]`; those after these finish. Its own launcher."""

    def __init__(self, folder: Path, *attempts: Callable[[], None], **settings: Any) -> None:
        self.store = Away(folder)
        self.attempts = attempts
        self.settings = parse(LauncherSettings, {"restart": {"backoff_s": 1}} | settings, "test")
        self.stop = threading.Event()
        self.launched: list[int] = []  # workers of each attempt
        self.events: list[Event] = []
        self.now_s = 0.0
        self.take = lambda: take_attempt(self.store, {"config": {}})
        self.took: list[int] = []  # without knowing it
        self.rooms: dict[str, int] = {"a": 64}  # by node
        self.drained: dict[str, float] = {}
        self.excluded: list[str] = []
        self.looks = 0  # for room

    def supervise(self, restart: bool = True) -> tuple[int, Event]:
        run = SupervisedRun(
            self.store, self.settings, lambda: self.take(), lambda attempt, workers: {}, self.events.append,
            lambda attempt: attempt in self.took,
        )  # fmt: skip
        return supervise.supervise(
            run, self, restart, self.stop, clock=lambda: self.now_s, pause=lambda seconds: self.pause(seconds)
        )

    def launch(self, spec: Any, workers: int, on_event: Callable[[Event], None]) -> Event:
        self.launched.append(workers)
        self.tell = on_event
        on_event({"event": "started", "pids": [], "node_ids": sorted(self.rooms)})
        for does in self.attempts[len(self.launched) - 1 : len(self.launched)]:
            does()
        asked = asked_of(self.store, newest_attempt(self.store))
        return {"stopped": asked is not None}

    def room(self, at_most: int, without: str | None = None) -> int:
        self.looks += 1
        stay = self.rooms.keys() - {without, *self.excluded, *self.drained}
        return min(at_most, sum(self.rooms[node] for node in stay))

    def leaving(self) -> dict[str, float]:
        return self.drained

    def exclude(self, node: str) -> None:
        self.excluded.append(node)

    def close(self) -> None:
        raise AssertionError("the driver closes no launcher that it has not opened")

    def pause(self, seconds: float) -> None:
        self.now_s += seconds

    def commit(self, images: int) -> None:
        """A checkpoint of the attempt that runs."""
        name = CheckpointName(images, newest_attempt(self.store))
        self.store.put_if_absent(name.manifest_key, b"{}")

    def progress(self, images: int, step_s: float = 1.0) -> None:
        self.now_s += step_s
        self.tell({"event": "progress", "images": images, "time/step_s": step_s})

    def wait_for_request(self) -> None:
        attempt = newest_attempt(self.store)
        wait_for(lambda: asked_of(self.store, attempt), 20)

    def wait_for_looks(self) -> None:
        """Until the driver has seen what there is room for now."""
        looks = self.looks + 2  # one may be under way
        wait_for(lambda: self.looks >= looks, 20)

    def ends(self) -> list[AttemptEnd | None]:
        self.store.away = lambda: False  # type: ignore[method-assign]
        return [read_end(self.store, attempt) for attempt in range(1, newest_attempt(self.store) + 1)]

    def outcomes(self) -> list[str | None]:
        return [end.outcome if end else None for end in self.ends()]


def die() -> None:
    raise WorkerDied("worker 1", "a result", "SIGKILL", "see its log")


@pytest.fixture(autouse=True)
def quick_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "RELAY_POLL_S", 0.001)
    monkeypatch.setattr(supervise, "WATCH_POLL_S", 0.001)


def test_a_run_goes_on_after_deaths_until_the_budget_is_spent_since_a_checkpoint(tmp_path: Path) -> None:
    def commit_and_die() -> None:
        driver.commit(16 * len(driver.launched))
        die()

    budgets = {"restart": {"budgets": {"killed": 2}, "backoff_s": 1}}
    driver = Driver(tmp_path / "gets-on", die, die, commit_and_die, die, die, **budgets)
    assert driver.supervise() == (6, FINISHED)
    assert driver.outcomes() == ["died"] * 5 + ["finished"]
    assert [(e["event"], e["attempt"]) for e in driver.events if e["event"] == "restart"] == [
        ("restart", attempt) for attempt in range(1, 6)
    ]
    reasons = [event["reason"] for event in driver.events if event["event"] == "restart"]
    assert all("SIGKILL" in reason for reason in reasons) and driver.now_s == 2, "a pause before each second restart"

    driver = Driver(tmp_path / "does-not", die, commit_and_die, die, die, die, **budgets)
    with pytest.raises(
        WorkerDied, match="worker 1, attempt 5: expected at most 2 restarts of the cause killed between"
    ):
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
    assert len(driver.launched) == 1 and driver.outcomes() == ["died", None]


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
    assert len(driver.launched) == 1 and driver.outcomes() == ["died"]


def test_a_store_that_is_away_when_workers_die_is_waited_for_and_the_death_counts_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def lose_the_store_and_die() -> None:
        back_s = driver.now_s + 100
        driver.store.away = lambda: driver.now_s < back_s  # type: ignore[method-assign]
        die()

    driver = Driver(tmp_path, lose_the_store_and_die, lose_the_store_and_die)
    assert driver.supervise() == (3, FINISHED)
    assert driver.now_s == 201 and caplog.text.count("no answer; trying again in 5 s") == 40
    assert driver.outcomes() == ["died", "died", "finished"]


def test_an_attempt_whose_taking_was_not_answered_is_not_another_drivers(tmp_path: Path) -> None:
    def take_unheard() -> int:
        driver.took.append(take_attempt(driver.store, {"config": {}}))
        driver.take = lambda: take_attempt(driver.store, {"config": {}})
        raise OSError("the answer was lost")

    def die_and_go_on_unheard() -> None:
        driver.take = take_unheard
        die()

    driver = Driver(tmp_path, die_and_go_on_unheard)
    assert driver.supervise() == (3, FINISHED)
    assert driver.took == [2] and driver.outcomes() == ["died", None, "finished"]


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


@pytest.mark.parametrize("asked", ["in the store", "of the driver"])
def test_a_stop_while_nothing_runs_ends_the_run_well_at_its_newest_checkpoint(tmp_path: Path, asked: str) -> None:
    def commit_and_die() -> None:
        driver.store.put_if_absent(CheckpointName(32, 1).manifest_key, b"{}")
        die()

    def stop_in_the_pause(seconds: float) -> None:
        if asked == "in the store":
            request_stop(driver.store, 3)
        else:
            driver.stop.set()

    driver = Driver(tmp_path, commit_and_die, die, die)
    driver.pause = stop_in_the_pause  # type: ignore[method-assign]
    attempt, result = driver.supervise()
    assert attempt == 3 and result["stopped"] and result["images"] == 32 and len(driver.launched) == 3
    assert result["checkpoint"] == f"{driver.store.uri}/checkpoints/images-000000032/attempt-1"
    assert driver.outcomes() == ["died", "died", "stopped"]
    end = read_end(driver.store, 3)
    assert end is not None and end.cause == "killed" and end.position == 32

    driver.stop.set()  # before it takes an attempt
    attempt, result = driver.supervise()
    assert (attempt, result["images"], result["stopped"]) == (3, 32, True) and newest_attempt(driver.store) == 3


def test_a_stop_ends_the_wait_for_a_store(tmp_path: Path) -> None:
    def lose_the_store_and_die() -> None:
        driver.store.away = lambda: True  # type: ignore[method-assign]
        die()

    driver = Driver(tmp_path, lose_the_store_and_die)
    driver.pause = lambda seconds: driver.stop.set()  # type: ignore[method-assign]
    with pytest.raises(WorkerDied):
        driver.supervise()
    assert len(driver.launched) == 1


def test_a_node_that_leaves_costs_no_death_and_the_run_shrinks_and_grows_with_what_there_is_room_for(
    tmp_path: Path,
) -> None:
    def drain_b() -> None:
        driver.drained = {"b": 60.0}
        driver.wait_for_request()
        driver.commit(16)
        driver.rooms, driver.drained = {"a": 1}, {}

    def get_b_back() -> None:
        driver.rooms = {"a": 1, "c": 1}
        driver.wait_for_looks()
        driver.now_s += 29
        driver.wait_for_looks()
        assert asked_of(driver.store, 2) is None, "only room that stayed"
        driver.now_s += 2
        driver.wait_for_request()

    driver = Driver(tmp_path, drain_b, get_b_back, workers=2, min_workers=1, grow_after_s=30)
    driver.rooms = {"a": 1, "b": 1}
    assert driver.supervise() == (3, FINISHED)
    assert driver.launched == [2, 1, 2] and driver.outcomes() == ["resized", "resized", "finished"]
    assert [event for event in driver.events if event["event"] != "started"] == [
        {"event": "resize", "attempt": 1, "from": 2, "to": 1, "reason": "node b leaves in 60 s"},
        {"event": "resize", "attempt": 2, "from": 1, "to": 2, "reason": "room for 2 workers instead of 1"},
    ]


def test_a_run_without_room_after_a_drain_waits_and_then_ends_as_stopped(tmp_path: Path) -> None:
    def drain(*, back_s: float) -> None:
        driver.drained = {"a": float("inf")}
        driver.wait_for_request()
        waits_until = driver.now_s + back_s

        def pause(seconds: float) -> None:
            driver.now_s += seconds
            driver.drained = {} if driver.now_s >= waits_until else driver.drained

        driver.pause = pause  # type: ignore[method-assign]

    driver = Driver(tmp_path / "back", lambda: drain(back_s=500), workers=2)
    assert driver.supervise() == (2, FINISHED) and driver.now_s >= 500
    driver = Driver(tmp_path / "gone", lambda: drain(back_s=700), workers=2)
    attempt, result = driver.supervise()
    assert (attempt, result["stopped"]) == (1, True) and driver.outcomes() == ["stopped"]
    assert result["stop_reason"] == (
        "node a leaves soon; expected room for 2 workers within 600 s, found room for 0; "
        "the same command goes on from the newest checkpoint when there is room"
    )


def test_whoever_wants_the_run_stopped_wins_over_its_driver_that_wants_another_size(tmp_path: Path) -> None:
    def drain(*, then: Callable[[], None]) -> None:
        driver.drained = {"a": 60.0}
        driver.wait_for_request()
        then()

    driver = Driver(tmp_path / "before the save", lambda: drain(then=lambda: request_stop(driver.store, 1)), workers=2)
    assert driver.supervise() == (1, STOPPED) and driver.outcomes() == ["stopped"]

    def stop_while_waiting(seconds: float) -> None:
        request_stop(driver.store, 1)

    driver = Driver(tmp_path / "while there is no room", lambda: drain(then=lambda: None), workers=2)
    driver.pause = stop_while_waiting  # type: ignore[method-assign]
    assert driver.supervise() == (1, STOPPED) and driver.outcomes() == ["stopped"] and driver.now_s == 0


def test_a_lost_node_makes_an_elastic_run_smaller_and_a_fixed_one_wait_for_room(tmp_path: Path) -> None:
    def lose_b() -> None:
        driver.rooms = {"a": 1}
        raise WorkerDied("worker 1", "a result", "its node died", "see its log", "node-lost", 1, "b")

    driver = Driver(tmp_path / "elastic", lose_b, workers=2, min_workers=1)
    driver.rooms = {"a": 1, "b": 1}
    assert driver.supervise() == (2, FINISHED) and driver.launched == [2, 1]
    [end, _] = driver.ends()
    assert end is not None and (end.cause, end.rank, end.node, end.workers) == ("node-lost", 1, "b", 2)
    assert end.error == "worker 1: expected a result, found its node died; see its log"

    driver = Driver(tmp_path / "fixed", lose_b, workers=2)
    driver.rooms = {"a": 1, "b": 1}
    with pytest.raises(NoRoom, match="expected room for 2 workers within 600 s, found room for 1; the same command"):
        driver.supervise()
    assert driver.launched == [2] and driver.now_s == 600 and driver.outcomes() == ["died"]


def test_a_node_where_death_after_death_begins_is_left_out_if_there_is_room_without_it(tmp_path: Path) -> None:
    def die_on_b() -> None:
        driver.commit(16 * len(driver.launched))
        raise WorkerDied("worker 1", "a result", "SIGKILL", "see its log", "hung", 1, "b")

    driver = Driver(tmp_path / "room", *[die_on_b] * 3, workers=2, min_workers=1)
    driver.rooms = {"a": 1, "b": 1}
    assert driver.supervise() == (4, FINISHED)
    assert driver.launched == [2, 2, 2, 1] and driver.excluded == ["b"]
    driver = Driver(tmp_path / "no room", *[die_on_b] * 5, workers=2)
    driver.rooms = {"a": 1, "b": 1}
    assert driver.supervise() == (6, FINISHED) and driver.excluded == []
    driver = Driver(tmp_path / "alone", *[die_on_b] * 5, workers=2, min_workers=1)
    driver.rooms = {"b": 2}
    assert driver.supervise() == (6, FINISHED) and driver.excluded == []


def test_a_run_begins_with_what_there_is_room_for_and_refuses_at_once_without_room(tmp_path: Path) -> None:
    def refuse() -> None:
        raise NoRoom("Ray cluster", "room for 2 workers", "room for 1", "wait")

    driver = Driver(tmp_path / "less", workers=8, min_workers=2)
    driver.rooms = {"a": 3}
    assert driver.supervise() == (1, FINISHED) and driver.launched == [3]
    driver = Driver(tmp_path / "none", refuse, workers=8, min_workers=2)
    driver.rooms = {"a": 1}
    with pytest.raises(NoRoom):
        driver.supervise()
    assert driver.launched == [2] and driver.now_s == 0


def test_an_attempt_that_dies_after_it_was_asked_to_make_way_is_no_death_of_the_run(tmp_path: Path) -> None:
    def die_while_leaving() -> None:
        driver.drained = {"b": 1.0}
        driver.wait_for_request()
        driver.rooms, driver.drained = {"a": 1, "c": 1}, {}
        die()

    driver = Driver(tmp_path, die_while_leaving, workers=2, restart={"budgets": {"killed": 0}})
    driver.rooms = {"a": 1, "b": 1}
    assert driver.supervise() == (2, FINISHED) and driver.outcomes() == ["died", "finished"]


def test_the_record_of_an_attempt_counts_the_steps_that_the_run_keeps(tmp_path: Path) -> None:
    def step_roll_back_and_die() -> None:
        driver.tell({"event": "loaded", "images": 64})
        driver.commit(64)
        for images in (80, 96, 112):
            driver.progress(images, 2.0)
        driver.tell({"event": "rollback", "images": 112, "to_images": 80})
        driver.commit(112)
        driver.progress(128, 3.0)
        driver.commit(128)
        driver.progress(144, 5.0)
        die()

    driver = Driver(tmp_path, step_roll_back_and_die)
    driver.supervise()
    end = driver.ends()[0]
    assert end is not None and (end.from_images, end.images, end.position) == (64, 144, 128)
    assert end.seconds == 14 and end.counted_s == 5, "2 s up to 80, then 3 s; undone: 4 s; taken again: 5 s"


def test_a_stop_that_got_no_save_is_refused_and_so_is_one_of_a_run_that_never_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = LocalStore(tmp_path / "run")
    with pytest.raises(UserError, match="run tiny: expected to be running, found no attempts in"):
        stopping.stop_run(store, "tiny")

    def stop_ending(outcome: Any) -> tuple[int, dict[str, Any]]:
        """The command, on an attempt that answers the request by ending so."""
        take_attempt(store, {"config": {}})

        def answer(asked: LocalStore, attempt: int) -> None:
            request_stop(asked, attempt)
            record_end(asked, AttemptEnd(attempt, outcome, 32, "its/checkpoint"))

        monkeypatch.setattr(stopping, "request_stop", answer)
        return run(["stop", store.uri, "--json"]), json.loads(capsys.readouterr().out)

    for attempt, outcome in enumerate(("died", "failed"), 1):
        code, said = stop_ending(outcome)
        assert code == 1 and f"expected a save at the stop, found attempt {attempt}, which {outcome}" in said["error"]
    said = stop_ending("stopped")[1] | {"run": ""}
    assert {name: value for name, value in said.items() if value is not None} == {
        "run": "", "attempt": 3, "outcome": "stopped", "position": 32, "checkpoint": "its/checkpoint",
    }  # fmt: skip
