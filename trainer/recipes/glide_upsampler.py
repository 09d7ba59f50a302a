"""Recipe `glide_upsampler`: the text-conditional upsampler (GLIDE, section 4.1), 64 -> 256 at the paper's size."""

from __future__ import annotations

from typing import Annotated

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from data_pipeline.config import Settings
from data_pipeline.draws import Draws
from data_pipeline.errors import UserError
from data_pipeline.images import area_resize, decode_stored
from data_pipeline.loader import Column, Rows
from trainer.config import SamplingSettings
from trainer.recipes.glide import GlideConfig, GlideRecipe, to_model_range
from trainer.recipes.recipe import Batch, Pixels

Fraction = Annotated[float, Field(ge=0, le=1)]


class LowResAugmentation(Settings):
    """What is done to the low resolution in training, so that a base model's faults do not surprise the upsampler.

    GLIDE names none, and none is the default. Blur: cascaded diffusion (Ho et al. 2021, section 4.2) and unCLIP's first
    upsampler, which has sigma 0.6 with a kernel of 3. Noise: the same paper, section 4.1.
    """

    blur: Fraction = 0.0  # chance of a Gaussian blur with a kernel of 3 px
    blur_sigma: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.4, 0.6)  # px, uniform
    noise: Fraction = 0.0  # highest noise level; needs model.low_res_level, which tells the network the level


class GlideUpsamplerConfig(GlideConfig):
    """An upsampler."""

    part = "upsampler"
    low_res: LowResAugmentation = LowResAugmentation()

    @model_validator(mode="after")
    def _tells_the_level(self) -> GlideUpsamplerConfig:
        if (self.low_res.noise > 0) != self.model.low_res_level:
            raise ValueError(f"model.low_res_level true if low_res.noise is above 0, found {self.model.low_res_level}")
        return self

    def for_evaluation(self) -> GlideConfig:
        return super().for_evaluation().model_copy(update={"low_res": LowResAugmentation()})


class GlideUpsampler(GlideRecipe):
    """See Recipe. Picture and low-resolution condition both come from the stored 256 px JPEG by the area filter (ADM:
    area-reduced condition, no blur or noise)."""

    config: GlideUpsamplerConfig
    columns = (Column("upsampler", "image256"), Column("upsampler", "tokens"), Column("upsampler", "n_tokens"))

    def pictures(self, rows: Rows, draws: Draws) -> dict[str, Tensor]:
        side, low = self.config.model.image_size, self.config.model.low_resolution
        assert low is not None
        decoded = [decode_stored(jpeg) for jpeg in rows["image256"]]
        return {
            "images": to_model_range(np.stack([area_resize(image, side) for image in decoded])),
            **self._augmented(np.stack([area_resize(image, low) for image in decoded]), draws),
        }

    def _augmented(self, images: Pixels, draws: Draws) -> dict[str, Tensor]:
        """The low resolution, blurred by chance, and noised where the network is told how much."""
        settings = self.config.low_res
        sigmas = np.interp(draws.uniform("blur sigma"), (0, 1), settings.blur_sigma)
        blurred = draws.uniform("blur") < settings.blur
        images = np.stack(
            [
                cv2.GaussianBlur(image, (3, 3), sigma) if chosen else image
                for image, sigma, chosen in zip(images, sigmas, blurred, strict=True)
            ]
        )
        return self._noised(to_model_range(images), draws.uniform("low-res level") * settings.noise, draws)

    def _noised(self, low_res: Tensor, levels: NDArray[np.float64], draws: Draws) -> dict[str, Tensor]:
        """Level s in [0, 1] is cos(s pi/2) x + sin(s pi/2) noise: nothing at 0, noise alone at 1."""
        if not self.config.model.low_res_level:
            return {"low_res": low_res}
        angles = torch.from_numpy(levels * np.pi / 2).float()[:, None, None, None]
        noise = torch.from_numpy(draws.normal("low-res noise", tuple(low_res.shape[1:])))
        return {
            "low_res": angles.cos() * low_res + angles.sin() * noise,
            "low_res_level": torch.from_numpy(levels).float(),
        }

    def sample_conditions(self, conditions: Batch, draws: Draws, settings: SamplingSettings) -> Batch:
        """The low resolution with the noise that the network is told of."""
        if settings.low_res_level and not self.config.model.low_res_level:
            told = "0 for an upsampler that is not told of noise"
            raise UserError("low_res_level", told, f"{settings.low_res_level}", "leave it out")
        levels = np.full(len(draws.positions), settings.low_res_level)
        return {**conditions, **self._noised(conditions["low_res"], levels, draws)}
