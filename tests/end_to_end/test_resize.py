"""A run that changes its size while it goes on: real workers on this machine, a launcher that says what there is room
for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support import consumed_ids, ids_in_order

from cluster import supervise
from cluster.launch import Event
from cluster.local_launch import LocalLauncher
from cluster.supervise import SupervisedRun
from data_pipeline.storage import LocalStore
from trainer.recipes import parse_train_config
from trainer.run import prepare_run
from trainer.stop import read_end

Values = Callable[..., dict[str, Any]]


class TwoNodes(LocalLauncher):
    """Two nodes with room for one worker each. The second leaves once the run got on, and returns when it did again."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []  # of the attempts so far
        self.steps = 0  # of the attempt that runs

    def launch(self, spec: dict[str, Any], workers: int, on_event: Callable[[Event], None]) -> Event:
        self.steps = 0
        self.sizes.append(workers)

        def watch(event: Event) -> None:
            self.steps += event["event"] == "progress"
            on_event(event | ({"node_ids": ["a", "b"][:workers]} if event["event"] == "started" else {}))

        return super().launch(spec, workers, watch)

    def room(self, at_most: int, without: str | None = None) -> int:
        back = self.sizes[-1:] == [1] and self.steps > 2
        return min(at_most, 1 if self.leaving() or (len(self.sizes) == 2 and not back) else 2)

    def leaving(self) -> dict[str, float]:
        return {"b": 60.0} if len(self.sizes) == 1 and self.steps > 2 else {}


@pytest.mark.parametrize(
    "sizes", [pytest.param([2, 1], id="two-one"), pytest.param([2, 1, 2], id="two-one-two", marks=pytest.mark.drill)]
)
def test_a_run_goes_from_two_workers_to_one_and_back_when_a_node_leaves_and_returns_and_misses_no_sample(
    sizes: list[int], train_values: Values, dataset_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "WATCH_POLL_S", 0.05)
    settings = {"workers": 2, "min_workers": 1, "grow_after_s": 0.1}
    values = train_values(images=10**6, launcher=settings, checkpoint={"every_images": 10**6})
    config = parse_train_config(values, "test")
    store, launcher, stop = LocalStore(Path(values["store"])), TwoNodes(), threading.Event()
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if launcher.sizes == sizes and launcher.steps == 2:
            stop.set()  # before the node returns, where it is not to

    def begin(attempt: int, workers: int) -> dict[str, Any]:
        return {"values": config.model_dump(mode="json"), "attempt": attempt}

    run = SupervisedRun(store, config.launcher, lambda: prepare_run(config), begin, on_event, lambda attempt: False)
    attempt, result = supervise.supervise(run, launcher, restart=True, stop=stop)

    assert (attempt, launcher.sizes) == (len(sizes), sizes) and result["stopped"] and "stop_reason" not in result
    resizes = [event for event in events if event["event"] == "resize"]
    assert [(event["from"], event["to"]) for event in resizes] == list(pairwise(sizes))
    reasons = ["node b leaves in 60 s", "room for 2 workers instead of 1"]
    assert [event["reason"] for event in resizes] == reasons[: len(resizes)]
    ends = [end for number in range(1, len(sizes) + 1) if (end := read_end(store, number))]
    outcomes = ["resized"] * len(resizes) + ["stopped"]
    assert [(end.outcome, end.workers) for end in ends] == list(zip(outcomes, sizes, strict=True))
    assert ends[0].from_images == 0 and ends[-1].position == result["images"]
    assert all(before.position == before.images == after.from_images for before, after in pairwise(ends))
    assert all(end.counted_s and end.seconds and end.counted_s < end.seconds for end in ends)

    assert consumed_ids(values["store"]) == ids_in_order(dataset_uri, config.seed, 16, result["images"])
