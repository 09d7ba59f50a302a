"""The checkpoint protocol, stopped at every operation: nothing unreadable, no orphan after the next attempt's sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_case import attempt_and_save, orphans, restored_position, save

from cluster.drills.crash_points import (
    SIZE,
    WORLD,
    Place,
    checkpoint_protocol,
    drop_folder,
    folder_place,
    order_at,
    stop_everywhere,
)
from data_pipeline.errors import UserError
from data_pipeline.storage import LocalStore
from data_pipeline.storage.crash import CrashPointStore, StoppingStore
from trainer.checkpoint.attempts import newest_attempt, take_attempt
from trainer.checkpoint.load import restore_newest
from trainer.checkpoint.manifest import CheckpointName, committed
from trainer.checkpoint.save import RunIdentity, SaveFailed, Superseded, commit, upload_share
from trainer.checkpoint.sweep import sweep
from trainer.engine.engine import KINDS, Interval
from trainer.engine.group import Group
from trainer.recipes import parse_train_config
from trainer.run import prepare_run


class Undeletable(LocalStore):
    """Deletes nothing while `refuses`."""

    refuses = True

    def delete(self, key: str) -> None:
        if self.refuses:
            raise OSError("deleting is not allowed")
        super().delete(key)


def requests_place(folder: Path) -> Place:
    """As in a bucket: whole writes, done or not, and never answered."""
    numbers = iter(range(10**6))
    return Place("bucket", lambda: LocalStore(folder / f"{next(numbers)}"), StoppingStore, drop_folder)


@pytest.mark.parametrize(("place", "at_least"), [(folder_place, 30), (requests_place, 14)])
def test_a_stop_at_any_operation_leaves_a_readable_run_and_no_orphan_after_the_sweep(
    tmp_path: Path, place: Callable[[Path], Place], at_least: int
) -> None:
    points, failures = stop_everywhere(checkpoint_protocol(), place(tmp_path))
    assert points >= at_least and not failures


def test_a_protocol_that_commits_before_its_parts_are_stored_is_caught(tmp_path: Path) -> None:
    class Hasty(CrashPointStore):
        """Its first part becomes visible after the manifest, by which it seems to be there."""

        def put(self, key: str, chunks: Any) -> None:
            if "part-00000" in key:
                self.late = key, [bytes(chunk) for chunk in chunks]
            else:
                super().put(key, chunks)

        def put_if_absent(self, key: str, data: bytes) -> bool:
            stored = super().put_if_absent(key, data)
            if key.endswith("manifest.json"):
                super().put(*self.late)
            return stored

    hasty = dataclasses.replace(folder_place(tmp_path), stopping=lambda store, at: Hasty(Path(store.uri), at))
    _, failures = stop_everywhere(checkpoint_protocol(), hasty)
    assert any("part-00000-of-00002.safetensors: found no such part" in failure for failure in failures)


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
