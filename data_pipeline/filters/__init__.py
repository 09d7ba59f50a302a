"""Filters: which intact records a corpus leaves out, and the reason that is counted for each.

Always holds: a filter is a pure function of a record's facts and the thresholds, and gives None (keep) or its reason; a
record is counted under the first reason in the order of FILTERS, cheap ones first; what is drawn from pixels comes
after decoding. Called by the score pass. To add a filter: a threshold in Thresholds and FilterSettings, a function in
the file of its kind, and a line in FILTERS or PIXEL_FILTERS. presets.py has the table of presets.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from data_pipeline.config import Settings
from data_pipeline.filters.caption import boilerplate, caption_length, caption_words
from data_pipeline.filters.columns import absent_columns, column_limits, reason_of
from data_pipeline.filters.language import known_languages, language
from data_pipeline.filters.pixels import icon, single_colour
from data_pipeline.filters.presets import PRESETS
from data_pipeline.filters.size import aspect, file_bytes, side
from data_pipeline.filters.thresholds import FILTER_VERSION, Facts, Judged, Limit, Thresholds
from data_pipeline.images import Pixels

__all__ = [
    "FILTERS",
    "FILTER_VERSION",
    "PIXEL_FILTERS",
    "PRESETS",
    "Facts",
    "FilterSettings",
    "Judged",
    "Limit",
    "Range",
    "Thresholds",
    "absent_columns",
    "reason_of",
    "reason_to_drop",
    "reason_to_drop_pixels",
]


class Range(Settings):
    """What a column's number may be; both ends are kept."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Range:
        ends = [end for end in (self.min, self.max) if end is not None]
        if not ends or not all(map(math.isfinite, ends)) or ends != sorted(ends):
            raise ValueError(f"min, max or both, in this order, found min {self.min}, max {self.max}")
        return self


class FilterSettings(Settings):
    """A preset, and thresholds that replace those of the preset; an explicit null means no limit."""

    preset: str = "basic"
    min_side: int | None = Field(default=None, ge=1)  # pixels
    max_aspect: float | None = Field(default=None, ge=1)  # longer side / shorter side
    min_file_bytes: int | None = Field(default=None, ge=0)
    max_file_bytes: int | None = Field(default=None, ge=0)
    min_caption: int | None = Field(default=None, ge=0)  # characters after normalisation
    max_caption: int | None = Field(default=None, ge=0)
    min_words: int | None = Field(default=None, ge=0)
    max_words: int | None = Field(default=None, ge=0)
    drop_boilerplate: bool = False  # stock phrases, addresses and file names in place of a caption
    languages: tuple[str, ...] | None = None  # ISO 639 codes; null: any
    language_confidence: float = Field(default=0.6, ge=0, le=1)  # least probability of another language to drop for
    language_from: int = Field(default=20, ge=0)  # characters; shorter captions are judged by their script alone
    min_deviation: float | None = Field(default=None, ge=0, le=255)  # of a picture's colours; drops single-colour ones
    max_flat: float | None = Field(default=None, ge=0, le=1)  # share of equal neighbours; drops icons and drawings
    columns: dict[str, Range] = Field(default_factory=dict)  # of numbers that the input states, such as pwatermark
    scores: dict[str, Range] = Field(default_factory=dict)  # of numbers that `scorers` compute, such as clip_similarity
    max_caption_repeats: int | None = Field(default=None, ge=1)  # pictures that share a caption; more: all go

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, preset: str) -> str:
        if preset not in PRESETS:
            raise ValueError(f"one of {', '.join(PRESETS)}{_nearest(preset, PRESETS)}, found {preset!r}")
        return preset

    @field_validator("languages")
    @classmethod
    def _known_languages(cls, languages: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if languages is None:
            return None
        known = known_languages()
        for code in languages:
            if code not in known:
                raise ValueError(f"ISO 639 codes such as en, de, zh{_nearest(code, known)}, found {code!r}")
        if not languages:
            raise ValueError("at least one ISO 639 code, or null for any language, found none")
        return tuple(sorted(set(languages)))

    def resolved(self) -> Thresholds:
        """The thresholds in force in the score pass; these, not the preset's name, stand in the dataset's identity."""
        chosen = self._chosen()
        about_judging = ("scores", "max_caption_repeats")
        own = {name: value for name, value in chosen.items() if name not in about_judging}
        return Thresholds(**own | {"columns": _limits(self.columns)})

    def judged(self) -> Judged:
        """The thresholds in force in the judge pass."""
        return Judged(self._chosen().get("max_caption_repeats"), _limits(self.scores))

    def _chosen(self) -> dict[str, Any]:
        return PRESETS[self.preset] | {name: getattr(self, name) for name in self.model_fields_set - {"preset"}}


def _limits(ranges: Mapping[str, Range]) -> tuple[Limit, ...]:
    return tuple((name, range_.min, range_.max) for name, range_ in sorted(ranges.items()))


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f" (nearest: {near[0]})" if near else ""


FILTERS: tuple[Callable[[Facts, Thresholds], str | None], ...] = (
    caption_length,
    side,
    aspect,
    file_bytes,
    caption_words,
    boilerplate,
    column_limits,
    language,  # last: some 0.15 ms, ten times all others together
)
PIXEL_FILTERS: tuple[Callable[[Pixels, Thresholds], str | None], ...] = (single_colour, icon)


def reason_to_drop(facts: Facts, limits: Thresholds) -> str | None:
    """The first filter's reason, or None to keep the record."""
    return next((reason for filter_ in FILTERS if (reason := filter_(facts, limits)) is not None), None)


def reason_to_drop_pixels(image64: Pixels, limits: Thresholds) -> str | None:
    """As `reason_to_drop`, of what only the decoded picture shows. `image64`: RGB uint8 [64, 64, 3]."""
    return next((reason for filter_ in PIXEL_FILTERS if (reason := filter_(image64, limits)) is not None), None)
