"""Runs side by side, as pure functions: in what settings they differ, and how they stand at equal cost.

Always holds: nothing is read or written; a figure of a run at a position is what its curve has there, never one beyond
its end. Called by `glidepath runs compare`; drawn by cluster/comparison_page.py.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.errors import UsageError, UserError
from trainer.tracking.runs import EVALUATION, STEP_S, WORKERS, Curves, Grid
from trainer.tracking.tracker import HELDOUT

IDENTIFIES = ("run", "store")  # settings that tell runs apart rather than compare them
USUAL_METRICS = ("loss/total", "*/loss/total", f"{HELDOUT}total", f"{EVALUATION}*", "grad_norm", "*/grad_norm")
THROUGHPUT = "images_per_s"
DRAWN_POINTS = 600  # of a curve at most
SMOOTHING_SHARE = 50  # by default over this part of the images that all runs have
# Given per run, not smoothed: each is a measurement of its own, of many pictures.
SEPARATE = (HELDOUT, EVALUATION)

FACTS = {
    "store": "store",
    "status": "status",
    "images": "images",
    "images_per_s": "images/s",
    "images_per_gpu_hour": "images per GPU-hour",
    "gpu_hours": "GPU-hours",
    "gpu_hours_at_equal_images": "GPU-hours at equal images",
}
MONEY = {
    "cost": "cost",
    "cost_at_equal_images": "cost at equal images",
    "cost_per_million_images": "cost per million images",
}

Line = Mapping[Any, float]  # x -> value; x is images or GPU-hours


class Section(NamedTuple):
    title: str
    lines: list[tuple[str, list[Any]]]


@dataclass(frozen=True)
class Compared:
    """One of the runs to compare. `about`: its row of `runs list`; `newest`: the newest value of each metric."""

    about: dict[str, Any]
    newest: Mapping[str, float]
    settings: Mapping[str, Any]
    curves: Curves
    grids: Sequence[Grid] = ()

    @cached_property
    def hours(self) -> dict[int, float]:
        """See `gpu_hours`."""
        return gpu_hours(self.curves)


def choose_metrics(logged: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The names to compare, in the order of the shell patterns in `wanted` that they match; by default losses, held-out
    loss, evaluations and gradient norms. Raises UserError for a pattern that nothing matches."""
    names = sorted(set(logged))
    for pattern in wanted:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            hint = f"the nearest is {near[0]}" if near else "wait for the first update"
            raise UserError(f"metric {pattern}", "one that a run logged", f"none such among {len(names)}", hint)
    matching = (name for pattern in wanted or USUAL_METRICS for name in names if fnmatch.fnmatchcase(name, pattern))
    return list(dict.fromkeys(matching))


def differing_settings(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, typed: 1, true and "1" are three. None where a run has none."""
    keys = sorted({key for one in settings for key in one} - set(IDENTIFIES))
    values = {key: [one.get(key) for one in settings] for key in keys}
    return {key: found for key, found in values.items() if any(_typed(value) != _typed(found[0]) for value in found)}


def _typed(value: Any) -> Any:
    """A value that is equal only to what means the same; 1 and 1.0 do."""
    if isinstance(value, (list, tuple)):
        return [_typed(one) for one in value]
    if isinstance(value, dict):
        return {key: _typed(one) for key, one in value.items()}
    return (isinstance(value, bool), value)


def gpu_hours(curves: Curves) -> dict[int, float]:
    """images -> GPU-hours that all updates up to there took: the sum of each one's time times the workers that it had,
    one GPU each. What an attempt lost when it died, starting anew and rollbacks are not in it. {} where those curves
    are not there from the first update on, as of a run that an older version began."""
    steps, workers = curves.get(STEP_S, {}), curves.get(WORKERS, {})
    hours, total = dict[int, float](), 0.0
    if not workers or min(workers) > min(steps, default=0):
        return hours
    for images in sorted(steps.keys() & workers.keys()):
        total += steps[images] * workers[images] / 3600
        hours[images] = total
    return hours


def values_at(line: Line, xs: Iterable[float]) -> list[float | None]:
    """The values at each x, linear between the points on either side; None before the first and beyond the last."""
    asked = np.array(list(xs), dtype=np.float64)
    if not line:
        return [None] * len(asked)
    places = np.array(sorted(line), dtype=np.float64)
    values = np.interp(asked, places, np.array([line[x] for x in sorted(line)], dtype=np.float64))
    inside = (asked >= places[0]) & (asked <= places[-1])
    return [float(value) if there else None for value, there in zip(values, inside, strict=True)]


def smoothed(line: Line, window: float) -> dict[float, float]:
    """The mean of a line's points up to each, weighted by exp(-distance / window); the line itself for a window of 0.

    It is bias-corrected (divided by the sum of the weights), so that it begins at the first value, and takes distances
    in x rather than in points, so that runs with batches of other sizes are smoothed over as many images.
    """
    made: dict[float, float] = {}
    before, total, weight = 0.0, 0.0, 0.0
    for x in sorted(line):
        kept = math.exp((before - x) / window) if window else 0.0
        total, weight = total * kept + line[x], weight * kept + 1
        made[x], before = total / weight, x
    return made


def at_equal(lines: Sequence[Line]) -> tuple[float, list[float | None]] | None:
    """The last x that all lines reach (but for empty ones), and each one's value there; None if all are empty."""
    ends = [max(line) for line in lines if line]
    return (min(ends), [values_at(line, [min(ends)])[0] for line in lines]) if ends else None


def by_hours(line: Line, hours: Mapping[int, float]) -> dict[float, float]:
    """A line over images as one over GPU-hours; points beyond the last update whose time is known are left out."""
    placed = zip(values_at(_from_nothing(hours), line), line.values(), strict=True)
    return {x: value for x, value in placed if x is not None}


def _from_nothing(hours: Mapping[int, float]) -> Line:
    """GPU-hours over images with their beginning; empty if none are known."""
    return {0: 0.0, **hours} if hours else {}


def compare(
    runs: Sequence[Compared], metrics: Sequence[str], window: float | None, price: float | None
) -> dict[str, Any]:
    """The document of `runs compare`. `window`: of the smoothing, in images; `price`: of a GPU-hour."""
    equal_images = min((run.about["images"] for run in runs), default=0)
    window = equal_images / SMOOTHING_SHARE if window is None else window
    raw = {name: [run.curves.get(name, {}) for run in runs] for name in metrics}
    lines = {
        name: [smoothed(curve, 0 if name.startswith(SEPARATE) else window) for curve in curves]
        for name, curves in raw.items()
    }
    over_hours = {
        name: [by_hours(line, run.hours) for run, line in zip(runs, of_runs, strict=True)]
        for name, of_runs in lines.items()
    }
    return {
        "runs": [{**run.about, **cost(run, equal_images, price)} for run in runs],
        "params_that_differ": differing_settings([run.settings for run in runs]),
        "metrics": newest(runs),
        "equal_images": _equal(lines, "images"),
        "equal_gpu_hours": _equal(over_hours, "gpu_hours"),
        "smoothing_images": window,
        "price_per_gpu_hour": price,
        "grids": equal_grids(runs, equal_images),
        "curves": {
            name: [
                drawn(run, curve, line) if curve else None
                for run, curve, line in zip(runs, raw[name], lines[name], strict=True)
            ]
            for name in metrics
        },
    }


def _equal(lines: Mapping[str, Sequence[Line]], axis: str) -> dict[str, Any]:
    found = {name: at_equal(of_runs) for name, of_runs in lines.items()}
    return {name: {axis: equal[0], "values": equal[1]} for name, equal in found.items() if equal}


def newest(runs: Sequence[Compared]) -> dict[str, list[float | None]]:
    """The newest value of each metric; None where a run has none."""
    names = sorted({name for run in runs for name in run.newest})
    return {name: [run.newest.get(name) for run in runs] for name in names}


def cost(run: Compared, equal_images: float, price: float | None) -> dict[str, float | None]:
    """Throughput, GPU-hours and money of a run; None for what was not logged, and without a price."""
    hours = max(run.hours.values(), default=None)
    rates = list(run.curves.get(THROUGHPUT, {}).values())
    counted = max(run.hours, default=0)

    def money(of_hours: float | None) -> float | None:
        return None if of_hours is None or price is None else of_hours * price

    equal = values_at(_from_nothing(run.hours), [equal_images])[0]
    return {
        "images_per_s": statistics.median(rates) if rates else None,
        "images_per_gpu_hour": counted / hours if hours else None,
        "gpu_hours": hours,
        "gpu_hours_at_equal_images": equal,
        "cost": money(hours),
        "cost_at_equal_images": money(equal),
        "cost_per_million_images": money(hours / counted * 1e6 if hours else None),
    }


def equal_grids(runs: Sequence[Compared], equal_images: float) -> list[dict[str, Any]]:
    """For each kind of weights a grid of each run, drawn after as many images where there are such, else the newest of
    each within `equal_images`. None where a run has none."""
    found = []
    for weights in sorted({grid.weights for run in runs for grid in run.grids}):
        of_runs = [
            {g.images: g for g in run.grids if g.weights == weights and g.images <= equal_images} for run in runs
        ]
        common = set.intersection(*(set(grids) for grids in of_runs))
        chosen = [grids.get(max(common or grids, default=0)) for grids in of_runs]
        if any(chosen):
            keys, images = zip(*((grid.key, grid.images) if grid else (None, None) for grid in chosen), strict=True)
            found.append({"weights": weights, "images": list(images), "keys": list(keys)})
    return found


def drawn(run: Compared, curve: Mapping[int, float], line: Line) -> dict[str, list[float] | None]:
    """A curve as it is drawn: the points of `thinned`, over images and, where those are known, GPU-hours."""
    xs = thinned(curve)
    hours = values_at(_from_nothing(run.hours), xs)
    return {
        "images": list(xs),
        "gpu_hours": [hour for hour in hours if hour is not None] if None not in hours else None,
        "values": [curve[x] for x in xs],
        "smoothed": [line[x] for x in xs],
    }


def thinned(curve: Mapping[int, float], most: int = DRAWN_POINTS) -> list[int]:
    """At most about `most` of a curve's x, with the lowest and the highest point of each stretch, so that no spike is
    lost; all of them where there are no more."""
    xs = sorted(curve)
    if len(xs) <= most:
        return xs
    stretch = math.ceil(len(xs) / (most // 2))
    parts = [sorted(xs[start : start + stretch], key=lambda x: curve[x]) for start in range(0, len(xs), stretch)]
    return sorted({xs[0], xs[-1], *(part[0] for part in parts), *(part[-1] for part in parts)})


def sections(document: Mapping[str, Any]) -> list[Section]:
    """The figures of a comparison as tables: a line per figure, a value per run."""
    runs = document["runs"]
    facts = FACTS | (MONEY if document["price_per_gpu_hour"] is not None else {})
    made = [
        Section("Runs", [(name, [run[key] for run in runs]) for key, name in facts.items()]),
        Section("Settings that differ", list(document["params_that_differ"].items())),
    ]
    for title, key, axis, unit in (
        ("At equal images", "equal_images", "images", "images"),
        ("At equal GPU-hours", "equal_gpu_hours", "gpu_hours", "GPU-hours"),
    ):
        lines = [(f"{name} at {cell(found[axis])} {unit}", found["values"]) for name, found in document[key].items()]
        made.append(Section(title, lines))
    return [*made, Section("Newest values", list(document["metrics"].items()))]


def headings(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each run that no other has."""
    names = [run["run"] for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]


def cell(value: Any) -> str:
    """A value for people."""
    if value is None:
        return "-"
    if isinstance(value, (int, float)) and abs(value) >= 1e4:
        return f"{value:,.0f}"
    if isinstance(value, float):
        return f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def refuse_same(names: Sequence[str], stores: Sequence[str]) -> None:
    """Raise UsageError for fewer than two runs, or for one that is named twice."""
    if len(names) < 2:
        raise UsageError("runs compare", "two runs or more", f"{len(names)}", "name another one")
    for number, store in enumerate(stores):
        if store in stores[:number]:
            first = names[stores.index(store)]
            raise UsageError(
                "runs compare", "different runs", f"{first} and {names[number]}, one run", "name another one"
            )
