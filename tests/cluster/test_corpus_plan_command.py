"""`glidepath plan` of a corpus configuration, as the command line gives it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cluster.cli import run


def test_plan_of_a_corpus_says_what_it_will_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "demo", "dedup.near=4", "--pairs", "1e9", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["pairs"] == 10**9 and plan["tasks"]["emit"] == plan["shards"] == -(-plan["rows"] // 4096)
    assert plan["storage_bytes"]["total"] > plan["storage_bytes"]["dataset"] > 10**12
    assert set(plan["core_hours"]) == {"read", "score", "judge", "emit", "total"}
    assert run(["plan", "demo", "--pairs", "1e8"]) == 0
    assert "core_hours" in capsys.readouterr().out


def test_plan_of_a_corpus_without_input_fails_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "photos", "--json"]) == 1
    assert "at least one input" in json.loads(capsys.readouterr().out)["error"]


def test_a_plan_names_the_evaluation_sets_that_are_in_no_figure(
    capsys: pytest.CaptureFixture[str], picture_folder: Path
) -> None:
    folder = f"{{kind: folder, uri: {picture_folder}}}"
    arguments = ["plan", "demo", f"inputs=[{folder}]", "filters.preset=none"]
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_counted"] == []
    arguments.append(f"decontaminate.sets=[{folder}]")
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_counted"] == [f"evaluation set {picture_folder}"]
    assert run(arguments) == 0
    assert f"evaluation set {picture_folder}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "override", "line"),
    [
        (1, "decontaminate.sets=[nothing-there]", "nothing-there: expected one committed dataset, found none"),
        (1, "decontaminate.sets=[{kind: webdataset, uri: nothing-there}]", "input webdataset nothing-there: expected"),
        (1, "scorers=[{kind: noised_clip, checkpoint: nothing-there}]", "nothing-there: expected a run with"),
        (2, "filters.scores={clip_similarity: {min: 0.1}}", "filters.scores.clip_similarity: expected a column"),
        (2, "scorers=[{kind: noised_clip, checkpoint: nothing-there, actors: 2}]", "scorers.actors: expected 1"),
    ],
)
def test_a_plan_refuses_scorers_and_evaluation_sets_as_the_build_would(
    capsys: pytest.CaptureFixture[str], code: int, override: str, line: str
) -> None:
    for command in (["plan", "demo"], ["corpus", "build", "demo"]):
        assert run([*command, override, "--json"]) == code
        assert line in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["plan", "demo", "--pairs", "inf"],
            "--pairs: expected less than or equal to 1000000000000000000, found 'inf'",
        ),
        (
            ["plan", "demo", "--pairs", "nan"],
            "--pairs: expected less than or equal to 1000000000000000000, found 'nan'",
        ),
        (["plan", "demo", "--pairs", "0"], "--pairs: expected greater than or equal to 1, found '0'"),
        (["plan", "demo", "--pairs", "lots"], "--pairs: expected a valid number, .*found 'lots'"),
        (["corpus", "inspect", "x", "--pictures", "0"], "--pictures: expected greater than or equal to 1, found '0'"),
    ],
)
def test_a_value_that_an_option_cannot_have_is_told_by_the_option(
    capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert run([*arguments, "--json"]) == 2
    assert re.fullmatch(f"{line}; correct the value", json.loads(capsys.readouterr().out)["error"])
