"""The checkpoint protocol, stopped at every operation: nothing unreadable, no orphan after the next attempt's sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import UserError
from data_pipeline.order import OrderState
from data_pipeline.storage import LocalStore
from data_pipeline.storage.crash import Crashed, CrashPointStore
from trainer.checkpoint.attempts import newest_attempt, take_attempt
from trainer.checkpoint.inspect import verify_checkpoints
from trainer.checkpoint.load import restore_newest
from trainer.checkpoint.manifest import CheckpointName, committed, read_manifest
from trainer.checkpoint.save import RunIdentity, SaveFailed, Superseded, commit, upload_share
from trainer.checkpoint.sweep import sweep
from trainer.engine.engine import KINDS, Interval
from trainer.engine.group import Group
from trainer.recipes import parse_train_config
from trainer.run import prepare_run

SIZE, WORLD, DATASET = 10, 2, "d" * 64


def save(store: LocalStore, attempt: int, position: int) -> None:
    """A save by two ranks, one after the other, so that every stop is at a known place."""
    identities = [
        RunIdentity(
            run="test",
            attempt=attempt,
            rank=rank,
            world_size=WORLD,
            zero_stage=0,
            parameters={"net/w": SIZE},
            config={},
            code_version="0",
        )
        for rank in range(WORLD)
    ]
    for identity in identities:
        begin, end = SIZE * identity.rank // WORLD, SIZE * (identity.rank + 1) // WORLD
        values = torch.full((end - begin,), float(position))
        upload_share(store, identity, position, [Interval("net/w", kind, begin, values) for kind in KINDS])
    state = {"optimizer_steps": {"net": 1}, "guard": {}, "order": dataclasses.asdict(order_at(position))}
    commit(store, identities[0], position, state, deadline_s=0)


def order_at(position: int) -> OrderState:
    return OrderState(DATASET, "lanes", seed=0, batch=16, lanes=1, position=position)


class Undeletable(LocalStore):
    """Deletes nothing while `refuses`."""

    refuses = True

    def delete(self, key: str) -> None:
        if self.refuses:
            raise OSError("deleting is not allowed")
        super().delete(key)


def attempt_and_save(store: LocalStore, position: int) -> None:
    attempt = take_attempt(store, {})
    sweep(store, attempt)
    save(store, attempt, position)


def restored_position(store: LocalStore) -> int:
    """The position of the newest checkpoint, whose every element must be that number."""
    wanted = [Interval("net/w", kind, 0, torch.zeros(SIZE)) for kind in KINDS]
    found = restore_newest(store, Group(), wanted, {"net/w": SIZE}, order_at(0))
    assert found is not None
    for interval in wanted:
        assert interval.values.tolist() == [float(found.name.position)] * SIZE
    return found.name.position


def orphans(store: LocalStore) -> set[str]:
    """Files that no manifest names and that are no attempt."""
    owned = set()
    for name in committed(store):
        owned |= {name.manifest_key}
        owned |= {name.folder + part.file for part in read_manifest(store, name.manifest_key).parts}
    files = {path.relative_to(store.root).as_posix() for path in store.root.rglob("*") if path.is_file()}
    return {file for file in files - owned if not (file.startswith("attempts/") and file.endswith(".json"))}


def operations_of_a_save(folder: Path) -> int:
    attempt_and_save(LocalStore(folder), 16)
    counting = CrashPointStore(folder)
    attempt_and_save(counting, 32)
    return counting.operations


def test_a_stop_at_any_operation_leaves_a_readable_run_and_no_orphan_after_the_sweep(tmp_path: Path) -> None:
    operations = operations_of_a_save(tmp_path / "count")
    assert operations >= 30
    seen = set()
    for stop_at in range(operations):
        root = tmp_path / str(stop_at)
        attempt_and_save(LocalStore(root), 16)
        with pytest.raises(Crashed):
            attempt_and_save(CrashPointStore(root, stop_at), 32)
        store = LocalStore(root)
        seen.add(restored_position(store))
        assert not verify_checkpoints(str(root))
        attempt = take_attempt(store, {})
        sweep(store, attempt)
        assert orphans(store) == set()
        assert restored_position(store) in (16, 32)
        save(store, attempt, 32)
        assert committed(store)[0] == CheckpointName(32, attempt)
        assert restored_position(store) == 32
    assert seen == {16, 32}


def test_a_writer_that_sees_a_higher_attempt_does_not_commit(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    attempt_and_save(store, 16)
    assert take_attempt(store, {}) == newest_attempt(store) == 2
    with pytest.raises(Superseded, match="found attempt 2"):
        save(store, 1, 32)
    assert committed(store) == [CheckpointName(16, 1)]
    assert sweep(store, 2) == 4  # two parts, two receipts
    assert orphans(store) == set()


def test_a_sweep_touches_neither_its_own_attempt_nor_a_damaged_checkpoint(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    attempt_and_save(store, 16)
    (tmp_path / CheckpointName(16, 1).manifest_key).write_bytes(b"{")
    store.put(CheckpointName(48, 2).folder + "part-00000-of-00002.safetensors", [b"being written"])
    assert sweep(store, 2) == 0


class DisagreeingGroup(Group):
    """This rank loads; another one does not, the first `times`."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def all_agree(self, good: bool) -> bool:
        self.times -= 1
        return good and self.times < 0


def test_damage_that_only_another_rank_sees_makes_this_one_fall_back_too_and_say_so(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for position in (16, 32):
        attempt_and_save(store, position)
    wanted = [Interval("net/w", kind, 0, torch.zeros(SIZE)) for kind in KINDS]
    found = restore_newest(store, DisagreeingGroup(1), wanted, {"net/w": SIZE}, order_at(0))
    assert found is not None and found.name.position == 16
    assert "images-000000032/attempt-2: another rank found it damaged" in found.passed_over[0]
    with pytest.raises(UserError, match="found 2 that do not"):
        restore_newest(store, DisagreeingGroup(2), wanted, {"net/w": SIZE}, order_at(0))


def test_a_checkpoint_of_another_order_is_refused_by_name(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    attempt_and_save(store, 16)
    other = dataclasses.replace(order_at(0), algorithm="lanes-2")
    with pytest.raises(UserError, match="expected algorithm lanes, found algorithm lanes-2"):
        restore_newest(store, Group(), [], {"net/w": SIZE}, other)


def test_a_manifest_that_is_committed_while_the_sweep_looks_keeps_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that was superseded after it had looked for a higher one."""
    store = LocalStore(tmp_path)
    attempt_and_save(store, 16)
    take_attempt(store, {})
    listing = store.list

    def list_then_commit(prefix: str = "") -> Any:
        found = list(listing(prefix))
        if not committed_late and prefix == "checkpoints/":
            committed_late.append(True)
            monkeypatch.setattr("trainer.checkpoint.save.newest_attempt", lambda store: 1)
            save(store, 1, 32)
        return iter(found)

    committed_late: list[bool] = []
    monkeypatch.setattr(store, "list", list_then_commit)
    sweep(store, 2)
    assert committed_late and restored_position(store) == 32


def test_a_missing_receipt_fails_the_save_and_names_the_rank(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    identity = RunIdentity(
        run="test",
        attempt=1,
        rank=0,
        world_size=WORLD,
        zero_stage=0,
        parameters={"net/w": SIZE},
        config={},
        code_version="0",
    )
    upload_share(store, identity, 16, [Interval("net/w", "master", 0, torch.zeros(5))])
    with pytest.raises(SaveFailed, match="expected a receipt from rank 1 in 0 s, found none"):
        commit(store, identity, 16, {}, deadline_s=0)
    assert committed(store) == []


def test_a_store_that_refuses_deletes_costs_neither_a_checkpoint_nor_a_start(
    tmp_path: Path,
    train_values: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Undeletable(tmp_path)
    config = parse_train_config(train_values(), "test")
    monkeypatch.setattr("trainer.run.open_store", lambda uri: store)
    assert prepare_run(config) == 1
    save(store, 1, 16)
    assert restored_position(store) == 16 and "receipts of images-" in caplog.text
    assert prepare_run(config) == 2 and "leftovers of earlier attempts stay for now: deleting" in caplog.text
    store.refuses = False
    assert prepare_run(config) == 3 and not orphans(store)


def test_a_sweep_leaves_uploads_that_are_not_the_runs(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    take_attempt(store, {"config": {}})
    foreign = tmp_path / "datasets" / "abc" / f".upload-{'0' * 32}-shard-00000.arrow"
    own = tmp_path / "samples" / f".upload-{'0' * 32}-grid.png"
    for path in (foreign, own):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")
    assert sweep(store, 1) == 1
    assert foreign.exists() and not own.exists()
