"""Size: pictures too small or too elongated to learn from, and files too small to hold one or too large to be one.

Always holds: width and height are as the header states them, so that nothing is decoded; turning a picture on its side
changes no verdict.
"""

from __future__ import annotations

from data_pipeline.filters.thresholds import Facts, Thresholds


def side(facts: Facts, limits: Thresholds) -> str | None:
    return "image_too_small" if min(facts.width, facts.height) < (limits.min_side or 0) else None


def aspect(facts: Facts, limits: Thresholds) -> str | None:
    longer, shorter = max(facts.width, facts.height), min(facts.width, facts.height)
    # A product, not a quotient: a header may state a side of 0.
    return "image_aspect" if limits.max_aspect is not None and longer > limits.max_aspect * shorter else None


def file_bytes(facts: Facts, limits: Thresholds) -> str | None:
    if facts.file_bytes < (limits.min_file_bytes or 0):
        return "file_too_small"
    if limits.max_file_bytes is not None and facts.file_bytes > limits.max_file_bytes:
        return "file_too_large"
    return None
