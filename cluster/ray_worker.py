"""What the Ray launcher runs elsewhere: a worker, which waits warm until it takes a rank, and the mailbox of a run.

Always holds: training runs on the main thread of its actor's process, as torch.distributed and the collectives of a
group want it; a worker takes one rank, once; nothing here holds resources of Ray's, the placement group does; torch is
imported in `warm`, so that importing this file costs a driver nothing. Called by the Ray launcher.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle

from cluster.environment import NodeFacts, node_environment, rank_environment
from cluster.imports import quick_imports
from cluster.launch import Event
from data_pipeline.errors import UserError

log = logging.getLogger(__name__)

END_OF_FORMER_S = 30.0  # killed processes go at once, unless the kernel holds them


@dataclass(frozen=True)
class Rank:
    """A rank of an attempt. `gang`: the launcher's count of its gangs; `former`: processes of the gang before, on this
    node, whose memory and GPUs it needs."""

    rank: int
    world_size: int
    local_rank: int
    gang: int
    rendezvous: str
    former: Sequence[int]


class Worker:
    """One rank of an attempt, or one that may yet become it. Ray calls the methods of such an actor one after another
    on its main thread."""

    def warm(self, facts: NodeFacts, values: dict[str, Any]) -> dict[str, Any]:
        """Do all that needs no rank. `values`: the resolved configuration. Returns where this is: pid, node id, host,
        whether on the main thread, bytes of memory there."""
        host = ray.util.get_node_ip_address()
        facts = dataclasses.replace(facts, interface=_interface_of(host))
        os.environ.update(node_environment(facts, os.environ))  # before the imports, of which some look at the GPUs
        with quick_imports():
            from cluster.out_of_memory import machine_bytes
            from trainer.run import warm

            warm(values)
        return {
            "pid": os.getpid(),
            "host": host,
            "machine_bytes": machine_bytes(),
            "on_main_thread": threading.current_thread() is threading.main_thread(),
        }

    def answer(self) -> None:
        """Nothing: to see that it lives. What `warm` returned stays with the driver when this process dies."""

    def rendezvous(self) -> str:
        """Where the ranks meet: a port of this node that is free now. One that is taken before rank 0 listens there
        fails the attempt, and the next one has another."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def train(self, place: Rank, spec: dict[str, Any], mailbox: ActorHandle[Any]) -> Event:
        """Train to the end. Returns {"event": "ended"}, "error" for a UserError, or "raised" (out_of_memory.py)."""
        level = logging.INFO if place.rank == 0 else logging.WARNING
        format_ = f"%(asctime)s rank {place.rank}: %(message)s"
        logging.basicConfig(level=level, format=format_, datefmt="%H:%M:%S", force=True)
        os.environ.update(rank_environment(place.rank, place.world_size, place.local_rank))
        sent: list[Any] = []

        def report(event: Event) -> None:
            sent[:] = [mailbox.put.remote(place.gang, event)]  # not waited for: no step is slower for it

        try:
            _await_end(place.former)
            _train(place, spec, report)
        except UserError as error:
            return {"event": "error", "fields": error.fields()}
        except Exception as error:
            from cluster.out_of_memory import raised_event

            log.exception("ends")
            return raised_event(place.rank, error)
        ray.get(sent)  # the driver looks into the mailbox after this call has ended: then all must be there
        return {"event": "ended"}


def _train(place: Rank, spec: dict[str, Any], report: Callable[[Event], None]) -> None:
    from cluster.rank import train_rank

    train_rank(place.rank, place.world_size, place.rendezvous, spec, report)


class Mailbox:
    """Events on their way to the driver, with the time of their arrival. Calls of one sender arrive in order."""

    def __init__(self) -> None:
        self.events: list[tuple[int, Event]] = []

    def put(self, gang: int, event: Event) -> None:
        self.events.append((gang, {"at": time.time()} | event))

    def take(self, gang: int) -> list[Event]:
        """Those of this gang; what others sent is dropped."""
        events, self.events = self.events, []
        return [event for sender, event in events if sender == gang]


def gpu_ids() -> list[str]:
    """Of the bundle that this runs in."""
    return [str(number) for number in ray.get_runtime_context().get_accelerator_ids().get("GPU", [])]


def _interface_of(host: str) -> str | None:
    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            return interface
    return None


def _await_end(pids: Sequence[int]) -> None:
    """Raises RuntimeError naming a process that does not end. Killed here as well, since Ray gives one that is stopped
    five seconds; a process that has the number now but is younger than this one is another."""
    running, began = [], psutil.Process().create_time()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() < began:
                process.kill()
                running.append(process)
    _, left = psutil.wait_procs(running, END_OF_FORMER_S)
    if left:
        raise RuntimeError(f"process {left[0].pid} of the attempt before outlives SIGKILL by {END_OF_FORMER_S:.0f} s")
