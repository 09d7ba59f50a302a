"""Filters: which intact records a corpus leaves out, and the reason that is counted for each.

Always holds: a filter is a pure function of a record's facts and the thresholds, and gives None (keep) or its reason; a
record is counted under the first reason in the order of FILTERS. Called by the score pass. To add a filter, add a
threshold to FilterSettings and the presets, a function, and a line to FILTERS.

| preset | shorter side     | longer / shorter side | caption, characters |
|--------|------------------|-----------------------|---------------------|
| none   | any              | any                   | any                 |
| basic  | at least 64 px   | at most 2             | 3 to 1000           |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from data_pipeline.config import Settings
from data_pipeline.images import Pixels

PRESETS: dict[str, dict[str, float | None]] = {
    "none": {"min_side": 1, "max_aspect": None, "min_caption": 0, "max_caption": None},
    "basic": {"min_side": 64, "max_aspect": 2.0, "min_caption": 3, "max_caption": 1000},
}


class FilterSettings(Settings):
    """A preset, and thresholds that replace those of the preset; an explicit null means no limit."""

    preset: Literal["none", "basic"] = "basic"
    min_side: int | None = Field(default=None, ge=1)  # pixels
    max_aspect: float | None = Field(default=None, ge=1)  # longer side / shorter side
    min_caption: int | None = Field(default=None, ge=0)  # characters after normalisation
    max_caption: int | None = Field(default=None, ge=0)

    def resolved(self) -> Thresholds:
        """The thresholds in force; these, not the preset's name, stand in the dataset's identity."""
        chosen: dict[str, Any] = {name: getattr(self, name) for name in self.model_fields_set - {"preset"}}
        return Thresholds(**(PRESETS[self.preset] | chosen))


@dataclass(frozen=True)
class Thresholds:
    """As in FilterSettings, all decided; None means no limit."""

    min_side: int | None
    max_aspect: float | None
    min_caption: int | None
    max_caption: int | None


@dataclass(frozen=True)
class Facts:
    """What filters may look at before the picture is decoded.

    `width` and `height` in pixels, as the header states them; `caption` normalised; `columns` the input's own numbers.
    """

    width: int
    height: int
    file_bytes: int
    caption: str
    columns: Mapping[str, float] = field(default_factory=dict)


def caption_length(facts: Facts, limits: Thresholds) -> str | None:
    if len(facts.caption) < (limits.min_caption or 0):
        return "caption_too_short"
    if limits.max_caption is not None and len(facts.caption) > limits.max_caption:
        return "caption_too_long"
    return None


def side(facts: Facts, limits: Thresholds) -> str | None:
    return "image_too_small" if min(facts.width, facts.height) < (limits.min_side or 0) else None


def aspect(facts: Facts, limits: Thresholds) -> str | None:
    longer, shorter = max(facts.width, facts.height), min(facts.width, facts.height)
    # A product, not a quotient: a header may state a side of 0.
    return "image_aspect" if limits.max_aspect is not None and longer > limits.max_aspect * shorter else None


FILTERS: tuple[Callable[[Facts, Thresholds], str | None], ...] = (caption_length, side, aspect)


def reason_to_drop(facts: Facts, limits: Thresholds) -> str | None:
    """The first filter's reason, or None to keep the record."""
    return next((reason for filter_ in FILTERS if (reason := filter_(facts, limits)) is not None), None)


def reason_to_drop_pixels(image64: Pixels, limits: Thresholds) -> str | None:
    """As `reason_to_drop`, of what only the decoded picture shows. `image64`: RGB uint8 [64, 64, 3]."""
    return None
