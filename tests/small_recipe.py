"""The smallest recipe that does all a recipe does: a net of 112 parameters that removes noise from 2 x 2 pixels, with a
state of its own in the manifest. Its checkpoints are small enough to be kept beside the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.draws import Draws
from data_pipeline.images import area_resize
from data_pipeline.loader import Column, Rows
from trainer.config import SamplingSettings, TrainConfig
from trainer.diffusion.steps import Gradient
from trainer.recipes.recipe import Batch, Given, Losses, Part, Phase, Pixels, Recipe, Watch

SIDE, HIDDEN = 2, 4
PIXELS = 3 * SIDE * SIDE


class Updates:
    """How many updates were accepted; a recipe's state in the manifest."""

    count = 0

    def document(self) -> dict[str, Any]:
        return {"updates": self.count}

    def load(self, document: dict[str, Any]) -> None:
        self.count = document["updates"]


class SmallRecipe(Recipe):
    """See Recipe. Given by name: `monkeypatch.setitem(RECIPES, "small", (TrainConfig, SmallRecipe))`."""

    columns = (Column("base", "image64"),)

    def __init__(self, config: TrainConfig) -> None:
        self.updates = Updates()

    def parts(self) -> dict[str, Part]:
        return {"net": Part(lambda: nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, PIXELS)))}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("net", ("total",), self.loss, observe=self.observe),)

    def state(self) -> Updates:
        return self.updates

    def prepare(self, rows: Rows, draws: Draws) -> Batch:
        small = np.stack([area_resize(image, SIDE) for image in rows["image64"].reshape(-1, 64, 64, 3)])
        clean = torch.from_numpy(small).float().reshape(len(small), -1) / 127.5 - 1
        return {"clean": clean, "noise": torch.from_numpy(draws.normal("noise", (PIXELS,)))}

    def loss(self, parts: Mapping[str, nn.Module], batch: Batch, draws: Draws) -> Losses:
        found = parts["net"](batch["clean"] + batch["noise"])
        return {"total": (found - batch["clean"]).square().mean(dim=1)}

    def observe(self, values: Mapping[str, Tensor], accepted: bool) -> Mapping[str, float]:
        self.updates.count += accepted
        return {}

    def conditions(self, prompts: Sequence[str], given: Given) -> Batch:
        return {"prompts": torch.zeros(len(prompts))}

    def sample(
        self,
        parts: Mapping[str, nn.Module],
        conditions: Batch,
        draws: Draws,
        settings: SamplingSettings,
        gradient: Gradient | None = None,
        watch: Watch | None = None,
    ) -> Pixels:
        drawn = parts["net"](torch.from_numpy(draws.normal("start", (PIXELS,))))
        bytes_ = ((drawn + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        return bytes_.reshape(-1, SIDE, SIDE, 3).numpy()
