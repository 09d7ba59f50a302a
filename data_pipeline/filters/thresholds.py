"""What filters look at and what they compare it with: the facts of one captioned picture, and the thresholds.

Always holds: plain frozen data, all decided; None means no limit. Read by every filter and by the judge pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Raise it when a filter can judge the same facts and thresholds otherwise than before: it stands in the identity of
# staged rows and of datasets, as a field of Thresholds.
FILTER_VERSION = "filters-2"

# (column, least value, greatest value) of a record that is kept
Limit = tuple[str, float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """As in FilterSettings; what the score pass needs to know. Nothing else may stand here: a change scores again."""

    min_side: int | None = None
    max_aspect: float | None = None
    min_file_bytes: int | None = None
    max_file_bytes: int | None = None
    min_caption: int | None = None
    max_caption: int | None = None
    min_words: int | None = None
    max_words: int | None = None
    drop_boilerplate: bool = False
    languages: tuple[str, ...] | None = None
    language_confidence: float = 0.6
    language_from: int = 20
    min_deviation: float | None = None
    max_flat: float | None = None
    columns: tuple[Limit, ...] = ()
    version: str = FILTER_VERSION


@dataclass(frozen=True)
class Judged:
    """The thresholds of the judge pass: they need all units, or what scorers add. No change of them scores again.

    `max_caption_repeats`: most pictures that may have the same caption; `columns`: of scorers.
    """

    max_caption_repeats: int | None = None
    columns: tuple[Limit, ...] = ()


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
