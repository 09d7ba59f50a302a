"""Pixels: single-colour pictures and icon-like ones, seen in the decoded picture at 64 px.

Always holds: a verdict depends on the 64 px picture and the thresholds alone.

Both figures were set apart on 2,120 photographs and 380 emoji on plain grounds (benchmarks/results/filters.json):

| figure                                                  | photographs  | emoji as PNG  | dropped        |
|---------------------------------------------------------|--------------|---------------|----------------|
| deviation: of the channel that varies most, of 0..255   | 18.8 to 109  | 28.9 to 102   | less than 5    |
| flat: share of equal pairs of neighbours, right and down | 0.00 to 0.62 | 0.75 to 0.97 | more than 0.70 |
"""

from __future__ import annotations

import cv2
import numpy as np

from data_pipeline.filters.thresholds import Thresholds
from data_pipeline.images import Pixels


def deviation(image64: Pixels) -> float:
    """Standard deviation of the channel of [64, 64, 3] that varies most; 0 for a single colour."""
    return float(cv2.meanStdDev(image64)[1].max())


def flat_share(image64: Pixels) -> float:
    """Share of the pairs of horizontal and vertical neighbours of [64, 64, 3] that have exactly the same colour."""
    colours = cv2.cvtColor(image64, cv2.COLOR_RGB2RGBA).view(np.uint32)[:, :, 0]  # one number each: a tenth of the time
    right, down = colours[:, 1:] == colours[:, :-1], colours[1:] == colours[:-1]
    return float(np.count_nonzero(right) + np.count_nonzero(down)) / (right.size + down.size)


def single_colour(image64: Pixels, limits: Thresholds) -> str | None:
    return "image_single_colour" if limits.min_deviation and deviation(image64) < limits.min_deviation else None


def icon(image64: Pixels, limits: Thresholds) -> str | None:
    return "image_flat" if limits.max_flat is not None and flat_share(image64) > limits.max_flat else None
