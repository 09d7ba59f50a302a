"""Stopping: a request in the store ends a run at a step, with a checkpoint there, and nothing else removes it."""

from __future__ import annotations

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
from trainer.run import prepare_run, train
from trainer.stop import AttemptEnd, StopWatch, read_end, record_end, request_stop

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
    assert events[0]["images"] == saved.position + 16 and not events[-1]["stopped"]


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
