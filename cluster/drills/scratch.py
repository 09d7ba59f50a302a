"""What drills work on: a small corpus, a small model, runs in real worker processes, all in a folder that goes away.

Always holds: nothing outside that folder is written or read - not the user's runs, tracking server or store - but the
dataset, where one was given. Called by every drill.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from cluster.launch import Event
from cluster.training import train_run
from data_pipeline.build import CorpusConfig, build_corpus
from data_pipeline.config import find_config, parse, read_values
from data_pipeline.storage import open_store
from trainer.checkpoint.manifest import CheckpointName, Manifest, committed, read_manifest
from trainer.config import TrainConfig
from trainer.loop import CONSUMED
from trainer.recipes import parse_train_config
from trainer.tracking.jsonl import read_curves, read_events, read_lines

PICTURES, SHARD_ROWS, BATCH = 96, 32, 16
KEPT = 5  # checkpoints of a run, of 31 MB each
LONG_IMAGES = 10 * BATCH  # more than an epoch


@dataclass(frozen=True)
class Wishes:
    """What the command line asks of the drills. `faults` None: as many as the drill does in full."""

    seed: int = 0
    faults: int | None = None
    dataset: str | None = None
    precision: str = "fp32"
    outage_s: float = 60.0


@dataclass(frozen=True)
class Scratch:
    """A folder for runs, and the wishes. `tell` takes a line of progress."""

    folder: Path
    wishes: Wishes
    tell: Callable[[str], None]

    @cached_property
    def dataset(self) -> str:
        """URI of the dataset: the given one, or one of pictures that are made here."""
        return self.wishes.dataset or build_dataset(self.folder / "corpus", str(self.folder / "dataset"))

    def config(self, run: str, **changes: Any) -> TrainConfig:
        """A tiny run of that name. `changes` are top-level settings; its store is a folder unless they name one."""
        values = read_values(find_config("train", "tiny"), ())
        values["model"] |= {"image_size": 16, "text_context": 8}
        values |= {"run": run, "store": str(self.folder / "runs" / run), "dataset": self.dataset, "batch": BATCH}
        values |= {"seed": self.wishes.seed, "precision": self.wishes.precision, "dropout": 0.1}
        values |= {"checkpoint": {"every_images": BATCH, "keep_newest": KEPT}}
        values |= {"tracking": {"uri": str(self.folder / "tracking" / run), "consumed_ids": True}}
        return parse_train_config(values | changes, "drill")

    def long_config(self, run: str) -> TrainConfig:
        """A run of two workers, long enough to be interrupted several times, with all that training remembers: losses
        by timestep, and a guard that refuses updates."""
        diffusion = {"steps": 4, "timesteps": "loss_second_moment"}  # which draws by its losses after some 50 of them
        # It never goes back: where to depends on which saves were put off, which differs from run to run.
        guard = {"warmup": 1, "window": 3, "spike_factor": 1.02, "rollback_after": 100, "sustained_after": 100}
        remembers = {"diffusion": diffusion, "samples": {"sampling": {"spacing": "2"}}, "guard": guard}
        return self.config(run, images=LONG_IMAGES, launcher={"workers": 2}, **remembers)

    @cached_property
    def whole(self) -> TrainConfig:
        """Such a run, trained to its end without interruption."""
        config = self.long_config("whole")
        self.tell(f"training {config.run}: {LONG_IMAGES} images on 2 workers")
        self.train(config)
        return config

    def store_folder(self, config: TrainConfig) -> Path:
        assert config.store is not None
        return Path(config.store)

    def train(self, config: TrainConfig, on_event: Callable[[Event], None] = lambda event: None) -> dict[str, Any]:
        return train_run(config, on_event)


@contextmanager
def scratch(wishes: Wishes, tell: Callable[[str], None]) -> Iterator[Scratch]:
    """A scratch folder; meanwhile this process's environment leads nowhere else."""
    elsewhere = dict.fromkeys(("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "GLIDEPATH_CACHE_BYTES"))
    with (
        # What cannot be removed must not cost the scoreboard.
        tempfile.TemporaryDirectory(prefix="glidepath-drill-", ignore_cleanup_errors=True) as folder,
        environment({"GLIDEPATH_HOME": f"{folder}/home", **elsewhere}),
    ):
        yield Scratch(Path(folder), wishes, tell)
    if Path(folder).exists():
        tell(f"{folder} could not be removed; remove it by hand")


@contextmanager
def environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Inside, these variables have these values, or none; what is started inherits them."""
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def write_corpus(path: Path, pictures: int = PICTURES) -> Path:
    """A tar of captioned pictures of noise: no two alike, the same everywhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(pictures):
            noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            files = {"jpg": simplejpeg.encode_jpeg(np.ascontiguousarray(noise)), "txt": f"noise {number}".encode()}
            for suffix, data in files.items():
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def corpus_config(tar: Path, output: str, shard_rows: int = SHARD_ROWS) -> CorpusConfig:
    values = {"inputs": [{"kind": "webdataset", "uri": str(tar)}], "output": output, "shard_rows": shard_rows}
    return parse(CorpusConfig, values | {"filters": {"preset": "none"}}, "drill")


def build_dataset(corpus: Path, output: str) -> str:
    """A small dataset in that store; its URI."""
    build_corpus(corpus_config(write_corpus(corpus / "pictures.tar"), output))
    return output


def newest_manifest(config: TrainConfig) -> tuple[CheckpointName, Manifest]:
    """The newest checkpoint of a run that has one."""
    assert config.store is not None
    store = open_store(config.store)
    name = committed(store)[0]
    return name, read_manifest(store, name.manifest_key)


def tracking_of(config: TrainConfig) -> Path:
    assert config.tracking.uri is not None
    return Path(config.tracking.uri)


def resumes(config: TrainConfig) -> list[dict[str, Any]]:
    """The events of going on from a checkpoint: `images`, `attempt`, `text`."""
    return read_events(tracking_of(config), "resume")


def losses(config: TrainConfig) -> dict[int, float]:
    """images -> loss of the update that ended there."""
    return read_curves(tracking_of(config))["loss/total"]


def consumed(config: TrainConfig) -> list[tuple[int, list[int]]]:
    """(position, ids of the global batch) in the order in which the run consumed them."""
    return [(line["position"], line["ids"]) for line in read_lines(tracking_of(config) / CONSUMED)]


def consumed_ids(config: TrainConfig) -> dict[int, list[int]]:
    """position -> ids of the global batch; where a resumed run passed a position again, the last time counts."""
    return dict(consumed(config))
