"""The diffusion process: its coefficients, its posterior, and a network's output read as one reverse step.

Always holds: coefficients are computed in float64 and gathered as float32; a `timestep` argument indexes this process
(0..steps-1), and `original_timesteps` turns it into what the network is told. Called by `losses`, `samplers`, recipes.

Legend: B batch, C channels, H W image. All images are float32; x_0 lies in [-1, 1].
Sources: DDPM = Ho et al. 2020; iDDPM = Nichol & Dhariwal 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.diffusion.respacing import spaced_timesteps
from trainer.diffusion.schedules import BetaSchedule, betas

Table = npt.NDArray[np.float64]


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0): mean [B, C, H, W]; variances [B, 1, 1, 1], the logarithm finite at t = 0 too."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class ReverseStep(NamedTuple):
    """p(x_{t-1} | x_t) as the network sees it, and the x_0 it was built on; all [B, C, H, W]."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x_start: Tensor


class Diffusion:
    """A process of `steps` timesteps, possibly a subsequence of a longer one.

    The float64 tables are public: `betas`, `alphas_cumprod`, `alphas_cumprod_prev`, `posterior_variance`, ….
    """

    def __init__(self, betas: Table, timestep_map: npt.NDArray[np.int64] | None = None) -> None:
        """`betas` [steps] float64 in (0, 1); `timestep_map` [steps]: each one's timestep in the process trained on."""
        if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"betas: expected a vector of values between 0 and 1, found {betas}")
        self.steps = len(betas)
        self.timestep_map = np.arange(self.steps) if timestep_map is None else timestep_map
        alphas = 1.0 - betas
        cumulated = np.cumprod(alphas)
        before = np.append(1.0, cumulated[:-1])
        self.betas = betas
        self.log_betas = np.log(betas)
        self.alphas_cumprod = cumulated
        self.alphas_cumprod_prev = before
        self.sqrt_alphas_cumprod = np.sqrt(cumulated)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - cumulated)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / cumulated)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / cumulated - 1.0)
        # DDPM equations 6 and 7.
        self.posterior_variance = betas * (1.0 - before) / (1.0 - cumulated)
        self.posterior_mean_coef1 = betas * np.sqrt(before) / (1.0 - cumulated)
        self.posterior_mean_coef2 = (1.0 - before) * np.sqrt(alphas) / (1.0 - cumulated)
        # The posterior of the first timestep has no variance; its logarithm borrows the second's (a process of one
        # timestep has none to lend).
        first = self.posterior_variance[1] if self.steps > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    @classmethod
    def from_schedule(cls, schedule: BetaSchedule, steps: int = 1000) -> Diffusion:
        """The process that a network is trained on."""
        return cls(betas(schedule, steps))

    def respaced(self, spacing: str) -> Diffusion:
        """The process over a subsequence of timesteps with the same marginals (iDDPM section 4, equation 19).

        `spacing` as in `respacing.spaced_timesteps`. The network still receives timesteps on the original scale.
        """
        kept = spaced_timesteps(self.steps, spacing)
        cumulated = self.alphas_cumprod[kept]
        return Diffusion(1.0 - cumulated / np.append(1.0, cumulated[:-1]), self.timestep_map[kept])

    def original_timesteps(self, timesteps_B: Tensor) -> Tensor:
        """The timesteps the network is told, on the scale of the process it was trained on: [B] int64."""
        return self._on(timesteps_B.device, "timestep_map")[timesteps_B]

    def at(self, table: str, timesteps_B: Tensor) -> Tensor:
        """A table's values at `timesteps_B`: [B, 1, 1, 1] float32 on their device."""
        return self._on(timesteps_B.device, table)[timesteps_B][:, None, None, None]

    def _on(self, device: torch.device, table: str) -> Tensor:
        # Copied once per device: a copy in each call would be a CPU-GPU sync point in every step.
        if (table, device) not in self._on_device:
            values = torch.from_numpy(getattr(self, table))
            self._on_device[table, device] = (values.float() if values.is_floating_point() else values).to(device)
        return self._on_device[table, device]

    def q_sample(self, x_start_BCHW: Tensor, timesteps_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """x_t from q(x_t | x_0), DDPM equation 4."""
        signal_B111 = self.at("sqrt_alphas_cumprod", timesteps_B)
        return signal_B111 * x_start_BCHW + self.at("sqrt_one_minus_alphas_cumprod", timesteps_B) * noise_BCHW

    def q_posterior_mean_variance(self, x_start_BCHW: Tensor, x_BCHW: Tensor, timesteps_B: Tensor) -> Posterior:
        """q(x_{t-1} | x_t, x_0), DDPM equations 6 and 7. At t = 0 the variance is 0 and the logarithm is clipped."""
        mean = (
            self.at("posterior_mean_coef1", timesteps_B) * x_start_BCHW
            + self.at("posterior_mean_coef2", timesteps_B) * x_BCHW
        )
        variance = self.at("posterior_variance", timesteps_B)
        return Posterior(mean, variance, self.at("posterior_log_variance_clipped", timesteps_B))

    def predict_xstart_from_eps(self, x_BCHW: Tensor, timesteps_B: Tensor, eps_BCHW: Tensor) -> Tensor:
        """x_0 of which `x_BCHW` is the noised image if `eps_BCHW` is the noise."""
        recip_B111 = self.at("sqrt_recip_alphas_cumprod", timesteps_B)
        return recip_B111 * x_BCHW - self.at("sqrt_recipm1_alphas_cumprod", timesteps_B) * eps_BCHW

    def eps_from_xstart(self, x_BCHW: Tensor, timesteps_B: Tensor, x_start_BCHW: Tensor) -> Tensor:
        """The noise in `x_BCHW` if `x_start_BCHW` is the image."""
        recip_B111 = self.at("sqrt_recip_alphas_cumprod", timesteps_B)
        return (recip_B111 * x_BCHW - x_start_BCHW) / self.at("sqrt_recipm1_alphas_cumprod", timesteps_B)

    def p_mean_variance(
        self,
        output_B2CHW: Tensor,
        x_BCHW: Tensor,
        timesteps_B: Tensor,
        *,
        clip_denoised: bool = True,
        process_x_start: Callable[[Tensor], Tensor] | None = None,
    ) -> ReverseStep:
        """p(x_{t-1} | x_t) from a network's output: predicted noise, then the variance's position in [-1, 1].

        The log variance interpolates between the posterior's (-1) and log beta (1): iDDPM equation 15. The predicted
        x_0 passes through `process_x_start` (inpainting pins known pixels there), then is clipped to [-1, 1] if asked.
        """
        eps_BCHW, position_BCHW = output_B2CHW.float().chunk(2, dim=1)
        fraction_BCHW = (position_BCHW + 1) / 2
        log_variance = fraction_BCHW * self.at("log_betas", timesteps_B) + (1 - fraction_BCHW) * self.at(
            "posterior_log_variance_clipped", timesteps_B
        )
        x_start = self.predict_xstart_from_eps(x_BCHW, timesteps_B, eps_BCHW)
        if process_x_start is not None:
            x_start = process_x_start(x_start)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        mean = self.q_posterior_mean_variance(x_start, x_BCHW, timesteps_B).mean
        return ReverseStep(mean, log_variance.exp(), log_variance, x_start)
