"""Recipe `glide_upsampler`: the text-conditional upsampler (GLIDE, section 4.1), 64 -> 256 at the paper's size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from data_pipeline.draws import Draws
from data_pipeline.images import area_resize, decode_stored
from data_pipeline.loader import Column, Rows
from trainer.config import SamplingSettings
from trainer.models.glide import Glide
from trainer.recipes.glide import GlideConfig, GlideDiffusion, build_glide, to_model_range
from trainer.recipes.recipe import Batch, Losses, Part, Phase, Pixels, Recipe


class GlideUpsampler(Recipe):
    """See Recipe. Picture and low-resolution condition both come from the stored 256 px JPEG by the area filter (ADM:
    area-reduced condition, no blur or noise)."""

    columns = (Column("upsampler", "image256"), Column("upsampler", "tokens"), Column("upsampler", "n_tokens"))

    def __init__(self, config: GlideConfig) -> None:
        self.config, self.diffusion = config, GlideDiffusion(config)

    def parts(self) -> dict[str, Part]:
        return {"upsampler": Part(build=lambda: build_glide(self.config), start=self.config.parent)}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("upsampler", ("total", "mse", "vb"), self._loss),)

    def prepare(self, rows: Rows, draws: Draws) -> Batch:
        size = self.config.model.image_size
        decoded = [decode_stored(jpeg) for jpeg in rows["image256"]]
        images = np.stack([area_resize(image, size) for image in decoded])
        captions = self.diffusion.captions(rows["tokens"], rows["n_tokens"], draws)
        return {
            "images": to_model_range(images),
            "low_res": to_model_range(self._reduce(decoded)),
            **captions,
            **self.diffusion.noising(draws),
        }

    def _loss(self, parts: Mapping[str, nn.Module], batch: Batch, draws: Draws) -> Losses:
        return self.diffusion.loss(parts["upsampler"], batch)

    def conditions(self, prompts: Sequence[str], images: Pixels | None) -> Batch:
        if images is None:
            raise ValueError("an upsampler needs the pictures to enlarge")
        return {**self.diffusion.prompts(prompts), "low_res": to_model_range(self._reduce(images))}

    def sample(
        self, parts: Mapping[str, nn.Module], conditions: Batch, draws: Draws, settings: SamplingSettings
    ) -> Pixels:
        model = parts["upsampler"]
        assert isinstance(model, Glide)
        return self.diffusion.sample(model, conditions, draws, settings)

    def _reduce(self, images: Sequence[Pixels] | Pixels) -> Pixels:
        """[b, low, low, 3] by the versioned area filter; pictures of that size already pass unchanged."""
        low = self.config.model.low_resolution
        assert low is not None
        return np.stack([area_resize(image, low) for image in images])
