"""Snapshots: a copy of this rank's share of the state in host memory, which is taken once and reused from save to save.

Always holds: it takes as many bytes as the share, and there is one; so it must not be taken again while somebody still
reads it, which `Saver` sees to. Page-locked where the state is on a GPU: a copy to other memory waits for the GPU
interval by interval and goes through a buffer of the driver's.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from trainer.engine.engine import Interval

log = logging.getLogger(__name__)


class HostMemory:
    """Room for one snapshot."""

    def __init__(self) -> None:
        self._values = torch.empty(0)

    @property
    def bytes(self) -> int:
        return self._values.nbytes

    @torch.no_grad()
    def snapshot(self, view: Iterable[Interval]) -> list[Interval]:
        """A copy of the state that `view` shows now; it holds until the next one is taken."""
        intervals = list(view)
        self.reserve(intervals)
        copies, at = [], 0
        for interval in intervals:
            values = self._values[at : at + len(interval.values)]
            values.copy_(interval.values, non_blocking=True)
            copies.append(Interval(interval.name, interval.kind, interval.offset, values))
            at += len(values)
        if any(interval.values.is_cuda for interval in intervals):
            torch.cuda.current_stream().synchronize()  # the one wait for all copies
        return copies

    def reserve(self, view: Iterable[Interval]) -> None:
        """Take the memory for snapshots of `view`, if it is not taken yet. To be done before the first one: the system
        gives pages at their first use, and locks them, more slowly than a copy goes."""
        intervals = list(view)
        elements = sum(len(interval.values) for interval in intervals)
        if elements != len(self._values):
            self._values = torch.empty(0)  # first gives back what there was
            self._values = torch.zeros(elements).fill_(0)
            if any(interval.values.is_cuda for interval in intervals):
                _lock_pages(self._values)


def _lock_pages(values: Tensor) -> None:
    """As torch.distributed does for its own checkpoints: `pin_memory` would round up to a power of two, 56 GB to 64."""
    cuda = torch.cuda.cudart()
    error = int(cuda.cudaHostRegister(values.data_ptr(), values.nbytes, 1))
    if error:
        log.warning(
            "snapshots: CUDA error %d, so %d bytes are not page-locked and saves stall longer", error, values.nbytes
        )
        return
    # Not at the end of the process, where CUDA may be gone already.
    weakref.finalize(values.untyped_storage(), cuda.cudaHostUnregister, values.data_ptr()).atexit = False
