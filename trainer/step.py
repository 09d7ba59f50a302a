"""The training step: forward, backward, update (which asks the guard), ema; once per phase of the recipe.

Always holds: it knows no recipe, engine, store or tracker by name; losses are summed per sample and divided by the
global batch, so the number of workers changes nothing but the order of additions; everything it decides follows from
the position and from numbers that are equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.loader import MicroBatch
from trainer.config import TrainConfig, lr_at
from trainer.ema import ema_decay_at, update_ema
from trainer.engine.engine import Engine
from trainer.engine.group import Group
from trainer.guard import Decision, GuardHistory, judge
from trainer.recipes.recipe import Phase, Recipe, on_device, seed_dropout


@dataclass
class Trainee:
    """What training changes: an engine per part, a guard history per phase."""

    recipe: Recipe
    config: TrainConfig
    group: Group
    engines: dict[str, Engine]
    guards: dict[str, GuardHistory] = field(default_factory=dict)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {name: engine.module for name, engine in self.engines.items()}


def train_step(trainee: Trainee, micro_batches: Sequence[MicroBatch], position: int) -> dict[str, float | str]:
    """One update of every phase on the global batch that starts at `position`.

    Returns figures to log, equal on all ranks; a refused update adds `skipped`: its reason. Where the guard wants the
    run taken back, `rollback` has the reason instead, and phases that would follow are left out. Raises UserError when
    the guard halts the run.
    """
    figures: dict[str, float | str] = {}
    lr = lr_at(position, trainee.config.lr, trainee.config.warmup_images)
    phases, watch = trainee.recipe.phases(), trainee.group.watch
    for phase in phases:
        if not phase.active(position // trainee.config.batch):
            continue
        engine = trainee.engines[phase.part]
        values = backward_of(trainee, phase, micro_batches, position)
        losses = dict(zip(phase.terms, values[: len(phase.terms)].mean(dim=1).tolist(), strict=True))
        seen: dict[str, float | str] = {}
        updates = engine.optimizer_steps()
        with watch.section("update"):
            decision = engine.update(lr, partial(ask_guard, trainee, phase.label, losses["total"], position, seen))
            if decision is Decision.CONTINUE:
                update_ema(engine.shard_view(), ema_decay_at(updates, trainee.config.ema))
        if decision is Decision.HALT:
            raise UserError(
                f"run {trainee.config.run}, part {phase.label}, at {position} images",
                f"to get further within {trainee.config.guard.halt_after} rollbacks",
                f"as many, and again {seen['rollback']}",
                "look at the curves before it; the checkpoints before it stand",
            )
        if decision is Decision.SKIP:
            seen.setdefault("skipped", "gradients overflow fp16; the loss scale falls")
        seen.update({f"loss/{name}": value for name, value in losses.items()})
        named = dict(zip((*phase.terms, *phase.observed), values, strict=True))
        seen.update(phase.observe(named, decision is Decision.CONTINUE))
        if scale := engine.loss_scale():
            seen["loss_scale"] = scale["cur_scale"]
        prefix = f"{phase.label}/" if len(phases) > 1 else ""
        figures.update({f"{prefix}{name}": value for name, value in seen.items()})
        if decision is Decision.ROLLBACK:
            break  # all parts go back together
    return {**figures, "lr": lr}


def backward_of(trainee: Trainee, phase: Phase, micro_batches: Sequence[MicroBatch], position: int) -> Tensor:
    """`phase`'s gradients into its engine, and its values per sample of the global batch that starts at `position`, as
    `accumulate` returns them, summed over ranks, in host memory. A collective call."""
    watch = trainee.group.watch
    with only_trained(trainee.engines, phase.part):
        values = (phase.accumulate or accumulate)(trainee, phase, micro_batches, position)
    with watch.section("backward"):
        watch.await_gpu()  # before the collective calls: there a GPU that hangs would look as those that wait for it
    with watch.section("reduce"):
        return trainee.group.sum_(values).cpu()


def ask_guard(
    trainee: Trainee, phase: str, loss: float, position: int, seen: dict[str, float | str], norm: float
) -> Decision:
    """The guard's decision on an update of `phase`; its history goes on, what it saw goes into `seen`."""
    verdict = judge(trainee.guards.get(phase, GuardHistory()), loss, norm, trainee.config.guard, position)
    trainee.guards[phase] = verdict.history
    seen["grad_norm"] = norm
    if verdict.reason:
        seen["skipped" if verdict.decision is Decision.SKIP else "rollback"] = verdict.reason
    return verdict.decision


def accumulate(trainee: Trainee, phase: Phase, micro_batches: Sequence[MicroBatch], position: int) -> Tensor:
    """Backward of every micro batch of the global batch that starts at `position`.

    Returns the phase's terms and observed values per sample of the global batch, those of other ranks 0: float64
    [terms + observed, B], of which the sum over ranks is every sample's value, exactly.
    """
    engine, device, watch = trainee.engines[phase.part], trainee.group.device, trainee.group.watch
    names = (*phase.terms, *phase.observed)
    values = torch.zeros(len(names), trainee.config.batch, dtype=torch.float64, device=device)
    for micro in micro_batches:
        # A rank whose share is used up goes through the same collective calls, with weight 0.
        mine = len(micro.positions)
        seed_dropout(micro, trainee.group.rank)
        with watch.section("forward"), engine.precision_context():
            losses = phase.loss(trainee.modules, on_device(micro.batch, device), micro.draws)
        with watch.section("backward"):
            engine.backward(losses["total"].sum() * (float(mine > 0) / trainee.config.batch))
        if mine:
            places = torch.from_numpy(micro.positions - position).to(device)
            values[:, places] = torch.stack([losses[name].detach().double() for name in names])
    return values


@contextmanager
def only_trained(engines: Mapping[str, Engine], part: str) -> Iterator[None]:
    """Inside, every part but `part` is frozen: no gradient reaches its parameters."""
    modules = [engine.module for name, engine in engines.items() if name != part]
    others = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
