"""Connecting this process to a Ray cluster, and what such a cluster has.

Always holds: the caller's handler of SIGTERM stays in place (ray.init() replaces it by one that ends the process at
once, without a save). Called by jobs, and by `train` and `corpus build` with kind ray.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from cluster.signals import Interrupted
from data_pipeline.errors import UserError


@contextmanager
def connected() -> Iterator[None]:
    """Connected to the cluster of $RAY_ADDRESS or of this machine. Raises UserError where there is none."""
    if ray.is_initialized():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address="auto", log_to_driver=True, logging_level=logging.WARNING)
    except SystemExit as left:
        if left.code != signal.SIGTERM:
            raise
        raise Interrupted from None  # its handler heard the signal, not ours; nothing has begun yet
    except ConnectionError:
        raise UserError(
            "Ray cluster", "one that runs here, or at RAY_ADDRESS", "none", "start one with `glidepath up`, or `submit`"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


def resources(needed: tuple[str, ...] = ("CPU", "GPU")) -> str:
    """What the cluster has in all, for people: "2 CPU, 0 GPU on 1 node"."""
    has = ray.cluster_resources()
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    amounts = ", ".join(f"{has.get(name, 0):g} {name}" for name in needed)
    return f"{amounts} on {nodes} node{'s' if nodes != 1 else ''}"
