"""How near drawn pictures come to real ones: FID, KID, Inception Score, precision and recall, on features.

Always holds: pure float64 numpy on features that some network gave; the same features give the same figures, whatever
block size the pairwise distances are taken in. Nothing here knows where features come from: the figure's name says it
(feature_networks.py). Called by evaluation.

Sources: FID: Heusel et al. 2017, equation 6. KID: Binkowski et al. 2018, section 4. Inception Score: Salimans et al.
2016, section 4. Precision and recall: Kynkaanniemi et al. 2019, equations 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError

Features = NDArray[np.floating]  # [n, D], or logits [n, K]
Float64 = NDArray[np.float64]

# Pictures on each side below which a figure is warned about. FID: what its authors ask for; its bias falls as 1/n
# (Chong and Forsyth 2020), so it is compared at equal counts only. KID: the paper's subset. Inception Score, precision
# and recall: a tenth of the papers' 50,000.
STABLE_FROM = {"fid": 10_000, "kid": 1_000, "inception_score": 5_000, "precision_recall": 5_000}

KID_SUBSET, KID_SUBSETS = 1_000, 100
INCEPTION_SPLITS = 10
NEAREST = 3
BLOCK_ROWS = 1_024  # of pairwise distances held at once


class Moments(NamedTuple):
    """Mean [D] and covariance [D, D] (unbiased, by n - 1) of features."""

    mean: Float64
    covariance: Float64


class Estimate(NamedTuple):
    """A mean over parts of the data, and the standard deviation between the parts."""

    mean: float
    deviation: float


def moments(features: Features) -> Moments:
    """Of features [n, D]. Raises UserError for fewer than two."""
    values = checked(features, "fid")
    centred = values - values.mean(axis=0)
    return Moments(values.mean(axis=0), centred.T @ centred / (len(values) - 1))


def frechet_distance(drawn: Moments, real: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), at least 0.

    tr((S1 S2)^(1/2)) is the sum of the singular values of S1^(1/2) S2^(1/2), which exist and are real whatever the
    rank: with fewer pictures than features both matrices are singular, where a general matrix square root of their
    product gives complex numbers or none, and the usual remedy, to add 1e-6 to the diagonals, changes the figure.
    """
    _refuse_other_width(drawn.covariance, real.covariance)
    shift = drawn.mean - real.mean
    cross = np.linalg.svd(_square_root(drawn.covariance) @ _square_root(real.covariance), compute_uv=False).sum()
    return max(0.0, float(shift @ shift + np.trace(drawn.covariance) + np.trace(real.covariance) - 2 * cross))


def _square_root(covariance: Float64) -> Float64:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)  # below 0 by rounding only


def kernel_distance(
    drawn: Features, real: Features, subset: int = KID_SUBSET, subsets: int = KID_SUBSETS, seed: int = 0
) -> Estimate:
    """KID: the mean of the unbiased MMD^2 under k(x, y) = (x.y / D + 1)^3 over random subsets, and its deviation.

    Subsets of `subset` pictures of each side, or of all where there are fewer; an unbiased estimate may be below 0.
    """
    x, y = checked(drawn, "kid"), checked(real, "kid")
    _refuse_other_width(x, y)
    size, rng = min(subset, len(x), len(y)), np.random.default_rng(seed)
    if size == len(x) == len(y):
        subsets = 1  # every subset is the whole
    found = [squared_mmd(x[rng.permutation(len(x))[:size]], y[rng.permutation(len(y))[:size]]) for _ in range(subsets)]
    return Estimate(float(np.mean(found)), float(np.std(found)))


def squared_mmd(x: Float64, y: Float64) -> float:
    """The unbiased estimate of MMD^2 between m and n features, by the cubic kernel."""
    within = (_kernel_mean(x), _kernel_mean(y))
    return float(sum(within) - 2 * _cubic(x, y).mean())


def _kernel_mean(x: Float64) -> float:
    """Over pairs of different rows: a row with itself is what would bias it."""
    kernel = _cubic(x, x)
    return float((kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1)))


def _cubic(x: Float64, y: Float64) -> Float64:
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def inception_score(logits: Features, splits: int = INCEPTION_SPLITS) -> Estimate:
    """exp of the mean KL divergence of p(class | picture) from p(class), over splits in the order of the pictures;
    between 1 and the number of classes. Fewer pictures than splits: one split of all."""
    values = checked(logits, "inception_score")
    parts = np.array_split(values, splits) if len(values) >= 2 * splits else [values]
    found = [_exponentiated_information(part) for part in parts]
    return Estimate(float(np.mean(found)), float(np.std(found)))


def _exponentiated_information(logits: Float64) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    marginal = p.mean(axis=0)
    # A class that no picture has any probability of adds nothing: 0 log 0.
    log_marginal = np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0)
    return float(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))


def precision_recall(drawn: Features, real: Features, nearest: int = NEAREST) -> tuple[float, float]:
    """(precision, recall): the share of drawn features within a real one's distance to its `nearest`-th neighbour, and
    of real ones within a drawn one's. Raises UserError where one side has not so many neighbours."""
    x, y = checked(drawn, "precision", nearest + 1), checked(real, "recall", nearest + 1)
    _refuse_other_width(x, y)
    return _covered(x, y, nearest), _covered(y, x, nearest)


def _covered(queries: Float64, manifold: Float64, nearest: int) -> float:
    # The 0-th neighbour of each is itself.
    radii = np.concatenate(
        [np.partition(block, nearest, axis=1)[:, nearest] for block in _distances(manifold, manifold)]
    )
    return float(np.concatenate([(block <= radii).any(axis=1) for block in _distances(queries, manifold)]).mean())


def _distances(x: Float64, y: Float64) -> Iterator[Float64]:
    """Squared distances [block, n] of the rows of x to all of y, block after block."""
    squares = (y**2).sum(axis=1)
    for begin in range(0, len(x), BLOCK_ROWS):
        block = x[begin : begin + BLOCK_ROWS]
        yield np.maximum((block**2).sum(axis=1)[:, None] + squares - 2 * block @ y.T, 0)


def too_few(metric: str, drawn: int, real: int) -> str | None:
    """A line if a figure of so many pictures is not stable; `real` is `drawn` where it needs none."""
    least, expected = min(drawn, real), STABLE_FROM[metric]
    if least >= expected:
        return None
    pictures = f"{drawn} drawn and {real} real" if real != drawn else f"{drawn}"
    return (
        f"{metric}: expected at least {expected} pictures for a stable figure, found {pictures}; "
        "compare it with figures of as many pictures only"
    )


def checked(features: Features, metric: str, least: int = 2) -> Float64:
    """Features as float64 [n, D]. Raises UserError for fewer than `least` and for values that are not finite."""
    values = np.asarray(features, np.float64)
    if len(values) < least:
        raise UserError(metric, f"at least {least} pictures", f"{len(values)}", "draw more, or give more real ones")
    if not np.isfinite(values).all():
        found = f"{int((~np.isfinite(values).all(axis=1)).sum())} of {len(values)} pictures without"
        raise UserError(metric, "finite features", found, "check the feature network's file")
    return values


def _refuse_other_width(x: Float64, y: Float64) -> None:
    if x.shape[1] != y.shape[1]:
        name, expected = "features", f"{y.shape[1]} a picture, as of the real ones"
        raise UserError(name, expected, f"{x.shape[1]}", "take both from one network")
