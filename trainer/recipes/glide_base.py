"""Recipe `glide_base`: the text-conditional base model (GLIDE, section 4.1), 64 x 64 at the paper's size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from data_pipeline.draws import Draws
from data_pipeline.images import area_resize
from data_pipeline.loader import Column, Rows
from trainer.config import SamplingSettings
from trainer.models.glide import Glide
from trainer.recipes.glide import GlideConfig, GlideDiffusion, build_glide, to_model_range
from trainer.recipes.recipe import Batch, Losses, Part, Phase, Pixels, Recipe


class GlideBase(Recipe):
    """See Recipe. Trains at 64 px, or below it on the same column reduced by the same area filter."""

    columns = (Column("base", "image64"), Column("base", "tokens"), Column("base", "n_tokens"))

    def __init__(self, config: GlideConfig) -> None:
        self.config, self.diffusion = config, GlideDiffusion(config)

    def parts(self) -> dict[str, Part]:
        return {"base": Part(build=lambda: build_glide(self.config), start=self.config.parent)}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("base", ("total", "mse", "vb"), self._loss),)

    def prepare(self, rows: Rows, draws: Draws) -> Batch:
        size = self.config.model.image_size
        images = np.stack([area_resize(image, size) for image in rows["image64"].reshape(-1, 64, 64, 3)])
        captions = self.diffusion.captions(rows["tokens"], rows["n_tokens"], draws)
        return {"images": to_model_range(images), **captions, **self.diffusion.noising(draws)}

    def _loss(self, parts: Mapping[str, nn.Module], batch: Batch, draws: Draws) -> Losses:
        return self.diffusion.loss(parts["base"], batch)

    def conditions(self, prompts: Sequence[str], images: Pixels | None) -> Batch:
        return self.diffusion.prompts(prompts)

    def sample(
        self, parts: Mapping[str, nn.Module], conditions: Batch, draws: Draws, settings: SamplingSettings
    ) -> Pixels:
        model = parts["base"]
        assert isinstance(model, Glide)
        return self.diffusion.sample(model, conditions, draws, settings)
