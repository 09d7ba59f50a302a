"""Which timesteps a training batch visits, and the loss told apart by them.

Always holds: a timestep is the inverse of the sampler's cumulated probabilities at a uniform number that is handed in,
so it is a function of that number and of the losses observed before, whatever the world size; the weight drawn with it
keeps the expected loss that of uniform timesteps. Called by the diffusion recipes: `draw` where the loss is computed
(what loader threads prepare ahead of time would miss the newest losses), `observe` once per update.

Legend: b micro batch, B global batch in the order of positions, T timesteps, N losses remembered of each.
Source of the loss-aware sampler: iDDPM = Nichol & Dhariwal 2021, section 3.3.
"""

from __future__ import annotations

import base64
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import UserError

TimestepLaw = Literal["uniform", "loss_second_moment"]

LOSSES_REMEMBERED = 10  # per timestep; with the share below, the values of the published code
UNIFORM_SHARE = 0.001  # of the probability, so that no timestep is ever out of reach
STORED_LOSS, STORED_COUNT = np.dtype("<f4"), np.dtype("u1")


class TimestepSampler(Protocol):
    """A law of timesteps, equal on all ranks."""

    def draw(self, uniforms_b: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps int64 [b] for `uniforms_b` float64 [b] in [0, 1), and the weights float32 [b] of their losses."""

    def observe(self, timesteps_B: Tensor, losses_B: Tensor) -> None:
        """The global batch's timesteps and unweighted losses, in order of position and equal on all ranks."""


class UniformTimesteps:
    """Every timestep alike, as DDPM, ADM and GLIDE train: floor(u · T) with weight 1. Remembers nothing."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def draw(self, uniforms_b: Tensor) -> tuple[Tensor, Tensor]:
        timesteps_b = (uniforms_b * self.steps).to(torch.int64)
        return timesteps_b, torch.ones_like(timesteps_b, dtype=torch.float32)

    def observe(self, timesteps_B: Tensor, losses_B: Tensor) -> None:
        pass


class LossSecondMoment:
    """Timesteps in proportion to the root mean square of their last 10 losses (iDDPM equation 18).

    Uniform until every timestep has 10 losses, and always in a thousandth of the draws. iDDPM made it for the purely
    variational objective, whose loss differs by orders of magnitude between timesteps, and found no gain for the
    hybrid one. The document holds the losses as base64 of little-endian float32 bytes [T, N], oldest first, and how
    many there are of each timestep as base64 of bytes [T]: 55 kB at 1000 timesteps.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        # float32, the precision losses have: what is stored is what is remembered, to the bit.
        self._history_TN = np.zeros((steps, LOSSES_REMEMBERED), STORED_LOSS)
        self._count_T = np.zeros(steps, STORED_COUNT)
        # Cumulated probabilities and weights by device, until the next `observe`.
        self._law: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def probabilities(self) -> NDArray[np.float64]:
        """Of each timestep: [T] float64, all above 0."""
        moments_T = np.sqrt(np.square(self._history_TN, dtype=np.float64).mean(axis=1))
        # Losses that are all 0 say nothing about any timestep.
        if not self._warm() or not moments_T.any():
            return np.full(self.steps, 1 / self.steps)
        return (1 - UNIFORM_SHARE) * moments_T / moments_T.sum() + UNIFORM_SHARE / self.steps

    def draw(self, uniforms_b: Tensor) -> tuple[Tensor, Tensor]:
        if not self._warm():
            return UniformTimesteps(self.steps).draw(uniforms_b)
        if uniforms_b.device not in self._law:
            probability_T = self.probabilities()
            weight_T = (1 / (probability_T * self.steps)).astype(np.float32)
            law = torch.from_numpy(np.cumsum(probability_T)), torch.from_numpy(weight_T)
            self._law[uniforms_b.device] = law[0].to(uniforms_b.device), law[1].to(uniforms_b.device)
        cumulated_T, weight_of_T = self._law[uniforms_b.device]
        # Up to the last sum, which rounding keeps from being 1: above it there is no timestep.
        timesteps_b = torch.searchsorted(cumulated_T, uniforms_b * cumulated_T[-1], right=True)
        return timesteps_b, weight_of_T[timesteps_b]

    def observe(self, timesteps_B: Tensor, losses_B: Tensor) -> None:
        """A loss that is not finite is left out: one alone would make every probability nan."""
        losses = losses_B.detach().cpu().numpy().astype(STORED_LOSS)
        for timestep, loss in zip(timesteps_B.tolist(), losses, strict=True):
            if np.isfinite(loss):
                self._remember(int(timestep), loss)
        self._law = {}

    def _warm(self) -> bool:
        return bool(self._count_T.min() == LOSSES_REMEMBERED)

    def _remember(self, timestep: int, loss: np.float32) -> None:
        count = self._count_T[timestep]
        if count < LOSSES_REMEMBERED:
            self._history_TN[timestep, count] = loss
            self._count_T[timestep] += 1
        else:
            self._history_TN[timestep, :-1] = self._history_TN[timestep, 1:]
            self._history_TN[timestep, -1] = loss

    def document(self) -> dict[str, Any]:
        """The state as JSON, exactly."""
        return {
            "law": "loss_second_moment",
            "steps": self.steps,
            "losses": base64.b64encode(self._history_TN.tobytes()).decode(),
            "counts": base64.b64encode(self._count_T.tobytes()).decode(),
        }

    def load(self, document: dict[str, Any]) -> None:
        """Go on from a `document()`. Raises UserError for one of another law or process."""
        _expect(document, self.document())
        self._history_TN = _decoded(document, "losses", STORED_LOSS, (self.steps, LOSSES_REMEMBERED))
        self._count_T = _decoded(document, "counts", STORED_COUNT, (self.steps,))
        self._law = {}


def timestep_sampler(law: TimestepLaw, steps: int) -> TimestepSampler:
    """The sampler that a configuration names, with nothing observed yet."""
    return UniformTimesteps(steps) if law == "uniform" else LossSecondMoment(steps)


def losses_by_quartile(timesteps_B: Tensor, losses_B: Tensor, steps: int) -> dict[str, float]:
    """Mean loss of each quarter of the process that has a sample: "q0", the least noise, to "q3".

    Quarter q holds the timesteps with floor(4 t / steps) = q, as in ADM's log.
    """
    quartile_B = (4 * timesteps_B.to(torch.int64)) // steps
    chosen = {f"q{quartile}": losses_B[quartile_B == quartile].double() for quartile in range(4)}
    return {name: losses.mean().item() for name, losses in chosen.items() if len(losses)}


def _expect(document: dict[str, Any], own: dict[str, Any]) -> None:
    for key in ("law", "steps"):
        if document.get(key) != own[key]:
            raise UserError(
                f"state of the timestep sampler: {key}", str(own[key]), str(document.get(key)), "keep it on resume"
            )


def _decoded(document: dict[str, Any], key: str, kind: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    data = base64.b64decode(document[key], validate=True)
    size = int(np.prod(shape)) * kind.itemsize
    if len(data) != size:
        raise UserError(
            f"state of the timestep sampler: {key}", f"{size} bytes", f"{len(data)}", "resume from another checkpoint"
        )
    return np.frombuffer(data, kind).reshape(shape).copy()
