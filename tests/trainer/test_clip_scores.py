"""CLIP scores and their chance level against every pair written out, and the interval against known truths."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.evaluation.feature_networks import unit_rows
from trainer.evaluation.figures import clip_scores

Floats = NDArray[np.float32]


def test_they_are_those_of_every_pair_of_a_picture_and_a_caption_that_says_something_else() -> None:
    rng, captions = np.random.default_rng(0), ["a cat", "a dog", "a cat", "a boat", "a hut"]
    pictures, texts = (rng.normal(size=(5, 8)).astype(np.float32) for _ in range(2))
    cosines = unit_rows(pictures) @ unit_rows(texts).T
    differs = np.array([[mine != other for other in captions] for mine in captions])
    shuffled = np.mean([row[other].mean() for row, other in zip(cosines, differs, strict=True)])
    found = clip_scores(pictures, texts, captions)
    assert found["clip_score"] == pytest.approx(np.diag(cosines).mean())
    assert found["clip_score_shuffled"] == pytest.approx(shuffled)
    assert found["clip_score_margin"] == pytest.approx(np.diag(cosines).mean() - shuffled)
    # With nothing to shuffle there is no chance level.
    assert set(clip_scores(pictures[:1], texts[:1], captions[:1])) == {"clip_score"}
    assert set(clip_scores(pictures[:2], texts[:2], ["a cat"] * 2)) == {"clip_score"}


def pairs(count: int, effect: float, seed: int) -> tuple[Floats, Floats]:
    """Features of pictures and captions that share a part, and have more or less in common with all others."""
    rng, common = np.random.default_rng(seed), np.random.default_rng(9).normal(size=6)
    shared = effect * rng.normal(size=(count, 6))
    x, y = (shared + rng.normal(size=(count, 6)) + rng.exponential(size=(count, 1)) * common for _ in range(2))
    return x.astype(np.float32), y.astype(np.float32)


@pytest.mark.parametrize("effect", [0.0, 0.7])
def test_the_interval_holds_the_truth_95_times_in_100(effect: float) -> None:
    def scores(count: int, seed: int) -> dict[str, float]:
        return clip_scores(*pairs(count, effect, seed), [str(number) for number in range(count)])

    truth = scores(200_000, 0)["clip_score_margin"]
    assert (truth > 0.02) == (effect > 0)
    found = [scores(100, seed) for seed in range(1, 501)]
    held = np.mean([one["clip_score_margin_low"] <= truth <= one["clip_score_margin_high"] for one in found])
    assert 0.92 <= held <= 0.98
