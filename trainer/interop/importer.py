"""A released file as a checkpoint of ours: sampled from, fine-tuned from, listed and verified as any other.

Always holds: the store is a new one, and holds one checkpoint at position 0 whose masters and EMA are the file's
weights; the files are named with their sha256 as its lineage. It has no moments, since the release has none: training
starts from it as a parent, it does not resume. Called by `glidepath import`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipeline.errors import UsageError, UserError
from data_pipeline.manifests import sha256_of
from data_pipeline.storage import ObjectStore, open_store
from trainer.checkpoint.attempts import newest_attempt, take_attempt
from trainer.checkpoint.save import RunIdentity, Saver
from trainer.config import TrainConfig
from trainer.engine.engine import Interval
from trainer.engine.engine import Kind as StateKind
from trainer.interop.arguments import SCHEDULES, ClipArguments, GlideArguments, Kind, read_arguments
from trainer.interop.openai import load_release, release_files
from trainer.recipes import make_recipe, parse_train_config

RECIPE_OF: dict[Kind, str] = {
    "base": "glide_base",
    "upsample": "glide_upsampler",
    "base-inpaint": "inpaint_base",
    "upsample-inpaint": "inpaint_upsampler",
    "clip": "noised_clip",
}
UNKNOWN = "unknown"  # what the release was trained on
SAVE_DEADLINE_S = 60.0  # somebody waits
GRID_STEPS = 50  # of sampling, or all that the release's process has


def import_release(kind: Kind, arguments: Mapping[str, Any], path: Path, out: str) -> dict[str, Any]:
    """Store a released file as a checkpoint under the URI `out`, a new run's store.

    Returns {"checkpoint", "kind", "recipe", "parameters", "sha256" {file: digest}}. Raises UsageError and UserError as
    `load_release` does, and if the store has a run already or cannot be used.
    """
    config = recorded_config(kind, read_arguments(kind, arguments), out)
    part = part_of(config)
    store = open_store(out)
    store.check()
    if newest_attempt(store):
        raise UserError(f"store {store.uri}", "no run there", "one", "give another --out")
    module = load_release(kind, arguments, path)
    digests = {file.name: sha256_of(file) for file in release_files(kind, path).values()}
    lineage = {part: {"imported": sorted(digests), "kind": kind, "sha256": digests}}
    return {
        "checkpoint": _save(store, config, part, module, lineage),
        "kind": kind,
        "recipe": config.recipe,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "sha256": digests,
    }


def read_json(text: str) -> dict[str, Any]:
    """Constructor arguments from JSON, or from a file of it. Raises UsageError."""
    source = "release arguments"
    try:
        if not text.lstrip().startswith("{"):
            source, text = f"file {text}", Path(text).read_text(encoding="utf-8")
        document = json.loads(text)
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(source, "a JSON object, or a file of one", str(found), "correct it") from None
    if not isinstance(document, dict):
        raise UsageError(source, "a JSON object", type(document).__name__, "correct it")
    return document


def recorded_config(kind: Kind, arguments: GlideArguments | ClipArguments, out: str) -> TrainConfig:
    """The training configuration that an imported checkpoint carries: its model and process are the release's, the
    rest says that training is unknown. Raises UsageError if this version has no such recipe."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", out.rstrip("/").rpartition("/")[2]).strip("-._")
    values: dict[str, Any] = {
        "run": name or f"released-{kind}",
        "recipe": RECIPE_OF[kind],
        "store": out,
        "dataset": UNKNOWN,
        "images": 1,
        "batch": 1,
        "lr": 1e-4,
        "model": arguments.model().model_dump(mode="json"),
    }
    sampling: dict[str, Any] = {}
    if isinstance(arguments, GlideArguments):
        schedule, steps = arguments.noise_schedule, arguments.diffusion_steps
        values["dropout"] = arguments.dropout
        if kind in ("base", "base-inpaint"):
            values["caption_dropout"] = 0.2  # both were trained for guidance (GLIDE, appendix B.1)
        else:
            sampling["guidance_scale"] = 1.0  # no caption was ever empty
    else:
        schedule, steps = arguments.beta_schedule, arguments.n_timesteps
        values["logit_scale"] = arguments.logit_scale
    values["diffusion"] = {"schedule": SCHEDULES[schedule], "steps": steps}
    sampling["spacing"] = str(min(GRID_STEPS, steps))
    values["samples"] = {"sampling": sampling}
    return parse_train_config(values, f"import of {kind}")


def part_of(config: TrainConfig) -> str:
    """The name of the one network of a configuration's recipe. Raises UserError if it has several."""
    parts = list(make_recipe(config).parts())
    if len(parts) != 1:
        raise UserError(f"recipe {config.recipe}", "one network", ", ".join(parts), "choose another checkpoint")
    return parts[0]


def _save(
    store: ObjectStore, config: TrainConfig, part: str, module: nn.Module, lineage: dict[str, dict[str, Any]]
) -> str:
    """Commit by the protocol that training uses, as its only rank. Returns the checkpoint's URI."""
    record = {"config": config.model_dump(mode="json"), "lineage": lineage}
    identity = RunIdentity(
        run=config.run,
        attempt=take_attempt(store, record),
        rank=0,
        world_size=1,
        zero_stage=0,
        parameters={f"{part}/{name}": parameter.numel() for name, parameter in module.named_parameters()},
        config=record["config"],
        code_version=metadata.version("glidepath"),
        lineage=lineage,
    )
    saver = Saver(store, identity, SAVE_DEADLINE_S)
    saver.save(0, _view(part, module), {"optimizer_steps": {part: 0}, "guard": {}, "order": {}})
    saver.wait()
    assert saver.committed is not None
    return saver.committed.uri(store)


def _view(part: str, module: nn.Module) -> Iterator[Interval]:
    kinds: tuple[StateKind, ...] = ("master", "ema")
    for kind in kinds:
        for name, parameter in module.named_parameters():
            yield Interval(f"{part}/{name}", kind, 0, parameter.detach().to(torch.float32).view(-1))
