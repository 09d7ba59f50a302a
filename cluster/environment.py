"""The environment of a worker process, from where it runs: what torch.distributed, NCCL, gloo and OpenMP read.

Always holds: pure functions over plain facts; what a user has set for NCCL, gloo and torch wins, and what tells a rank
who it is does not come from outside. Called by the launchers' workers, before anything touches a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MOST_THREADS = 16  # OpenMP threads of a rank on a GPU node: an update in host memory gains nothing from more
USERS_OWN = ("NCCL_", "GLOO_", "TORCH_NCCL_", "DS_ACCELERATOR")

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class NodeFacts:
    """A node as a run uses it. `threads`: OpenMP's, of each rank; `gpu_ids`: the GPUs of all ranks there, in the order
    of their local ranks, none when the run has the machine to itself; `interface`: the network interface with the
    node's address, None when none has it."""

    device: Device
    threads: int = 1
    gpu_ids: tuple[str, ...] = ()
    interface: str | None = None


def node_environment(facts: NodeFacts, users: Mapping[str, str]) -> dict[str, str]:
    """What all ranks of a node have in common. `users`: the environment so far.

    All GPUs of the run on the node are visible to each of its ranks, which use the one of their LOCAL_RANK: NCCL and
    DeepSpeed are made for that, and a standby can be given it before it has a rank.
    """
    # Else DeepSpeed's import looks for a GPU, and with that fixes which ones this process sees.
    wanted: dict[str, str] = {"DS_ACCELERATOR": facts.device}
    if facts.interface:
        # Left alone, gloo takes the address of the host's name, which may be one that others do not reach.
        wanted |= {"GLOO_SOCKET_IFNAME": facts.interface, "NCCL_SOCKET_IFNAME": facts.interface}
    if facts.device == "cuda":
        wanted["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "3"  # a collective that failed ends its process
    own = {name: value for name, value in wanted.items() if not (name.startswith(USERS_OWN) and name in users)}
    own["OMP_NUM_THREADS"] = str(facts.threads)
    if facts.gpu_ids:
        own["CUDA_VISIBLE_DEVICES"] = ",".join(facts.gpu_ids)
    return own


def rank_environment(rank: int, world_size: int, local_rank: int) -> dict[str, str]:
    """Who a rank is."""
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(local_rank)}


def threads_of_rank(device: Device, cpus: int, ranks: int) -> int:
    """OpenMP threads of each of `ranks` ranks of a node with `cpus` CPUs. One where they train on CPU: two threads in
    each of two workers on two cores are several times slower than one."""
    return max(1, min(cpus // ranks, MOST_THREADS)) if device == "cuda" else 1
