"""What a step is measured by: time per section, images per second, memory.

Always holds: times are of this rank, from one step boundary to the next (trainer/watch.py); nothing here decides
anything. Called by the loop.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache

import torch

STATM = "/proc/self/statm"  # Linux; elsewhere there is no such figure
STATM_BYTES = 128  # more than its one line has


def memory() -> dict[str, float]:
    """Bytes that this process holds now; on GPUs also the most that tensors took."""
    figures = {}
    if (statm := _open_statm(os.getpid())) is not None:
        pages = int(os.pread(statm, STATM_BYTES, 0).split()[1])
        figures["memory/rss_bytes"] = float(pages * os.sysconf("SC_PAGE_SIZE"))
    if _on_gpu():
        figures["memory/cuda_peak_bytes"] = float(torch.cuda.max_memory_allocated())
    return figures


@cache
def _open_statm(pid: int) -> int | None:
    """Kept open, since opening takes most of a look's time, and one is taken at every step. A fork has its own."""
    return os.open(STATM, os.O_RDONLY) if os.path.exists(STATM) else None


@cache
def _on_gpu() -> bool:
    return torch.cuda.is_available()


def step_figures(seconds: Mapping[str, float], images: int) -> dict[str, float]:
    """Figures of a step on so many images, from what `Watch.end_step` returned."""
    return {f"time/{name}_s": value for name, value in seconds.items()} | {"images_per_s": images / seconds["step"]}
