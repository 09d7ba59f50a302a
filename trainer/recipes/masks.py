"""Which pixels inpainting is trained to fill in. GLIDE erases "random regions" (section 4.3) and does not say of which
law, so the law is a setting.

Always holds: a mask is a function of the settings and of the sample's draws; 1 where a pixel is known, 0 where it is
erased; something is erased in every mask. Called by the inpainting recipes.
"""

from __future__ import annotations

from typing import Annotated, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from data_pipeline.config import Settings
from data_pipeline.draws import Draws

Fraction = Annotated[float, Field(ge=0, le=1)]
STROKE_POINTS = 6


class MaskSettings(Settings):
    """A union of `regions` shapes, whose size is a fraction of the picture's side."""

    law: Literal["boxes", "strokes", "mixed"] = "mixed"  # rectangles, brush strokes, or one of the two for each picture
    regions: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 4)  # fewest, most
    box_side: tuple[Fraction, Fraction] = (0.2, 0.6)
    stroke_width: tuple[Fraction, Fraction] = (0.08, 0.25)
    everything: Fraction = 0.1  # chance that all is erased: the model goes on learning to draw from the caption alone

    @model_validator(mode="after")
    def _ordered(self) -> MaskSettings:
        for name in ("regions", "box_side", "stroke_width"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} as [smallest, largest], found [{low}, {high}]")
        return self


def random_masks(settings: MaskSettings, side: int, draws: Draws) -> Tensor:
    """float32 [b, 1, side, side] of 0 (erased) and 1 (known), one for each sample of `draws`."""
    masks = np.ones((len(draws.positions), side, side), np.uint8)
    fewest, most = settings.regions
    counts = fewest + (draws.uniform("mask regions") * (most - fewest + 1)).astype(int)
    stroked = {"boxes": 0.0, "strokes": 1.0, "mixed": 0.5}[settings.law]
    strokes = draws.uniform("mask law") < stroked
    for region in range(most):
        draw = _Region(settings, side, draws, f"mask {region}")
        for number, mask in enumerate(masks):
            if region < counts[number]:
                (draw.stroke if strokes[number] else draw.box)(mask, number)
    masks[draws.uniform("mask everything") < settings.everything] = 0
    return torch.from_numpy(masks[:, None].astype(np.float32))


class _Region:
    """One region of every sample's mask, in pixels."""

    def __init__(self, settings: MaskSettings, side: int, draws: Draws, purpose: str) -> None:
        def between(limits: tuple[float, float], name: str) -> NDArray[np.float64]:
            low, high = limits
            return low + (high - low) * draws.uniform(f"{purpose} {name}")

        self.side = side
        self.extent = np.stack([between(settings.box_side, name) for name in ("height", "width")], axis=1) * side
        self.place = np.stack([between((0, 1), name) for name in ("top", "left")], axis=1)
        self.stroke_width = between(settings.stroke_width, "stroke") * side
        turns = [between((-1, 1), f"turn {point}") for point in range(STROKE_POINTS)]
        self.angles = np.cumsum(np.stack(turns, axis=1), axis=1) * np.pi / 2

    def box(self, mask: NDArray[np.uint8], number: int) -> None:
        extent = np.maximum(self.extent[number].round().astype(int), 1)
        top, left = (self.place[number] * (self.side - extent + 1)).astype(int)
        mask[top : top + extent[0], left : left + extent[1]] = 0

    def stroke(self, mask: NDArray[np.uint8], number: int) -> None:
        """A brush that walks `STROKE_POINTS` steps of a fifth of the side, turning at each."""
        steps = np.stack([np.sin(self.angles[number]), np.cos(self.angles[number])], axis=1) * self.side / 5
        points = self.place[number] * (self.side - 1) + np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
        corners = points[:, ::-1].round().astype(np.int32)[:, None]  # OpenCV: x first
        cv2.polylines(mask, [corners], False, 0, max(int(self.stroke_width[number].round()), 1))
