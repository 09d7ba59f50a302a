"""Tracker: the seam between the loop and whatever keeps curves. Only rank 0 holds a real one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Tracker(Protocol):
    """Curves over images, and events. A tracker never raises into the loop once it is open."""

    def log(self, images: int, values: Mapping[str, float]) -> None:
        """One point per name, after `images` images."""

    def event(self, images: int, kind: str, text: str) -> None:
        """Something that happened: restart, skip, fallback, grid saved."""


class NoTracker:
    """For ranks other than 0."""

    def log(self, images: int, values: Mapping[str, float]) -> None:
        pass

    def event(self, images: int, kind: str, text: str) -> None:
        pass
