"""What tests of all floors share: a small real dataset, a tiny model, and runs in real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import demo
from data_pipeline.build import CorpusConfig, build_corpus
from data_pipeline.config import parse

PICTURES = 96
TINY_MODEL = {
    "image_size": 16,
    "channels": 32,
    "res_blocks": 1,
    "channel_mult": [1, 1],
    "attention_resolutions": [8],
    "head_channels": 32,
    "text_context": 8,
    "text_width": 32,
    "text_layers": 1,
    "text_heads": 1,
}


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test writes into the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLIDEPATH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real captioned pictures: the first of the demo corpus's held-out emoji, as image files with caption files."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, record in zip(range(PICTURES), demo.read_slice("heldout", 0), strict=False):
        (folder / f"{number:03d}.png").write_bytes(record.image_bytes)
        (folder / f"{number:03d}.txt").write_bytes(record.caption)
    return folder


@pytest.fixture(scope="session")
def dataset_uri(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of those pictures in three shards."""
    output = tmp_path_factory.mktemp("dataset")
    values = {
        "inputs": [{"kind": "folder", "uri": str(picture_folder)}],
        "output": str(output),
        "shard_rows": 32,
        "filters": {"preset": "none"},
    }
    build_corpus(parse(CorpusConfig, values, "test"))
    return str(output)


@pytest.fixture
def train_values(dataset_uri: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Values of a tiny base run on that dataset; its store is a folder of the test."""

    def make(run: str = "tiny", **changes: Any) -> dict[str, Any]:
        return {
            "run": run,
            "recipe": "glide_base",
            "store": str(tmp_path / "runs" / run),
            "dataset": dataset_uri,
            "images": 64,
            "batch": 16,
            "micro_batch": 4,
            "lr": 1e-3,
            "ema": 0.9,
            "caption_dropout": 0.25,
            "dropout": 0.1,
            "model": TINY_MODEL,
            "checkpoint": {"every_images": 16},
            "tracking": {"consumed_ids": True},
            **changes,
        }

    return make
