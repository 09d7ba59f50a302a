"""The size of a GLIDE network as data.

Always holds: a configuration that validates builds, and its weights have the shapes of OpenAI's release at that size.
Called by recipes, `plan` and the importer of released weights; presets live in `configs/model/`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from data_pipeline.config import Settings

VOCABULARY = 50257  # GPT-2's byte-pair encoding, as in the release
IMAGE_CHANNELS = 3
INPAINT_CHANNELS = IMAGE_CHANNELS + 1  # known pixels, and the mask that says which are known

Positive = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class GlideModelConfig(Settings):
    """Base model or upsampler (`low_resolution`), each also as an inpainting model (`inpaint`)."""

    image_size: PositiveInt
    """Side of the square image that is denoised, in pixels."""
    channels: PositiveInt
    """Width of the first level; level i has `channels * channel_mult[i]`."""
    res_blocks: PositiveInt
    """Residual blocks per level on the way down; the way up has one more."""
    channel_mult: Positive
    attention_resolutions: tuple[PositiveInt, ...]
    """Sides of the feature maps that attend to themselves and to the caption; the middle block always does."""
    head_channels: PositiveInt = 64
    norm_groups: PositiveInt = 32
    """Groups of every group normalisation; 32 in the release. A narrow network needs fewer: with one channel per group
    each channel loses its mean, and with it the colour of the whole picture."""
    text_context: PositiveInt = 128
    """Caption length in tokens, padding included."""
    text_width: PositiveInt
    text_layers: PositiveInt
    text_heads: PositiveInt
    low_resolution: PositiveInt | None = None
    """Side of the images that an upsampler is trained to enlarge; None for a base model. The network itself takes any
    smaller square, as the release does."""
    inpaint: bool = False
    """Also sees an image with a hole: what is known of it, and where it is known."""
    low_res_level: bool = False
    """An upsampler is told how noisy its low resolution is (cascaded diffusion); the release is not."""
    learned_variance: bool = True
    """Also predicts where the variance lies between its bounds (improved DDPM); the release always does."""

    @property
    def in_channels(self) -> int:
        """Noised image; for inpainting, known pixels and mask; for an upsampler, the enlarged image. In that order."""
        inpainting = INPAINT_CHANNELS if self.inpaint else 0
        upsampling = IMAGE_CHANNELS if self.low_resolution is not None else 0
        return IMAGE_CHANNELS + inpainting + upsampling

    @property
    def out_channels(self) -> int:
        """The prediction, then the position of the variance between its bounds where that is learned."""
        return (2 if self.learned_variance else 1) * IMAGE_CHANNELS

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Side of the feature map at each level, in pixels."""
        return tuple(self.image_size >> level for level in range(len(self.channel_mult)))

    @model_validator(mode="after")
    def _check_image(self) -> GlideModelConfig:
        halvings = len(self.channel_mult) - 1
        if self.image_size % 2**halvings:
            raise ValueError(f"image_size divisible by {2**halvings} ({halvings} halvings), found {self.image_size}")
        if self.low_resolution is not None and self.low_resolution >= self.image_size:
            raise ValueError(f"low_resolution below image_size {self.image_size}, found {self.low_resolution}")
        if self.low_res_level and self.low_resolution is None:
            raise ValueError("low_res_level for upsamplers only (low_resolution), found true")
        unknown = sorted(set(self.attention_resolutions) - set(self.resolutions))
        if unknown:
            raise ValueError(f"attention_resolutions among the levels' {list(self.resolutions)}, found {unknown}")
        return self

    @model_validator(mode="after")
    def _check_widths(self) -> GlideModelConfig:
        if self.channels % self.norm_groups:
            raise ValueError(f"channels divisible by norm_groups {self.norm_groups}, found {self.channels}")
        for resolution, mult in zip(self.resolutions, self.channel_mult, strict=True):
            width = self.channels * mult
            attends = resolution in self.attention_resolutions or resolution == self.resolutions[-1]
            if attends and width % self.head_channels:
                raise ValueError(
                    f"head_channels that divides the width at every resolution with attention, "
                    f"found {self.head_channels} for width {width} at {resolution} px"
                )
        if self.text_width % self.text_heads:
            raise ValueError(f"text_width divisible by text_heads {self.text_heads}, found {self.text_width}")
        return self
