"""Stopping: a request in the store ends a run at a step, with a checkpoint there, and nothing else removes it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trainer.stop
from data_pipeline.errors import UserError
from data_pipeline.storage import LocalStore
from trainer.checkpoint.manifest import committed
from trainer.checkpoint.sweep import sweep
from trainer.engine.group import Group
from trainer.recipes import parse_train_config
from trainer.run import prepare_run, tracking_folder, train
from trainer.stop import AttemptEnd, StopWatch, read_end, record_end, request_stop
from trainer.tracking.jsonl import read_curves, read_events

Values = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.stop, "POLL_S", 0.01)


@pytest.mark.usefixtures("one_thread")
def test_a_run_saves_where_it_was_asked_to_stop_and_goes_on_from_there(train_values: Values) -> None:
    values = train_values(
        images=10**6, checkpoint={"every_images": 10**6}, samples={"prompts": ["a"], "sampling": {"spacing": "2"}}
    )
    store = LocalStore(Path(values["store"]))
    events: list[dict[str, Any]] = []

    def report(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "progress":
            request_stop(store, 1)

    config = parse_train_config(values, "test")
    train(config.model_dump(mode="json"), prepare_run(config), Group(), report)
    result = events[-1]
    assert result["event"] == "result" and result["stopped"] and result["samples"] is None
    [saved] = committed(store)
    assert result["images"] == saved.position == events[-2]["images"] > 0
    assert result["checkpoint"].endswith(saved.folder.rstrip("/"))

    config = parse_train_config(values | {"images": saved.position + 32}, "test")
    events.clear()
    train(config.model_dump(mode="json"), prepare_run(config), Group(), events.append)
    first = next(event for event in events if event["event"] == "progress")
    assert first["images"] == saved.position + 16 and not events[-1]["stopped"]


@pytest.mark.usefixtures("one_thread")
def test_a_stop_before_the_first_step_saves_nothing_and_later_ones_leave_evaluation_and_grids_undone(
    train_values: Values, dataset_uri: str
) -> None:
    heldout = {"dataset": dataset_uri, "images": 32, "every_images": 16}
    samples = {"prompts": ["a"], "every_images": 16, "sampling": {"spacing": "2"}}
    values = train_values(images=32, heldout=heldout, samples=samples)
    store, config = LocalStore(Path(values["store"])), parse_train_config(values, "test")

    def trained(stop_at: int | None) -> tuple[list[int], dict[str, Any]]:
        """An attempt that hears of a stop at that position; the positions it reached, and its result."""
        attempt, events = prepare_run(config), []
        if stop_at == 0:
            request_stop(store, attempt)

        def report(event: dict[str, Any]) -> None:
            events.append(event)
            if event.get("images") == stop_at and event["event"] == "progress":
                request_stop(store, attempt)
                for thread in threading.enumerate():
                    if thread.name == "stop-watch":
                        thread.join(30)

        train(config.model_dump(mode="json"), attempt, Group(), report)
        return [event["images"] for event in events if event["event"] == "progress"], events[-1]

    def told(kind: str) -> list[tuple[int, int]]:
        return [(line["attempt"], line["images"]) for line in read_events(tracking_folder(config), kind)]

    positions, result = trained(stop_at=0)
    assert positions == [] and result["stopped"] and result["checkpoint"] is None and not committed(store)
    positions, result = trained(stop_at=16)
    assert positions == [16] and result["stopped"] and [name.position for name in committed(store)] == [16]
    positions, result = trained(stop_at=32)
    assert positions == [32] and result["stopped"] and committed(store)[0].position == 32
    assert told("evaluation-left") == [(1, 0), (2, 16), (3, 32)] and told("samples-left") == [(2, 16)]
    curve = read_curves(tracking_folder(config))["heldout/total"]
    assert list(curve) == [0], "of the second attempt's start"
    positions, result = trained(stop_at=None)
    assert positions == [] and not result["stopped"] and result["samples"] and result["heldout"]
    assert list(read_curves(tracking_folder(config))["heldout/total"]) == [0, 32]


def test_requests_and_ends_are_kept_by_attempt_and_no_sweep_takes_them(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    end = AttemptEnd(2, "stopped", 64, "somewhere")
    request_stop(store, 2)
    request_stop(store, 2)
    record_end(store, end)
    (tmp_path / "stop" / f".upload-{'0' * 32}-00003.json").touch()
    assert sweep(store, 4) == 0
    assert read_end(store, 2) == end and read_end(store, 3) is None
    (tmp_path / "ended" / "00002.json").write_text("{")
    with pytest.raises(UserError, match=r"ended/00002.json: expected an attempt's JSON record"):
        read_end(store, 2)


class DeafOnce(LocalStore):
    """Fails the first look."""

    looks = 0

    def exists(self, key: str) -> bool:
        self.looks += 1
        if self.looks == 1:
            raise OSError("no answer")
        return super().exists(key)


def test_a_store_that_does_not_answer_does_not_end_the_watch(tmp_path: Path) -> None:
    store = DeafOnce(tmp_path)
    request_stop(store, 1)
    with StopWatch(store, 1, watching=True) as watch:
        assert watch._thread is not None
        watch._thread.join(30)
        assert watch.asked and store.looks == 2
