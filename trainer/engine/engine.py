"""The engine seam: one trained part on this rank, whatever spreads its state over ranks.

Checkpoint and EMA see an engine only through `shard_view()`: flat intervals of its fp32 state. Together the ranks'
views cover every parameter and kind exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from trainer.config import Precision
from trainer.guard import Decision

Kind = Literal["master", "exp_avg", "exp_avg_sq", "ema"]
KINDS: tuple[Kind, ...] = ("master", "exp_avg", "exp_avg_sq", "ema")


@dataclass(frozen=True)
class Interval:
    """Elements [offset, offset + len(values)) of the flattened parameter `name` (part/parameter), of one kind.

    `values`: float32 [n], a view of the engine's own memory: writing to it changes the state.
    """

    name: str
    kind: Kind
    offset: int
    values: Tensor


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """What forward passes run inside, in every engine: products in the low precision, sums and statistics in fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


class Engine(Protocol):
    """One trained part on this rank."""

    module: nn.Module
    parameter_sizes: dict[str, int]  # part/parameter -> elements; what a checkpoint must hold

    def precision_context(self) -> AbstractContextManager[object]:
        """Forward passes run inside it."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, already divided by the global batch, to those of this update."""

    def update(self, lr: float, guard: Callable[[float], Decision]) -> Decision:
        """Reduce gradients over ranks, ask `guard` with their global norm, then step or skip. Clears the gradients."""

    def shard_view(self) -> Iterator[Interval]:
        """This rank's share of the state."""

    def wanted(self) -> Iterable[Interval]:
        """What this rank must read to resume; at least its shard view."""

    def optimizer_steps(self) -> int:
        """Updates that were not skipped; Adam's bias correction counts them."""

    def loss_scale(self) -> dict[str, float]:
        """State of fp16's loss scale; empty where there is none."""

    def loaded(self, optimizer_steps: int, loss_scale: dict[str, float]) -> None:
        """Called once all of `wanted()` was overwritten from a checkpoint, with the rest of that state. A collective
        call."""

    def weights(self, kind: Literal["master", "ema"]) -> AbstractContextManager[nn.Module]:
        """The module with these weights, inside the context, on every rank; a collective call."""
