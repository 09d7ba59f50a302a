"""Contrastive updates: the loss of a pair depends on every other pair of the global batch, on all ranks.

Always holds: the gradient is that of the symmetric cross-entropy over the whole global batch (CLIP, figure 3), whatever
the micro batch and the number of ranks; no [B, B] matrix exists, and activations of one micro batch at a time. Called
by recipes: `Contrastive` is a phase's `accumulate`, `pair_losses` its loss inside one batch, for evaluation.

Two passes over the rank's micro batches (GradCache, Gao et al. 2021, arXiv 2101.06983): directions without a graph; the
loss's gradient with respect to them, in closed form; directions once more with a graph, to carry that gradient on. What
travels between ranks is 2 E + 2 numbers per pair.

Legend: B pairs of the global batch, b pairs of this rank, c pairs of a chunk, E features. A direction is a feature
vector of unit length; image i and caption i are a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.loader import MicroBatch
from trainer.recipes.recipe import Batch, Losses, Phase, on_device, seed_dropout

if TYPE_CHECKING:
    from trainer.step import Trainee

CHUNK_ROWS = 1024  # at the paper's batch of 32,768 a chunk of scores is 128 MiB

TERMS = ("total", "image_to_text_error", "text_to_image_error")
"""The pair's loss, and for each direction 1 where its partner is not the nearest of the batch (a tie is an error)."""

Directions = tuple[Tensor, Tensor]  # of images and of their captions, each [b, E] float32


class Scores(NamedTuple):
    """What one side of the pairs (rows) finds among all of the other side; all [b]."""

    log_normaliser_b: Tensor
    partner_b: Tensor
    error_b: Tensor


class Contrast(NamedTuple):
    """Loss terms per pair, each [b], and the gradients of the mean total over the global batch, each [b, E]."""

    losses: Losses
    image_gradients_bE: Tensor
    caption_gradients_bE: Tensor


def unit(features_BE: Tensor) -> Tensor:
    """Features as directions, float32."""
    return F.normalize(features_BE.float(), dim=-1)


def pair_losses(images_BE: Tensor, captions_BE: Tensor, logit_scale: float) -> dict[str, Tensor]:
    """`TERMS` per pair, each [B], when these pairs are the whole batch. Differentiable; holds [B, B]."""
    right_B = torch.arange(len(images_BE), device=images_BE.device)
    scores_BB = logit_scale * images_BE @ captions_BE.T
    by_image_B = F.cross_entropy(scores_BB, right_B, reduction="none")
    by_caption_B = F.cross_entropy(scores_BB.T, right_B, reduction="none")
    errors = (_error(scores_BB, right_B), _error(scores_BB.T, right_B))
    return dict(zip(TERMS, ((by_image_B + by_caption_B) / 2, *errors), strict=True))


def contrast(
    images_BE: Tensor,
    captions_BE: Tensor,
    places_b: Tensor,
    logit_scale: float,
    sum_over_ranks: Callable[[Tensor], Tensor],
    chunk_rows: int = CHUNK_ROWS,
) -> Contrast:
    """Losses and gradients of this rank's pairs `places_b` int64 among all pairs of the global batch.

    All ranks hold the same directions and bring disjoint places that cover the batch. Temporaries are
    [chunk_rows, B]. With S = logit_scale · images · captionsᵀ, p the softmax over its rows and q over its columns, the
    gradient of the mean loss with respect to image i is logit_scale / 2B · (Σ_j (p_ij + q_ij) caption_j - 2 caption_i).
    """
    chunks = list(places_b.split(chunk_rows)) if len(places_b) else []
    by_image = _scores(images_BE, captions_BE, chunks, logit_scale)
    by_caption = _scores(captions_BE, images_BE, chunks, logit_scale)
    normalisers_2B = images_BE.new_zeros(2, len(images_BE))
    normalisers_2B[:, places_b] = torch.stack([by_image.log_normaliser_b, by_caption.log_normaliser_b])
    of_images_B, of_captions_B = sum_over_ranks(normalisers_2B)
    totals_b = (by_image.log_normaliser_b - by_image.partner_b + by_caption.log_normaliser_b - by_caption.partner_b) / 2
    return Contrast(
        dict(zip(TERMS, (totals_b, by_image.error_b, by_caption.error_b), strict=True)),
        _gradients(images_BE, captions_BE, of_images_B, of_captions_B, chunks, logit_scale),
        _gradients(captions_BE, images_BE, of_captions_B, of_images_B, chunks, logit_scale),
    )


def _scores(own_BE: Tensor, other_BE: Tensor, chunks: Sequence[Tensor], logit_scale: float) -> Scores:
    found = [own_BE.new_zeros(3, 0)]
    for places_c in chunks:
        scores_cB = logit_scale * own_BE[places_c] @ other_BE.T
        partner_c = scores_cB.gather(1, places_c[:, None])[:, 0]
        found.append(torch.stack([scores_cB.logsumexp(dim=1), partner_c, _error(scores_cB, places_c)]))
    return Scores(*torch.cat(found, dim=1))


def _error(scores_cB: Tensor, places_c: Tensor) -> Tensor:
    """1 where another score of the row reaches that of the partner, else 0: [c]."""
    partner_c1 = scores_cB.gather(1, places_c[:, None])
    return ((scores_cB >= partner_c1).sum(dim=1) > 1).to(scores_cB.dtype)


def _gradients(
    own_BE: Tensor, other_BE: Tensor, of_own_B: Tensor, of_other_B: Tensor, chunks: Sequence[Tensor], logit_scale: float
) -> Tensor:
    found = [own_BE.new_zeros(0, own_BE.shape[1])]
    for places_c in chunks:
        scores_cB = logit_scale * own_BE[places_c] @ other_BE.T
        weights_cB = (scores_cB - of_own_B[places_c, None]).exp_()
        weights_cB += scores_cB.sub_(of_other_B).exp_()
        found.append(weights_cB @ other_BE - 2 * other_BE[places_c])
    return torch.cat(found) * (logit_scale / (2 * len(own_BE)))


@dataclass(frozen=True)
class Contrastive:
    """An `Accumulate` (see Phase), `BatchWide`: the phase's terms are `TERMS`, its observed values entries of the
    batch."""

    directions: Callable[[Mapping[str, nn.Module], Batch], Directions]
    logit_scale: float
    features: int  # E; for `rehearse`
    chunk_rows: int = CHUNK_ROWS

    def __call__(self, trainee: Trainee, phase: Phase, micro_batches: Sequence[MicroBatch], position: int) -> Tensor:
        """Backward of every micro batch of the global batch that starts at `position`; as trainer/step.py's."""
        group, watch = trainee.group, trainee.group.watch
        with torch.no_grad():
            passed = [self._directions(trainee, phase, micro) for micro in micro_batches[:-1]]
        # The last micro batch keeps its graph and goes back first: a rank with one micro batch computes nothing twice.
        newest: Directions | None = self._directions(trainee, phase, micro_batches[-1])
        assert newest is not None
        sizes = [len(micro.positions) for micro in micro_batches]
        places_b = torch.from_numpy(np.concatenate([micro.positions for micro in micro_batches]) - position)
        places_b = places_b.to(group.device)
        images_BE, captions_BE = _gathered([*passed, newest], sizes, places_b, trainee.config.batch, group.sum_)
        with watch.section("forward"):
            found = contrast(images_BE, captions_BE, places_b, self.logit_scale, group.sum_, self.chunk_rows)
        gradients = zip(found.image_gradients_bE.split(sizes), found.caption_gradients_bE.split(sizes), strict=True)
        for micro, gradient in reversed(list(zip(micro_batches, gradients, strict=True))):
            directions = newest or self._directions(trainee, phase, micro)
            newest = None
            with watch.section("backward"):
                trainee.engines[phase.part].backward(_carrying(directions, gradient))
        return _values(found.losses, phase, micro_batches, places_b, trainee)

    def passed_twice(self, micro_batches: int) -> int:
        return micro_batches - 1

    def rehearse(self, batch: int, share: int) -> tuple[Directions, Directions, Contrast]:
        """See BatchWide: the rank's directions, those of the global batch, the gradients."""
        own = (torch.empty(share, self.features), torch.empty(share, self.features))
        places_b = torch.arange(share)
        everyone = _gathered([own], [share], places_b, batch, _alone)
        return own, everyone, contrast(*everyone, places_b, self.logit_scale, _alone, self.chunk_rows)

    def _directions(self, trainee: Trainee, phase: Phase, micro: MicroBatch) -> Directions:
        """The same in both passes: noise is the batch's, dropout a function of the micro batch's position."""
        seed_dropout(micro, trainee.group.rank)
        with trainee.group.watch.section("forward"), trainee.engines[phase.part].precision_context():
            return self.directions(trainee.modules, on_device(micro.batch, trainee.group.device))


def _alone(values: Tensor) -> Tensor:
    """The sum over ranks where there is one."""
    return values


def _gathered(
    found: Sequence[Directions],
    sizes: Sequence[int],
    places_b: Tensor,
    batch: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> Directions:
    """The directions of the global batch, on every rank; of a stand-in micro batch (size 0) nothing enters."""
    both_b2E = torch.cat([torch.cat(pair, dim=1)[:size].detach() for pair, size in zip(found, sizes, strict=True)])
    both_B2E = both_b2E.new_zeros(batch, both_b2E.shape[1])
    both_B2E[places_b] = both_b2E
    # A sum with zeros is exact, so every rank gets every direction to the bit.
    images_BE, captions_BE = sum_over_ranks(both_B2E).chunk(2, dim=1)
    return images_BE.contiguous(), captions_BE.contiguous()


def _carrying(directions: Directions, gradients: Directions) -> Tensor:
    """A scalar whose gradient with respect to the directions is `gradients`, or 0 for a stand-in micro batch."""
    carried = [
        (own * (gradient if len(gradient) else torch.zeros_like(own))).sum()
        for own, gradient in zip(directions, gradients, strict=True)
    ]
    return carried[0] + carried[1]


def _values(
    losses: Losses, phase: Phase, micro_batches: Sequence[MicroBatch], places_b: Tensor, trainee: Trainee
) -> Tensor:
    """Terms and observed values at their places of the global batch, 0 elsewhere: float64 [terms + observed, B]."""
    rows = [losses[name] for name in phase.terms]
    for name in phase.observed:
        rows.append(torch.cat([micro.batch[name][: len(micro.positions)] for micro in micro_batches]))
    values = torch.zeros(len(rows), trainee.config.batch, dtype=torch.float64, device=trainee.group.device)
    values[:, places_b] = torch.stack([row.double().to(values.device) for row in rows])
    return values
