"""Retrieval: of so many captions, does an image find its own, and the other way round? The held-out figure of a CLIP.

Always holds: the same weights give the same figure at any time and world size: rows, timesteps and noise are fixed.
Called by evaluation and by tests.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data_pipeline.draws import Draws
from data_pipeline.errors import UserError
from data_pipeline.loader import read_rows
from data_pipeline.order import SampleOrder
from data_pipeline.shards import Dataset
from trainer.evaluation.heldout import EVALUATION_SEED
from trainer.models.noised_clip import NoisedClip
from trainer.recipes.contrastive import pair_losses
from trainer.recipes.noised_clip import PART, NoisedClipRecipe
from trainer.recipes.recipe import on_device

FORWARD_ROWS = 50  # pairs in a forward pass; changes nothing but memory


def retrieval_accuracy(images_NE: Tensor, captions_NE: Tensor, ways: int = 100) -> dict[str, float]:
    """{"image_to_text", "text_to_image"}: share of pairs whose partner is the nearest among `ways`; chance is 1 / ways.

    Directions [N, E] of N pairs, taken `ways` at a time in their order; a last incomplete set is left out. Raises
    UserError when not one set is complete.
    """
    sets = len(images_NE) // ways
    if sets == 0:
        raise UserError(
            f"{ways}-way retrieval", f"at least {ways} pairs", str(len(images_NE)), "bring more held-out rows"
        )
    found = [
        pair_losses(images_NE[begin : begin + ways], captions_NE[begin : begin + ways], logit_scale=1.0)
        for begin in range(0, sets * ways, ways)
    ]
    return {
        way: 1.0 - torch.cat([losses[f"{way}_error"] for losses in found]).mean().item()
        for way in ("image_to_text", "text_to_image")
    }


def heldout_retrieval(
    recipe: NoisedClipRecipe, model: NoisedClip, dataset: Dataset, timestep: int, pairs: int = 1000, ways: int = 100
) -> dict[str, float]:
    """`retrieval_accuracy` on up to `pairs` held-out rows, all noised to `timestep`. `model` in evaluation mode."""
    order = SampleOrder(dataset.id, dataset.shard_rows, EVALUATION_SEED, 1)
    device = next(model.parameters()).device
    found = []
    for begin in range(0, min(pairs, order.epoch_images), FORWARD_ROWS):
        positions = np.arange(begin, min(begin + FORWARD_ROWS, pairs, order.epoch_images), dtype=np.int64)
        rows = read_rows(dataset, recipe.columns, *order.rows_at(positions))
        batch = dict(on_device(recipe.prepare(rows, Draws(EVALUATION_SEED, positions)), device))
        batch["timesteps"] = torch.full_like(batch["timesteps"], timestep)
        with torch.no_grad():
            found.append(recipe.directions({PART: model}, batch))
    images_NE, captions_NE = (torch.cat(side) for side in zip(*found, strict=True))
    return retrieval_accuracy(images_NE, captions_NE, ways)
