"""Drill R12: one run through every ZeRO stage and world size, by the launcher and the store, nothing converted."""

from __future__ import annotations

import pytest

from cluster.drills import zero_chain
from cluster.drills.scratch import Wishes, scratch


def test_a_run_goes_through_every_zero_stage_and_several_world_sizes_without_conversion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zero_chain, "UPDATES", 2)
    monkeypatch.setattr(zero_chain, "chain", lambda seed, resumes: [(3, 2), (1, 1), (2, 2), (0, 3), (3, 1)])
    with scratch(Wishes(), print) as place:
        score = zero_chain.run(place)
    assert not score.failures
    assert score.figures["resumes"] == 4 and score.figures["batches_listed"] == 10


def test_the_twelve_resumes_of_any_seed_meet_every_pair_once() -> None:
    pairs = {(stage, ranks) for stage in range(4) for ranks in (1, 2, 3)}
    for seed in range(5):
        links = zero_chain.chain(seed, 12)
        assert len(links) == 13 and set(links[1:]) == pairs


@pytest.mark.drill
@pytest.mark.parametrize(("seed", "precision"), [(0, "fp32"), (1, "bf16")])
def test_twelve_resumes_and_the_way_there_and_back_keep_samples_and_loss(seed: int, precision: str) -> None:
    with scratch(Wishes(seed=seed, precision=precision), print) as place:
        score = zero_chain.run(place)
    assert not score.failures and score.faults >= 12
