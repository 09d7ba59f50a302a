"""Saves behind the training's back: never two at once, ended by their deadline, never the end of the training."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.order import OrderState
from data_pipeline.storage import LocalStore, StoreError
from trainer.checkpoint import save as save_module
from trainer.checkpoint.attempts import take_attempt
from trainer.checkpoint.load import READ_THREADS, restore_newest
from trainer.checkpoint.manifest import CheckpointName, committed, read_manifest
from trainer.checkpoint.parts import REQUEST_BYTES
from trainer.checkpoint.save import RunIdentity, SaveFailed, Saver, Superseded
from trainer.engine.engine import KINDS, Interval
from trainer.engine.group import Group
from trainer.run import train
from trainer.tracking.jsonl import read_events

SIZE = 1000
ORDER = OrderState("d" * 64, "lanes", seed=0, batch=16, lanes=1, position=0)


class UnreliableStore(LocalStore):
    """A folder that fails when it is told to. `faults` is asked before each operation, with its name and key; what it
    raises is raised, and it may take its time."""

    def __init__(self, root: Path, faults: Callable[[str, str], None] = lambda operation, key: None) -> None:
        super().__init__(root)
        self.faults = faults

    def put(self, key: str, chunks: Iterable[bytes | memoryview]) -> None:
        self.faults("put", key)
        super().put(key, chunks)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.faults("put_if_absent", key)
        return super().put_if_absent(key, data)

    def get(self, key: str) -> bytes:
        self.faults("get", key)
        return super().get(key)

    def list(self, prefix: str = "") -> Iterator[Any]:
        self.faults("list", prefix)
        return super().list(prefix)

    def delete(self, key: str) -> None:
        self.faults("delete", key)
        super().delete(key)


def saver(store: LocalStore, deadline_s: float = 60.0, rank: int = 0, world_size: int = 1, attempt: int = 1) -> Saver:
    identity = RunIdentity(
        run="test",
        attempt=attempt,
        rank=rank,
        world_size=world_size,
        zero_stage=0,
        parameters={"net/w": SIZE},
        config={},
        code_version="0",
    )
    return Saver(store, identity, deadline_s)


def view(position: int, rank: int = 0, world_size: int = 1) -> list[Interval]:
    begin, end = SIZE * rank // world_size, SIZE * (rank + 1) // world_size
    return [Interval("net/w", kind, begin, torch.full((end - begin,), float(position))) for kind in KINDS]


def begin(of: Saver, position: int) -> None:
    order = dataclasses.asdict(dataclasses.replace(ORDER, position=position))
    state = {"optimizer_steps": {"net": 1}, "guard": {}, "order": order}
    of.save(position, view(position, of.identity.rank, of.identity.world_size), state)


def restored_position(store: LocalStore) -> int:
    """Of the newest checkpoint, whose every element must be that number."""
    wanted = [Interval("net/w", kind, 0, torch.zeros(SIZE)) for kind in KINDS]
    found = restore_newest(store, Group(), wanted, {"net/w": SIZE}, ORDER)
    assert found is not None and all(interval.values.eq(float(found.name.position)).all() for interval in wanted)
    return found.name.position


class Gate:
    """Operations on keys that hold `word` wait until the gate opens."""

    def __init__(self, word: str) -> None:
        self.word, self.open, self.waiting = word, threading.Event(), threading.Event()

    def __call__(self, operation: str, key: str) -> None:
        if operation == "put" and self.word in key:
            self.waiting.set()
            assert self.open.wait(60)


def test_a_snapshot_is_what_was_there_when_it_was_taken_and_its_memory_is_used_again(tmp_path: Path) -> None:
    gate = Gate("part-")
    store = UnreliableStore(tmp_path, gate)
    run, state = saver(store), view(16)
    run.memory.reserve(state)
    assert run.memory.bytes == 4 * 4 * SIZE
    run.save(16, state, {"optimizer_steps": {"net": 1}, "guard": {}, "order": dataclasses.asdict(ORDER)})
    for interval in state:
        interval.values.fill_(-1)  # training goes on
    gate.open.set()
    run.wait()
    assert restored_position(store) == 16
    one, two = run.memory.snapshot(state), run.memory.snapshot(state)
    assert one[0].values.data_ptr() == two[0].values.data_ptr() and run.memory.bytes == 4 * 4 * SIZE


def test_a_save_that_is_under_way_is_neither_waited_for_nor_written_over(tmp_path: Path) -> None:
    gate = Gate("images-000000016")
    store = UnreliableStore(tmp_path, gate)
    run = saver(store)
    begin(run, 16)
    assert gate.waiting.wait(60) and run.poll() is None and run.busy
    with pytest.raises(SaveFailed, match="that of images-000000016/attempt-1 under way"):
        begin(run, 32)
    gate.open.set()
    run.wait()
    assert not run.busy
    begin(run, 32)
    run.wait()
    assert [name.position for name in committed(store)] == [32, 16] and restored_position(store) == 32


@pytest.mark.parametrize(
    ("operation", "word"),
    [("put", "part-"), ("put", "receipt-"), ("get", "receipt-"), ("list", "attempts/"), ("put_if_absent", "manifest")],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_comes_back_within_the_deadline_costs_nothing(
    tmp_path: Path, operation: str, word: str, rank: int
) -> None:
    """Whatever it fails, on rank 0 and on another one."""
    left = [2]

    def faults(done: str, key: str) -> None:
        if (done, word in key) == (operation, True) and left[0]:
            left[0] -= 1
            raise StoreError(key, "error 503 (SlowDown)")

    stores = [UnreliableStore(tmp_path), UnreliableStore(tmp_path)]
    stores[rank].faults = faults
    ranks = [saver(store, 60.0, number, 2) for number, store in enumerate(stores)]
    for one in ranks:
        begin(one, 16)
    for one in reversed(ranks):
        one.wait()
    assert left[0] == (0 if rank == 0 or operation == "put" else 2)  # the rest is rank 0's
    assert ranks[0].committed == CheckpointName(16, 1) and restored_position(stores[0]) == 16
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith((".upload", "receipt"))]


def test_a_save_that_misses_its_deadline_is_given_up_counted_once_and_cleared_away_by_the_next(tmp_path: Path) -> None:
    def faults(operation: str, key: str) -> None:
        if operation == "put" and "images-000000016" in key and "00001-of" in key:
            raise StoreError(key, "error 500 (InternalError)")

    stores = [UnreliableStore(tmp_path), UnreliableStore(tmp_path, faults)]
    ranks = [saver(store, 3.0, number, 2) for number, store in enumerate(stores)]
    for one in ranks:
        begin(one, 16)
    failed = [one.settle() for one in reversed(ranks)]
    assert "the part of rank 1" in str(failed[0]) and "InternalError" in str(failed[0])
    assert "a receipt from rank 1 in 3 s, found" in str(failed[1]) and "InternalError" in str(failed[1]), "the cause"
    assert [one.failures for one in ranks] == [1, 1] and not any(one.poll() for one in ranks)
    assert committed(stores[0]) == [] and any(tmp_path.rglob("part-00000*"))
    for one in ranks:
        one.deadline_s = 60.0
        begin(one, 32)
    for one in reversed(ranks):
        one.wait()
    assert restored_position(stores[0]) == 32 and [name.position for name in committed(stores[0])] == [32]
    folders = {path.parent.parent.name for path in tmp_path.rglob("*") if path.is_file()}
    assert folders == {"images-000000032"}, "nothing is left of the other"


def test_an_upload_that_crawls_ends_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "PIECE_BYTES", 16)

    class Crawling(LocalStore):
        def _write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
            def slowly() -> Iterator[bytes | memoryview]:
                for chunk in chunks:
                    time.sleep(0.01)
                    yield chunk

            super()._write(path, slowly() if "part-" in path.name else chunks)

    run = saver(Crawling(tmp_path), deadline_s=0.2)
    began = time.monotonic()
    begin(run, 16)  # 16,000 bytes: ten seconds
    failed = run.settle()
    assert failed is not None and "not stored within 0 s" in str(failed)
    assert time.monotonic() - began < 5 and not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_request_that_never_ends_is_reported_and_its_snapshot_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_module, "GRACE_S", 0.1)
    gate = Gate("part-")
    store = UnreliableStore(tmp_path, gate)
    run = saver(store, deadline_s=0.1)
    begin(run, 16)
    failed = run.settle()
    assert failed is not None and "a request that does not end" in str(failed)
    assert run.poll() is None and run.busy and run.failures == 1
    with pytest.raises(SaveFailed, match="under way"):
        begin(run, 32)
    threading.Timer(0.05, gate.open.set).start()
    run.let_end()  # what the end of a run does before its own save
    assert not run.busy and run.failures == 1
    begin(run, 32)
    run.wait()
    assert restored_position(store) == 32


@pytest.mark.parametrize("error", [SaveFailed(CheckpointName(16, 1), "a", "b"), Superseded("run", "a", "b", "c")])
def test_an_error_that_comes_while_one_looks_is_heard(tmp_path: Path, error: SaveFailed | Superseded) -> None:
    class EndsMeanwhile(threading.Thread):
        def is_alive(self) -> bool:
            pending.error = error
            return False

    run = saver(LocalStore(tmp_path))
    pending = run._save = save_module._Save(CheckpointName(16, 1), save_module.Deadline(60), EndsMeanwhile())
    if isinstance(error, Superseded):
        with pytest.raises(Superseded):
            run.poll()
    else:
        assert run.poll() is error and run.failures == 1
    assert not run.busy


def test_what_a_save_left_that_could_not_ask_for_newer_attempts_is_cleared_away(tmp_path: Path) -> None:
    def faults(operation: str, key: str) -> None:
        if operation == "list" and key == "attempts/" and away:
            raise StoreError(key, "no answer")

    away, store = True, UnreliableStore(tmp_path, faults)
    run = saver(store, deadline_s=2.0)  # a busy disk stores the part before that
    begin(run, 16)
    assert "to be told of newer attempts" in str(run.settle())
    assert any(tmp_path.rglob("part-*"))
    away, run.deadline_s = False, 60.0
    begin(run, 32)
    run.wait()
    assert {path.parent.parent.name for path in tmp_path.rglob("*") if path.is_file()} == {"images-000000032"}


def test_a_save_again_at_the_place_of_one_that_failed_leaves_what_other_ranks_stored_meanwhile(tmp_path: Path) -> None:
    failing = [True]

    def faults(operation: str, key: str) -> None:
        if failing[0] and operation == "list" and key == "attempts/":
            raise StoreError(key, "no answer")

    store = UnreliableStore(tmp_path, faults)
    ranks = [saver(store, 3.0, rank=number, world_size=2) for number in (1, 0)]
    for run in ranks:
        begin(run, 16)
        assert (run.settle() is None) == (run.identity.rank == 1)
    failing[0] = False
    for run in ranks:  # rank 1 is done before rank 0 begins
        run.deadline_s = 60.0
        begin(run, 16)
        run.wait()
    assert restored_position(store) == 16


def test_a_manifest_whose_answer_was_lost_is_a_success(tmp_path: Path) -> None:
    class Deaf(LocalStore):
        lost = 0

        def put_if_absent(self, key: str, data: bytes) -> bool:
            stored = super().put_if_absent(key, data)
            if "manifest" in key and not self.lost:
                self.lost = 1
                raise StoreError(key, "no answer")
            return stored

    run = saver(Deaf(tmp_path))
    begin(run, 16)
    run.wait()
    assert run.committed == CheckpointName(16, 1) and run.failures == 0


def test_a_save_never_ends_the_training_by_a_defect_but_by_a_newer_attempt(tmp_path: Path) -> None:
    def faults(operation: str, key: str) -> None:
        if "images-000000016" in key:
            raise RuntimeError("a defect")

    store = UnreliableStore(tmp_path, faults)
    take_attempt(store, {})
    run = saver(store)
    begin(run, 16)
    assert "a defect" in str(run.settle()) and run.failures == 1
    take_attempt(store, {})
    begin(run, 32)
    with pytest.raises(Superseded, match="found attempt 2"):
        run.settle()


def test_a_receipt_with_a_flipped_bit_costs_the_save_and_no_checkpoint(tmp_path: Path) -> None:
    class Flipping(LocalStore):
        def get(self, key: str) -> bytes:
            data = super().get(key)
            return data.replace(b'"bytes":1', b'"bytes":2') if "receipt" in key else data

    run = saver(Flipping(tmp_path))
    begin(run, 16)
    assert "a receipt from rank 0, found other bytes" in str(run.settle())
    assert committed(run.store) == []


class Loops:
    """A training run in this process: its progress tells when the store fails, and what it began to save is listed."""

    def __init__(self, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.values, self.down = values, False
        self.begun: list[tuple[int, bool]] = []  # position, whether the store failed then
        self.result: dict[str, Any] = {}
        self.store = UnreliableStore(Path(values["store"]), self.fault)
        monkeypatch.setattr("trainer.run.open_store", lambda uri: self.store)
        begin = Saver.save

        def save(saver: Saver, position: int, *rest: Any) -> None:
            saver.deadline_s = 0.0 if self.down else 60.0  # a machine may be slow, but the test need not wait
            begin(saver, position, *rest)
            self.begun.append((position, self.down))

        monkeypatch.setattr(Saver, "save", save)

    def fault(self, operation: str, key: str) -> None:
        if self.down:
            raise StoreError(key, "no answer")

    def run(self, down: range = range(0), at: Callable[[int], None] = lambda position: None) -> None:
        def report(event: dict[str, Any]) -> None:
            if event["event"] == "result":
                self.result = event
            self.down = event["images"] in down
            at(event["images"])

        self.store.put_if_absent("attempts/00001.json", json.dumps({"config": {}}).encode())
        train(self.values, 1, Group(), report)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return read_events(self.store.root / "tracking", kind)


Values = Callable[..., dict[str, Any]]


@pytest.mark.usefixtures("one_thread")
def test_a_store_that_fails_everything_for_a_while_ends_no_run_and_saves_begun_afterwards_commit(
    train_values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = train_values(
        images=80,
        samples={"every_images": 32, "prompts": ["a cat"], "sampling": {"spacing": "2"}},
    )
    loop = Loops(values, monkeypatch)
    loop.run(down=range(32, 64))
    stored = {name.position for name in committed(loop.store)}
    assert loop.result["images"] == 80 and loop.result["checkpoint"].endswith("images-000000080/attempt-1")
    assert all(position in stored for position, down in loop.begun if not down)
    assert loop.result["failed_saves"] == len(loop.events("save-failed")) == len(loop.begun) - len(stored) > 0
    assert len(loop.events("samples-failed")) == 1 and len(loop.events("samples")) == 2


@pytest.mark.usefixtures("one_thread")
def test_a_due_save_that_meets_the_one_before_it_begins_when_that_has_ended(
    train_values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loops(train_values(images=80), monkeypatch)
    gate = Gate("images-000000016/attempt-1/part")
    loop.store.faults = gate

    def open_late(position: int) -> None:
        if position == 48:
            gate.open.set()

    loop.run(at=open_late)
    begun = [position for position, _ in loop.begun]
    assert begun[0] == 16 and begun[1] >= 48 and begun[-1] == 80
    assert begun == sorted(name.position for name in committed(loop.store)) and loop.result["failed_saves"] == 0
    manifest = read_manifest(loop.store, CheckpointName(80, 1).manifest_key)
    assert loop.result["snapshot_bytes"] == 4 * len(KINDS) * sum(manifest.parameters.values())
    delayed = loop.events("save-delayed")
    assert loop.result["delayed_saves"] == len(delayed) and delayed[0]["images"] == 32
    assert all(event["images"] not in (48,) for event in delayed), "once for each save that is owed"


@pytest.mark.usefixtures("one_thread")
def test_saves_come_by_the_clock_too(train_values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    values = train_values(images=64, checkpoint={"every_images": 10**6, "every_minutes": 1e-6})
    loop = Loops(values, monkeypatch)
    loop.run()
    begun = [position for position, _ in loop.begun]
    assert begun[0] == 16 and begun[-1] == 64
    assert begun == sorted(name.position for name in committed(loop.store))


@pytest.mark.usefixtures("one_thread")
def test_a_last_save_that_fails_until_its_deadline_ends_the_run_in_one_line(
    train_values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loops(train_values(images=32), monkeypatch)
    with pytest.raises(SaveFailed, match=r"save of images-000000032/attempt-1: expected .* found .*no answer"):
        loop.run(down=range(16, 33))
    assert committed(LocalStore(loop.store.root)) == []


MEMORY = """
import dataclasses, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import test_saver
from test_saver import KINDS, Group, Interval, LocalStore, ORDER, restore_newest, saver

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def most(what):
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    what()
    return resident("VmHWM") - before

size = int(sys.argv[3]) // 16
view = [Interval("net/w", kind, 0, torch.ones(size)) for kind in KINDS]
run = saver(LocalStore(Path(sys.argv[2])))

def save_twice():
    for position in (16, 32):
        run.save(position, view, {"optimizer_steps": {"net": 1}, "guard": {}, "order": dataclasses.asdict(ORDER)})
        run.wait()

def load():
    assert restore_newest(run.store, Group(), view, {"net/w": 1000}, ORDER)

print(most(save_twice), run.memory.bytes, most(load))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts a process's largest memory")
def test_saves_take_the_memory_of_one_share_and_a_load_that_of_its_requests(tmp_path: Path) -> None:
    share = 256 * 2**20
    command = [sys.executable, "-c", MEMORY, str(Path(__file__).parent), str(tmp_path), str(share)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    saving, held, loading = map(int, done.stdout.split())
    assert held == share and share <= saving < 1.1 * share
    assert loading < 2 * READ_THREADS * REQUEST_BYTES
