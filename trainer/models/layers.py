"""Small layers that the U-Net and the text encoder share.

Always holds: parameters are named and shaped as in the release; statistics and sums that bfloat16 would spoil are taken
in float32; a layer reads its weights only inside its own forward, which is where sharded engines gather them.
Called by `unet`, `text` and `glide`.

Legend: B batch, C channels, H W image, L sequence positions, D features in and F features out of a linear map.
"""

from __future__ import annotations

import contextlib
import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation in float32, then SiLU when `silu`; returns the input's dtype.

    Given bfloat16, torch's kernel keeps mean and reciprocal deviation as bfloat16 for the backward pass, which spoils
    the gradient where the mean is large; hence the explicit float32.
    """

    def __init__(self, groups: int, channels: int, *, silu: bool = False) -> None:
        super().__init__(groups, channels)
        self.silu = silu

    def forward(self, x_BCHW: Tensor) -> Tensor:
        normed = F.group_norm(x_BCHW.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        normed = normed.to(x_BCHW.dtype)
        return F.silu(normed) if self.silu else normed


class LayerNorm32(nn.LayerNorm):
    """Layer normalisation in float32; returns the input's dtype."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        normed = F.layer_norm(x_BLD.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(x_BLD.dtype)


class Pointwise(nn.Conv1d):
    """A linear map of features, kept as the pointwise convolution of the release: weight [F, D, 1].

    The sequence stays [B, L, D], so that attention reads its heads without a transpose, and on CPU a matrix product is
    much faster than torch's conv1d.
    """

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__(features_in, features_out, kernel_size=1)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return F.linear(x_BLD, self.weight.squeeze(-1), self.bias)


class Conv2dFloat32(nn.Conv2d):
    """A convolution in float32 whatever the module was cast to and whatever autocast says; returns float32."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        with _no_autocast(x_BCHW.device.type):
            assert self.bias is not None
            return F.conv2d(x_BCHW.float(), self.weight.float(), self.bias.float(), padding=self.padding)


def _no_autocast(device: str) -> contextlib.AbstractContextManager[None]:
    # The meta device, on which models are measured, refuses even a disabled autocast.
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def zeroed(module: M) -> M:
    """`module` with every parameter zero: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError, in one line, if a tensor is of another shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")


def timestep_embedding(timesteps_B: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of the timesteps at `width / 2` geometric frequencies: [B, width] float32.

    `timesteps_B` may be integral or fractional, on the scale of the training process (0..999). `width` is even.
    Source: Vaswani et al. 2017 (section 3.5) as used by DDPM; the release puts cosines first.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps_B.device) / half
    angles = timesteps_B.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
