"""The recipe seam: what is trained. The loop knows no recipe by name.

A recipe says which columns it reads, which networks (parts) it has, which updates (phases) make one step, and how to
sample from the result. To add a system from the literature, add one recipe file, and a model file where the model is
new, and name it in `trainer/recipes/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_pipeline.draws import Draws, key64
from data_pipeline.loader import Column, MicroBatch, Prepare, Rows
from trainer.config import SamplingSettings
from trainer.diffusion.steps import Gradient

if TYPE_CHECKING:
    from trainer.step import Trainee

Pixels = NDArray[np.uint8]
Batch = Mapping[str, Tensor]
Losses = Mapping[str, Tensor]  # values per sample, each [b]; "total", in float32, is the one that is minimised
StateDict = dict[str, Tensor]  # parameter name -> values
Accumulate = Callable[["Trainee", "Phase", Sequence[MicroBatch], int], Tensor]  # as trainer/step.py's `accumulate`
Watch = Callable[[int], None]  # told the index of every sampling step once it is done; the last one is 0


@runtime_checkable
class BatchWide(Protocol):
    """An `Accumulate` that does more than one forward and backward pass of every micro batch; `plan` asks what."""

    def passed_twice(self, micro_batches: int) -> int:
        """Of so many micro batches of a rank, those that run forward once more, without a graph."""

    def rehearse(self, batch: int, share: int) -> Any:
        """What it computes of a global batch with `share` samples on this rank, from made-up values on torch's default
        device; returns what lives on through the backward passes."""


@dataclass(frozen=True)
class Part:
    """One network; `build` makes it with its own initialisation, from torch's seed.

    It is also called on the meta device, so what a network holds are parameters and buffers, no other tensors.
    """

    build: Callable[[], nn.Module]
    # replicated: in plain torch whatever `zero.stage` says. What needs a gradient of a gradient does: ZeRO has none.
    hold: Literal["sharded", "replicated"] = "sharded"
    # A checkpoint, or a run (then its newest), whose part of the same name the run starts from.
    start: str | None = None
    adapt: Callable[[StateDict], StateDict] | None = None  # the parent's weights to this part's; on meta as well
    fresh: tuple[str, ...] = ()  # parameters that begin so keep their own initialisation where the parent has none
    alike: tuple[str, ...] = ()  # settings (dotted keys) that the parent must have alike though its shapes would fit


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on a device; the loader's threads prepare them in this machine's memory."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def pinned(prepare: Prepare, device: torch.device) -> Prepare:
    """`prepare` into page-locked memory, from which the GPU copies while the host goes on. For the loader's threads."""

    def prepare_pinned(rows: Rows, draws: Draws) -> Batch:
        batch = prepare(rows, draws)
        with torch.cuda.device(device):  # a new thread stands on GPU 0, and would take memory there for every rank
            return {name: tensor.pin_memory() for name, tensor in batch.items()}

    return prepare_pinned


def seed_dropout(micro: MicroBatch, rank: int) -> None:
    """Dropout inside networks is a function of the run's seed, the micro batch's position, and the rank."""
    torch.manual_seed(key64("dropout", micro.draws.seed, int(micro.draws.positions[0]), rank))


def always(update: int) -> bool:
    return True


def nothing(values: Mapping[str, Tensor], accepted: bool) -> Mapping[str, float]:
    return {}


@dataclass(frozen=True)
class Phase:
    """One update of one part; the loop freezes every other part meanwhile."""

    part: str
    terms: tuple[str, ...]  # names of the loss terms, "total" among them
    loss: Callable[[Mapping[str, nn.Module], Batch, Draws], Losses]
    observed: tuple[str, ...] = ()  # further values per sample in what `loss` returns
    # Terms and observed values of the global batch, float64 [B] in the order of positions, equal on all ranks; whether
    # the update was accepted. Returns figures to log.
    observe: Callable[[Mapping[str, Tensor], bool], Mapping[str, float]] = nothing
    accumulate: Accumulate | None = None  # None: micro batch by micro batch, as losses that are sums over samples can
    active: Callable[[int], bool] = always  # by number of the global batch: a penalty every 15th, a critic from n on
    name: str = ""  # told from other phases of the same part by this

    @property
    def label(self) -> str:
        """The phase's name in figures and in the guard's history."""
        return self.name or self.part


@dataclass(frozen=True)
class Given:
    """Pictures that sampling starts from; square, of any side that is not below the network's."""

    low_res: Sequence[Pixels] | Pixels | None = None  # to enlarge, each uint8 [h, w, 3]
    image: Pixels | None = None  # to edit or fill in, uint8 [b, h, w, 3]
    mask: NDArray[np.bool_] | None = None  # [b, h, w], True where `image` is kept


class HostState(Protocol):
    """What a recipe remembers from step to step: small, equal on all ranks, kept in the checkpoint's manifest."""

    def document(self) -> dict[str, Any]:
        """It as JSON, exactly."""

    def load(self, document: dict[str, Any]) -> None: ...


class Recipe(Protocol):
    """What the loop, held-out evaluation and sampling need to know of a training system. Recipes derive from it."""

    columns: tuple[Column, ...]

    def parts(self) -> dict[str, Part]: ...

    def phases(self) -> tuple[Phase, ...]: ...

    def state(self) -> HostState | None:
        return None

    def prepare(self, rows: Rows, draws: Draws) -> Batch:
        """Tensors of a micro batch from its rows. Pure; runs in loader threads."""

    def conditions(self, prompts: Sequence[str], given: Given) -> Batch:
        """What `sample` needs, from prompts and the pictures given with them."""

    def sample(
        self,
        parts: Mapping[str, nn.Module],
        conditions: Batch,
        draws: Draws,
        settings: SamplingSettings,
        gradient: Gradient | None = None,
        watch: Watch | None = None,
    ) -> Pixels:
        """Images uint8 [b, H, W, 3] for the conditions, each a function of its own position in `draws` alone.

        `gradient` pulls them, for example towards what a noised CLIP takes for the caption; `watch` follows the steps.
        """

    def bits_per_dimension(self, parts: Mapping[str, nn.Module], batch: Batch, draws: Draws) -> Tensor:
        """An upper bound for each sample, [b], in a recipe that has one."""
        raise NotImplementedError
