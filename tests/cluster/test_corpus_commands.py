"""The corpus commands as people and scripts see them: one JSON document, progress in lines, errors in one line."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

import pytest

from cluster import cli
from data_pipeline.filters import Thresholds
from data_pipeline.score import ScoreSettings
from data_pipeline.shards import open_dataset, verify_dataset


def test_a_build_tells_its_passes_on_stderr_and_its_result_on_stdout(
    picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "corpus.json"  # JSON is YAML
    config.write_text(json.dumps({"inputs": [{"kind": "folder", "uri": str(picture_folder)}], "output": "out"}))
    assert cli.run(["corpus", "build", str(config), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["funnel"]["in"] == 96
    ends = [line.split(",")[0] for line in said.err.splitlines() if ": " in line and " of " in line]
    stages = [line.partition(":")[0] for line in ends]
    assert stages == sorted(stages, key=["read", "score", "judge", "emit"].index)
    assert ends[:2] == ["read: 1 of 1", "score: 1 of 1"] and ends[-1] == "emit: 1 of 1"
    assert "score: 1 of 1, " in said.err and "images/s" in said.err


def test_enrich_and_export_go_on_where_they_stopped_and_answer_in_json(
    dataset_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = str(shutil.copytree(dataset_uri, tmp_path / "dataset"))
    for _ in range(2):
        assert cli.run(["corpus", "enrich", dataset, "tokens_clip", "--json"]) == 0
        added = json.loads(capsys.readouterr().out)
        assert (added["family"], added["rows"], added["shards"]) == ("tokens_clip", 96, 3)
    assert "tokens_clip" in open_dataset(dataset).families() and verify_dataset(dataset) == []
    for _ in range(2):
        assert cli.run(["corpus", "export", dataset, "--out", "tars", "--shard-rows", "50", "--json"]) == 0
        done = json.loads(capsys.readouterr().out)
        assert (done["rows"], done["shards"]) == (96, 2) and done["dataset_id"] == added["dataset_id"]


def test_a_sweep_removes_what_a_killed_build_left_and_nothing_else(
    dataset_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(dataset_uri, tmp_path / "output"))
    before = {path for path in output.rglob("*") if path.is_file()}
    unit = ScoreSettings(Thresholds()).prefix("0" * 64)
    for name in (f"judge/scratch-{uuid.uuid4().hex}/gather-00000.rows", f"{unit}verdicts-00000.parquet"):
        (output / name).parent.mkdir(parents=True)
        (output / name).write_bytes(b"left")
    for removed in (2, 0):
        assert cli.run(["corpus", "sweep", str(output), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["removed"] == removed
    assert {path for path in output.rglob("*") if path.is_file()} == before


def test_a_build_into_a_folder_with_other_peoples_files_leaves_them_alone(
    picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = ("datasets/cats/train/data-00000-of-00001.arrow", "units/notes/si.txt", "judge/2026/verdict.docx")
    for name in mine:
        (tmp_path / "mine" / name).parent.mkdir(parents=True)
        (tmp_path / "mine" / name).write_text(name)
    settings = [
        f"inputs=[{{kind: folder, uri: {picture_folder}}}]",
        f"output={tmp_path / 'mine'}",
        "executor.workers=1",
    ]
    assert cli.run(["corpus", "build", "photos", *settings, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] > 0
    assert [(tmp_path / "mine" / name).read_text() for name in mine] == list(mine)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["enrich", "{dataset}", "faces"], 2, "enrich: expected one of labels, tokens_clip, found 'faces'"),
        (["enrich", "{dataset}", "labels"], 2, "expected --labels with a csv or parquet of id and label"),
        (["enrich", "{dataset}", "tokens_clip", "--executor", "slurm"], 2, "--executor"),
        (["enrich", "absent", "tokens_clip"], 1, "expected one committed dataset, found none"),
        (["export", "absent", "--out", "tars"], 1, "expected one committed dataset, found none"),
        (["export", "{dataset}", "--out", "ftp://there"], 2, "store ftp://"),
        (["inspect", "absent", "--out", "report"], 1, "expected one committed dataset, found none"),
        (
            ["inspect", "{dataset}", "--out", __file__],
            1,
            "expected a folder, or nothing, found a file; choose another --out",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    dataset_uri: str, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(dataset=dataset_uri) for argument in arguments]
    assert cli.run(["corpus", *filled, "--json"]) == code
    found = capsys.readouterr()
    error = json.loads(found.out)["error"]
    assert said in error and "\n" not in error
