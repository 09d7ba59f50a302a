"""Images per second from counted FLOPs and an assumed utilisation. Pure; called by `plan`."""

from __future__ import annotations

from trainer.config import Precision
from trainer.plan.hardware import Cluster

SECONDS_PER_DAY = 86_400


def images_per_s(computed_flops_per_image: int, workers: int, precision: Precision, cluster: Cluster) -> float:
    """Of all workers together, when the arithmetic that is done (recomputation included) reaches the cluster's
    utilisation of its peak."""
    return workers * cluster.gpu.peak(precision) * cluster.utilisation / computed_flops_per_image
