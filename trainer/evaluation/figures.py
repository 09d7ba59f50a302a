"""The figures of one set of drawn pictures: each metric by each network that can take it, named with the network.

Always holds: pictures pass through a network once for all its metrics, and only features are kept; a figure's name is
metric/network; what was asked for and no network can take is refused before anything is drawn. Called by the evaluate
command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data_pipeline.config import Settings
from data_pipeline.errors import UsageError
from trainer.config import Positive
from trainer.evaluation.feature_metrics import (
    INCEPTION_SPLITS,
    KID_SUBSET,
    KID_SUBSETS,
    NEAREST,
    checked,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    precision_recall,
    too_few,
)
from trainer.evaluation.feature_networks import (
    ClipNetwork,
    FeatureNetwork,
    Float32,
    InceptionNetwork,
    Kind,
    NoisedClipNetwork,
    cosines,
)
from trainer.evaluation.linear_probe import ProbeSettings, aesthetic_scores, fit_probe
from trainer.evaluation.reference import BLOCK
from trainer.recipes.recipe import Pixels

Metric = Literal["fid", "kid", "precision_recall", "inception_score", "clip_score", "aesthetic"]
METRICS: tuple[Metric, ...] = (
    "fid",
    "kid",
    "precision_recall",
    "inception_score",
    "clip_score",
)  # if none is asked for
COMPARING: tuple[Metric, ...] = ("fid", "kid", "precision_recall")  # with real pictures
TAKEN_BY: dict[Metric, tuple[Kind, ...]] = {  # all others by every kind
    "inception_score": ("inception",),
    "clip_score": ("clip", "noised-clip"),
    "aesthetic": ("clip", "noised-clip"),
}
INTERVAL = 1.96  # standard errors on each side of a mean: 95%


class MetricSettings(Settings):
    """The papers' constants; figures of others do not compare with published ones."""

    kid_subset: Annotated[int, Field(ge=2)] = KID_SUBSET
    kid_subsets: Positive = KID_SUBSETS
    inception_splits: Positive = INCEPTION_SPLITS
    nearest: Positive = NEAREST


@dataclass(frozen=True)
class Taken:
    """What one network gave of n drawn pictures and of their captions."""

    features: Float32  # [n, D]
    logits: Float32 | None = None  # [n, K]
    captions: Float32 | None = None  # [n, D]


def metrics_of(kind: Kind, asked: Sequence[Metric]) -> tuple[Metric, ...]:
    """Those of `asked` (all, where none is) that a kind of network can take."""
    return tuple(metric for metric in asked or METRICS if kind in TAKEN_BY.get(metric, (kind,)))


def refuse_untakeable(asked: Sequence[Metric], kinds: Iterable[Kind]) -> None:
    """Raise UsageError naming the first metric that none of the networks can take."""
    here = sorted(set(kinds))
    for metric in asked:
        if not any(metric in metrics_of(kind, asked) for kind in here):
            expected = f"a feature network of kind {' or '.join(TAKEN_BY[metric])}"
            raise UsageError(f"metric {metric}", expected, ", ".join(here), "add one to features, or leave it out")


def take(network: FeatureNetwork, blocks: Iterable[Pixels], passed: Callable[[int], None]) -> Taken:
    """Pass drawn pictures through a network; `passed` is told how many are done."""
    features, logits, done = [], [], 0
    for block in blocks:
        if isinstance(network, InceptionNetwork):
            found, classes = network.features_and_logits(block)
            logits.append(classes)
        else:
            found = network.features(block)
        features.append(found)
        done += len(block)
        passed(done)
    return Taken(np.concatenate(features), np.concatenate(logits) if logits else None)


def with_captions(network: FeatureNetwork, drawn: Taken, captions: Sequence[str], asked: Sequence[Metric]) -> Taken:
    """The same with the captions' features, where a metric needs them and the network reads captions."""
    if "clip_score" not in metrics_of(network.identity.kind, asked):
        return drawn
    assert isinstance(network, ClipNetwork | NoisedClipNetwork)
    found = [network.text_features(captions[begin : begin + BLOCK]) for begin in range(0, len(captions), BLOCK)]
    return replace(drawn, captions=np.concatenate(found))


def other_captions(captions: Sequence[str]) -> NDArray[np.int64]:
    """For each picture the number of the next one whose caption says something else, [n]; its own where none does."""
    count = len(captions)
    following = np.arange(count, dtype=np.int64)
    nearest = None  # the next row with another caption than the row after which it stands
    for number in reversed(range(2 * count)):
        here, after = number % count, (number + 1) % count
        if captions[after] != captions[here]:
            nearest = after
        if nearest is not None:
            following[here] = nearest
    return following


def figures_of(
    network: FeatureNetwork,
    drawn: Taken,
    captions: Sequence[str],
    real: Float32 | None,
    asked: Sequence[Metric],
    settings: MetricSettings,
) -> tuple[dict[str, float], list[str]]:
    """({metric/network: value}, warnings). `real` [m, D] may be absent where no metric compares with it."""
    found: dict[str, float] = {}
    lines: list[str | None] = []
    wanted, count = metrics_of(network.identity.kind, asked), len(drawn.features)
    if real is not None:
        lines += [too_few(metric, count, len(real)) for metric in COMPARING if metric in wanted]
        if "fid" in wanted:
            found["fid"] = frechet_distance(moments(drawn.features), moments(real))
        if "kid" in wanted:
            kid = kernel_distance(drawn.features, real, settings.kid_subset, settings.kid_subsets)
            found |= {"kid": kid.mean, "kid_deviation": kid.deviation}
        if "precision_recall" in wanted:
            found["precision"], found["recall"] = precision_recall(drawn.features, real, settings.nearest)
    if drawn.logits is not None and "inception_score" in wanted:
        lines.append(too_few("inception_score", count, count))
        score = inception_score(drawn.logits, settings.inception_splits)
        found |= {"inception_score": score.mean, "inception_score_deviation": score.deviation}
    if drawn.captions is not None:
        for features in (drawn.features, drawn.captions):
            checked(features, "clip_score", least=1)
        others = drawn.captions[other_captions(captions)]
        found |= clip_scores(cosines(drawn.features, drawn.captions), cosines(drawn.features, others))
    name = network.identity.name
    return {f"{metric}/{name}": value for metric, value in found.items()}, [line for line in lines if line]


def aesthetic_figures(
    network: FeatureNetwork, drawn: Taken, asked: Sequence[Metric], settings: ProbeSettings
) -> dict[str, float]:
    """The mean score of drawn pictures by a linear probe, and how well the probe predicts people on held-out pictures
    ({} of a network that takes none). Raises UserError as `fit_probe` does."""
    if "aesthetic" not in metrics_of(network.identity.kind, asked):
        return {}
    probe = fit_probe(settings, network.identity)
    name = network.identity.name
    checked(drawn.features, "aesthetic", least=1)
    score = float(aesthetic_scores(probe, drawn.features, network.identity).mean())
    return {f"aesthetic/{name}": score, f"aesthetic_correlation/{name}": probe.correlation}


def clip_scores(right: NDArray[np.float64], shuffled: NDArray[np.float64]) -> dict[str, float]:
    """Of cosines [n] of the same pictures with their captions and with others': the two means, and the mean
    difference with its 95% interval, which is absent for a single picture."""
    margin = right - shuffled
    found = {
        "clip_score": float(right.mean()),
        "clip_score_shuffled": float(shuffled.mean()),
        "clip_score_margin": float(margin.mean()),
    }
    if len(margin) > 1:
        reach = INTERVAL * float(margin.std(ddof=1)) / len(margin) ** 0.5
        found["clip_score_margin_low"] = found["clip_score_margin"] - reach
        found["clip_score_margin_high"] = found["clip_score_margin"] + reach
    return found
