"""Group: the ranks of a run and the few collectives that Glidepath itself needs of them.

Always holds: called on the main thread only, by every rank in the same order; a rank that waits for others in one is in
the watch's section `reduce`; with one rank it needs no process group.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import zlib
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import UserError
from trainer.watch import Watch


class Group:
    """This rank's place among `world_size` ranks, the device it computes on, and where its main thread is (`watch`).
    `open_group` makes one."""

    def __init__(self, rank: int = 0, world_size: int = 1, device: str = "cpu", watch: Watch | None = None) -> None:
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.watch = watch or Watch()
        if self.device.type == "cuda":
            self.watch.on_gpu(self.device)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over ranks, in place."""
        if self.world_size > 1:
            with self.watch.section("reduce"):
                dist.all_reduce(tensor)
        return tensor

    def all_agree(self, good: bool) -> bool:
        """True on every rank if it is true on every rank."""
        return int(self.sum_(torch.tensor(0 if good else 1))) == 0

    def ranks_here(self) -> int:
        """How many ranks run on this machine, this one included."""
        hosts = torch.zeros(self.world_size, dtype=torch.int64)
        hosts[self.rank] = mine = zlib.crc32(socket.gethostname().encode())
        return int((self.sum_(hosts) == mine).sum())

    def broadcast(self, document: Any) -> Any:
        """Rank 0's JSON document, on every rank. JSON, not pickle: nothing that arrives is ever executed."""
        if self.world_size == 1:
            return document
        data = json.dumps(document).encode() if self.rank == 0 else b""
        size = torch.tensor(len(data))
        with self.watch.section("reduce"):
            dist.broadcast(size, 0)
            payload = torch.zeros(int(size), dtype=torch.uint8)
            if self.rank == 0:
                payload.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(payload, 0)
        return json.loads(bytes(payload.numpy()))

    def ensure_process_group(self) -> None:
        """For libraries that want torch's process group of a single rank as well."""
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def open_group(
    rank: int,
    world_size: int,
    rendezvous: str,
    device: Literal["cpu", "cuda"] = "cpu",
    timeout_s: float = 3600.0,
    watch: Watch | None = None,
) -> Group:
    """Meet the other ranks at `rendezvous`, a URI that torch.distributed takes, such as file:///…

    Tensors in this machine's memory go by gloo, those on a GPU by NCCL; `cuda` is the GPU number LOCAL_RANK.
    `timeout_s` bounds a collective. It must outlast what rank 0 does alone, such as drawing a grid; a rank that dies is
    noticed by the launcher long before. Raises UserError where torch sees no such GPU, before anybody is met.
    """
    number = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and number >= (seen := torch.cuda.device_count()):
        expected, next_step = f"a GPU number {number} for rank {rank}", "set launcher.device=cpu, or fewer workers"
        raise UserError("launcher.device cuda", expected, f"{seen} that torch sees", next_step)
    if world_size > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    if device == "cpu":
        return Group(rank, world_size, watch=watch)
    torch.cuda.set_device(number)
    return Group(rank, world_size, f"cuda:{number}", watch)
