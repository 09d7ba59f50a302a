"""Data drawn from mixtures of Gaussians, for which a perfect network is known. For tests of samplers and guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.diffusion.gaussian import Diffusion
from trainer.diffusion.samplers import SamplerName
from trainer.diffusion.schedules import BetaSchedule
from trainer.diffusion.steps import Denoise, StepOptions

SAMPLERS: tuple[SamplerName, ...] = ("ancestral", "ddim", "dpm++", "dpm++sde")
UNCLIPPED = StepOptions(clip="none")


def randn(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise_like(x: Tensor, seed: int = 0) -> Callable[[int], Tensor]:
    return lambda index: randn(1000 * seed + index + 1, tuple(x.shape))


@dataclass(frozen=True)
class Mixture:
    """Gaussians of equal spread; an image of shape [C, H, W] is one point of C · H · W dimensions."""

    means_KD: Tensor
    weights_K: Tensor
    spread: float

    def log_responsibilities(self, x: Tensor, bar: float) -> Tensor:
        """log p(component | x_t): [B, K]."""
        distance_BK = (x.flatten(1)[:, None] - math.sqrt(bar) * self.means_KD).square().sum(dim=-1)
        return (self.weights_K.log() - distance_BK / (2 * self.variance(bar))).log_softmax(dim=-1)

    def variance(self, bar: float) -> float:
        return bar * self.spread**2 + 1 - bar

    def eps(self, x: Tensor, bar: float) -> Tensor:
        """The noise that a perfect network predicts: -sqrt(1 - bar) · score of the noised mixture."""
        x64 = x.double()
        weights_BK = self.log_responsibilities(x64, bar).exp()
        towards_BD = math.sqrt(bar) * weights_BK @ self.means_KD - x64.flatten(1)
        return -math.sqrt(1 - bar) * (towards_BD / self.variance(bar)).view(x.shape)

    def denoise(self, process: Diffusion) -> Denoise:
        """The perfect network; `process` is the whole one."""
        return lambda x, t: self.eps(x, float(process.alphas_cumprod[int(t[0])])).float()

    def draw(self, count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights_K, count, replacement=True, generator=random)
        points = self.means_KD[which] + self.spread * torch.randn(count, self.means_KD.shape[1], generator=random)
        return points.float().view(count, *shape)


THREE = Mixture(
    torch.tensor([[-0.6, -0.4], [0.7, -0.2], [0.1, 0.6]]).double(), torch.tensor([0.5, 0.3, 0.2]).double(), 0.3
)
ONE = Mixture(torch.tensor([[0.3]]).double(), torch.ones(1).double(), 0.2)
TWO_DIMENSIONS = (2, 1, 1)


def whole_process(schedule: BetaSchedule = "linear", steps: int = 1000) -> Diffusion:
    return Diffusion.from_schedule(schedule, steps, variance="fixed_small")


def component_probability(process: Diffusion, component: int) -> Callable[[Tensor, Tensor], Tensor]:
    """log p(component | x_t), as a perfect classifier of noised images says."""
    return lambda x, t: THREE.log_responsibilities(x.double(), float(process.alphas_cumprod[int(t[0])]))[:, component]
