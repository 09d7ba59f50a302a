"""Trained weights out of a checkpoint: for sampling, export and evaluation, and for a run that starts from them.

Always holds: they come from verified blocks of a committed checkpoint; what started from them says so by the
checkpoint's URI and the sha256 of its manifest. Called by `trainer.run`, sampling, evaluation and the exporters.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from data_pipeline.config import state_folder
from data_pipeline.draws import key64
from data_pipeline.errors import UserError
from data_pipeline.storage import ObjectStore, open_store
from trainer.checkpoint.load import fill, refuse_other_model
from trainer.checkpoint.manifest import (
    CheckpointName,
    Manifest,
    committed,
    is_checkpoint_uri,
    read_manifest,
    split_checkpoint_uri,
)
from trainer.checkpoint.parts import CheckpointDamaged
from trainer.config import TrainConfig, flat_keys
from trainer.engine.engine import Interval
from trainer.recipes import make_recipe, parse_train_config
from trainer.recipes.recipe import Part, Recipe, StateDict
from trainer.tracking.registry import find_version, is_model_uri
from trainer.tracking.server import tracking_uri

WeightsKind = Literal["ema", "master"]


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to sample: its recipe, modules in evaluation mode, and where they came from."""

    uri: str
    config: TrainConfig
    recipe: Recipe
    modules: Mapping[str, nn.Module]
    images: int  # consumed in training


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose manifest was read and whose configuration this version knows."""

    store: ObjectStore
    name: CheckpointName
    manifest: Manifest
    config: TrainConfig

    @property
    def uri(self) -> str:
        return self.name.uri(self.store)

    @cached_property
    def manifest_sha256(self) -> str:
        """Digest of the stored manifest, by which children know their parent whatever its format. Kept: retention may
        remove the checkpoint once its weights are read."""
        return hashlib.sha256(self.store.get(self.name.manifest_key)).hexdigest()


def load_trained(uri: str, kind: WeightsKind = "ema") -> Trained:
    """The model of a checkpoint, or of the newest checkpoint of a run.

    Raises UserError if there is none, it does not verify, or it is of another version.
    """
    checkpoint = open_checkpoint(uri)
    parts = make_recipe(checkpoint.config.for_evaluation()).parts()
    modules = {name: part.build().eval() for name, part in parts.items()}
    read_weights(checkpoint, {name: dict(module.named_parameters()) for name, module in modules.items()}, kind)
    recipe = make_recipe(checkpoint.config)
    return Trained(checkpoint.uri, checkpoint.config, recipe, modules, checkpoint.manifest.position)


def open_checkpoint(uri: str, tracking: str | None = None) -> Checkpoint:
    """The checkpoint of a URI; for a run's store, or its name in the state folder, the newest; for models:/NAME@ALIAS
    what it stands for on the server `tracking`, by default that of the environment. Raises UserError."""
    if is_model_uri(uri):
        return _open_registered(uri, tracking_uri(tracking, os.environ))
    store_uri, name = _locate(uri)
    store = open_store(store_uri)
    try:
        manifest = read_manifest(store, name.manifest_key)
    except CheckpointDamaged as damage:
        raise _damaged(name, damage) from None
    return Checkpoint(store, name, manifest, parse_train_config(manifest.config, f"checkpoint {name}"))


def _open_registered(uri: str, server: str | None) -> Checkpoint:
    """Raises UserError as `find_version`, and if another checkpoint lies there by now."""
    version = find_version(uri, server)
    checkpoint = open_checkpoint(version.checkpoint)
    if checkpoint.manifest_sha256 != version.manifest_sha256:
        raise UserError(
            f"{uri}, checkpoint {checkpoint.uri}",
            f"the manifest {version.manifest_sha256[:12]} that was registered",
            checkpoint.manifest_sha256[:12],
            "register what is there now, or restore that checkpoint",
        )
    return checkpoint


def _locate(uri: str) -> tuple[str, CheckpointName]:
    if is_checkpoint_uri(uri):
        return split_checkpoint_uri(uri)
    for store_uri in (uri, str(state_folder() / "runs" / uri)):
        if names := committed(open_store(store_uri)):
            return store_uri, names[0]
    raise UserError(
        f"run {uri}", "a run with a committed checkpoint", "none", "give a checkpoint's URI, or another run"
    )


def read_weights(checkpoint: Checkpoint, parts: Mapping[str, Mapping[str, torch.Tensor]], kind: WeightsKind) -> None:
    """Overwrite float32 tensors, by part and name, of all parts of a checkpoint with its own. Raises UserError."""
    wanted = [
        Interval(f"{part}/{name}", kind, 0, values.data.view(-1))
        for part, parameters in parts.items()
        for name, values in parameters.items()
    ]
    refuse_other_model(checkpoint.manifest, {i.name: len(i.values) for i in wanted}, checkpoint.uri)
    try:
        fill(checkpoint.store, checkpoint.name, checkpoint.manifest, wanted)
    except CheckpointDamaged as damage:
        raise _damaged(checkpoint.name, damage) from None


def _damaged(name: CheckpointName, damage: CheckpointDamaged) -> UserError:
    return UserError(
        f"checkpoint {name}", "bytes that verify", str(damage), "choose an older one: glidepath checkpoints list RUN"
    )


def lineage_of(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """By part, the checkpoint that a run of `config` starts from; empty without a parent.

    In the driver, before anything is started. Raises UserError if there is none, or it does not fit the part.
    """
    lineage = {}
    for name, part in make_recipe(config).parts().items():
        if part.start is None:
            continue
        parent = open_checkpoint(part.start, config.tracking.uri)
        refuse_other_settings(parent, part, config)
        with torch.device("meta"):
            mine = part.build()
        fitted(parent, name, part, mine, _shapes_on_meta(parent, name))
        lineage[name] = {
            "parent": parent.uri,
            "weights": config.parent_weights,
            "run": parent.manifest.run,
            "recipe": parent.config.recipe,
            "images": parent.manifest.position,
            "manifest_sha256": parent.manifest_sha256,
        }
    return lineage


def start_of(config: TrainConfig, lineage: Mapping[str, Mapping[str, Any]]) -> dict[str, StateDict]:
    """By part, the weights that a run starts from, float32 on this machine. Raises UserError."""
    starts = {}
    parts = make_recipe(config).parts()
    for name, facts in lineage.items():
        parent = open_checkpoint(facts["parent"])
        found = parent.manifest_sha256
        if found != facts["manifest_sha256"]:
            raise UserError(
                f"parent {parent.uri}",
                f"the manifest {facts['manifest_sha256'][:12]} that the run began from",
                found[:12],
                "restore that checkpoint, or start another run",
            )
        whole = {
            part: {key: torch.empty(values.shape) for key, values in _shapes_on_meta(parent, part).items()}
            for part in make_recipe(parent.config).parts()
        }
        read_weights(parent, whole, facts["weights"])
        with torch.device("meta"):
            mine = parts[name].build()
        starts[name] = fitted(parent, name, parts[name], mine, whole[name])
    return starts


def initial_module(name: str, part: Part, seed: int, start: StateDict | None = None) -> nn.Module:
    """A part as a run begins with it: built from the seed, or with the weights of `start`, which is emptied on the
    way."""
    torch.manual_seed(key64("initialise", seed, name))
    module = part.build()
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if start and key in start:
                parameter.copy_(start.pop(key))
    return module


def refuse_other_settings(parent: Checkpoint, part: Part, config: TrainConfig) -> None:
    """Raise UserError naming the first setting in which a parent means something else by weights of equal shapes."""
    mine = dict(flat_keys(config.model_dump(mode="json")))
    its = dict(flat_keys(parent.config.model_dump(mode="json")))
    for key in part.alike:
        if key in its and its[key] != mine[key]:
            raise UserError(f"parent {parent.uri}: {key}", f"{mine[key]}", f"{its[key]}", f"set {key}={its[key]}")


def _shapes_on_meta(checkpoint: Checkpoint, part: str) -> StateDict:
    """The parameters of a checkpoint's part, without values. Raises UserError if it has no such part."""
    parts = make_recipe(checkpoint.config).parts()
    if part not in parts:
        raise UserError(
            f"parent {checkpoint.uri}",
            f"a recipe with the part {part}",
            f"{checkpoint.config.recipe} with {', '.join(parts)}",
            "give a checkpoint of the recipe that this one fine-tunes",
        )
    with torch.device("meta"):
        module = parts[part].build()
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def fitted(parent: Checkpoint, name_of_part: str, part: Part, mine: nn.Module, weights: StateDict) -> StateDict:
    """The parent's weights as this part takes them, without those it has afresh. Raises UserError naming the first key
    that does not fit."""
    adapted = part.adapt(weights) if part.adapt else weights
    expected = {name: tuple(parameter.shape) for name, parameter in mine.named_parameters()}
    found = {name: tuple(values.shape) for name, values in adapted.items()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found and name.startswith(part.fresh):
            continue
        if expected.get(name) != found.get(name):
            raise UserError(
                f"parent {parent.uri}: {name_of_part}/{name}",
                f"shape {expected[name]}" if name in expected else "no such parameter",
                f"shape {found[name]}" if name in found else "none",
                "give a parent of the same model.* settings",
            )
    return adapted
