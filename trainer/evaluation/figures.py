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
    unit_rows,
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
# What the names mean; a stored result of another version is not read. 2: clip_score_shuffled is of all pairs.
FIGURES_VERSION = 2
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
        found |= clip_scores(drawn.features, drawn.captions, captions)
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


def clip_scores(pictures: Float32, texts: Float32, captions: Sequence[str]) -> dict[str, float]:
    """Of features [n, D] of pictures and [n, D] of their captions: the mean cosine of a picture with its caption
    (`clip_score`), with the others' captions that say something else, averaged over all of them (`_shuffled`: what
    chance gives), and the difference (`_margin`) with its 95% interval. Where all captions are alike, the first alone.

    The difference is a U-statistic of the pairs, its standard error that of its projection: own cosine less the means
    of the picture's and of the caption's row, in which pictures and captions that score high with anything cancel.
    Source: Hoeffding 1948, "A class of statistics with asymptotically normal distribution", section 7.
    """
    x_ND, y_ND = unit_rows(pictures), unit_rows(texts)
    own = (x_ND * y_ND).sum(axis=1)
    found = {"clip_score": float(own.mean())}
    _, says, counts = np.unique(np.array(captions), return_inverse=True, return_counts=True)
    others = len(captions) - counts[says]  # captions that say something else, of each row
    if not others.all():
        return found
    of_picture = (x_ND * _sum_of_others(y_ND, says)).sum(axis=1) / others
    of_caption = (y_ND * _sum_of_others(x_ND, says)).sum(axis=1) / others
    shuffled, margin = float(of_picture.mean()), float((own - of_picture).mean())
    reach = INTERVAL * float((own - of_picture - of_caption).std(ddof=1)) / len(own) ** 0.5
    found |= {"clip_score_shuffled": shuffled, "clip_score_margin": margin}
    return found | {"clip_score_margin_low": margin - reach, "clip_score_margin_high": margin + reach}


def _sum_of_others(rows_ND: NDArray[np.float64], says: NDArray[np.int64]) -> NDArray[np.float64]:
    """For each row the sum of the rows whose caption says something else. `says`: the number of each row's caption."""
    sums = np.zeros((says.max() + 1, rows_ND.shape[1]))
    np.add.at(sums, says, rows_ND)
    return np.asarray(rows_ND.sum(axis=0) - sums[says])
