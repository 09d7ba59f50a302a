"""Tracker: the seam between the loop and whatever keeps curves. Only rank 0 holds a real one.

Always holds: each update's value of each metric counts once, however often a run is killed: what a tracker took and did
not deliver yet (`undelivered`) goes into each checkpoint, and what was left at its end (`close`) into the run's store;
a run that goes on hands both back first (`replay`), the latter before the former.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

# A point or an event as JSON: {"images", "ms", "values": {name: value}} or {"images", "ms", "event", "text"}, where
# "ms" is when it was logged (UTC milliseconds since 1970).
Record = dict[str, Any]

HELDOUT = "heldout/"  # metrics whose names begin so are of the held-out evaluation: not one per update


class Tracker(Protocol):
    """Curves over images, events, pictures. A tracker never raises into the loop once it is open."""

    def log(self, images: int, values: Mapping[str, float]) -> None:
        """One point per name, after `images` images."""

    def event(self, images: int, kind: str, text: str) -> None:
        """Something that happened: restart, skip, fallback, grid saved."""

    def picture(self, images: int, key: str, png: bytes) -> None:
        """A picture that lies under `key` of the run's store as well."""

    def undelivered(self) -> list[Record]:
        """What was logged and is not known to have arrived, oldest first."""

    def replay(self, records: Sequence[Record]) -> None:
        """Take back what an earlier attempt could not deliver. Before anything else is logged."""

    def close(self) -> list[Record] | None:
        """Deliver what is left, within a deadline; returns what could not be. None: a newer attempt speaks now."""


class NoTracker:
    """For ranks other than 0."""

    def log(self, images: int, values: Mapping[str, float]) -> None:
        pass

    def event(self, images: int, kind: str, text: str) -> None:
        pass

    def picture(self, images: int, key: str, png: bytes) -> None:
        pass

    def undelivered(self) -> list[Record]:
        return []

    def replay(self, records: Sequence[Record]) -> None:
        pass

    def close(self) -> list[Record] | None:
        return []
