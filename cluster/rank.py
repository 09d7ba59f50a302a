"""One rank of an attempt, from the rendezvous to its end, in the process of a worker of either launcher.

Always holds: imports torch, so a worker imports it late. Called by worker.py and ray_worker.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from cluster.launch import Event
from trainer.engine.group import open_group
from trainer.run import train
from trainer.watch import watched


def train_rank(
    rank: int, world_size: int, rendezvous: str, spec: dict[str, Any], report: Callable[[Event], None]
) -> None:
    """`spec`: what trainer.run.train takes besides. Reports "met" once all ranks are there (rank 0), then as that does.
    Raises what it raises."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    values = spec["values"]
    with watched(values, rank, report) as watch:
        group = open_group(rank, world_size, rendezvous, values["launcher"]["device"], watch=watch)
        if rank == 0:
            report({"event": "met"})
        train(group=group, report=report, **spec)
        group.close()
