"""What all samplers share: the types they speak, their options, and one prediction of the image behind a noisy one.

Always holds: nothing depends on which samples share a batch; the network and a gradient are told timesteps of the
process trained on. Called by `samplers` and `dpm_solver`.

Legend: B batch, C channels, H W image. Sources: Dhariwal & Nichol 2021 (gradient guidance, ADM), Saharia et al. 2022
(dynamic thresholding, Imagen).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trainer.diffusion.gaussian import Diffusion, ReverseStep

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, H, W], timesteps [B] on the original scale) to the network's output, [B, C, H, W] or [B, 2C, H, W]."""
Gradient = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, H, W], timesteps [B] on the original scale) to the scaled gradient of a log-probability, [B, C, H, W]."""
Noise = Callable[[int], Tensor]
"""Step index to standard normal noise [B, C, H, W]; asked once each in descending order, never for index 0."""
Clip = Literal["static", "dynamic", "none"]


class SampleStep(NamedTuple):
    """One step taken: its index, the sample after it, and the image predicted behind the sample before it."""

    step_index: int
    x_BCHW: Tensor
    x_start_BCHW: Tensor


class StepOptions(NamedTuple):
    """What every sampler does to each predicted image, in this order, and what pulls it.

    `clip` "static" clamps to [-1, 1] after `process_x_start`, as the release does; "dynamic" is `dynamic_threshold`
    *before* it, so that pinned pixels keep their values; "none" leaves the range open. `gradient` pulls the sample,
    for example towards a caption by noised CLIP, already multiplied by its scale; nothing is clipped after it.
    """

    clip: Clip = "static"
    percentile: float = 0.995  # of a sample's absolute values; dynamic clipping only
    process_x_start: Callable[[Tensor], Tensor] | None = None
    gradient: Gradient | None = None


DEFAULT_OPTIONS = StepOptions()


def dynamic_threshold(x_start_BCHW: Tensor, percentile: float = 0.995) -> Tensor:
    """Imagen section 2.3: clamp each sample to ±s and divide by s, its `percentile` of |x_0| but at least 1.

    [B, C, H, W] in, the same in [-1, 1] out. Values that fit into [-1, 1] already are left as they are, but for
    the fraction beyond the percentile.
    """
    size_B = torch.quantile(x_start_BCHW.abs().flatten(1), percentile, dim=1).clamp(min=1)
    size_B111 = size_B[:, None, None, None]
    return x_start_BCHW.clamp(-size_B111, size_B111) / size_B111


def step_indices(diffusion: Diffusion, start_index: int | None) -> range:
    """The steps to take, last first, if x is at `start_index`; None: the whole process; -1: none.

    Raises ValueError for an index outside the process.
    """
    first = diffusion.steps - 1 if start_index is None else start_index
    if not -1 <= first < diffusion.steps:
        raise ValueError(f"start index: expected -1 to {diffusion.steps - 1}, found {first}")
    return range(first, -1, -1)


def predict(denoise: Denoise, diffusion: Diffusion, x_BCHW: Tensor, index: int, options: StepOptions) -> ReverseStep:
    """p(x_{t-1} | x_t) of the network at one step, its image processed and clipped as asked, without the gradient.

    Raises ValueError for an unknown kind of clipping.
    """
    t_B = timesteps(x_BCHW, index)
    return diffusion.p_mean_variance(
        denoise(x_BCHW, diffusion.original_timesteps(t_B)),
        x_BCHW,
        t_B,
        clip_denoised=False,
        process_x_start=lambda x_start_BCHW: _processed(x_start_BCHW, options),
    )


def pull(diffusion: Diffusion, x_BCHW: Tensor, index: int, options: StepOptions) -> Tensor | None:
    """The gradient at one step, None without one."""
    if options.gradient is None:
        return None
    return options.gradient(x_BCHW, diffusion.original_timesteps(timesteps(x_BCHW, index)))


def predict_by_score(
    denoise: Denoise, diffusion: Diffusion, x_BCHW: Tensor, index: int, options: StepOptions
) -> tuple[Tensor, Tensor]:
    """The image and the noise that add up to x, both [B, C, H, W], for samplers that follow the score.

    A gradient changes the noise by -sqrt(1 - alpha_bar) · gradient (ADM algorithm 2); the image follows and is not
    clipped again, as in the release.
    """
    t_B = timesteps(x_BCHW, index)
    x_start_BCHW = predict(denoise, diffusion, x_BCHW, index, options).x_start
    # Derived again: clipping has changed the image, and image and noise must add up to x.
    eps_BCHW = diffusion.eps_from_xstart(x_BCHW, t_B, x_start_BCHW)
    gradient_BCHW = pull(diffusion, x_BCHW, index, options)
    if gradient_BCHW is not None:
        eps_BCHW = eps_BCHW - diffusion.at("sqrt_one_minus_alphas_cumprod", t_B) * gradient_BCHW
        x_start_BCHW = diffusion.predict_xstart_from_eps(x_BCHW, t_B, eps_BCHW)
    return x_start_BCHW, eps_BCHW


def timesteps(x_BCHW: Tensor, index: int) -> Tensor:
    """The index of one step for every sample: [B] int64."""
    return torch.full((len(x_BCHW),), index, dtype=torch.int64, device=x_BCHW.device)


def _processed(x_start_BCHW: Tensor, options: StepOptions) -> Tensor:
    if options.clip not in ("static", "dynamic", "none"):
        raise ValueError(f"clip: expected static, dynamic or none, found {options.clip!r}")
    if options.clip == "dynamic":
        x_start_BCHW = dynamic_threshold(x_start_BCHW, options.percentile)
    if options.process_x_start is not None:
        x_start_BCHW = options.process_x_start(x_start_BCHW)
    return x_start_BCHW.clamp(-1, 1) if options.clip == "static" else x_start_BCHW
