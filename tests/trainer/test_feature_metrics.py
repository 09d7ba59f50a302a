"""FID, KID, Inception Score, precision and recall against computations written from the papers' definitions."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from trainer.evaluation.feature_metrics import (
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    precision_recall,
    too_few,
)

CLOSE = 1e-4  # relative: what is promised
Floats = NDArray[np.float32]


def features(count: int, width: int, seed: int, shift: float = 0.0) -> Floats:
    """Skewed and correlated, as features behind a rectifier are."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(width, width)) / width**0.5
    return np.maximum(rng.normal(size=(count, width)) @ mixing + shift, 0).astype(np.float32) + 0.1


@pytest.mark.parametrize(("count", "width"), [(400, 24), (40, 24), (12, 24)], ids=["many", "few", "singular"])
def test_fid_equals_a_general_matrix_square_root(count: int, width: int) -> None:
    drawn, real = features(count, width, 1, 0.3).astype(np.float64), features(count + 9, width, 2).astype(np.float64)
    s1, s2 = np.cov(drawn, rowvar=False), np.cov(real, rowvar=False)
    if count > width:
        root_trace = np.trace(scipy.linalg.sqrtm(s1 @ s2)).real
    else:  # no square root of the product: by its eigenvalues
        root_trace = np.sqrt(scipy.linalg.eigvals(s1 @ s2).real.clip(min=0)).sum()
    expected = ((drawn.mean(0) - real.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root_trace
    assert frechet_distance(moments(drawn), moments(real)) == pytest.approx(expected, rel=CLOSE)


def test_fid_of_two_gaussians_on_the_axes_is_the_closed_form() -> None:
    """Of diagonal covariances: |m1 - m2|^2 + sum (sqrt(v1) - sqrt(v2))^2."""
    rng = np.random.default_rng(0)
    drawn, real = rng.normal(size=(200_000, 3)) * [1, 2, 3] + [1, 0, 0], rng.normal(size=(200_000, 3)) * [2, 2, 1]
    assert frechet_distance(moments(drawn), moments(real)) == pytest.approx(1 + 1 + 0 + 4, rel=0.01)


def test_kid_equals_the_double_sums_of_the_paper() -> None:
    x, y = features(23, 8, 1, 0.4).astype(np.float64), features(17, 8, 2).astype(np.float64)

    def k(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float((a @ b / 8 + 1) ** 3)

    m = 17  # every subset has as many as the smaller side
    picked = np.random.default_rng(5)
    expected = []
    for _ in range(3):
        xs, ys = x[picked.permutation(23)[:m]], y[picked.permutation(17)[:m]]
        within = sum(k(s[i], s[j]) for s in (xs, ys) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
        expected.append(within - 2 / m**2 * sum(k(a, b) for a in xs for b in ys))
    found = kernel_distance(x, y, subset=1000, subsets=3, seed=5)
    assert found.mean == pytest.approx(np.mean(expected), rel=CLOSE)
    assert found.deviation == pytest.approx(np.std(expected), rel=CLOSE)


def test_kid_is_unbiased() -> None:
    """Between halves of one population it is 0 on average, where a biased estimate never is."""
    found = [
        kernel_distance(features(60, 6, seed), features(60, 6, 1000 + seed), subset=30, subsets=4).mean
        for seed in range(60)
    ]
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found)) < 4 * error
    assert min(found) < 0 < max(found)


def test_inception_score_equals_the_mean_of_scipys_relative_entropies() -> None:
    logits = np.random.default_rng(3).normal(size=(107, 12)) * 3 + 1e3  # far from 0: needs a stable softmax
    expected = []
    for part in np.array_split(logits, 10):
        p = np.exp(part - part.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        expected.append(np.exp(np.mean([scipy.stats.entropy(row, p.mean(axis=0)) for row in p])))
    found = inception_score(logits)
    assert found.mean == pytest.approx(np.mean(expected), rel=CLOSE)
    assert found.deviation == pytest.approx(np.std(expected), rel=CLOSE)


def test_precision_and_recall_equal_a_brute_force_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.evaluation.feature_metrics.BLOCK_ROWS", 7)  # blocks that do not divide the rows
    drawn, real = features(60, 5, 1, 0.5), features(50, 5, 2)

    def covered(queries: Floats, manifold: Floats) -> float:
        def radius(i: int) -> float:
            return sorted(np.linalg.norm(manifold[i] - other) for other in manifold.astype(np.float64))[3]

        radii = [radius(i) for i in range(len(manifold))]
        inside = [any(np.linalg.norm(q - m) <= r for m, r in zip(manifold, radii, strict=True)) for q in queries]
        return float(np.mean(inside))

    precision, recall = precision_recall(drawn, real)
    assert (precision, recall) == (covered(drawn, real), covered(real, drawn))
    assert 0 < precision < 1 and 0 < recall < 1


SIZES = st.integers(2, 40)


@settings(max_examples=40, deadline=None)
@given(m=SIZES, n=SIZES, width=st.integers(1, 30), seed=st.integers(0, 10**6), shift=st.floats(-1, 3))
def test_fid_is_symmetric_not_negative_and_0_on_itself(m: int, n: int, width: int, seed: int, shift: float) -> None:
    drawn, real = moments(features(m, width, seed, shift)), moments(features(n, width, seed + 1))
    there, back = frechet_distance(drawn, real), frechet_distance(real, drawn)
    scale = np.trace(drawn.covariance) + np.trace(real.covariance)
    assert there == pytest.approx(back, rel=1e-9, abs=1e-9 * scale)
    assert there >= 0
    assert frechet_distance(drawn, drawn) <= 1e-9 * (1 + scale)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(4, 30), n=st.integers(4, 30), seed=st.integers(0, 10**6), shift=st.floats(-1, 3))
def test_precision_and_recall_swap_with_the_sides_and_are_1_on_itself(m: int, n: int, seed: int, shift: float) -> None:
    drawn, real = features(m, 4, seed, shift), features(n, 4, seed + 1)
    assert precision_recall(drawn, real) == precision_recall(real, drawn)[::-1]
    assert precision_recall(drawn, drawn) == (1.0, 1.0)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 60), classes=st.integers(2, 20), seed=st.integers(0, 10**6), scale=st.floats(0, 1e4))
def test_inception_score_lies_between_1_and_the_number_of_classes(
    count: int, classes: int, seed: int, scale: float
) -> None:
    logits = np.random.default_rng(seed).normal(size=(count, classes)) * scale
    assert 1 - 1e-9 <= inception_score(logits).mean <= classes * (1 + 1e-9)
    certain = np.eye(classes) * 1e4
    assert inception_score(certain, splits=1).mean == pytest.approx(classes)
    assert inception_score(np.zeros((count, classes))).mean == pytest.approx(1)


def test_what_cannot_be_measured_is_refused_in_one_line_and_what_is_unstable_says_its_count() -> None:
    good = features(9, 4, 1)
    with pytest.raises(UserError, match=r"^fid: expected at least 2 pictures, found 1; "):
        moments(good[:1])
    with pytest.raises(UserError, match=r"^recall: expected at least 4 pictures, found 3; "):
        precision_recall(good, good[:3])
    with pytest.raises(UserError, match=r"^features: expected 4 a picture, as of the real ones, found 3; "):
        frechet_distance(moments(good[:, :3]), moments(good))
    with pytest.raises(UserError, match=r"^kid: expected finite features, found 1 of 9 pictures without; "):
        kernel_distance(np.where(np.arange(9)[:, None] == 4, np.nan, good), good)
    assert too_few("fid", 10_000, 50_000) is None
    line = too_few("fid", 256, 96)
    assert line and "at least 10000 pictures" in line and "found 256 drawn and 96 real" in line
