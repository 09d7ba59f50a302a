"""`glidepath status RUN`: attempts of every kind of end, and the share of time that counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import lease
from cluster.cli import run
from cluster.lease import DriverLease
from data_pipeline.storage import LocalStore, canonical_json
from trainer.checkpoint.attempts import take_attempt
from trainer.checkpoint.manifest import CheckpointName
from trainer.quarantine import SkipList, Skipped
from trainer.stop import AttemptEnd, record_end

Cli = Callable[..., tuple[int, Any, str]]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A run with an attempt of before its record had figures, a death, a resize, and one whose driver was lost."""
    store = LocalStore(tmp_path / "run")
    for _ in range(4):
        take_attempt(store, {"config": {"run": "tiny", "images": 4096}})
    store.put(
        "ended/00001.json", [canonical_json({"attempt": 1, "outcome": "died", "position": 16, "checkpoint": "c"})]
    )
    times: dict[str, Any] = {"began_at": "2026-03-01T10:00:00+00:00", "workers": 2}
    found = {
        "cause": "hung",
        "error": "worker 1: expected to get on, found 60 s in forward",
        "rank": 1,
        "node": "b" * 56,
    }
    died = AttemptEnd(2, "died", 32, "c", seconds=100.0, from_images=16, images=64, counted_s=20.0, **found, **times)
    record_end(store, died)
    resize = {"error": "node b leaves in 60 s", **times}
    record_end(
        store, AttemptEnd(3, "resized", 96, "c", seconds=60.0, from_images=32, images=96, counted_s=50.0, **resize)
    )
    store.put(CheckpointName(1120, 4).manifest_key, [b"{}"])
    skipped = SkipList(store)
    skipped.add(Skipped("rollback", 48, 64, "loss is not finite", 2))
    skipped.write()
    return store


def drive(store: LocalStore, figures: dict[str, Any]) -> None:
    with DriverLease(store) as held:
        held.hold(4, lambda: figures)


FIGURES = {"workers": 1, "began_at": "2026-03-01T10:05:00+00:00", "from_images": 96, "images": 2144}
FIGURES |= {"seconds": 240.0, "steps_s": 200.0}


def test_status_counts_what_the_run_kept_and_names_cause_and_place(
    store: LocalStore, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive(store, FIGURES)
    code, said, _ = cli("status", store.uri)
    assert code == 0 and said["driver"]["alive"] and (said["images"], said["of_images"]) == (2144, 4096)
    assert said["goodput"] == round((20 + 50 + 200) / (100 + 60 + 240), 4), "steps under way count"
    assert [row["outcome"] for row in said["attempts"]] == ["died", "died", "resized", "runs"]
    assert {key: said["attempts"][1][key] for key in ("cause", "rank", "workers", "position")} == {
        "cause": "hung", "rank": 1, "workers": 2, "position": 32,
    }  # fmt: skip
    assert said["attempts"][0]["seconds"] is None and said["skipped"][0]["reason"] == "loss is not finite"
    assert said["checkpoint"] == f"{store.uri}/checkpoints/images-000001120/attempt-4"

    monkeypatch.setattr(lease, "is_alive", lambda process: False)
    code, said, _ = cli("status", store.uri)
    assert code == 0 and not said["driver"]["alive"]
    lost = said["attempts"][3]
    assert (lost["outcome"], lost["position"], lost["counted_s"]) == ("driver lost", 1120, 100.0), "half of its steps"
    assert said["goodput"] == round((20 + 50 + 100) / 400, 4)


def test_status_for_people_is_a_summary_and_a_row_for_each_attempt(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    drive(store, FIGURES)
    assert run(["status", store.uri]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("goodput") and "67.5% of its drivers' time" in line for line in lines)
    assert any(line.startswith("runs") and "yes: process" in line for line in lines)
    [died] = [line for line in lines if line.lstrip().startswith("2 ")]
    assert "rank 1 node bbbbbbbbbbbb" in died and "found 60 s in forward" in died
    assert any("rollback" in line and "loss is not finite" in line for line in lines)


def test_status_of_a_run_that_is_not_there_is_refused_in_one_line(tmp_path: Path, cli: Cli) -> None:
    code, said, _ = cli("status", str(tmp_path / "none"))
    assert code == 1 and "neither; check the URI or the name" in said["error"]
