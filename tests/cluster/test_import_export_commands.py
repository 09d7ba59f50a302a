"""`glidepath import` and `glidepath checkpoints export`: what scripts read of them, and their refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.cli import run
from trainer.interop.arguments import read_arguments
from trainer.interop.openai import build_network

TINY = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "num_head_channels": 16}
TINY |= {"attention_resolutions": "8", "text_ctx": 8, "xf_width": 8, "xf_layers": 1, "xf_heads": 1}


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A released file with its arguments beside it; the state folder is beside them."""
    monkeypatch.setenv("GLIDEPATH_HOME", str(tmp_path))
    torch.save(build_network(read_arguments("base", TINY)).state_dict(), tmp_path / "base.pt")
    (tmp_path / "arguments.json").write_text(json.dumps(TINY))
    return tmp_path / "base.pt"


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = run([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_released_file_is_imported_verified_and_exported(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, arguments = str(tmp_path / "runs" / "released"), str(tmp_path / "arguments.json")
    code, imported = command(
        capsys, "import", str(released), "--kind", "base", "--out", store, "--arguments", arguments
    )
    assert code == 0
    assert imported["kind"] == "base" and list(imported["sha256"]) == ["base.pt"]
    assert command(capsys, "checkpoints", "verify", "released") == (0, {"ok": True, "bad": []})

    code, exported = command(capsys, "checkpoints", "export", "released", "--out", str(tmp_path / "out"))
    assert code == 0
    assert exported["checkpoint"] == imported["checkpoint"]
    theirs, ours = (torch.load(path, weights_only=True) for path in (released, tmp_path / "out/release/base.pt"))
    assert all(torch.equal(ours[name], values) for name, values in theirs.items())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--kind", "basis"], 2, "kind: expected one of base, upsample"),
        (["--kind", "base", "--arguments", "{"], 2, "release arguments: expected a JSON object"),
        (["--kind", "base"], 1, "final_ln.bias: expected shape [512], found shape [8]"),
        (["--kind", "base-inpaint", "--arguments", json.dumps(TINY)], 1, "expected shape [32, 7, 3, 3], found shape"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(
    released: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    found, document = command(capsys, "import", str(released), "--out", str(released.parent / "run"), *arguments)
    assert found == code
    assert message in document["error"] and "\n" not in document["error"]


def test_weights_of_another_kind_and_a_full_folder_are_refused(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = str(tmp_path / "runs" / "released")
    command(capsys, "import", str(released), "--kind", "base", "--out", store, "--arguments", json.dumps(TINY))
    export = ["checkpoints", "export", "released", "--out"]
    code, document = command(capsys, *export, str(tmp_path / "out"), "--weights", "best")
    assert (code, "expected ema or master" in document["error"]) == (2, True)
    monkeypatch.chdir(tmp_path)
    for full in (str(tmp_path), ".", "runs/.."):
        code, document = command(capsys, *export, full)
        assert (code, "expected none, or an empty one" in document["error"]) == (1, True)
        assert "\n" not in document["error"]
