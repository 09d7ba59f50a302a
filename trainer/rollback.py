"""Rollback: the trained state of an older checkpoint comes back into the running workers.

Always holds: all parts come back together, with all that their checkpoint holds besides - applied updates, EMA, loss
scale, guard histories, the recipe's state; the data position is not taken back. What outlives a rollback of the guard's
histories is their own business (trainer/guard.py). Called by the loop on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from data_pipeline.order import OrderState
from data_pipeline.storage import ObjectStore
from trainer.checkpoint.load import Restored, restore_newest
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.save import RunIdentity
from trainer.engine.engine import Engine
from trainer.guard import GuardHistory, all_after_rollback
from trainer.recipes import make_recipe
from trainer.step import Trainee
from trainer.weights import initial_module, start_of


def adopt(trainee: Trainee, manifest: Manifest) -> None:
    """What a checkpoint holds besides the values that were just read from its parts. A collective call."""
    for part, engine in trainee.engines.items():
        engine.loaded(manifest.optimizer_steps[part], manifest.loss_scale.get(part, {}))
    if state := trainee.recipe.state():
        state.load(manifest.recipe_state)
    trainee.guards = {phase: GuardHistory.from_document(document) for phase, document in manifest.guard.items()}


def go_back(
    trainee: Trainee, store: ObjectStore, identity: RunIdentity, order: OrderState, since: int
) -> Restored | None:
    """Into the state of the newest checkpoint of at most `since` images; without any checkpoint, into the state that
    the run began with, and None. A collective call.

    Raises UserError if there are checkpoints and none so old verifies, or if the parent of the start is gone.
    """
    left = trainee.guards
    wanted = [interval for engine in trainee.engines.values() for interval in engine.wanted()]
    found = restore_newest(store, trainee.group, wanted, identity.parameters, order, identity.run, not_after=since)
    if found is None:
        _begin_again(trainee, identity.lineage)
    else:
        adopt(trainee, found.manifest)
    trainee.guards = all_after_rollback(trainee.guards, left)
    return found


def _begin_again(trainee: Trainee, lineage: Mapping[str, Mapping[str, Any]]) -> None:
    """The state of no updates; but fp16's loss scale stays as it is, for it finds its way by itself."""
    starts = start_of(trainee.config, lineage)
    for name, part in trainee.recipe.parts().items():
        module = initial_module(name, part, trainee.config.seed, starts.pop(name, None))
        _fill(trainee.engines[name], {f"{name}/{key}": p.detach() for key, p in module.named_parameters()})
    if state := trainee.recipe.state():
        fresh = make_recipe(trainee.config).state()
        assert fresh is not None
        state.load(fresh.document())
    trainee.guards = {}


@torch.no_grad()
def _fill(engine: Engine, weights: Mapping[str, torch.Tensor]) -> None:
    for interval in engine.wanted():
        if interval.kind in ("master", "ema"):
            whole = weights[interval.name].reshape(-1)
            interval.values.copy_(whole[interval.offset : interval.offset + len(interval.values)])
        else:
            interval.values.zero_()
    engine.loaded(0, {})
