"""Elo ratings and win rates of models that people compared pairwise.

Always holds: pure; a tie is half a win for both; ratings have the mean 0 and are refused, with the models named, where
the answers have no maximum of the likelihood, which would be at infinity. Called by `cluster.judging.results`.

Source: Nichol et al. 2021 (GLIDE), appendix A.1: the σ that minimise Σ_ij A_ij log(1 + 10^((σ_j - σ_i) / 400)), where
A_ij is how often i was preferred to j. (The appendix as printed has σ_i - σ_j, which would rate the loser higher.)
It is the model of Bradley & Terry 1952; when it has a maximum: Ford 1957.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError

Floats = NDArray[np.float64]

PER_LOG_UNIT = 400 / math.log(10)  # Elo points of one unit of log-odds
TAIL = 0.025  # on either side of a 95% interval
Z = 1.959963984540054  # its quantile of the standard normal
LARGEST_STEP, CLOSE_ENOUGH, ITERATIONS = 2.0, 1e-10, 200  # of Newton's method, in log-odds
CHUNK = 256  # resamples at a time, which bounds memory


@dataclass(frozen=True)
class Comparisons:
    """n comparisons of models by their numbers: `first` and `second` int64 [n]; `score` float64 [n] is 1 where the
    first was preferred, 0 where the second was, 0.5 for a tie."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    score: Floats

    def __len__(self) -> int:
        return len(self.score)


def wins(models: int, comparisons: Comparisons) -> Floats:
    """A_ij, float64 [models, models]: how often i was preferred to j."""
    every = np.arange(len(comparisons))[None, :]
    return _wins_of(models, comparisons, every)[0]


def elo(names: Sequence[str], wins_KK: Floats) -> Floats:
    """Ratings float64 [K] with the mean 0. Raises UserError if the answers do not decide them."""
    refuse_undecided(names, wins_KK)
    return _maximum(wins_KK[None])[0]


def refuse_undecided(names: Sequence[str], wins_KK: Floats) -> None:
    """Raise UserError, naming the models, unless there are finite ratings (Ford 1957: every model is reached from every
    other by a chain of wins, of which half ones are some)."""
    compared = _reaches((wins_KK + wins_KK.T)[None] > 0)[0]
    if not compared.all():
        apart = [name for name, near in zip(names, compared[0], strict=True) if not near]
        together = [name for name, near in zip(names, compared[0], strict=True) if near]
        raise UserError(
            f"ratings of {_listed(together)} and {_listed(apart)}",
            "comparisons between them, direct or through others",
            "none",
            "judge some pairs of them, or rate them apart",
        )
    beats = _reaches(wins_KK[None] > 0)[0]
    if beats.all():
        return
    # Whom the fewest are below never won against anybody else.
    lowest = beats[int(beats.sum(axis=1).argmin())]
    losers = [name for name, below in zip(names, lowest, strict=True) if below]
    others = [name for name, below in zip(names, lowest, strict=True) if not below]
    count = int(wins_KK[~lowest][:, lowest].sum())
    raise UserError(
        f"rating of {_listed(losers)}",
        f"a win or a tie against {_listed(others)}",
        f"none in {count} comparisons, which puts it at minus infinity",
        "judge more pairs, or read the win rates alone",
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def bootstrap(models: int, comparisons: Comparisons, resamples: int, seed: int) -> Floats:
    """Ratings float64 [resamples, models] of as many comparisons drawn with replacement; rows of NaN where those have
    no maximum."""
    rng = np.random.default_rng(seed)
    found = np.full((resamples, models), np.nan)
    for begin in range(0, resamples, CHUNK):
        rows = found[begin : begin + CHUNK]
        drawn = rng.integers(0, len(comparisons), (len(rows), len(comparisons)))
        wins_RKK = _wins_of(models, comparisons, drawn)
        decided = _reaches(wins_RKK > 0).all(axis=(1, 2))
        rows[decided] = _maximum(wins_RKK[decided])
    return found


def intervals(resampled_RK: Floats) -> tuple[Floats, Floats]:
    """95% percentile intervals: (low, high), each float64 [K]. A resample without a maximum counts as minus infinity
    for the lower end and as infinity for the upper one, so that leaving it out never narrows an interval."""
    rows = len(resampled_RK)
    outside = min(math.floor(TAIL * rows), rows - 1)
    low = np.sort(np.where(np.isnan(resampled_RK), -np.inf, resampled_RK), axis=0)[outside]
    high = np.sort(np.where(np.isnan(resampled_RK), np.inf, resampled_RK), axis=0)[rows - 1 - outside]
    return low, high


def win_rate(won: float, count: float) -> tuple[float, float, float]:
    """(rate, low, high) of `won` in `count` comparisons: Wilson's 95% interval, which is not empty at 0 and 1 either.
    A tie is half a win, which varies less than a whole one: with many ties the interval is wider than it need be."""
    rate, spread = won / count, Z * Z / count
    centre = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(rate * (1 - rate) * spread + spread * spread / 4) / (1 + spread)
    return rate, max(0.0, centre - half), min(1.0, centre + half)


def _wins_of(models: int, comparisons: Comparisons, drawn_RN: NDArray[np.int64]) -> Floats:
    """A_ij float64 [R, models, models] of R selections of comparisons."""
    size = models * models
    base = np.arange(len(drawn_RN))[:, None] * size
    cells = (comparisons.first * models + comparisons.second)[drawn_RN] + base
    mirrored = (comparisons.second * models + comparisons.first)[drawn_RN] + base
    score = comparisons.score[drawn_RN]
    total = len(drawn_RN) * size
    flat = np.bincount(cells.ravel(), score.ravel(), total) + np.bincount(mirrored.ravel(), 1 - score.ravel(), total)
    return flat.astype(np.float64).reshape(-1, models, models)


def _reaches(edges_RKK: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which model is reached from which over any number of edges, each from itself."""
    models = edges_RKK.shape[1]
    reached = edges_RKK | np.eye(models, dtype=bool)
    for _ in range(models.bit_length()):  # squared, paths double
        reached = np.matmul(reached, reached)
    return reached


def _maximum(wins_RKK: Floats) -> Floats:
    """Ratings [R, K] of the greatest likelihood by Newton's method, for tallies known to have one."""
    models = wins_RKK.shape[1]
    counts = wins_RKK + wins_RKK.transpose(0, 2, 1)
    log_odds = np.zeros(wins_RKK.shape[:2])
    diagonal = np.arange(models)
    for _ in range(ITERATIONS):
        p_ij = 1 / (1 + np.exp(log_odds[:, None, :] - log_odds[:, :, None]))
        gradient = (wins_RKK - counts * p_ij).sum(axis=2)
        curvature = counts * p_ij * (1 - p_ij)
        # The likelihood does not change along (1, …, 1); this fixes the mean instead.
        hessian = 1 / models - curvature
        hessian[:, diagonal, diagonal] += curvature.sum(axis=2)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        step *= np.minimum(1, LARGEST_STEP / np.maximum(np.abs(step).max(axis=1, keepdims=True), LARGEST_STEP))
        log_odds += step
        if not step.size or np.abs(step).max() < CLOSE_ENOUGH:
            return (log_odds - log_odds.mean(axis=1, keepdims=True)) * PER_LOG_UNIT
    raise ArithmeticError(f"no maximum after {ITERATIONS} steps of Newton's method")
