"""Noise schedules: the variances beta_t of the forward process.

Always holds: float64, each in (0, 1), for any number of steps. Called by `gaussian`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

BetaSchedule = Literal["cosine", "linear", "sqrt_linear"]

LARGEST_BETA = 0.999  # a beta of 1 would erase the image in one step and leave no posterior


def linear_betas(steps: int) -> npt.NDArray[np.float64]:
    """Ho et al. 2020: 1e-4 to 0.02 at 1000 steps; other lengths scale it so that the total noise stays the same.

    Below 21 steps the scaled end would pass 1; it is capped at 0.999.
    """
    scale = 1000 / steps
    return np.minimum(np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64), LARGEST_BETA)


def sqrt_linear_betas(steps: int) -> npt.NDArray[np.float64]:
    """Rombach et al. 2022: evenly spaced square roots, from a beta of .00085 to one of .012 at 1000 steps.

    The ends are those of latent diffusion's text-to-image models, whose configurations call this schedule `linear`.
    Other lengths scale them as `linear_betas` does, and cap at 0.999 what would pass it (below 13 steps).
    """
    scale = 1000 / steps
    roots = np.linspace(math.sqrt(scale * 0.00085), math.sqrt(scale * 0.012), steps, dtype=np.float64)
    return np.minimum(roots**2, LARGEST_BETA)


def cosine_betas(steps: int) -> npt.NDArray[np.float64]:
    """Nichol & Dhariwal 2021, equation 17 (`squaredcos_cap_v2` in the release), capped at 0.999 near the end."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [1 - alpha_bar((step + 1) / steps) / alpha_bar(step / steps) for step in range(steps)]
    return np.minimum(np.array(betas, dtype=np.float64), LARGEST_BETA)


def betas(schedule: BetaSchedule, steps: int) -> npt.NDArray[np.float64]:
    """beta_t for t = 0..steps-1: [steps] float64. Raises ValueError for an unknown schedule or no steps."""
    if steps < 1:
        raise ValueError(f"diffusion steps: expected at least 1, found {steps}")
    if schedule not in SCHEDULES:
        raise ValueError(f"noise schedule: expected one of {', '.join(get_args(BetaSchedule))}, found {schedule!r}")
    return SCHEDULES[schedule](steps)


SCHEDULES: dict[str, Callable[[int], npt.NDArray[np.float64]]] = {
    "cosine": cosine_betas,
    "linear": linear_betas,
    "sqrt_linear": sqrt_linear_betas,
}
