"""Samplers: from noise to an image, one reverse step after the other, and DDIM's way back.

Always holds: all randomness is handed in (`x_BCHW`, `noise`), so equal inputs give equal images; the network is told
timesteps of the process it was trained on. Called by recipes and `trainer.sampling`.

Legend: B batch, C channels, H W image. Sources: Ho et al. 2020 (algorithm 2), Song et al. 2021 (DDIM), Dhariwal &
Nichol 2021 (gradient guidance, ADM).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from trainer.diffusion.dpm_solver import dpm_solver_steps
from trainer.diffusion.gaussian import Diffusion
from trainer.diffusion.steps import (
    DEFAULT_OPTIONS,
    Denoise,
    Noise,
    SampleStep,
    StepOptions,
    predict,
    predict_by_score,
    pull,
    step_indices,
)

SamplerName = Literal["ancestral", "ddim", "dpm++", "dpm++sde"]


def sample_steps(
    sampler: SamplerName,
    denoise: Denoise,
    diffusion: Diffusion,
    x_BCHW: Tensor,
    noise: Noise | None = None,
    *,
    eta: float = 0.0,
    start_index: int | None = None,
    options: StepOptions = DEFAULT_OPTIONS,
) -> Iterator[SampleStep]:
    """The steps of a sampler by its name; `x_BCHW` is at `start_index`, None: noise for the whole process.

    Raises ValueError for an unknown sampler or an eta for another than DDIM; each sampler adds its own.
    """
    if eta and sampler != "ddim":
        raise ValueError(f"eta: expected 0, as {sampler} fixes its own noise, found {eta}")
    if sampler == "ancestral":
        return ancestral_steps(denoise, diffusion, x_BCHW, noise, start_index=start_index, options=options)
    if sampler == "ddim":
        return ddim_steps(denoise, diffusion, x_BCHW, noise, eta=eta, start_index=start_index, options=options)
    if sampler in ("dpm++", "dpm++sde"):
        eta = 1.0 if sampler == "dpm++sde" else 0.0
        return dpm_solver_steps(denoise, diffusion, x_BCHW, noise, eta=eta, start_index=start_index, options=options)
    raise ValueError(f"sampler: expected ancestral, ddim, dpm++ or dpm++sde, found {sampler!r}")


def sample(
    sampler: SamplerName,
    denoise: Denoise,
    diffusion: Diffusion,
    x_BCHW: Tensor,
    noise: Noise | None = None,
    *,
    eta: float = 0.0,
    start_index: int | None = None,
    options: StepOptions = DEFAULT_OPTIONS,
    watch: Callable[[int], None] | None = None,
) -> Tensor:
    """`sample_steps` to the end: the image [B, C, H, W], in [-1, 1] when predictions are clipped and nothing pulls.
    `watch` is told the index of each step once it is done."""
    steps = sample_steps(sampler, denoise, diffusion, x_BCHW, noise, eta=eta, start_index=start_index, options=options)
    for step in steps:
        x_BCHW = step.x_BCHW
        if watch:
            watch(step.step_index)
    return x_BCHW


@torch.no_grad()
def ancestral_steps(
    denoise: Denoise,
    diffusion: Diffusion,
    x_BCHW: Tensor,
    noise: Noise | None,
    *,
    start_index: int | None = None,
    options: StepOptions = DEFAULT_OPTIONS,
) -> Iterator[SampleStep]:
    """Draw x_{t-1} from p(x_{t-1} | x_t) for every timestep, last first.

    A gradient shifts the mean by variance · gradient (ADM algorithm 1). Raises ValueError without a source of noise.
    """
    if noise is None:
        raise ValueError("ancestral sampling: expected a source of noise, found none")
    for index in step_indices(diffusion, start_index):
        step = predict(denoise, diffusion, x_BCHW, index, options)
        gradient_BCHW = pull(diffusion, x_BCHW, index, options)
        x_BCHW = step.mean if gradient_BCHW is None else step.mean + step.variance * gradient_BCHW
        if index:
            x_BCHW = x_BCHW + torch.exp(0.5 * step.log_variance) * noise(index)
        yield SampleStep(index, x_BCHW, step.x_start)


@torch.no_grad()
def ddim_steps(
    denoise: Denoise,
    diffusion: Diffusion,
    x_BCHW: Tensor,
    noise: Noise | None = None,
    *,
    eta: float = 0.0,
    start_index: int | None = None,
    options: StepOptions = DEFAULT_OPTIONS,
) -> Iterator[SampleStep]:
    """DDIM (Song et al. 2021, equation 12): deterministic at eta 0, which never asks for noise; eta 1 is as noisy as
    ancestral sampling with the posterior's variance.

    A gradient acts on the score (`steps.predict_by_score`). Raises ValueError when eta is not within 0..1, or is above
    0 and `noise` is missing.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"DDIM: expected an eta from 0 to 1, found {eta}")
    if eta and noise is None:
        raise ValueError(f"DDIM with eta {eta}: expected a source of noise, found none")
    for index in step_indices(diffusion, start_index):
        x_start_BCHW, eps_BCHW = predict_by_score(denoise, diffusion, x_BCHW, index, options)
        # In float64: in float32 the difference under the second root can come out below 0 when steps are few.
        bar, bar_before = float(diffusion.alphas_cumprod[index]), float(diffusion.alphas_cumprod_prev[index])
        variance = eta**2 * (1 - bar_before) / (1 - bar) * (1 - bar / bar_before)
        x_BCHW = math.sqrt(bar_before) * x_start_BCHW + math.sqrt(max(1 - bar_before - variance, 0.0)) * eps_BCHW
        if index and eta and noise is not None:
            x_BCHW = x_BCHW + math.sqrt(variance) * noise(index)
        yield SampleStep(index, x_BCHW, x_start_BCHW)


@torch.no_grad()
def ddim_inversion(
    denoise: Denoise,
    diffusion: Diffusion,
    image_BCHW: Tensor,
    *,
    end_index: int | None = None,
    options: StepOptions = DEFAULT_OPTIONS,
) -> Tensor:
    """The sample at `end_index` (None: the last step) from which DDIM without eta leads back to the image.

    DDIM's equation in the other direction (Song et al. 2021, section 4.3): every step takes the noise found in the
    sample it starts from. The first step starts from the image itself, which has no timestep, and asks at the first
    one. The way back misses the image by an error that falls with the number of steps. -1 gives the image.
    """
    x_BCHW = image_BCHW
    for index in reversed(step_indices(diffusion, end_index)):
        at = max(index - 1, 0)
        x_start_BCHW, eps_BCHW = predict_by_score(denoise, diffusion, x_BCHW, at, options)
        if index == 0:
            x_start_BCHW = image_BCHW
        bar = float(diffusion.alphas_cumprod[index])
        x_BCHW = math.sqrt(bar) * x_start_BCHW + math.sqrt(1 - bar) * eps_BCHW
    return x_BCHW
