"""The Ray launcher: one actor per rank in a placement group, watched by the driver of the job.

Always holds: training runs on the main thread of its actor's process, as torch.distributed and the collectives of a
group want it; actors are never restarted one by one - when one ends badly all are ended, since a collective would wait
for it for ever; they belong to the driver, so Ray ends them when it dies. Whether to try again is decided above
(cluster/supervise.py), which calls this in a process that is connected to Ray.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.launch import END_GRACE_S, Event, WorkerDied
from cluster.ray_cluster import resources
from data_pipeline.errors import UserError

log = logging.getLogger(__name__)

PLACEMENT_TIMEOUT_S = 120.0  # workers of the run before may still be ending, or another job may
EVENT_POLL_S = 0.2


def launch_ray(
    spec: dict[str, Any],
    workers: int,
    device: Literal["cpu", "cuda"],
    on_event: Callable[[Event], None],
    placement_timeout_s: float = PLACEMENT_TIMEOUT_S,
) -> Event:
    """Train on `workers` actors of the connected cluster. Returns rank 0's result event.

    `spec`: the arguments of `trainer.run.train` other than group and report. `on_event` is called on this thread for
    every event, first with {"event": "started", "pids": [...], "node_ids": [...]}. Raises UserError as a worker
    reported it or when the cluster has no room, and WorkerDied.
    """
    group = _reserve(workers, device, placement_timeout_s)
    mailbox = _open_mailbox()
    actors = [_start(group, index, workers, device) for index in range(workers)]
    try:
        places = _answers([actor.place.remote() for actor in actors], "to start")
        for rank, place in enumerate(places):
            log.info("rank %d: process %d on node %s", rank, place["pid"], place["host"])
        names = {"pids": "pid", "node_ids": "node_id", "on_main_thread": "on_main_thread"}
        on_event({"event": "started"} | {key: [place[name] for place in places] for key, name in names.items()})
        [rendezvous] = _answers([actors[0].rendezvous.remote()], "an address to meet at")
        runs = [actor.train.remote(spec, rendezvous, mailbox) for actor in actors]
        return _supervise(runs, mailbox, on_event)
    finally:
        for actor in (*actors, mailbox):
            ray.kill(actor)
        remove_placement_group(group)


class Worker:
    """One rank of an attempt. Ray calls the methods of such an actor one after another on its main thread."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        level = logging.INFO if rank == 0 else logging.WARNING
        format_ = f"%(asctime)s rank {rank}: %(message)s"
        logging.basicConfig(level=level, format=format_, datefmt="%H:%M:%S", force=True)

    def place(self) -> dict[str, Any]:
        context = ray.get_runtime_context()
        return {
            "pid": os.getpid(),
            "node_id": context.get_node_id(),
            "host": ray.util.get_node_ip_address(),
            "on_main_thread": threading.current_thread() is threading.main_thread(),
        }

    def rendezvous(self) -> str:
        """Where the ranks meet: a port of this node that is free now. One that is taken before rank 0 listens there
        fails the attempt, and the next one has another."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def train(self, spec: dict[str, Any], rendezvous: str, mailbox: ActorHandle[Any]) -> Event:
        """Train to the end. Returns {"event": "ended"}, or the "error" event of a UserError."""
        os.environ.update(_environment(self.rank, self.world_size))
        import torch

        from trainer.engine.group import open_group
        from trainer.run import train

        torch.set_num_threads(1)
        sent: list[Any] = []

        def report(event: Event) -> None:
            sent[:] = [mailbox.put.remote(event)]  # not waited for: no step is slower for it

        try:
            group = open_group(self.rank, self.world_size, rendezvous, spec["values"]["launcher"]["device"])
            train(group=group, report=report, **spec)
            group.close()
        except UserError as error:
            return {"event": "error", "fields": error.fields()}
        ray.get(sent)  # the driver looks into the mailbox after this call has ended: then all must be there
        return {"event": "ended"}


class Mailbox:
    """Events on their way to the driver. Calls of one sender arrive in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def put(self, event: Event) -> None:
        self.events.append(event)

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events


def _environment(rank: int, world_size: int) -> dict[str, str]:
    """What torch.distributed and DeepSpeed read. LOCAL_RANK is 0: Ray shows each worker its own GPU only."""
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "OMP_NUM_THREADS": "1",
    }
    host = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            # Left alone, gloo takes the address of the host's name, which may be one that others do not reach.
            environment |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    return {name: value for name, value in environment.items() if "IFNAME" not in name or name not in os.environ}


def _reserve(workers: int, device: str, timeout_s: float) -> PlacementGroup:
    bundle = {"CPU": 1.0, "GPU": 1.0} if device == "cuda" else {"CPU": 1.0}
    group = placement_group([bundle] * workers, strategy="PACK")
    if not group.wait(timeout_s):
        remove_placement_group(group)
        asked = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
        raise UserError(
            "Ray cluster",
            f"room for {workers} workers of {asked} each within {timeout_s:.0f} s",
            f"{resources()} in all, less what others use",
            "lower launcher.workers, or wait for other jobs to end",
        )
    return group


def _start(group: PlacementGroup, rank: int, world_size: int, device: str) -> ActorHandle[Any]:
    actor: Any = ray.remote(Worker).options(
        num_cpus=1,
        num_gpus=1 if device == "cuda" else 0,
        max_restarts=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
    )
    return actor.remote(rank, world_size)


def _open_mailbox() -> ActorHandle[Any]:
    """Beside the driver: it must not go with another node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here)
    return actor.remote()


def _answers(calls: Sequence[Any], expected: str) -> list[Any]:
    try:
        return list(ray.get(list(calls)))
    except RayError as error:
        raise WorkerDied("a worker", expected, _one_line(error), "see the job's log") from None


def _supervise(runs: list[Any], mailbox: ActorHandle[Any], on_event: Callable[[Event], None]) -> Event:
    """Hand on events until every worker has ended well, or one has not."""
    result: Event | None = None
    running = list(runs)
    while running:
        done, running = ray.wait(running, num_returns=1, timeout=EVENT_POLL_S)
        [events] = _answers([mailbox.take.remote()], "its events to be kept")
        for event in events:
            on_event(event)
            result = event if event["event"] == "result" else result
        for ref in done:
            failure = _failure(ref, runs.index(ref))
            if failure is not None:
                raise _root_cause(failure, running, runs)
    if result is None:
        raise WorkerDied("rank 0", "a result", "none", "see the job's log")
    return result


class WorkerRaised(WorkerDied):
    """A worker ended with an exception that is not for users: often that of a collective whose peer died."""


def _failure(ref: Any, rank: int) -> UserError | None:
    next_step = "the other workers are ended; the run goes on from the newest checkpoint when it is started again"
    try:
        outcome = ray.get(ref)
    except RayTaskError as error:
        log.error("rank %d: %s", rank, error)
        return WorkerRaised(f"worker {rank}", "to end well", _one_line(error.cause or error), next_step)
    except RayError as error:
        log.error("rank %d: %s", rank, _one_line(error))
        return WorkerDied(f"worker {rank}", "to end well", "its process or node died", next_step)
    return UserError(*outcome["fields"]) if outcome["event"] == "error" else None


def _root_cause(failure: UserError, running: list[Any], runs: list[Any]) -> UserError:
    """The failure to tell: what a user can mend first, then a death, then exceptions, which deaths of others cause."""
    if type(failure) is WorkerDied:
        return failure
    # The others end too: on the same refusal, once their saves are done, or on the collective that failed.
    done = ray.wait(running, num_returns=len(running), timeout=END_GRACE_S)[0] if running else []
    failures = [failure, *(found for ref in done if (found := _failure(ref, runs.index(ref))) is not None)]
    return min(failures, key=lambda found: (isinstance(found, WorkerDied), isinstance(found, WorkerRaised)))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
