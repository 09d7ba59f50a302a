"""The jsonl tracker: appended lines, the highest attempt counts, nothing stops the training."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest

from trainer.tracking.jsonl import METRICS, JsonlTracker, read_curves, read_events


def test_where_a_resumed_run_passes_a_point_again_the_later_attempt_counts(tmp_path: Path) -> None:
    for attempt, losses in ((1, {16: 1.0, 32: 0.9}), (2, {32: 0.8, 48: 0.7})):
        tracker = JsonlTracker(tmp_path, attempt)
        for images, loss in losses.items():
            tracker.log(images, {"loss": loss})
    assert read_curves(tmp_path) == {"loss": {16: 1.0, 32: 0.8, 48: 0.7}}


def test_a_line_that_a_killed_process_left_unfinished_spoils_no_other(tmp_path: Path) -> None:
    JsonlTracker(tmp_path, 1).log(16, {"loss": 1.0})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"attempt": 1, "images": 32, "val')
    JsonlTracker(tmp_path, 2).log(48, {"loss": 0.5})
    assert read_curves(tmp_path) == {"loss": {16: 1.0, 48: 0.5}}


def test_a_value_that_is_no_number_becomes_an_event(tmp_path: Path) -> None:
    JsonlTracker(tmp_path, 1).log(16, {"loss": math.nan, "lr": 0.1})
    assert read_curves(tmp_path) == {"lr": {16: 0.1}}
    assert [event["text"] for event in read_events(tmp_path, "not-finite")] == ["loss is nan"]


def test_a_tracker_that_cannot_write_does_not_stop_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    JsonlTracker(tmp_path / "file" / "below", 1).log(16, {"loss": 1.0})


def test_a_disk_that_is_full_for_a_while_costs_the_lines_of_that_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = JsonlTracker(tmp_path, 1)
    tracker.log(16, {"loss": 1.0})

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[: len(data) // 2])

    tracker._file = Full(tmp_path / METRICS, "ab")
    tracker.log(32, {"loss": 0.9})
    tracker.log(48, {"loss": 0.8})
    tracker.close()
    assert read_curves(tmp_path) == {"loss": {16: 1.0, 48: 0.8}}
    assert "a line was lost: only a part of it was written" in caplog.text
