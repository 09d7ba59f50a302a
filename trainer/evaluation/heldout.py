"""Held-out loss: the recipe's own loss on rows that are never trained on, at fixed positions, noise and timesteps.

Always holds: the same weights give the same figure at any time and world size up to the order of additions; captions
can be right, or those of another row (`shuffled`), to see whether the model listens to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from data_pipeline.draws import Draws
from data_pipeline.loader import Column, Loader, MicroBatch, Prepare, Rows, read_rows
from data_pipeline.order import SampleOrder, micro_batches
from data_pipeline.shards import Dataset
from trainer.config import HeldoutSettings, TrainConfig
from trainer.engine.group import Group
from trainer.recipes import make_recipe
from trainer.recipes.recipe import Recipe, on_device
from trainer.stop import StopAsked

Captions = Literal["right", "shuffled"]
CAPTION_COLUMNS = ("caption", "tokens", "n_tokens")
EVALUATION_SEED = 20_211_220  # fixed: figures of different runs and seeds compare
EVALUATION_BATCH = 16


def never() -> bool:
    return False


def heldout_loss(
    config: TrainConfig,
    modules: Mapping[str, nn.Module],
    dataset: Dataset,
    settings: HeldoutSettings,
    group: Group,
    captions: Captions = "right",
    stop_asked: Callable[[], bool] = never,
) -> dict[str, float]:
    """Mean of every loss term over `settings.images` held-out rows (cut to whole batches); a collective call.

    `modules` must be in evaluation mode. With `captions="shuffled"` each row has its neighbour's caption. Raises
    StopAsked, on every rank, soon after `stop_asked` says so on one.
    """
    recipe = make_recipe(config.for_evaluation())
    phases = recipe.phases()
    names = {phase: (*phase.terms, *phase.observed) for phase in phases}

    def prepare(rows: Rows, draws: Draws) -> Any:
        return recipe.prepare(rows if captions == "right" else shuffled_captions(rows), draws)

    images, share = _share(config, recipe, dataset, prepare, settings.images, group, stop_asked)
    values = {phase: torch.zeros(len(names[phase]), images, dtype=torch.float64) for phase in phases}
    with torch.no_grad():
        for micro in share:
            rows = on_device(micro.batch, group.device)
            for phase in phases:
                losses = phase.loss(modules, rows, micro.draws)
                values[phase][:, micro.positions] = torch.stack([losses[name].double().cpu() for name in names[phase]])
    figures: dict[str, float] = {}
    for phase in phases:
        named = dict(zip(names[phase], group.sum_(values[phase]), strict=True))
        figures |= {name: float(named[name].mean()) for name in phase.terms}
        figures |= {name.removeprefix("loss/"): value for name, value in phase.observe(named, False).items()}
    return figures


def heldout_bits_per_dimension(
    config: TrainConfig,
    modules: Mapping[str, nn.Module],
    dataset: Dataset,
    images: int,
    group: Group,
    stop_asked: Callable[[], bool] = never,
) -> float:
    """Mean upper bound on the bits per dimension of `images` held-out rows (cut to whole batches), for a recipe that
    has one. Runs the network once for every timestep of the process. A collective call; raises StopAsked as
    `heldout_loss` does."""
    recipe = make_recipe(config.for_evaluation())
    count, share = _share(config, recipe, dataset, recipe.prepare, images, group, stop_asked)
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for micro in share:
            bits = recipe.bits_per_dimension(modules, on_device(micro.batch, group.device), micro.draws)
            total += bits.double().sum().cpu()
    return float(group.sum_(total)) / count


def _share(
    config: TrainConfig,
    recipe: Recipe,
    dataset: Dataset,
    prepare: Prepare,
    images: int,
    group: Group,
    stop_asked: Callable[[], bool],
) -> tuple[int, Iterator[MicroBatch]]:
    """How many held-out rows all ranks judge together, and this rank's batches of them.

    Every rank takes whole batches, so that shuffling stays inside a batch whatever the world size. A collective call,
    and so is going through the batches.
    """
    batch = min(EVALUATION_BATCH, dataset.rows, images)
    order = SampleOrder(dataset.id, dataset.shard_rows, EVALUATION_SEED, batch)
    images = min(images, order.epoch_images) // batch * batch
    # Damage always stops: other rows in the place of damaged ones would be another figure.
    loading = config.loader.model_copy(update={"on_damage": "stop"})
    cut = micro_batches(batch, 0, 1, batch)
    loader = Loader(dataset, order, recipe.columns, prepare, cut, loading, group.ranks_here())
    return images, _batches_of(loader, images, group, stop_asked)


def _batches_of(loader: Loader, images: int, group: Group, stop_asked: Callable[[], bool]) -> Iterator[MicroBatch]:
    """This rank's of the batches up to `images`, in rounds of one for each rank; all leave before the same round."""
    batch = loader.order.batch
    for begin in range(0, images, batch * group.world_size):
        if group.sum_(torch.tensor(int(stop_asked()))):
            raise StopAsked
        start = begin + batch * group.rank
        if start < images:
            for micro_batch_list in loader.batches(start, start + batch):
                yield from micro_batch_list


def shuffled_captions(rows: Rows) -> Rows:
    """The rows with every caption given to the next row."""
    return {name: np.roll(values, 1, axis=0) if name in CAPTION_COLUMNS else values for name, values in rows.items()}


def first_rows(dataset: Dataset, columns: tuple[Column, ...], count: int) -> Rows:
    """Columns of `count` held-out rows, the same at every call, for grids."""
    order = SampleOrder(dataset.id, dataset.shard_rows, EVALUATION_SEED, min(EVALUATION_BATCH, dataset.rows))
    count = min(count, order.epoch_images)
    return read_rows(dataset, columns, *order.rows_at(np.arange(count, dtype=np.int64)))
