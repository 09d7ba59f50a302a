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

Positive = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class GlideModelConfig(Settings):
    """Base model (`low_resolution` None) or upsampler (`low_resolution` = side of the image it starts from)."""

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

    @property
    def in_channels(self) -> int:
        """The noised image, and for an upsampler the enlarged low-resolution image behind it."""
        return IMAGE_CHANNELS if self.low_resolution is None else 2 * IMAGE_CHANNELS

    @property
    def out_channels(self) -> int:
        """Predicted noise, then the learned position of the variance between its bounds."""
        return 2 * IMAGE_CHANNELS

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
