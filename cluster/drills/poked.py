"""A worker whose training goes wrong on purpose: `python -m cluster.drills.poked SPEC RANK WORLD_SIZE`, of the local
launcher.

Always holds: what is wrong follows from the positions and from the stored rows alone, so it is the same on any number
of ranks and each time a position is passed. The recipe is a real one, behind whose back gradients are multiplied at
given positions, and whose loss counts each picture by the inverse of its contrast: rows of flat pictures make it
explode as real bad rows do. Called by the drill of bad gradients, and by tests.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cluster.worker import main
from data_pipeline.draws import Draws
from trainer.recipes import RECIPES
from trainer.recipes.recipe import Batch, Losses, Phase

POKES = "GLIDEPATH_DRILL_POKES"  # environment variable: a list of Poke in JSON
Poke = tuple[int, int, float]  # positions [begin, end), and what gradients of their samples are multiplied by


class _Scaled(torch.autograd.Function):
    """Values as they are; their gradients times `factors`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0], None


class Poked:
    """A recipe with other losses; the rest is `recipe`'s."""

    def __init__(self, recipe: Any, pokes: Iterable[Poke]) -> None:
        self._recipe, self._pokes = recipe, pokes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recipe, name)

    def phases(self) -> tuple[Phase, ...]:
        return tuple(dataclasses.replace(phase, loss=self._poked(phase.loss)) for phase in self._recipe.phases())

    def _poked(self, loss: Callable[..., Losses]) -> Callable[..., Losses]:
        def poked(parts: Mapping[str, nn.Module], batch: Batch, draws: Draws) -> Losses:
            losses = dict(loss(parts, batch, draws))
            factors = torch.ones(len(draws.positions))
            for begin, end, factor in self._pokes:
                factors[torch.from_numpy((draws.positions >= begin) & (draws.positions < end))] = factor
            contrast = batch["images"].flatten(1).std(dim=1)
            return losses | {"total": _Scaled.apply(losses["total"] / contrast, factors)}

        return poked


def poke(recipe: str, pokes: Iterable[Poke]) -> None:
    """From now on, in this process, runs of that recipe go wrong so."""
    settings, make = RECIPES[recipe]
    RECIPES[recipe] = (settings, lambda config: Poked(make(config), pokes))


if __name__ == "__main__":
    for recipe in list(RECIPES):
        poke(recipe, json.loads(os.environ[POKES]))
    sys.exit(main())
