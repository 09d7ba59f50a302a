"""A recipe of two networks, as the seam promises: a generator that is sharded, and a critic that is replicated because
its gradient penalty needs a gradient of a gradient (WGAN-GP; Gulrajani et al. 2017, equation 3)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.draws import Draws
from data_pipeline.images import area_resize
from data_pipeline.loader import Column, Rows
from trainer.recipes.recipe import Batch, Losses, Part, Phase, Recipe

SIDE, NOISE, WIDTH = 8, 16, 40
PENALTY = 10.0


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, outputs)
    )


class TwoParts(Recipe):
    columns = (Column("base", "image64"),)

    def parts(self) -> dict[str, Part]:
        pixels = 3 * SIDE * SIDE
        return {
            "critic": Part(lambda: network(pixels, 1), hold="replicated"),
            "generator": Part(lambda: network(NOISE, pixels)),
        }

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("critic", ("total", "wasserstein", "penalty"), self.critic_loss),
            Phase("generator", ("total",), self.generator_loss, active=lambda update: update % 2 == 1),
        )

    def prepare(self, rows: Rows, draws: Draws) -> Batch:
        images = np.stack([area_resize(image, SIDE) for image in rows["image64"].reshape(-1, 64, 64, 3)])
        flat = torch.from_numpy(images).float().reshape(len(images), -1) / 127.5 - 1
        mix = torch.from_numpy(draws.uniform("mix")).float()[:, None]
        return {"images": flat, "noise": torch.from_numpy(draws.normal("noise", (NOISE,))), "mix": mix}

    def critic_loss(self, parts: Mapping[str, nn.Module], batch: Batch, draws: Draws) -> Losses:
        with torch.no_grad():
            drawn = parts["generator"](batch["noise"])
        mixed = torch.lerp(batch["images"], drawn, batch["mix"]).requires_grad_()
        (slope,) = torch.autograd.grad(parts["critic"](mixed).sum(), mixed, create_graph=True)
        penalty = PENALTY * (slope.norm(dim=1) - 1).square()
        wasserstein = (parts["critic"](drawn) - parts["critic"](batch["images"])).squeeze(1)
        return {"total": wasserstein + penalty, "wasserstein": wasserstein, "penalty": penalty}

    def generator_loss(self, parts: Mapping[str, nn.Module], batch: Batch, draws: Draws) -> Losses:
        score: Tensor = parts["critic"](parts["generator"](batch["noise"]))
        return {"total": -score.squeeze(1)}
