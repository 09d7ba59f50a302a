"""What a step is measured by: time per section, images per second, share of waiting.

Always holds: times are of this rank's wall clock, from one step boundary to the next; nothing here decides anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepTimer:
    """Seconds per section of the current step. `clock` in seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._begun = clock()
        self._sections: dict[str, float] = {}

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        begun = self._clock()
        try:
            yield
        finally:
            self._sections[name] = self._sections.get(name, 0.0) + self._clock() - begun

    def finish(self, images: int) -> dict[str, float]:
        """Figures of the step that ends now, and a new step begins."""
        now = self._clock()
        step_s = max(now - self._begun, 1e-9)
        figures = {f"time/{name}_s": seconds for name, seconds in self._sections.items()}
        figures.update({"time/step_s": step_s, "images_per_s": images / step_s})
        self._begun, self._sections = now, {}
        return figures
