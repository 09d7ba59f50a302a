"""The hybrid objective L_simple + L_vlb of a network that predicts noise and variance.

Always holds: every term is per sample and in float32, whatever precision the network ran in; the variational term moves
the variance only, because the predicted noise is detached there. Called by the diffusion recipes.

Legend: B batch, C channels, H W image. Source: iDDPM = Nichol & Dhariwal 2021, section 3.1, equation 16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.diffusion.gaussian import Diffusion

HALF_LEVEL = 1 / 255  # half the distance of neighbouring 8-bit values on [-1, 1]
SMALLEST_PROBABILITY = 1e-12


def hybrid_loss(
    diffusion: Diffusion,
    output_B2CHW: Tensor,
    *,
    x_start_BCHW: Tensor,
    x_BCHW: Tensor,
    noise_BCHW: Tensor,
    timesteps_B: Tensor,
) -> dict[str, Tensor]:
    """Terms per sample, each [B] float32: `total`, `mse` of the noise, `vb` in bits per dimension.

    total = mse + vb · steps / 1000. At 1000 steps the weight is 1, iDDPM's lambda of 0.001 on the sum over timesteps.
    """
    output_B2CHW = output_B2CHW.float()
    eps_BCHW, position_BCHW = output_B2CHW.chunk(2, dim=1)
    mse_B = (noise_BCHW - eps_BCHW).square().mean(dim=(1, 2, 3))
    variance_only_B2CHW = torch.cat([eps_BCHW.detach(), position_BCHW], dim=1)
    vb_B = variational_bound(diffusion, variance_only_B2CHW, x_start_BCHW, x_BCHW, timesteps_B)
    return {"total": mse_B + vb_B * (diffusion.steps / 1000), "mse": mse_B, "vb": vb_B}


def variational_bound(
    diffusion: Diffusion, output_B2CHW: Tensor, x_start_BCHW: Tensor, x_BCHW: Tensor, timesteps_B: Tensor
) -> Tensor:
    """One term of the variational bound per sample, in bits per dimension: [B].

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), or at t = 0 the likelihood of the 8-bit image (DDPM equations 5, 13).
    """
    truth = diffusion.q_posterior_mean_variance(x_start_BCHW, x_BCHW, timesteps_B)
    step = diffusion.p_mean_variance(output_B2CHW, x_BCHW, timesteps_B, clip_denoised=False)
    kl_BCHW = gaussian_kl(truth.mean, truth.log_variance, step.mean, step.log_variance)
    nll_BCHW = -discretized_log_likelihood(x_start_BCHW, step.mean, 0.5 * step.log_variance)
    first_B111 = (timesteps_B == 0)[:, None, None, None]
    return torch.where(first_B111, nll_BCHW, kl_BCHW).mean(dim=(1, 2, 3)) / math.log(2)


def gaussian_kl(mean_p: Tensor, log_variance_p: Tensor, mean_q: Tensor, log_variance_q: Tensor) -> Tensor:
    """KL(p || q) of diagonal Gaussians in nats, element by element; shapes broadcast."""
    difference = log_variance_q - log_variance_p
    spread = torch.exp(-difference) + (mean_p - mean_q).square() * torch.exp(-log_variance_q)
    return 0.5 * (difference - 1.0 + spread)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability in nats of 8-bit values `x` on [-1, 1] under a Gaussian, element by element (DDPM equation 13).

    The lowest and highest value own the tails.
    """
    inverse_scale = torch.exp(-log_scale)
    below_upper = normal_cdf((x - mean + HALF_LEVEL) * inverse_scale)
    below_lower = normal_cdf((x - mean - HALF_LEVEL) * inverse_scale)
    probability = torch.where(
        x < -0.999, below_upper, torch.where(x > 0.999, 1 - below_lower, below_upper - below_lower)
    )
    return probability.clamp(min=SMALLEST_PROBABILITY).log()


def normal_cdf(x: Tensor) -> Tensor:
    """The standard normal distribution by the tanh approximation of the published code, to agree with its losses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
