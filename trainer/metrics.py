"""What a step is measured by: time per section, images per second, share of waiting, memory.

Always holds: times are of this rank's wall clock, from one step boundary to the next; nothing here decides anything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATM = Path("/proc/self/statm")  # Linux; elsewhere there is no such figure


SECTIONS = ("data", "update", "save")  # reported for each step, so that each has a point per update


def memory() -> dict[str, float]:
    """Bytes that this process holds now; on GPUs also the most that tensors took."""
    figures = {}
    if STATM.exists():
        figures["memory/rss_bytes"] = float(int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    if torch.cuda.is_available():
        figures["memory/cuda_peak_bytes"] = float(torch.cuda.max_memory_allocated())
    return figures


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
        sections = dict.fromkeys(SECTIONS, 0.0) | self._sections
        figures = {f"time/{name}_s": seconds for name, seconds in sections.items()}
        figures.update({"time/step_s": step_s, "images_per_s": images / step_s})
        self._begun, self._sections = now, {}
        return figures
