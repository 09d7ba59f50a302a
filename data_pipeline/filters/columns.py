"""Columns: thresholds on the numbers that an input states beside its pictures, such as scores of watermark or safety.

Always holds: a number that is absent, null or not a number is below no threshold and above none: its record is dropped
under a reason of its own, for a threshold that is not applied must be seen.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from data_pipeline.filters.thresholds import Facts, Limit, Thresholds


def column_limits(facts: Facts, limits: Thresholds) -> str | None:
    return reason_of(facts.columns, limits.columns)


def reason_of(columns: Mapping[str, float], limits: Collection[Limit]) -> str | None:
    """The first limit that a record's numbers do not meet; both ends are kept. The judge pass uses it for scorers'."""
    for name, least, greatest in limits:
        value = columns.get(name)
        if value is None or math.isnan(value):
            return f"column_missing_{name}"
        if least is not None and value < least:
            return f"column_low_{name}"
        if greatest is not None and value > greatest:
            return f"column_high_{name}"
    return None


def absent_columns(seen: Collection[str], limits: Thresholds) -> list[str]:
    """The columns that have a threshold and that no record of a unit has."""
    return [name for name, _, _ in limits.columns if name not in seen]
