"""What a step is measured by: time per section, images per second, memory.

Always holds: times are of this rank, from one step boundary to the next (trainer/watch.py); nothing here decides
anything. Called by the loop.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

STATM = Path("/proc/self/statm")  # Linux; elsewhere there is no such figure


def memory() -> dict[str, float]:
    """Bytes that this process holds now; on GPUs also the most that tensors took."""
    figures = {}
    if STATM.exists():
        figures["memory/rss_bytes"] = float(int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    if torch.cuda.is_available():
        figures["memory/cuda_peak_bytes"] = float(torch.cuda.max_memory_allocated())
    return figures


def step_figures(seconds: Mapping[str, float], images: int) -> dict[str, float]:
    """Figures of a step on so many images, from what `Watch.end_step` returned."""
    return {f"time/{name}_s": value for name, value in seconds.items()} | {"images_per_s": images / seconds["step"]}
