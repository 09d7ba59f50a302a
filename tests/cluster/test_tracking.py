"""The driver's notes of a run: what happens between the workers and it is an event of the run like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.tracking import TrackedRun
from trainer.recipes import parse_train_config
from trainer.run import tracking_folder
from trainer.tracking.jsonl import read_events


def test_a_slow_and_a_hung_rank_are_events_of_the_run_where_they_happened(
    train_values: Callable[..., dict[str, Any]],
) -> None:
    config = parse_train_config(train_values(), "test")
    with TrackedRun(config) as tracked:
        tracked.begin(3, 2)
        tracked.watch({"event": "progress", "images": 48})
        tracked.watch({"event": "straggler", "rank": 1, "node": "node-b", "factor": 2.9})
        tracked.watch({"event": "hung", "rank": 0, "node": "node-a", "section": "data", "seconds": 601.0})
        tracked.end("FINISHED")
    [slow], [hung] = (read_events(tracking_folder(config), kind) for kind in ("straggler", "hung"))
    assert (slow["attempt"], slow["images"]) == (hung["attempt"], hung["images"]) == (3, 48)
    assert slow["text"] == "rank 1 on node-b: 2.9 times the others' work"
    assert hung["text"] == "rank 0 on node-a: in data"
