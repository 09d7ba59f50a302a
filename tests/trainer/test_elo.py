"""Elo ratings: hand-computed cases, a simulated population, and answers that decide nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from trainer.evaluation.elo import Comparisons, Floats, bootstrap, elo, intervals, win_rate, wins

THREE_TO_ONE = 400 * math.log10(3)  # by hand: 10^(difference / 400) is the odds


def comparisons_of(*rows: tuple[int, int, float]) -> Comparisons:
    first, second, score = zip(*rows, strict=True)
    return Comparisons(np.array(first), np.array(second), np.array(score))


def simulated(ratings: Floats, count: int, rng: np.random.Generator) -> Comparisons:
    """Answers of people for whom the model of appendix A.1 holds, over random pairs."""
    first = rng.integers(0, len(ratings), count)
    second = (first + rng.integers(1, len(ratings), count)) % len(ratings)
    chance = 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / 400))
    return Comparisons(first, second, (rng.random(count) < chance).astype(np.float64))


def test_hand_computed_ratings() -> None:
    half = THREE_TO_ONE / 2
    np.testing.assert_allclose(elo(["a", "b"], np.array([[0.0, 3], [1, 0]])), [half, -half], atol=1e-9)
    # Two wins and two ties of four, shown on either side, are three wins of four.
    with_ties = comparisons_of((0, 1, 1), (1, 0, 0), (0, 1, 0.5), (1, 0, 0.5))
    np.testing.assert_allclose(elo(["a", "b"], wins(2, with_ties)), [half, -half], atol=1e-9)
    # A chain: nobody compared the ends, and each link is decided by itself.
    chain = np.array([[0.0, 3, 0], [1, 0, 9], [0, 1, 0]])
    links = np.array([THREE_TO_ONE, 0, -400 * math.log10(9)])
    np.testing.assert_allclose(elo(["a", "b", "c"], chain), links - links.mean(), atol=1e-9)
    circle = np.array([[0.0, 5, 2], [2, 0, 5], [5, 2, 0]])  # each beats the next as often
    np.testing.assert_allclose(elo(["a", "b", "c"], circle), 0, atol=1e-9)


@given(st.lists(st.integers(0, 30), min_size=12, max_size=12))
def test_no_change_of_a_rating_makes_the_answers_likelier(counts: list[int]) -> None:
    tally = np.zeros((4, 4))
    tally[~np.eye(4, dtype=bool)] = counts
    tally += 0.5 * (1 - np.eye(4))  # a tie of each pair: there is a maximum

    def cost(rated: Floats) -> float:
        return float((tally * np.log1p(10 ** ((rated[None, :] - rated[:, None]) / 400))).sum())

    found = elo(list("abcd"), tally)
    assert abs(found.mean()) < 1e-9
    for change in np.vstack([np.eye(4), -np.eye(4)]):
        assert cost(found + change) > cost(found)


def test_true_ratings_lie_in_the_intervals_at_about_the_stated_rate() -> None:
    """200 populations, of each the interval of one model: independent, so that their number is binomial. Below 178 or
    above 199 has a chance of 0.0003 at a rate of 95%."""
    rng, inside = np.random.default_rng(0), 0
    for trial in range(200):
        true = rng.normal(0, 120, 4)
        true -= true.mean()
        low, high = intervals(bootstrap(4, simulated(true, 300, rng), 200, seed=trial))
        inside += bool(low[trial % 4] <= true[trial % 4] <= high[trial % 4])
    assert 178 <= inside <= 199


def test_a_resample_that_decides_nothing_widens_the_interval() -> None:
    few = comparisons_of((0, 1, 1), (0, 1, 1), (0, 1, 0))  # nearly a third of its resamples lack the one loss
    resampled = bootstrap(2, few, 400, seed=1)
    lacking = np.isnan(resampled).any(axis=1).mean()
    assert 0.2 < lacking < 0.5
    low, high = intervals(resampled)
    assert np.isneginf(low).all() and np.isposinf(high).all()
    np.testing.assert_array_equal(resampled, bootstrap(2, few, 400, seed=1))
    assert not np.array_equal(resampled, bootstrap(2, few, 400, seed=2), equal_nan=True)


def test_answers_that_decide_no_ratings_are_refused_in_one_line_with_the_models_named() -> None:
    never = np.array([[0.0, 3, 4], [1, 0, 5], [0, 0, 0]])
    with pytest.raises(UserError, match=r"rating of c: .*against a and b, found none in 9 comparisons.*infinity"):
        elo(["a", "b", "c"], never)
    two_leagues = np.array([[0.0, 2, 7, 0], [2, 0, 0, 0], [0, 0, 0, 3], [0, 0, 3, 0]])
    with pytest.raises(UserError, match=r"rating of c and d: .*against a and b, found none in 7"):
        elo(list("abcd"), two_leagues)
    apart = np.array([[0.0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 3], [0, 0, 3, 0]])
    with pytest.raises(UserError, match="ratings of a and b and c and d: expected comparisons between them"):
        elo(list("abcd"), apart)


def test_win_rates_have_wilsons_interval() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    cases = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (won, count), expected in cases.items():
        rate, low, high = win_rate(won, count)
        assert rate == won / count
        np.testing.assert_allclose((low, high), expected, atol=6e-5)
