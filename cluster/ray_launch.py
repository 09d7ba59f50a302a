"""The Ray launcher: a gang of actors, one per rank, on nodes that a placement group holds, watched by the job's driver.

Always holds: the group reserves, and is kept from attempt to attempt while its size stays and its nodes do; actors are
never restarted one by one - when one ends badly all are ended, since a collective would wait for it for ever - and
standbys, which have done every import, take their ranks; all belong to the driver, so Ray ends them when it dies.
Whether to try again is decided above (cluster/supervise.py).
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.launch import END_GRACE_S, Cause, Event, NoRoom, WorkerDied
from cluster.nodes import fits, is_gone, live_nodes
from cluster.ray_cluster import connected, resources
from cluster.ray_places import Places, reserve
from cluster.ray_worker import Mailbox, Rank, Worker
from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from cluster.watching import GangWatch

log = logging.getLogger(__name__)

PLACEMENT_TIMEOUT_S = 120.0  # workers of the run before may still be ending, or another job may
EARLY_PLACEMENT_S = 2.0
START_TIMEOUT_S = 600.0  # of a worker's imports, which a network disk may keep for ever; heartbeats come later
EVENT_POLL_S = 0.2
AFTER_DEATH = "the other workers are ended; the run goes on from the newest checkpoint when it is started again"


class RayLauncher:
    """See Launcher. A context manager: connected meanwhile, and the first workers warm up from its beginning.

    `values`: the resolved configuration. Neither importing this file nor entering it imports torch: a driver does that
    while the workers do.
    """

    def __init__(self, values: dict[str, Any], placement_timeout_s: float = PLACEMENT_TIMEOUT_S) -> None:
        self._values, self._settings = values, values["launcher"]
        self._placement_timeout_s = placement_timeout_s
        self._bundle = {"CPU": 1.0, "GPU": 1.0} if self._settings["device"] == "cuda" else {"CPU": 1.0}
        self._places: Places | None = None
        self._avoided: set[str] = set()  # nodes that are excluded, and those found gone before Ray says so
        self._gangs = 0
        self._ended_at: float | None = None  # the gang before
        self._exit = ExitStack()

    def __enter__(self) -> RayLauncher:
        with ExitStack() as stack:
            stack.enter_context(connected())
            stack.callback(self._release)
            self._mailbox = _open_mailbox()
            stack.callback(ray.kill, self._mailbox)
            self._standbys = _Standbys(self._values)
            stack.callback(self._standbys.end)
            if self._place(self._settings["workers"], EARLY_PLACEMENT_S):
                assert self._places is not None
                self._standbys.fill(self._places)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._exit.close()

    def room(self, at_most: int, without: str | None = None) -> int:
        own = Counter(self._places.nodes if self._places else ())
        avoided = {*self._avoided, without}
        nodes = [node for node in live_nodes() if node.leaves_in_s is None and node.id not in avoided]
        return min(at_most, sum(fits(node, self._bundle, own[node.id]) for node in nodes))

    def leaving(self) -> dict[str, float]:
        own = set(self._places.nodes if self._places else ())
        return {node.id: node.leaves_in_s for node in live_nodes() if node.id in own and node.leaves_in_s is not None}

    def exclude(self, node: str) -> None:
        self._avoided.add(node)

    def launch(self, spec: dict[str, Any], workers: int, on_event: Callable[[Event], None]) -> Event:
        self._gangs += 1
        times = _StartTimes(self._ended_at)
        log.info("launch of attempt %d with %d workers", spec["attempt"], workers)
        places = self._hold(workers)
        times.passed("placed")
        gang = _Gang(self._gangs, places, self._mailbox, spec["values"])
        try:
            gang.muster(self._standbys)
            times.passed("imported")
            on_event({"event": "started"} | gang.about())
            gang.begin(spec, self._standbys.former)
            return self._supervise(gang, times, on_event)
        except WorkerDied as death:
            if death.cause == "node-lost" and death.node is not None:
                self._avoided.add(death.node)
            raise
        finally:
            gang.end(self._standbys.former)
            self._ended_at = time.time()

    def _supervise(self, gang: _Gang, times: _StartTimes, on_event: Callable[[Event], None]) -> Event:
        """Hand on events until every worker has ended well, or one has not."""
        from cluster.watching import GangWatch
        from trainer.config import WatchSettings

        watch = GangWatch(WatchSettings.model_validate(self._values["watch"]), gang.places.size, gang.places.nodes)
        result: Event | None = None
        running = list(gang.runs)
        while running:
            done, running = ray.wait(running, num_returns=1, timeout=EVENT_POLL_S)
            for event in gang.take_events():
                watch.saw(event)
                first_step = times.saw(event)
                if event["event"] not in ("beat", "met"):
                    on_event(event)
                result = event if event["event"] == "result" else result
                if first_step:
                    on_event(times.event())
                    if self._settings["standby"]:
                        self._standbys.fill(gang.places)  # now, so that their imports do not slow the way here
            for ref in done:
                if (failure := gang.failure(ref)) is not None:
                    raise gang.root_cause(failure, running)
            if pids := self._standbys.turned_warm():
                on_event({"event": "standby", "pids": pids})
            _look(watch, on_event)
        if result is None:
            raise WorkerDied("rank 0", "a result", "none", "see the job's log", "raised", 0, gang.places.nodes[0])
        return result

    def _hold(self, workers: int) -> Places:
        """The places of a gang of that size: those held, if they still serve. Raises NoRoom."""
        places = self._places
        if places is None or places.size != workers or not self._usable(places):
            if not self._place(workers, self._placement_timeout_s):
                asked = " and ".join(f"{amount:g} {name}" for name, amount in self._bundle.items())
                raise NoRoom(
                    "Ray cluster",
                    f"room for {workers} workers of {asked} each within {self._placement_timeout_s:.0f} s",
                    f"{resources()} in all, less what others use",
                    "lower launcher.workers, or wait for other jobs to end",
                )
            assert self._places is not None
            places = self._places
        return places

    def _usable(self, places: Places) -> bool:
        staying = {node.id for node in live_nodes() if node.leaves_in_s is None} - self._avoided
        return staying.issuperset(places.nodes)

    def _place(self, workers: int, timeout_s: float) -> bool:
        """Give back what is held, and hold `workers` places; whether there was room within that time."""
        self._release()
        self._places = reserve(workers, self._bundle, self._settings["device"], self._avoided, timeout_s)
        return self._places is not None

    def _release(self) -> None:
        if self._places is not None:
            self._places.release()
            self._places = None


class _Standbys:
    """Workers that wait warm on their nodes, and the processes of the gang before, which may still be ending."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        self._waiting: dict[tuple[str, Any], list[tuple[ActorHandle[Any], Any]]] = defaultdict(list)
        self._told: set[Any] = set()
        self.former: dict[str, list[int]] = {}

    def fill(self, places: Places) -> None:
        """Have as many on each node as it has ranks. Those of other nodes stay: a run that shrank may grow again."""
        for node, count in Counter(places.nodes).items():
            # Whoever waits for other GPUs of it may never be asked for again, and holds memory there.
            for stale in [key for key in self._waiting if key[0] == node and key[1] != places.facts[node]]:
                for actor, _ in self._waiting.pop(stale):
                    ray.kill(actor)
            waiting = self._waiting[node, places.facts[node]]
            waiting.extend(self.start(places, node) for _ in range(count - len(waiting)))

    def take(self, places: Places, node: str) -> tuple[ActorHandle[Any], Any] | None:
        """One that is warm or will be, and the answer of its `warm`."""
        waiting = self._waiting[node, places.facts[node]]
        return waiting.pop(0) if waiting else None

    def start(self, places: Places, node: str) -> tuple[ActorHandle[Any], Any]:
        """A new one. It holds no resources itself: those of its rank are the placement group's."""
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        actor: Any = ray.remote(Worker).options(num_cpus=0, max_restarts=0, scheduling_strategy=strategy).remote()
        return actor, actor.warm.remote(places.facts[node], self._values)

    def turned_warm(self) -> list[int]:
        """The processes that wait, once all of them are warm; none until then, and when that was told before."""
        answers = {answer for waiting in self._waiting.values() for _, answer in waiting}
        if answers <= self._told or len(ray.wait(list(answers), num_returns=len(answers), timeout=0)[1]):
            return []
        self._told, pids = answers, []
        for answer in answers:
            with suppress(RayError):  # it has died since: that is met when it is needed
                pids.append(int(ray.get(answer)["pid"]))
        return pids

    def end(self) -> None:
        for waiting in self._waiting.values():
            for actor, _ in waiting:
                ray.kill(actor)


class _Gang:
    """The workers of one attempt, in the order of their ranks."""

    def __init__(self, number: int, places: Places, mailbox: ActorHandle[Any], values: dict[str, Any]) -> None:
        self.number, self.places, self.mailbox, self.values = number, places, mailbox, values
        self.actors: list[ActorHandle[Any]] = []
        self.pids: list[int] = []
        self.on_main_thread: list[bool] = []
        self.machine_bytes: list[int] = []
        self.standbys = 0  # ranks that were taken by one
        self.runs: list[Any] = []

    def muster(self, standbys: _Standbys) -> None:
        """Find a warm worker for every rank. Raises WorkerDied."""
        taken = [standbys.take(self.places, node) for node in self.places.nodes]
        started = [
            pair or standbys.start(self.places, node) for pair, node in zip(taken, self.places.nodes, strict=True)
        ]
        self.actors = [actor for actor, _ in started]
        for rank, (node, standby) in enumerate(zip(self.places.nodes, taken, strict=True)):
            try:
                place = ray.get(started[rank][1], timeout=START_TIMEOUT_S)
                ray.get(self.actors[rank].answer.remote(), timeout=START_TIMEOUT_S)
                self.standbys += standby is not None
            except RayError as error:
                if standby is None or isinstance(error, RayTaskError):
                    raise self._death(error, rank, "to start") from None
                log.warning("the standby of rank %d is not there any more; another is started", rank)
                ray.kill(self.actors[rank])
                self.actors[rank], answer = standbys.start(self.places, node)
                place = self._answer(answer, rank, "to start")
            self.pids.append(place["pid"])
            self.on_main_thread.append(place["on_main_thread"])
            self.machine_bytes.append(place["machine_bytes"])
            log.info("rank %d: process %d on node %s", rank, place["pid"], place["host"])

    def about(self) -> Event:
        return {
            "pids": self.pids,
            "node_ids": list(self.places.nodes),
            "on_main_thread": self.on_main_thread,
            "standbys": self.standbys,
        }

    def begin(self, spec: dict[str, Any], former: dict[str, list[int]]) -> None:
        rendezvous = self._answer(self.actors[0].rendezvous.remote(), 0, "an address to meet at")
        for rank, (actor, node) in enumerate(zip(self.actors, self.places.nodes, strict=True)):
            local_rank = self.places.nodes[:rank].count(node)
            place = Rank(rank, self.places.size, local_rank, self.number, rendezvous, former.get(node, []))
            self.runs.append(actor.train.remote(place, spec, self.mailbox))

    def take_events(self) -> list[Event]:
        events: list[Event] = ray.get(self.mailbox.take.remote(self.number))
        return events

    def failure(self, ref: Any) -> UserError | None:
        """How the run of a rank that is over failed; None if it ended well."""
        rank = self.runs.index(ref)
        try:
            outcome = ray.get(ref)
        except RayError as error:
            return self._death(error, rank, "to end well")
        if outcome["event"] == "error":
            return UserError(*outcome["fields"])
        return self._raised(rank, outcome) if outcome["event"] == "raised" else None

    def _raised(self, rank: int, event: Event) -> WorkerDied:
        node, found = self.places.nodes[rank], event["error"]
        if event["cause"] == "out-of-memory":
            return self._out_of_memory(rank, found, event["memory"])
        return WorkerDied(f"worker {rank}", "to end well", found, AFTER_DEATH, "raised", rank, node)

    def _out_of_memory(self, rank: int, found: str, memory: dict[str, int] | None = None) -> WorkerDied:
        from cluster.out_of_memory import out_of_memory

        node, size = self.places.nodes[rank], self.places.size
        machine = self.machine_bytes[rank] // self.places.nodes.count(node) if self.machine_bytes else 0
        return out_of_memory(self.values, size, rank, node, found, memory, machine)

    def root_cause(self, failure: UserError, running: Sequence[Any]) -> UserError:
        """The failure to tell: what a user can mend first, then a death, then exceptions, which deaths of others cause.

        The others end too: on the same refusal, once their saves are done, or on the collective that failed.
        """
        failures, left, until = [failure], list(running), time.monotonic() + END_GRACE_S
        while left and not any(_is_death(found) for found in failures):
            done, left = ray.wait(left, num_returns=1, timeout=max(0.0, until - time.monotonic()))
            if not done:
                break
            failures += [found for ref in done if (found := self.failure(ref)) is not None]
        return min(failures, key=lambda found: (isinstance(found, WorkerDied), not _is_death(found)))

    def end(self, former: dict[str, list[int]]) -> None:
        for actor in self.actors:
            ray.kill(actor)
        former.clear()
        for node, pid in zip(self.places.nodes, self.pids, strict=False):
            former.setdefault(node, []).append(pid)

    def _answer(self, call: Any, rank: int, expected: str) -> Any:
        try:
            return ray.get(call, timeout=START_TIMEOUT_S)
        except RayError as error:
            raise self._death(error, rank, expected) from None

    def _death(self, error: RayError, rank: int, expected: str) -> WorkerDied:
        node = self.places.nodes[rank]
        log.error("rank %d: %s", rank, error if isinstance(error, RayTaskError) else _one_line(error))
        cause: Cause
        if isinstance(error, OutOfMemoryError):
            return self._out_of_memory(rank, "ended by Ray, for want of memory on its node")
        if isinstance(error, RayTaskError):
            cause, found = "raised", _one_line(error.cause or error)
        elif isinstance(error, GetTimeoutError):
            cause, found = "hung", f"no answer for {START_TIMEOUT_S:.0f} s"
        elif is_gone(node):
            cause, found = "node-lost", f"its node {node[:8]} gone"
        else:
            cause, found = "killed", "its process dead"
        return WorkerDied(f"worker {rank}", expected, found, AFTER_DEATH, cause, rank, node)


def _look(watch: GangWatch, on_event: Callable[[Event], None]) -> None:
    """At what the heartbeats say. Raises WorkerDied when a rank hangs."""
    watch.tell_stragglers(on_event)
    if hung := watch.hung():
        if hung.node is not None and is_gone(hung.node):
            raise WorkerDied(hung.name, hung.expected, "its node gone", AFTER_DEATH, "node-lost", hung.rank, hung.node)
        on_event(hung.event())
        raise hung


class _StartTimes:
    """How long the parts of a start took, up to the first step. `ended_at`: of the gang before. Unix times."""

    def __init__(self, ended_at: float | None) -> None:
        self._ended_at, self._began = ended_at, time.time()
        self.seconds: dict[str, float] = {}

    def event(self) -> Event:
        return {"event": "began", "at": self._began, "ended_at": self._ended_at, "seconds": self.seconds}

    def passed(self, part: str, at: float | None = None) -> None:
        self.seconds[part] = round((at or time.time()) - self._began - sum(self.seconds.values()), 3)

    def saw(self, event: Event) -> bool:
        """Whether the first step is done with it."""
        if "first_step" in self.seconds:
            return False
        part = {"met": "met", "loaded": "loaded", "progress": "first_step"}.get(event["event"])
        if part is not None:
            self.passed(part, event["at"])
        if part == "first_step":
            parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items())
            log.info("first step %.2f s after the launch: %s", sum(self.seconds.values()), parts)
        return part == "first_step"


def _is_death(failure: UserError) -> bool:
    return isinstance(failure, WorkerDied) and failure.cause != "raised"


def _open_mailbox() -> ActorHandle[Any]:
    """Beside the driver: it must not go with another node. Its death costs the events in it, not the run."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    again = {"max_restarts": -1, "max_task_retries": -1}
    actor: Any = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here, **again)
    return actor.remote()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
