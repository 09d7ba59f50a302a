"""DPM-Solver++ 2M: images in few steps by a second-order multistep method on the predicted image.

Always holds: one network call per step; all randomness is handed in; coefficients are float64. Called by `samplers`.

Legend: B batch, C channels, H W image; alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), lambda = log(alpha /
sigma). Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2 and section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.diffusion.gaussian import Diffusion
from trainer.diffusion.steps import (
    DEFAULT_OPTIONS,
    Denoise,
    Noise,
    SampleStep,
    StepOptions,
    predict_by_score,
    step_indices,
)

LARGEST_EXTRAPOLATION = 0.5
"""The largest weight of the change between the last two predictions (h / 2h' in the paper): that of equal steps.

Steps much longer in lambda than the one before are common here: the one that reaches the first timestep in every evenly
spaced process, and `fast27`'s from 799 to 600 after one from 800 to 799, whose weight of 100 would multiply the
network's error. The predicted image settles while lambda runs, so a long step is no reason to extrapolate further.
"""


@torch.no_grad()
def dpm_solver_steps(
    denoise: Denoise,
    diffusion: Diffusion,
    x_BCHW: Tensor,
    noise: Noise | None = None,
    *,
    eta: float = 0.0,
    start_index: int | None = None,
    options: StepOptions = DEFAULT_OPTIONS,
) -> Iterator[SampleStep]:
    """DPM-Solver++(2M); eta 0 solves the probability flow, eta 1 is SDE-DPM-Solver++(2M), which asks for noise.

    First order are the first step, which has no history, and the last, to an infinite lambda, which gives the predicted
    image itself. `x_BCHW` is at `start_index`. A gradient acts on the score, as for DDIM. Raises ValueError when eta is
    not within 0..1, or is above 0 and `noise` is missing.
    """
    if not 0 <= eta <= 1 or (eta and noise is None):
        raise ValueError(f"DPM-Solver++ with eta {eta}: expected 0 to 1 and a source of noise above 0")
    before: tuple[Tensor, float] | None = None  # the last prediction and the length of the step taken with it
    for index in step_indices(diffusion, start_index):
        x_start_BCHW, _ = predict_by_score(denoise, diffusion, x_BCHW, index, options)
        if index == 0:
            x_BCHW = x_start_BCHW
        else:
            length = _log_snr(diffusion, index - 1) - _log_snr(diffusion, index)
            direction_BCHW = x_start_BCHW
            if before is not None:
                weight = min(length / (2 * before[1]), LARGEST_EXTRAPOLATION)
                direction_BCHW = x_start_BCHW + weight * (x_start_BCHW - before[0])
            x_BCHW = _move(diffusion, index, x_BCHW, direction_BCHW, length, eta)
            if eta and noise is not None:
                spread = _sigma(diffusion, index - 1) * math.sqrt(-math.expm1(-2 * eta * length))
                x_BCHW = x_BCHW + spread * noise(index)
            before = (x_start_BCHW, length)
        yield SampleStep(index, x_BCHW, x_start_BCHW)


def _move(
    diffusion: Diffusion, index: int, x_BCHW: Tensor, direction_BCHW: Tensor, length: float, eta: float
) -> Tensor:
    """The mean of x one step on, if the predicted image were `direction_BCHW` all the way (equation 9 at eta 0)."""
    kept = _sigma(diffusion, index - 1) / _sigma(diffusion, index) * math.exp(-eta * length)
    added = -math.sqrt(diffusion.alphas_cumprod[index - 1]) * math.expm1(-(1 + eta) * length)
    return kept * x_BCHW + added * direction_BCHW


def _sigma(diffusion: Diffusion, index: int) -> float:
    return math.sqrt(1 - diffusion.alphas_cumprod[index])


def _log_snr(diffusion: Diffusion, index: int) -> float:
    """lambda: half the logarithm of the signal-to-noise ratio."""
    bar = diffusion.alphas_cumprod[index]
    return 0.5 * (math.log(bar) - math.log1p(-bar))
