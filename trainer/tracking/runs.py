"""What is known of a training run, wherever it was tracked: its figures in short, and its whole history for comparing.

Always holds: nothing here reads or writes; names of curves are the same from a tracking server and from a folder. Made
by the trackers' readers, shown by `cluster`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from trainer.config import SamplingSettings, flat_keys

STEP_S, WORKERS = "time/step_s", "workers"  # of each update; their product is what it cost
EVALUATION = "evaluation/"  # curves whose names begin so have a point per evaluation of a checkpoint
GRID_KEY = re.compile(r"samples/images-(\d{9,})-([a-z]+)\.png")
SAMPLING = "sampling."
USUAL = {f"{SAMPLING}{key}": str(value) for key, value in SamplingSettings().model_dump().items()} | {
    "weights": "ema",
    "seed": "0",
    "upsampler": "",  # the URI of a checkpoint
}

Curves = dict[str, dict[int, float]]  # name -> {images: value}


@dataclass(frozen=True)
class RunFigures:
    """`params`: the resolved configuration, flat, as text. `metrics`: the newest value of each."""

    run: str
    store: str
    mlflow_run_id: str | None
    status: str
    images: int
    updated_ms: int  # UTC milliseconds since 1970
    params: dict[str, str]
    metrics: dict[str, float]


class Grid(NamedTuple):
    """A grid of samples of a run, drawn after `images` with the raw weights or their average (ema)."""

    images: int
    weights: str
    key: str


class RunHistory(Protocol):
    """A run's settings, curves and grids. What may fail raises UserError; a picture that cannot be had is None."""

    def settings(self) -> dict[str, Any]:
        """The resolved configuration of the newest attempt, as it was stored."""

    def curves(self, names: Sequence[str]) -> Curves:
        """The curves of these names that the run has."""

    def evaluations(self) -> Curves:
        """One point for each evaluation of a checkpoint; see `evaluation_curves`."""

    def grids(self) -> list[Grid]: ...

    def picture(self, grid: Grid) -> bytes | None: ...


def flat_text(config: dict[str, Any]) -> dict[str, str]:
    """A configuration's settings by dotted key: text as it is, anything else as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat_keys(config)}


def param_value(text: str) -> Any:
    """A setting that was kept as `flat_text` as its JSON value; text that is none stays text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def grids_of(keys: Iterable[str]) -> list[Grid]:
    """The grids among keys of a run's files."""
    return [Grid(int(found[1]), found[2], key) for key in keys if (found := GRID_KEY.fullmatch(key))]


def evaluation_curves(results: Iterable[tuple[int, Mapping[str, str], Mapping[str, float]]]) -> Curves:
    """Curves of evaluations given as (images trained, facts, metrics), a later one before an earlier of the same.

    The name says of what settings a figure is, since figures of others are not to be compared with it:
    `evaluation/fid/noised-clip-ab12cd34 (256 of 5f3a91c2, guidance_scale=4.0)`: 256 pictures, the captions of that
    dataset, and whatever is not as usual. `facts`: as text; images, dataset, weights, seed, upsampler, sampling.*.
    """
    curves: Curves = {}
    for images, facts, metrics in results:
        unusual = [
            f"{key.removeprefix(SAMPLING)}={facts[key]}" for key in USUAL if facts.get(key, USUAL[key]) != USUAL[key]
        ]
        about = ", ".join([f"{facts.get('images', '?')} of {facts.get('dataset', '?')[:8]}", *unusual])
        for metric, value in metrics.items():
            curves.setdefault(f"{EVALUATION}{metric} ({about})", {})[images] = value
    return curves
