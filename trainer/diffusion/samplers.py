"""Samplers: from noise to an image, one reverse step after the other.

Always holds: all randomness is handed in (`x_BCHW`, `noise`), so equal inputs give equal images; the network is told
timesteps of the process it was trained on. Called by recipes and `trainer.sampling`.

Legend: B batch, C channels, H W image, 2C predicted noise and variance. Sources: Ho et al. 2020 (algorithm 2),
Song et al. 2021 (DDIM), Ho & Salimans 2022 (classifier-free guidance), Dhariwal & Nichol 2021 (gradient guidance).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.diffusion.gaussian import Diffusion, ReverseStep

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, H, W], timesteps [B] on the original scale) to the network's output [B, 2C, H, W]."""
Noise = Callable[[int], Tensor]
"""Step index to standard normal noise [B, C, H, W]; asked for steps-1..1 in that order, never for 0."""


class SampleStep(NamedTuple):
    """One step taken: its index, the sample after it, and the image predicted behind the sample before it."""

    step_index: int
    x_BCHW: Tensor
    x_start_BCHW: Tensor


class StepOptions(NamedTuple):
    """What both samplers do to each prediction.

    `process_x_start` acts on the predicted image before clipping. `gradient` (x, original timesteps) to [B, C, H, W]
    pulls the sample, for example towards a caption by noised CLIP, already multiplied by its scale.
    """

    clip_denoised: bool = True
    process_x_start: Callable[[Tensor], Tensor] | None = None
    gradient: Denoise | None = None


DEFAULT_OPTIONS = StepOptions()


@torch.no_grad()
def ancestral_steps(
    denoise: Denoise, diffusion: Diffusion, x_BCHW: Tensor, noise: Noise, options: StepOptions = DEFAULT_OPTIONS
) -> Iterator[SampleStep]:
    """Draw x_{t-1} from p(x_{t-1} | x_t) for every timestep, last first. `x_BCHW` is the initial noise.

    A gradient shifts the mean by variance · gradient (Dhariwal & Nichol 2021, algorithm 1).
    """
    for index in reversed(range(diffusion.steps)):
        step, pull = _predict(denoise, diffusion, x_BCHW, index, options)
        x_BCHW = step.mean if pull is None else step.mean + step.variance * pull
        if index:
            x_BCHW = x_BCHW + torch.exp(0.5 * step.log_variance) * noise(index)
        yield SampleStep(index, x_BCHW, step.x_start)


@torch.no_grad()
def ddim_steps(
    denoise: Denoise,
    diffusion: Diffusion,
    x_BCHW: Tensor,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    options: StepOptions = DEFAULT_OPTIONS,
) -> Iterator[SampleStep]:
    """DDIM (Song et al. 2021, equation 12): deterministic at eta 0, which never asks for noise.

    A gradient changes the noise by -sqrt(1 - alpha_bar) · gradient (Dhariwal & Nichol 2021, algorithm 2); the image is
    not clipped again after it, as in the release. Raises ValueError when eta is not 0 and `noise` is missing.
    """
    if eta and noise is None:
        raise ValueError(f"DDIM with eta {eta}: expected a source of noise, found none")
    for index in reversed(range(diffusion.steps)):
        step, pull = _predict(denoise, diffusion, x_BCHW, index, options)
        t_B = _timesteps(x_BCHW, index)
        x_start_BCHW = step.x_start
        # Derived again: clipping has changed the image, and image and noise must add up to x_t.
        eps_BCHW = diffusion.eps_from_xstart(x_BCHW, t_B, x_start_BCHW)
        if pull is not None:
            eps_BCHW = eps_BCHW - diffusion.at("sqrt_one_minus_alphas_cumprod", t_B) * pull
            x_start_BCHW = diffusion.predict_xstart_from_eps(x_BCHW, t_B, eps_BCHW)
        bar, bar_before = diffusion.at("alphas_cumprod", t_B), diffusion.at("alphas_cumprod_prev", t_B)
        sigma = eta * torch.sqrt((1 - bar_before) / (1 - bar) * (1 - bar / bar_before))
        x_BCHW = bar_before.sqrt() * x_start_BCHW + torch.sqrt(1 - bar_before - sigma.square()) * eps_BCHW
        if index and eta and noise is not None:
            x_BCHW = x_BCHW + sigma * noise(index)
        yield SampleStep(index, x_BCHW, x_start_BCHW)


def ancestral_sample(
    denoise: Denoise, diffusion: Diffusion, x_BCHW: Tensor, noise: Noise, options: StepOptions = DEFAULT_OPTIONS
) -> Tensor:
    """`ancestral_steps` to the end: the image [B, C, H, W], in [-1, 1] when predictions are clipped."""
    return _last(ancestral_steps(denoise, diffusion, x_BCHW, noise, options))


def ddim_sample(
    denoise: Denoise,
    diffusion: Diffusion,
    x_BCHW: Tensor,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    options: StepOptions = DEFAULT_OPTIONS,
) -> Tensor:
    """`ddim_steps` to the end: the image [B, C, H, W]."""
    return _last(ddim_steps(denoise, diffusion, x_BCHW, eta=eta, noise=noise, options=options))


def guided(
    model: Callable[..., Tensor],
    guidance_scale: float,
    conditions: Mapping[str, Tensor],
    empty: Mapping[str, Tensor],
) -> Denoise:
    """Classifier-free guidance as a `Denoise`: eps = eps(empty) + scale · (eps(conditions) - eps(empty)).

    `model(x, timesteps, **keywords)` runs once on the doubled batch, conditional half first; `conditions` and `empty`
    hold its keywords: tensors with the batch first, equal keys and shapes (an upsampler's low resolution is in both).
    Guidance acts on the noise only: the variance is the conditional half's own. At scale 1 the empty half has no
    weight and is not computed. Raises ValueError when the keywords differ.
    """
    if conditions.keys() != empty.keys():
        raise ValueError(f"guidance: expected equal keywords, found {sorted(conditions)} and {sorted(empty)}")
    if guidance_scale == 1:
        return lambda x_BCHW, timesteps_B: model(x_BCHW, timesteps_B, **conditions)
    doubled = {name: torch.cat([conditions[name], empty[name]]) for name in conditions}

    def denoise(x_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        output = model(torch.cat([x_BCHW, x_BCHW]), torch.cat([timesteps_B, timesteps_B]), **doubled)
        conditional_B2CHW, empty_B2CHW = output.chunk(2)
        eps_BCHW, position_BCHW = conditional_B2CHW.chunk(2, dim=1)
        empty_eps_BCHW = empty_B2CHW.chunk(2, dim=1)[0]
        guided_eps_BCHW = empty_eps_BCHW + guidance_scale * (eps_BCHW - empty_eps_BCHW)
        return torch.cat([guided_eps_BCHW, position_BCHW], dim=1)

    return denoise


def _predict(
    denoise: Denoise, diffusion: Diffusion, x_BCHW: Tensor, index: int, options: StepOptions
) -> tuple[ReverseStep, Tensor | None]:
    t_B = _timesteps(x_BCHW, index)
    original_B = diffusion.original_timesteps(t_B)
    step = diffusion.p_mean_variance(
        denoise(x_BCHW, original_B),
        x_BCHW,
        t_B,
        clip_denoised=options.clip_denoised,
        process_x_start=options.process_x_start,
    )
    return step, None if options.gradient is None else options.gradient(x_BCHW, original_B)


def _timesteps(x_BCHW: Tensor, index: int) -> Tensor:
    return torch.full((len(x_BCHW),), index, dtype=torch.int64, device=x_BCHW.device)


def _last(steps: Iterable[SampleStep]) -> Tensor:
    for step in steps:
        last = step
    return last.x_BCHW
