"""The diffusion process: its coefficients, its posterior, and a network's output read as one reverse step.

Always holds: coefficients are computed in float64 and gathered as float32; a `timestep` argument indexes this process
(0..steps-1), and `original_timesteps` turns it into what the network is told. Called by `losses`, `samplers`, recipes.

Legend: B batch, C channels, H W image; K = 2C channels of a network that learns the variance, else C. Images are
float32, and what comes in lower precision is raised to it; x_0 lies in [-1, 1].
Sources: DDPM = Ho et al. 2020; iDDPM = Nichol & Dhariwal 2021; v = Salimans & Ho 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.diffusion.respacing import spaced_timesteps
from trainer.diffusion.schedules import BetaSchedule, betas

Table = npt.NDArray[np.float64]

Prediction = Literal["eps", "x0", "v"]
"""What the network's first C channels are: the noise, the image, or v = sqrt(abar) eps - sqrt(1 - abar) x_0."""
Variance = Literal["learned", "fixed_small", "fixed_large"]
"""Of a reverse step: C further channels say it, or it is the posterior's (DDPM's small choice) or beta (its large)."""


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

    def __init__(
        self,
        betas: Table,
        timestep_map: npt.NDArray[np.int64] | None = None,
        prediction: Prediction = "eps",
        variance: Variance = "learned",
    ) -> None:
        """`betas` [steps] float64 in (0, 1); `timestep_map` [steps]: each one's timestep in the process trained on.

        `prediction` and `variance` say how a network's output is read. Raises ValueError for values outside these.
        """
        for name, value, allowed in (("prediction", prediction, Prediction), ("variance", variance, Variance)):
            if value not in get_args(allowed):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(allowed))}, found {value!r}")
        self.prediction, self.variance = prediction, variance
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
        # The large choice borrows it too, as the published code does: the last step would blur the image by beta.
        self.large_variance = np.append(first, betas[1:])
        self.large_log_variance = np.log(self.large_variance)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    @classmethod
    def from_schedule(
        cls,
        schedule: BetaSchedule,
        steps: int = 1000,
        prediction: Prediction = "eps",
        variance: Variance = "learned",
    ) -> Diffusion:
        """The process that a network is trained on. Raises ValueError for a setting that does not exist."""
        return cls(betas(schedule, steps), prediction=prediction, variance=variance)

    def respaced(self, spacing: str) -> Diffusion:
        """The process over a subsequence of timesteps with the same marginals (iDDPM section 4, equation 19).

        `spacing` as in `respacing.spaced_timesteps`. The network still receives timesteps on the original scale.
        """
        kept = spaced_timesteps(self.steps, spacing)
        cumulated = self.alphas_cumprod[kept]
        betas_kept = 1.0 - cumulated / np.append(1.0, cumulated[:-1])
        return Diffusion(betas_kept, self.timestep_map[kept], self.prediction, self.variance)

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

    def training_target(self, x_start_BCHW: Tensor, timesteps_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """What the network should predict where x_t = q_sample(x_0, t, noise): noise, image or v, [B, C, H, W]."""
        if self.prediction == "eps":
            return noise_BCHW
        if self.prediction == "x0":
            return x_start_BCHW
        signal_B111 = self.at("sqrt_alphas_cumprod", timesteps_B)
        return signal_B111 * noise_BCHW - self.at("sqrt_one_minus_alphas_cumprod", timesteps_B) * x_start_BCHW

    def predict_xstart(self, prediction_BCHW: Tensor, x_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """The x_0 that a network means by its prediction at x_t: [B, C, H, W], neither processed nor clipped."""
        if self.prediction == "eps":
            return self.predict_xstart_from_eps(x_BCHW, timesteps_B, prediction_BCHW)
        if self.prediction == "x0":
            return prediction_BCHW
        # x_t and v are one rotation of (x_0, eps): turned back (Salimans & Ho 2022, appendix D).
        signal_B111 = self.at("sqrt_alphas_cumprod", timesteps_B)
        return signal_B111 * x_BCHW - self.at("sqrt_one_minus_alphas_cumprod", timesteps_B) * prediction_BCHW

    def split_output(self, output_BKHW: Tensor, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Prediction [B, C, H, W] and, where it is learned, the variance's position in [-1, 1]; both float32.

        Raises ValueError when the output's channels are not those that `variance` asks for.
        """
        channels = x_BCHW.shape[1]
        expected = 2 * channels if self.variance == "learned" else channels
        if output_BKHW.shape[1] != expected:
            raise ValueError(
                f"network output: expected {expected} channels for {channels} image channels and variance "
                f"{self.variance}, found {output_BKHW.shape[1]}"
            )
        output_BKHW = output_BKHW.float()
        return output_BKHW[:, :channels], output_BKHW[:, channels:] if self.variance == "learned" else None

    def p_mean_variance(
        self,
        output_BKHW: Tensor,
        x_BCHW: Tensor,
        timesteps_B: Tensor,
        *,
        clip_denoised: bool = True,
        process_x_start: Callable[[Tensor], Tensor] | None = None,
    ) -> ReverseStep:
        """p(x_{t-1} | x_t) from a network's output: its prediction, then, if learned, the variance's position.

        The predicted x_0 passes through `process_x_start` (inpainting pins known pixels there), then is clipped to
        [-1, 1] if asked. Raises ValueError when the output has other channels than `variance` asks for.
        """
        x_BCHW = x_BCHW.float()
        prediction_BCHW, position_BCHW = self.split_output(output_BKHW, x_BCHW)
        x_start = self.predict_xstart(prediction_BCHW, x_BCHW, timesteps_B)
        if process_x_start is not None:
            x_start = process_x_start(x_start)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        mean = self.q_posterior_mean_variance(x_start, x_BCHW, timesteps_B).mean
        variance, log_variance = self._reverse_variance(position_BCHW, timesteps_B)
        return ReverseStep(mean, variance.expand_as(mean), log_variance.expand_as(mean), x_start)

    def _reverse_variance(self, position_BCHW: Tensor | None, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and its logarithm. A learned one lies between the posterior's (-1) and beta (1): iDDPM equation 15.

        As for the posterior, the small choice's variance is 0 at t = 0 where its logarithm is clipped.
        """
        if position_BCHW is not None:
            fraction_BCHW = (position_BCHW + 1) / 2
            log_variance = fraction_BCHW * self.at("log_betas", timesteps_B) + (1 - fraction_BCHW) * self.at(
                "posterior_log_variance_clipped", timesteps_B
            )
            return log_variance.exp(), log_variance
        if self.variance == "fixed_small":
            tables = ("posterior_variance", "posterior_log_variance_clipped")
        else:
            tables = ("large_variance", "large_log_variance")
        return self.at(tables[0], timesteps_B), self.at(tables[1], timesteps_B)
