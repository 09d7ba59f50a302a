"""R3: stop at every point of the commit protocols, of shards and of checkpoints: nothing unreadable, nothing left over.

Each protocol runs once per point and is stopped there; then readers look, the sweep runs, and the work is done again.
In a folder a point is a step of the file system; in a bucket it is before or after a request, its answer never heard.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from cluster.drills.scoreboard import CannotRun, Score
from cluster.drills.scratch import Scratch, corpus_config, environment, write_corpus
from cluster.drills.servers import s3_server
from data_pipeline.build import build_corpus, sweep_build
from data_pipeline.errors import UserError
from data_pipeline.order import OrderState
from data_pipeline.shards import open_dataset, verify_dataset
from data_pipeline.storage import LocalStore, ObjectStore, open_store
from data_pipeline.storage.crash import Crashed, CrashPointStore, StoppingStore
from trainer.checkpoint.attempts import ATTEMPTS, take_attempt
from trainer.checkpoint.inspect import verify_checkpoints
from trainer.checkpoint.load import restore_newest
from trainer.checkpoint.manifest import CheckpointName, committed, newest_committed, part_key, read_manifest
from trainer.checkpoint.save import RunIdentity, commit, upload_share
from trainer.checkpoint.sweep import sweep
from trainer.engine.engine import KINDS, Interval
from trainer.engine.group import Group

RUN, SIZE, WORLD = "drill", 10, 2  # its name; elements of its one parameter; ranks
PICTURES, SHARD_ROWS = 3, 2


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is stopped. `check` looks at what a stop left, mends it, and gives a line for each broken promise."""

    name: str
    begin: Callable[[ObjectStore], None]
    work: Callable[[ObjectStore], None]
    check: Callable[[ObjectStore], Iterator[str]]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where: new empty stores, and the same store with a stop in it."""

    name: str
    new: Callable[[], ObjectStore]
    stopping: Callable[[ObjectStore, int | None], CrashPointStore | StoppingStore]
    drop: Callable[[ObjectStore], None]


def run(scratch: Scratch) -> Score:
    """`faults` of each protocol and place: so many of their points, evenly spread; by default all."""
    protocols = (checkpoint_protocol(), *shard_protocols(scratch.folder / "crash" / "corpus"))
    figures: dict[str, int | str] = {}
    failures: list[str] = []
    with ExitStack() as stack:
        places = [folder_place(scratch.folder / "crash")]
        try:
            server = stack.enter_context(s3_server(scratch.folder / "s3", scratch.tell))
        except CannotRun as reason:
            figures["bucket"] = f"left out: {reason}"
        else:
            stack.enter_context(environment(server.environment))
            places.append(bucket_place(server.uri("crash")))
        for place in places:
            for protocol in protocols:
                points, broken = stop_everywhere(protocol, place, scratch.wishes.faults)
                figures[f"{protocol.name}_points_in_a_{place.name}"] = points
                failures += broken
                scratch.tell(f"{protocol.name} in a {place.name}: {points} points, {len(broken)} broken promises")
    faults = sum(points for points in figures.values() if isinstance(points, int))
    unreadable = sum("unreadable: " in failure for failure in failures)
    orphans = sum("left over: " in failure for failure in failures)
    return Score(faults, figures | {"unreadable": unreadable, "orphans": orphans}, failures)


def stop_everywhere(protocol: Protocol, place: Place, at_most: int | None = None) -> tuple[int, list[str]]:
    """(points tried, broken promises). `at_most` so many points, evenly spread over all."""
    store = place.new()
    protocol.begin(store)
    counting = place.stopping(store, None)
    protocol.work(counting)
    place.drop(store)
    points = spread(counting.operations, at_most)
    failures = []
    for point in points:
        store = place.new()
        protocol.begin(store)
        where = f"{protocol.name} in a {place.name}, stopped at {point}"
        try:
            protocol.work(place.stopping(store, point))
        except Crashed:
            failures += [f"{where}: {broken}" for broken in protocol.check(store)]
        else:
            failures.append(f"{where}: it did not stop")
        place.drop(store)
    return len(points), failures


def spread(count: int, at_most: int | None) -> Sequence[int]:
    """Numbers below `count`: all, or so many of them from the first to the last."""
    if at_most is None or at_most >= count:
        return range(count)
    return sorted({round(step * (count - 1) / max(at_most - 1, 1)) for step in range(at_most)})


def folder_place(folder: Path) -> Place:
    numbers = iter(range(10**9))

    def stopping(store: ObjectStore, stop_at: int | None) -> CrashPointStore:
        return CrashPointStore(Path(store.uri), stop_at)

    return Place("folder", lambda: LocalStore(folder / f"store-{next(numbers)}"), stopping, drop_folder)


def drop_folder(store: ObjectStore) -> None:
    shutil.rmtree(store.uri, ignore_errors=True)


def bucket_place(uri: str) -> Place:
    numbers = iter(range(10**9))
    return Place("bucket", lambda: open_store(f"{uri}/{next(numbers)}"), StoppingStore, lambda store: None)


# -------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_protocol() -> Protocol:
    """The second save of a run: at position 32, by a new attempt, beside a whole checkpoint at 16."""
    return Protocol("save", lambda store: attempt_and_save(store, 16), lambda store: attempt_and_save(store, 32),
                    check_checkpoints)  # fmt: skip


def check_checkpoints(store: ObjectStore) -> Iterator[str]:
    newest = newest_committed(store)
    if newest is None or restored_position(store) != newest.position:
        yield f"unreadable: what is restored is not the newest committed checkpoint, {newest}"
    yield from (f"unreadable: {bad['part']}: found {bad['found']}" for bad in verify_checkpoints(store.uri))
    attempt = take_attempt(store, {"config": {"run": "drill"}})
    sweep(store, attempt)
    yield from (f"left over: {key}" for key in orphans(store))
    save(store, attempt, 32)
    if committed(store)[0] != CheckpointName(32, attempt) or restored_position(store) != 32:
        yield "unreadable: the next save"


def attempt_and_save(store: ObjectStore, position: int) -> None:
    attempt = take_attempt(store, {"config": {"run": "drill"}})
    sweep(store, attempt)
    save(store, attempt, position)


def save(store: ObjectStore, attempt: int, position: int, run: str = RUN) -> None:
    """A save by two ranks, one after the other, so that every stop is at a known place."""
    for rank in range(WORLD):
        begin, end = SIZE * rank // WORLD, SIZE * (rank + 1) // WORLD
        values = torch.full((end - begin,), float(position))
        intervals = [Interval("net/w", kind, begin, values) for kind in KINDS]
        upload_share(store, identity(attempt, rank, run), position, intervals)
    state = {"optimizer_steps": {"net": 1}, "guard": {}, "order": dataclasses.asdict(order_at(position))}
    commit(store, identity(attempt, 0, run), position, state, deadline_s=0)


def identity(attempt: int, rank: int, run: str = RUN) -> RunIdentity:
    return RunIdentity(
        run=run,
        attempt=attempt,
        rank=rank,
        world_size=WORLD,
        zero_stage=0,
        parameters={"net/w": SIZE},
        config={},
        code_version="0",
    )


def order_at(position: int) -> OrderState:
    return OrderState("d" * 64, "lanes", seed=0, batch=16, lanes=1, position=position)


def restored_position(store: ObjectStore) -> int | None:
    """The position of the newest checkpoint; None unless every element of it is that number."""
    wanted = [Interval("net/w", kind, 0, torch.zeros(SIZE)) for kind in KINDS]
    found = restore_newest(store, Group(), wanted, {"net/w": SIZE}, order_at(0))
    if found is None or any(not interval.values.eq(found.name.position).all() for interval in wanted):
        return None
    return found.name.position


def orphans(store: ObjectStore) -> set[str]:
    """Objects that no manifest names and that are no attempt, and unfinished uploads."""
    owned = set()
    for name in committed(store):
        manifest = read_manifest(store, name.manifest_key)
        owned |= {name.manifest_key, *(part_key(name, part) for part in manifest.parts)}
    keys = {info.key for info in store.list() if not info.key.startswith(ATTEMPTS)}
    uploads = store.sweep_uploads()
    return (keys - owned) | ({f"{uploads} unfinished uploads"} if uploads else set())


# ------------------------------------------------------------------------------------------------------------- shards


def shard_protocols(folder: Path) -> tuple[Protocol, Protocol]:
    """A build that is swept after a stop before it is done again, as in a folder; and one that is done again over what
    the stop left, as in a bucket."""
    config = corpus_config(write_corpus(folder / "pictures.tar", PICTURES), str(folder / "unused"), SHARD_ROWS)
    whole = LocalStore(folder / "whole")
    build_corpus(config, store=whole)
    expected = contents(whole)

    def work(store: ObjectStore) -> None:
        build_corpus(config, store=store)

    def check_swept(store: ObjectStore) -> Iterator[str]:
        yield from check_visible(store)
        sweep_build(store)
        left = contents(store)
        yield from (f"unreadable: {key} has other bytes" for key in left if left[key] != expected.get(key))
        yield from (f"left over: {key}" for key in left if key.endswith(".arrow") and not has_manifest(key, left))
        yield from (f"left over: {count} objects after a sweep" for count in [sweep_build(store)] if count)
        yield from check_done_again(store)

    def check_unswept(store: ObjectStore) -> Iterator[str]:
        yield from check_visible(store)
        yield from check_done_again(store)

    def check_done_again(store: ObjectStore) -> Iterator[str]:
        work(store)
        sweep_build(store)
        found = contents(store)
        for key in sorted(expected.keys() | found.keys()):
            if found.get(key) != expected.get(key):
                yield f"left over: {key}" if key not in expected else f"unreadable: {key}"

    return (
        Protocol("build", lambda store: None, work, check_swept),
        Protocol("unswept_build", lambda store: None, work, check_unswept),
    )


def check_visible(store: ObjectStore) -> Iterator[str]:
    """What a reader sees is no dataset, or a whole one."""
    try:
        dataset = open_dataset(store.uri)
    except UserError:
        return
    yield from (f"unreadable: {bad}" for bad in verify_dataset(dataset))
    if dataset.rows != PICTURES:
        yield f"unreadable: {dataset.rows} rows of {PICTURES}"


def has_manifest(key: str, there: dict[str, bytes]) -> bool:
    folder = key.rpartition("/")[0]
    return (f"{folder}/manifest.json" if key.startswith("units/") else key.replace(".arrow", ".json")) in there


def contents(store: ObjectStore) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list()}
