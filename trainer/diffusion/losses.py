"""The objectives of a diffusion network: simple, hybrid and purely variational, and the bound's single terms.

Always holds: every term is per sample and in float32, whatever precision the network ran in. Called by the diffusion
recipes and by `likelihood`.

Legend: B batch, C channels, H W image; K = 2C channels of a network that learns the variance, else C.
Sources: DDPM = Ho et al. 2020; iDDPM = Nichol & Dhariwal 2021.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from trainer.diffusion.gaussian import Diffusion, ReverseStep, Variance

HALF_LEVEL = 1 / 255  # half the distance of neighbouring 8-bit values on [-1, 1]
SMALLEST_PROBABILITY = 1e-12

Objective = Literal["simple", "hybrid", "vlb"]


def check_objective(objective: Objective, variance: Variance) -> None:
    """Raises ValueError where an objective and a variance do not go together, for configurations to call early.

    hybrid has nothing to train in a fixed variance; simple would leave a learned one untrained, which samplers read.
    """
    if objective not in get_args(Objective):
        raise ValueError(f"objective: expected one of {', '.join(get_args(Objective))}, found {objective!r}")
    if objective == "hybrid" and variance != "learned":
        raise ValueError(f"objective hybrid: expected variance learned, found {variance}; choose simple or vlb")
    if objective == "simple" and variance == "learned":
        raise ValueError("objective simple: expected variance fixed_small or fixed_large, found learned; choose hybrid")


def term_names(objective: Objective) -> tuple[str, ...]:
    """The terms that `diffusion_loss` returns."""
    return ("total", "mse") if objective == "simple" else ("total", "mse", "vb")


def diffusion_loss(
    diffusion: Diffusion,
    output_BKHW: Tensor,
    *,
    objective: Objective,
    x_start_BCHW: Tensor,
    x_BCHW: Tensor,
    noise_BCHW: Tensor,
    timesteps_B: Tensor,
) -> dict[str, Tensor]:
    """Terms per sample, each [B] float32: `total` to minimise; `mse` of what is predicted; `vb`, one bound term.

    simple: total = mse (DDPM equation 14).
    hybrid: total = mse + vb · steps / 1000, where vb moves the variance only (iDDPM equation 16). At 1000 steps the
    weight is 1, iDDPM's lambda of 0.001 on the sum over timesteps.
    vlb: total = vb · steps, of which the mean over uniform timesteps is the whole bound but its prior term, in bits
    per dimension; it moves mean and variance, and mse is there to be watched only.

    `x_BCHW` is q_sample(x_start, timesteps, noise). Raises ValueError for an objective that the process's variance
    does not allow, or an output of other channels than it asks for.
    """
    check_objective(objective, diffusion.variance)
    # Below float32 a KL is lost: it is the small difference of terms near 1. (The output is raised where it is split.)
    x_start_BCHW, x_BCHW, noise_BCHW = (tensor.float() for tensor in (x_start_BCHW, x_BCHW, noise_BCHW))
    prediction_BCHW, position_BCHW = diffusion.split_output(output_BKHW, x_BCHW)
    target_BCHW = diffusion.training_target(x_start_BCHW, timesteps_B, noise_BCHW)
    mse_B = (target_BCHW - prediction_BCHW).square().mean(dim=(1, 2, 3))
    if objective == "simple":
        return {"total": mse_B, "mse": mse_B}
    if objective == "hybrid" and position_BCHW is not None:
        output_BKHW = torch.cat([prediction_BCHW.detach(), position_BCHW], dim=1)
    step = diffusion.p_mean_variance(output_BKHW, x_BCHW, timesteps_B, clip_denoised=False)
    vb_B = bound_term(diffusion, step, x_start_BCHW, x_BCHW, timesteps_B)
    if objective == "hybrid":
        return {"total": mse_B + vb_B * (diffusion.steps / 1000), "mse": mse_B, "vb": vb_B}
    return {"total": vb_B * diffusion.steps, "mse": mse_B.detach(), "vb": vb_B}


def bound_term(
    diffusion: Diffusion, step: ReverseStep, x_start_BCHW: Tensor, x_BCHW: Tensor, timesteps_B: Tensor
) -> Tensor:
    """One term of the variational bound per sample, in bits per dimension: [B].

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), or at t = 0 the likelihood of the 8-bit image (DDPM equations 5, 13).
    """
    truth = diffusion.q_posterior_mean_variance(x_start_BCHW, x_BCHW, timesteps_B)
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
