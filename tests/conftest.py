"""What tests of all floors share: a small real dataset, a tiny model, and runs in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from data_pipeline import demo
from data_pipeline.build import CorpusConfig, build_corpus
from data_pipeline.config import parse

# How long an example takes says how busy the machine is, and nothing of what it proves. `make test` takes the same
# examples every time, so that a red run is of the change at hand; `make drills` looks for new ones.
settings.register_profile("explore", settings(), deadline=None)
settings.register_profile("repeatable", settings(), deadline=None, derandomize=True)
settings.load_profile("repeatable")

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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For training inside the test's process: on busy cores two threads wait for each other more than they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real captioned pictures: the first of the demo corpus's held-out emoji, as image files with caption files."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, record in zip(range(PICTURES), demo.read_slice("heldout", 0), strict=False):
        (folder / f"{number:03d}.png").write_bytes(record.image_bytes)
        (folder / f"{number:03d}.txt").write_bytes(record.captions[0])
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


@pytest.fixture(scope="session")
def tiny_model() -> dict[str, Any]:
    return TINY_MODEL


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


@dataclass(frozen=True)
class Stack:
    """A running local stack: `home` is its GLIDEPATH_HOME, `env` what its clients need in their environment."""

    home: Path
    env: dict[str, str]
    dashboard: str
    mlflow: str
    s3: str
    bucket: str = "glidepath"

    def glidepath(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line on this stack."""
        return run_glidepath(self.home, *arguments)


def run_glidepath(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, with its own state folder."""
    environment = os.environ | {"GLIDEPATH_HOME": str(home)}
    argv = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, cwd=home, check=False)


# Waits for the end of its input, which comes with the end of the tests, even if those are killed.
UNDERTAKER = """
import json, shutil, subprocess, sys
from pathlib import Path
sys.stdin.read()
home = Path(sys.argv[1])
ended = subprocess.run([sys.executable, "-m", "cluster.cli", "down"], cwd=home)
record = home / "stack" / "stack.json"
ray_folder = json.loads(record.read_text())["ray_folder"] if record.exists() else ""
if ray_folder:
    shutil.rmtree(Path(ray_folder).parent)
shutil.rmtree(home)
sys.exit(ended.returncode)
"""


@contextmanager
def new_stack_home() -> Iterator[Path]:
    """A state folder for a stack; whatever happens, nothing of it stays: no process, no file, no folder of Ray's."""
    home = Path(tempfile.mkdtemp(prefix="gp-"))
    undertaker = subprocess.Popen(
        [sys.executable, "-c", UNDERTAKER, str(home)],
        env=os.environ | {"GLIDEPATH_HOME": str(home)},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield home
    finally:
        _, errors = undertaker.communicate()
        assert undertaker.returncode == 0, errors


@pytest.fixture
def stack_home() -> Iterator[Path]:
    """A state folder for a stack of the test's own."""
    with new_stack_home() as home:
        yield home


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Ray, MLflow and an S3 server, started once for all tests that need them. Four CPUs, whatever the machine has."""
    with new_stack_home() as home:
        done = run_glidepath(home, "up", "--cpus", "4", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        urls = {row["service"]: row["url"] for row in found["services"]}
        yield Stack(home, found["env"], dashboard=urls["ray"], mlflow=urls["mlflow"], s3=urls["s3"])


@pytest.fixture
def stack_env(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """The stack, with its addresses in this process's environment and nobody else's."""
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in stack.env.items():
        monkeypatch.setenv(name, value)
    return stack
