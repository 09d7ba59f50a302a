"""`glidepath demo`: the whole road on a small real corpus, with the proof that it works.

Corpus -> shards -> base model (one worker is killed on the way, the run goes on) -> text-free twin -> upsampler ->
guided pictures through both stages. Always holds: every figure printed was measured in this run; a check that fails
makes the demo fail. Finished steps are taken from the state folder, so an interrupted demo goes on.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from cluster.console import progress_bar, say
from cluster.drawing import load_part
from cluster.launch import Event, WorkerDied
from cluster.progress import build_progress
from cluster.tracking import resumed_at
from cluster.training import build_demo_dataset, train_run
from data_pipeline.build import inspect_dataset
from data_pipeline.config import find_config, read_values, state_folder
from data_pipeline.demo import GROUNDS
from data_pipeline.errors import UserError
from data_pipeline.shards import open_dataset
from data_pipeline.storage import open_store
from trainer.checkpoint.manifest import committed
from trainer.config import TrainConfig
from trainer.engine.group import Group
from trainer.evaluation.heldout import heldout_loss
from trainer.pictures import grid, png_bytes
from trainer.recipes import parse_train_config
from trainer.recipes.recipe import Pixels
from trainer.run import dataset_uri, store_uri
from trainer.sampling import two_stage
from trainer.weights import Trained

KILL_AT = 0.55  # of the images: some updates after a checkpoint, so that the resume has something to do again
BORDER = 4  # of 64 pixels: the ring in which a demo picture shows nothing but its ground


def run_demo() -> dict[str, Any]:
    """Run what is left of the demo; its figures. Raises UserError if a check fails."""
    corpus = {name: build(name) for name in ("demo", "demo-heldout")}
    base_config = preset("demo-base")
    base = train_with_a_kill(base_config)
    text_free = train("demo-base", "run=demo-text-free", "caption_dropout=1.0", "samples.prompts=['']")
    upsampler = train("demo-upsampler")

    models = load_part(base["checkpoint"], "base"), load_part(upsampler["checkpoint"], "upsampler")
    shuffled = shuffled_loss(models[0])
    prompts = list(base_config.samples.prompts)
    _, large = two_stage(*models, prompts, base_config.samples.sampling, seed=0)
    samples = state_folder() / "demo" / "grid.png"
    samples.parent.mkdir(parents=True, exist_ok=True)
    samples.write_bytes(png_bytes(grid(large, prompts), {"checkpoint": base["checkpoint"]}))

    first, last = base["heldout"]["first"], base["heldout"]["last"]
    followed = grounds_followed(large, prompts)
    checks = {
        "held-out mse, last / first": (last["mse"] / first["mse"], "<=", 0.2),
        "held-out mse, with captions / text-free twin": (last["mse"] / text_free["heldout"]["last"]["mse"], "<", 1.0),
        "held-out mse, shuffled / right captions": (shuffled["mse"] / last["mse"], ">=", 1.05),
        "images at which the killed run went on": (went_on_at(base_config, base), ">", 0),
        "pictures in the corpus": (corpus["demo"]["rows"], ">=", 3000),
        "prompts whose ground colour was followed, of 8": (followed, ">=", 6),
    }
    report(corpus, {"base": base, "text-free twin": text_free, "upsampler": upsampler}, checks, samples)
    return {**base, "samples": str(samples), "checks": {name: value for name, (value, _, _) in checks.items()}}


def build(name: str) -> dict[str, Any]:
    """Build the dataset of a demo corpus preset, or find it; its summary."""
    with build_progress() as progress:
        build_demo_dataset(name, progress)
    return inspect_dataset(dataset_uri(name))


def preset(name: str, *overrides: str) -> TrainConfig:
    return parse_train_config(read_values(find_config("train", name), overrides), name)


def train(name: str, *overrides: str) -> dict[str, Any]:
    """Train a preset to its end; the summary of `glidepath train`."""
    config = preset(name, *overrides)
    with progress_bar(config.run) as bar:
        return train_run(config, lambda event: show_progress(event, config, bar))


def train_with_a_kill(config: TrainConfig) -> dict[str, Any]:
    """Train; at the first start, end one worker with SIGKILL on the way, and start again as a user would."""
    if not committed(open_store(store_uri(config))):
        pids: list[int] = []
        with progress_bar(config.run) as bar:

            def kill_halfway(event: Event) -> None:
                show_progress(event, config, bar)
                if event["event"] == "started":
                    pids.extend(event["pids"])
                elif event["event"] == "progress" and event["images"] >= KILL_AT * config.images and pids:
                    say(f"killing worker 1 (process {pids[1]}) at {event['images']} images, on purpose")
                    os.kill(pids[1], signal.SIGKILL)
                    pids.clear()

            try:
                train_run(config, kill_halfway)
            except WorkerDied as death:
                say(f"as expected: {death}")
    return train(config.run)


def show_progress(event: Event, config: TrainConfig, bar: Any) -> None:
    if event["event"] == "progress":
        bar(event["images"], config.images, f"loss {event['loss']:.4f}  {event['images_per_s']:.1f} images/s")


def shuffled_loss(base: Trained) -> dict[str, float]:
    """Held-out loss when every picture has another picture's caption."""
    settings = base.config.heldout
    assert settings is not None
    heldout = open_dataset(dataset_uri(settings.dataset))
    return heldout_loss(base.config, base.modules, heldout, settings, Group(), captions="shuffled")


def went_on_at(config: TrainConfig, run: dict[str, Any]) -> int:
    """Images consumed before the run was last resumed in the middle; 0 if it never was."""
    return max((images for images in resumed_at(config, run["mlflow_run_id"]) if images < config.images), default=0)


def grounds_followed(pictures: Pixels, prompts: list[str]) -> int:
    """How many pictures [n, H, W, 3] have a border nearest to the ground that their prompt names (last word but 1)."""
    return sum(border_colour(picture) == prompt.split()[-2] for picture, prompt in zip(pictures, prompts, strict=True))


def border_colour(picture: Pixels) -> str:
    """The name of the ground that the picture's border is nearest to, in RGB. `picture` uint8 [H, W, 3]."""
    width = max(1, BORDER * len(picture) // 64)
    inner = np.zeros(picture.shape[:2], bool)
    inner[width:-width, width:-width] = True
    mean = picture[~inner].mean(axis=0)
    return min(GROUNDS, key=lambda name: float(np.square(mean - np.array(GROUNDS[name])).sum()))


def speed(run: dict[str, Any]) -> str:
    """Images per second of a run that trained just now."""
    return f"{run['images_per_s']:.1f}" if run["images_per_s"] else "-"


def report(
    corpus: dict[str, Any], runs: dict[str, dict[str, Any]], checks: dict[str, tuple[float, str, float]], samples: Path
) -> None:
    """Print what was measured. Raises UserError naming the checks that failed."""
    for name, summary in corpus.items():
        funnel = summary["funnel"]
        say(f"funnel {name}: in {funnel['in']}, out {funnel['out']}, dropped {funnel['dropped'] or 0}")
    for name, run in runs.items():
        say(f"{name}: {run['images']} images, {speed(run)} images/s, {run['checkpoint']}")
        for when in ("first", "last"):
            losses = "  ".join(f"{term} {value:.4f}" for term, value in run["heldout"][when].items())
            say(f"  held-out loss, {when}: {losses}")
        say(f"  grid: {run['samples']}")
    failed = []
    for name, (value, relation, limit) in checks.items():
        good = {"<=": value <= limit, "<": value < limit, ">=": value >= limit, ">": value > limit}[relation]
        say(f"{'ok  ' if good else 'FAIL'} {name}: {value:.4g} ({relation} {limit:g})")
        failed += [] if good else [name]
    say(f"pictures of both stages: {samples}")
    if failed:
        raise UserError("demo", "every check to hold", f"failed: {'; '.join(failed)}", "look at the curves and grids")
