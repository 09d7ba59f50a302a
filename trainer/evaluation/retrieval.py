"""Retrieval: of so many captions, does an image find its own, and the other way round? The held-out figure of a CLIP.

Always holds: the same weights give the same figure at any time and world size: rows, timesteps and noise are fixed; a
picture that several rows show with different captions stands once in a set. Called by evaluation and by tests.
"""

from __future__ import annotations

import hashlib
from typing import Literal

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
from trainer.recipes.contrastive import Directions, pair_losses, unit
from trainer.recipes.noised_clip import PART, NoisedClipRecipe
from trainer.recipes.recipe import on_device

FORWARD_ROWS = 50  # pairs in a forward pass; changes nothing but memory

Captions = Literal["one", "mean"]


def retrieval_accuracy(images_NE: Tensor, captions_NE: Tensor, ways: int = 100) -> dict[str, float]:
    """{"image_to_text", "text_to_image"}: share of pairs whose partner is the nearest among `ways`; chance is 1 / ways.

    Directions [N, E] of N pairs, taken `ways` at a time in their order; a last incomplete set is left out. Raises
    UserError when not one set is complete.
    """
    sets = len(images_NE) // ways
    if sets == 0:
        found = f"{len(images_NE)} pictures"
        raise UserError(f"{ways}-way retrieval", f"at least {ways} held-out pictures", found, "hold out more")
    errors = [
        pair_losses(images_NE[begin : begin + ways], captions_NE[begin : begin + ways], logit_scale=1.0)
        for begin in range(0, sets * ways, ways)
    ]
    return {
        way: 1.0 - torch.cat([losses[f"{way}_error"] for losses in errors]).mean().item()
        for way in ("image_to_text", "text_to_image")
    }


def heldout_retrieval(
    recipe: NoisedClipRecipe,
    model: NoisedClip,
    dataset: Dataset,
    timestep: int,
    rows: int = 1000,
    ways: int = 100,
    captions: Captions = "one",
) -> dict[str, float]:
    """`retrieval_accuracy` on up to `rows` held-out rows, all noised to `timestep`. `model` in evaluation mode.

    A picture in several rows is noised as in its first one; its caption is that row's (`one`), or the mean of the
    directions of all of them (`mean`: what CLIP calls an ensemble of prompts).
    """
    order = SampleOrder(dataset.id, dataset.shard_rows, EVALUATION_SEED, 1)
    device = next(model.parameters()).device
    found: list[Directions] = []
    pictures: list[bytes] = []
    until = min(rows, order.epoch_images)
    for begin in range(0, until, FORWARD_ROWS):
        positions = np.arange(begin, min(begin + FORWARD_ROWS, until), dtype=np.int64)
        columns = read_rows(dataset, recipe.columns, *order.rows_at(positions))
        pictures += [hashlib.sha256(image.tobytes()).digest() for image in columns["image64"]]
        batch = dict(on_device(recipe.prepare(columns, Draws(EVALUATION_SEED, positions)), device))
        batch["timesteps"] = torch.full_like(batch["timesteps"], timestep)
        with torch.no_grad():
            found.append(recipe.directions({PART: model}, batch))
    images_RE, captions_RE = (torch.cat(side) for side in zip(*found, strict=True))
    return retrieval_accuracy(*_by_picture(pictures, images_RE, captions_RE, captions), ways)


def _by_picture(pictures: list[bytes], images_RE: Tensor, captions_RE: Tensor, captions: Captions) -> Directions:
    """Directions [N, E] of N distinct pictures, in the order of their first rows, from those of R rows."""
    rows_of: dict[bytes, list[int]] = {}
    for row, picture in enumerate(pictures):
        rows_of.setdefault(picture, []).append(row)
    firsts = [rows[0] for rows in rows_of.values()]
    if captions == "one":
        return images_RE[firsts], captions_RE[firsts]
    return images_RE[firsts], unit(torch.stack([captions_RE[rows].mean(dim=0) for rows in rows_of.values()]))
