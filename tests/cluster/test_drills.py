"""The drills: the command and its scoreboard, and short samples of the drills that have no other test of their own."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from cluster import cli, drill_commands
from cluster.drills import corruption, crash_points, faulty_store, full_disk, kills, leaving, registry, zero_chain
from cluster.drills.registry import Drill
from cluster.drills.scoreboard import CannotRun, Score, run_all
from cluster.drills.scratch import Wishes, scratch
from cluster.faults import FaultyLink
from cluster.launch import WorkerDied
from data_pipeline.storage import LocalStore
from trainer.checkpoint.manifest import CheckpointName


def cannot(_: Any) -> Score:
    raise CannotRun("no such server")


@pytest.fixture
def easy_drills(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that passes and says what it was asked, one that fails, one that cannot run."""
    drills = {
        "R1": Drill("", lambda place: Score(place.wishes.faults or 0, {"seed": place.wishes.seed})),
        "R2": Drill("", lambda place: Score(1, {}, ["a part differs"])),
        "R3": Drill("", cannot),
    }
    monkeypatch.setattr(registry, "DRILLS", drills)


@pytest.mark.usefixtures("easy_drills")
def test_the_scoreboard_has_a_row_for_each_drill_and_the_exit_code_says_whether_all_passed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["drill", "R1", "--seed", "7", "--faults", "3", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {"id": "R1", "faults": 3, "passed": True, "figures": {"seed": 7}, "failures": []}
    assert cli.run(["drill", "R1", "R2", "R3", "--json"]) == 1
    told = capsys.readouterr()
    rows = json.loads(told.out)
    assert [row["passed"] for row in rows] == [True, False, False]
    assert rows[2]["figures"] == {"cannot_run": "no such server"} and "R2: a part differs" in told.err
    assert cli.run(["drill", "R1", "R3"]) == 1
    assert "cannot run" in capsys.readouterr().out
    assert cli.run(["drill", "R99"]) == 2
    assert "drill R99: expected R1, R2" in capsys.readouterr().err


def test_a_drill_that_ends_with_an_error_has_not_passed_and_costs_no_other_its_row(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def die() -> Score:
        raise WorkerDied("rank 1", "a result", "exit code 3", "see its log above")

    def interrupted() -> Score:
        raise KeyboardInterrupt

    rows = list(run_all({"R1": die, "R3": lambda: Score(1, {})}))
    assert [(row.id, row.passed) for row in rows] == [("R1", False), ("R3", True)]
    assert rows[0].failures[0].startswith("ended by WorkerDied: rank 1: expected a result, found exit code 3")
    assert "Traceback" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        list(run_all({"R1": interrupted}))


def test_a_start_that_trained_and_told_of_no_resume_fails_r1(monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = kills.Campaign(
        kills=2,
        expected={("a", 1): None, ("a", 2): CheckpointName(16, 1), ("a", 3): CheckpointName(32, 2)},
        trained={("a", 1), ("a", 3)},  # 2 was killed before it had read it
    )
    monkeypatch.setattr(kills, "kill_workers", lambda place: campaign)
    score = kills.resume_drill(None)  # type: ignore[arg-type]
    assert score.failures == [f"a, attempt 3: trained without going on from {CheckpointName(32, 2)}"]
    campaign.resumed.append(("a", 3, f"from {CheckpointName(32, 2)}, world size 2 then, 2 now"))
    assert not kills.resume_drill(None).failures  # type: ignore[arg-type]


def test_losses_that_are_missing_count_as_infinitely_far_off() -> None:
    assert zero_chain.deviations({16: 1.0, 32: 1.1}, {16: 1.0, 32: 1.0}) == pytest.approx([0.0, 0.1])
    assert zero_chain.deviations({16: 1.0}, {16: 1.0, 32: 1.0}) == [0.0, math.inf]
    assert zero_chain.deviations({16: 1.0}, {}) == [math.inf]


def test_a_script_of_faults_that_breaks_ends_the_run_and_fails_the_drill(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(script: faulty_store.Script) -> None:
        raise ValueError("no such phase")

    monkeypatch.setattr(faulty_store.Script, "_play", broken)
    link: FaultyLink = None  # type: ignore[assignment]
    script = faulty_store.Script(None, link, "")  # type: ignore[arg-type]
    script.on_event({"event": "progress", "images": 16})
    assert script.over.wait(10)
    script.end()
    assert script.failures == ["the script of the faults ended by ValueError: no such phase"]


def test_a_checkpoint_older_than_the_newest_committed_fails_r3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path / "run")
    for position in (16, 32):
        crash_points.attempt_and_save(store, position)
    monkeypatch.setattr(crash_points, "restored_position", lambda store: 16)
    assert next(crash_points.check_checkpoints(store)).startswith("unreadable: what is restored is not the newest")


def test_the_help_names_every_drill() -> None:
    assert re.findall(r"R\d+", drill_commands.NAMES) == list(registry.DRILLS)


def test_a_scratch_run_leaves_nothing_and_writes_nowhere_else(state_folder: Path) -> None:
    before = dict(os.environ)
    with scratch(Wishes(), print) as place:
        assert place.dataset.startswith(str(place.folder)) and os.environ["GLIDEPATH_HOME"] != str(state_folder)
    assert not place.folder.exists() and not state_folder.exists() and dict(os.environ) == before


def test_every_kind_of_damage_to_each_object_of_a_checkpoint_is_found_and_passed_over(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    for position in (16, 32, 48):
        crash_points.attempt_and_save(store, position)
    score = corruption.corrupt(store, 30, seed=0)
    assert not score.failures
    assert score.figures == {"corruptions": 30, "detected": 30, "fell_back": 30}


def test_damage_that_is_not_found_fails_the_drill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path / "run")
    for position in (16, 32, 48):
        crash_points.attempt_and_save(store, position)
    monkeypatch.setattr(corruption, "verify_checkpoints", lambda uri: [])
    score = corruption.corrupt(store, 3, seed=0)
    assert score.figures == {"corruptions": 3, "detected": 0, "fell_back": 3} and len(score.failures) == 3


def test_a_builder_with_a_full_disk_says_so_and_goes_on_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_disk, "CASES", {"builder": full_disk.builder_case})
    with scratch(Wishes(), print) as place:
        try:
            score = full_disk.run(place)
        except CannotRun as reason:
            pytest.skip(str(reason))
    assert not score.failures


@pytest.mark.drill
@pytest.mark.parametrize("drill", [crash_points.run, faulty_store.run, corruption.run, full_disk.run, leaving.run])
def test_each_drill_in_full(drill: Any) -> None:
    with scratch(Wishes(seed=1), print) as place:
        score = drill(place)
    assert not score.failures and score.faults
