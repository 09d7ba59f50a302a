"""What the two inpainting recipes share: random masks, and the surgery that gives a parent the new input channels.

GLIDE, section 4.3: fine-tuning in which random regions are erased, and what remains is fed to the model with a mask as
additional conditions. The law of the regions is not published (see `masks`).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from data_pipeline.draws import Draws
from trainer.models.config import INPAINT_CHANNELS
from trainer.models.surgery import FIRST_CONVOLUTION, PARENT_CHANNELS, inpaint_surgery
from trainer.recipes.glide_base import GlideBase, GlideBaseConfig
from trainer.recipes.glide_upsampler import GlideUpsampler, GlideUpsamplerConfig
from trainer.recipes.masks import MaskSettings, random_masks
from trainer.recipes.recipe import StateDict


class InpaintBaseConfig(GlideBaseConfig):
    """A base model that fills in erased regions. Without a parent it learns from nothing."""

    inpaint = True
    masks: MaskSettings = MaskSettings()


class InpaintUpsamplerConfig(GlideUpsamplerConfig):
    """An upsampler that fills in erased regions: all of the low resolution is given, of the high one what is known."""

    inpaint = True
    masks: MaskSettings = MaskSettings()


class InpaintBase(GlideBase):
    """See GlideBase."""

    config: InpaintBaseConfig

    def known(self, images: Tensor, draws: Draws) -> dict[str, Tensor]:
        return with_holes(self.config.masks, images, draws)

    def adapt(self, parent: StateDict) -> StateDict:
        return with_inpaint_channels(parent, "base")


class InpaintUpsampler(GlideUpsampler):
    """See GlideUpsampler."""

    config: InpaintUpsamplerConfig

    def known(self, images: Tensor, draws: Draws) -> dict[str, Tensor]:
        return with_holes(self.config.masks, images, draws)

    def adapt(self, parent: StateDict) -> StateDict:
        return with_inpaint_channels(parent, "upsampler")


def with_holes(settings: MaskSettings, images: Tensor, draws: Draws) -> dict[str, Tensor]:
    """The network's inpainting keywords; it multiplies picture and mask itself."""
    return {"inpaint_image": images, "inpaint_mask": random_masks(settings, images.shape[-1], draws)}


def with_inpaint_channels(parent: StateDict, kind: Literal["base", "upsampler"]) -> StateDict:
    """The weights of a parent that may be an inpainting model already."""
    has_them = parent[FIRST_CONVOLUTION].shape[1] == PARENT_CHANNELS[kind] + INPAINT_CHANNELS
    return parent if has_them else inpaint_surgery(parent, kind)
