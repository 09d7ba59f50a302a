"""Channel surgery: a trained GLIDE network becomes an inpainting one that computes the same until it is trained on.

Always holds: pure functions over state dicts, on any device and also without values (meta); the parent is not changed;
whatever image and mask the new inputs show, the output is the parent's. Called by the inpainting recipes.
Source: Nichol et al. 2021, section 4.3: four more input channels (RGB and a mask), whose weights start at zero; where
the upsampler's go, and that its old ones move, is a fact of the released weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from trainer.models.config import IMAGE_CHANNELS, INPAINT_CHANNELS

FIRST_CONVOLUTION = "input_blocks.0.0.weight"
PARENT_CHANNELS = {"base": IMAGE_CHANNELS, "upsampler": 2 * IMAGE_CHANNELS}


def inpaint_surgery(parent_state: Mapping[str, Tensor], kind: Literal["base", "upsampler"]) -> dict[str, Tensor]:
    """State dict of an inpainting model from its parent's; all tensors but the first convolution's are shared.

    Base: [x] becomes [x, known pixels, mask]. Upsampler: [x, enlarged] becomes [x, known pixels, mask, enlarged], so
    the weights of the enlarged image move from channels 3..5 to 7..9; zeros behind them would instead read the known
    pixels with weights made for the enlarged image. Raises ValueError if the parent's first convolution is missing or
    reads another number of channels.
    """
    weight_OCHW = parent_state.get(FIRST_CONVOLUTION)
    expected = PARENT_CHANNELS[kind]
    if weight_OCHW is None or weight_OCHW.ndim != 4 or weight_OCHW.shape[1] != expected:
        found = "none" if weight_OCHW is None else f"shape {list(weight_OCHW.shape)}"
        raise ValueError(f"{FIRST_CONVOLUTION}, {kind} parent: expected {expected} input channels, found {found}")
    outputs, _, height, width = weight_OCHW.shape
    zeros_OCHW = weight_OCHW.new_zeros(outputs, INPAINT_CHANNELS, height, width)
    pieces = [weight_OCHW[:, :IMAGE_CHANNELS], zeros_OCHW, weight_OCHW[:, IMAGE_CHANNELS:]]
    return {**parent_state, FIRST_CONVOLUTION: torch.cat(pieces, dim=1)}
