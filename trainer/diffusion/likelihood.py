"""Bits per dimension: the variational bound of given images, summed over all timesteps of a process.

Always holds: no gradient is recorded and all randomness is handed in; a process of T timesteps costs T calls of the
network per batch, so evaluation sums over few images or over a respaced process, which has a bound of its own. Called
by evaluation.

Legend: B batch, C channels, H W image, T timesteps.
Sources: DDPM = Ho et al. 2020, equation 5; the figures are those of the published evaluation of iDDPM and ADM.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.diffusion.gaussian import Diffusion
from trainer.diffusion.losses import bound_term, gaussian_kl
from trainer.diffusion.steps import Denoise


class BitsPerDimension(NamedTuple):
    """Per image, float32: `total_B` = `prior_B` + sum of `vb_BT`, bits per dimension; column t is timestep t.

    `noise_mse_BT` and `x_start_mse_BT` are the errors of the predicted noise and image at each timestep.
    """

    total_B: Tensor
    prior_B: Tensor
    vb_BT: Tensor
    noise_mse_BT: Tensor
    x_start_mse_BT: Tensor


@torch.no_grad()
def bits_per_dimension(
    denoise: Denoise,
    diffusion: Diffusion,
    x_start_BCHW: Tensor,
    noise: Callable[[int], Tensor],
    *,
    clip_denoised: bool = True,
) -> BitsPerDimension:
    """An upper bound on -log2 p(x_0) per dimension of 8-bit images on [-1, 1].

    `denoise` as for the samplers: (x_t, timesteps on the original scale) to the network's output, any prediction and
    variance. `noise(t)` is standard normal [B, C, H, W], asked for once per timestep, last first. Predicted images are
    clipped unless asked otherwise, as in the published figures: it brings each nearer to the image meant.
    """
    x_start_BCHW = x_start_BCHW.float()
    columns = []
    for timestep in reversed(range(diffusion.steps)):
        t_B = torch.full((len(x_start_BCHW),), timestep, dtype=torch.int64, device=x_start_BCHW.device)
        noise_BCHW = noise(timestep)
        x_BCHW = diffusion.q_sample(x_start_BCHW, t_B, noise_BCHW)
        output_BKHW = denoise(x_BCHW, diffusion.original_timesteps(t_B))
        step = diffusion.p_mean_variance(output_BKHW, x_BCHW, t_B, clip_denoised=clip_denoised)
        eps_BCHW = diffusion.eps_from_xstart(x_BCHW, t_B, step.x_start)
        columns.append(
            (
                bound_term(diffusion, step, x_start_BCHW, x_BCHW, t_B),
                _mean_square(eps_BCHW - noise_BCHW),
                _mean_square(step.x_start - x_start_BCHW),
            )
        )
    vb_BT, noise_mse_BT, x_start_mse_BT = (torch.stack(terms, dim=1) for terms in zip(*reversed(columns), strict=True))
    prior_B = prior_bits_per_dimension(diffusion, x_start_BCHW)
    return BitsPerDimension(vb_BT.sum(dim=1) + prior_B, prior_B, vb_BT, noise_mse_BT, x_start_mse_BT)


def prior_bits_per_dimension(diffusion: Diffusion, x_start_BCHW: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, 1)) in bits per dimension: [B] float32. What the schedule leaves of the image at T.

    Depends on no network (DDPM's L_T). Computed in float64: it is the small difference of terms near 1.
    """
    remaining = float(diffusion.alphas_cumprod[-1])
    mean_BCHW = math.sqrt(remaining) * x_start_BCHW.double()
    zero = torch.zeros((), dtype=torch.float64, device=x_start_BCHW.device)
    kl_BCHW = gaussian_kl(mean_BCHW, zero + math.log1p(-remaining), zero, zero)
    return (kl_BCHW.mean(dim=(1, 2, 3)) / math.log(2)).float()


def _mean_square(error_BCHW: Tensor) -> Tensor:
    return error_BCHW.square().mean(dim=(1, 2, 3))
