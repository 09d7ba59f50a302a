"""MFU of a run: the share of its GPUs' peak that the model's counted arithmetic reaches, images per second given.

Always holds: counting happens once, on a thread of the driver, so no rank waits for it, and once a step is done, so no
refusal does; nothing that is computed twice counts, as in `glidepath plan`; without GPUs, or of a kind whose peak is
not known, there is none. Called by cluster/tracking.py.
"""

from __future__ import annotations

import threading

from cluster.launch import Event
from trainer.config import TrainConfig
from trainer.plan.hardware import GPUS
from trainer.plan.planning import training_flops_per_image

LEAST_S = 5.0


class Utilisation:
    """Of one run, from its events. `workers`: GPUs of the attempt that runs."""

    def __init__(self, config: TrainConfig) -> None:
        self.workers = config.launcher.workers
        self._config = config
        self._flops_per_image: int | None = None
        self._images = self._seconds = 0.0  # of steps since the last figure
        self._counting: threading.Thread | None = None

    def _count(self) -> None:
        self._flops_per_image = training_flops_per_image(self._config)

    def stepped(self, event: Event) -> None:
        """A progress event."""
        if self._counting is None and self._config.launcher.device == "cuda":
            # No daemon: an interpreter that ends under torch's backward threads aborts, so it waits.
            self._counting = threading.Thread(target=self._count, name="counting-flops", daemon=False)
            self._counting.start()
        self._images += self._config.batch
        self._seconds += event["time/step_s"]

    def figure(self, gpu: str | None) -> float | None:
        """MFU of the steps since the last figure, on GPUs of this name; None where it cannot be told, or they took less
        than LEAST_S."""
        peak = peak_of(gpu, self._config) if gpu else None
        images, seconds = self._images, self._seconds
        if peak is None or self._flops_per_image is None or seconds < LEAST_S:
            return None
        self._images = self._seconds = 0.0
        return images / seconds * self._flops_per_image / (peak * self.workers)


def peak_of(gpu: str, config: TrainConfig) -> float | None:
    """FLOP/s of a GPU by the name that its driver gives it, such as NVIDIA H200; None for one that is not known."""
    known = (kind for name, kind in GPUS.items() if name.partition("-")[0] in gpu.lower())
    found = next(known, None)
    return found.peak(config.precision) if found else None
