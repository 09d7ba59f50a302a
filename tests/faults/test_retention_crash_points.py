"""Retention, stopped at every operation and refused by the store: what stays is readable, and nothing is left over."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from checkpoint_case import orphans, restored, restored_position, save

from data_pipeline.errors import UserError
from data_pipeline.storage import LocalStore
from data_pipeline.storage.crash import Crashed, CrashPointStore
from trainer.checkpoint.attempts import take_attempt
from trainer.checkpoint.inspect import list_checkpoints, verify_checkpoints
from trainer.checkpoint.manifest import CheckpointName, committed, part_key, read_manifest
from trainer.checkpoint.retention import Retention, protect, prune, unprotect
from trainer.checkpoint.sweep import sweep, sweep_by_hand
from trainer.config import CheckpointSettings
from trainer.stop import AttemptEnd, record_end

NEWEST = CheckpointSettings(keep_newest=1)


def refer(store: LocalStore, position: int, to: CheckpointName) -> CheckpointName:
    """Commit what a rollback commits: a manifest at a new position, of another checkpoint's parts."""
    found = read_manifest(store, to.manifest_key)
    parts = tuple(part.model_copy(update={"folder": to.folder}) for part in found.parts)
    name = CheckpointName(position, to.attempt)
    manifest = found.model_copy(update={"position": position, "parts": parts})
    assert store.put_if_absent(name.manifest_key, manifest.encode())
    return name


def copied(past: LocalStore, root: Path) -> LocalStore:
    shutil.copytree(past.root, root)
    return LocalStore(root)


def run_with_a_past(root: Path) -> LocalStore:
    """16, protected; 32; 48; 56, which has the parts of 32; 64."""
    store = LocalStore(root)
    assert take_attempt(store, {"config": {"run": "test"}}) == 1
    for position in (16, 32, 48):
        save(store, 1, position)
    protect(store, CheckpointName(16, 1))
    refer(store, 56, CheckpointName(32, 1))
    save(store, 1, 64)
    return store


def positions(store: LocalStore) -> list[int]:
    return [name.position for name in committed(store)]


def unnamed(store: LocalStore) -> set[str]:
    return {key for key in orphans(store) if not key.startswith(("protected/", "restored/"))}


def test_a_stop_at_any_operation_leaves_whole_checkpoints_and_no_orphan_after_the_sweep(tmp_path: Path) -> None:
    past = run_with_a_past(tmp_path / "past")
    counting = CrashPointStore(copied(past, tmp_path / "count").root)
    retention = Retention(counting, "test", 1, NEWEST)
    retention.after_commit(CheckpointName(64, 1))
    assert positions(counting) == [64, 16] and retention.deleted == 3 and not unnamed(counting)
    assert counting.operations >= 2 * (1 + 3 + 3)  # manifest and two parts; the removal and the flush of the folder
    seen = set()
    for stop_at in range(counting.operations):
        root = copied(past, tmp_path / str(stop_at)).root
        with pytest.raises(Crashed):
            Retention(CrashPointStore(root, stop_at), "test", 1, NEWEST).after_commit(CheckpointName(64, 1))
        store = LocalStore(root)
        assert {64, 16} <= set(positions(store)) and not verify_checkpoints(str(root))
        assert restored_position(store) == 64
        seen.add((tuple(positions(store)), bool(unnamed(store))))
        attempt = take_attempt(store, {"config": {"run": "test"}})
        sweep(store, attempt)
        assert not unnamed(store)
        save(store, attempt, 80)
        Retention(store, "test", attempt, NEWEST).after_commit(CheckpointName(80, attempt))
        assert positions(store) == [80, 16] and not unnamed(store)
    assert ((64, 48, 32, 16), False) in seen and any(left_over for _, left_over in seen)


def test_what_a_kept_manifest_refers_to_is_neither_pruned_nor_swept(tmp_path: Path) -> None:
    store = run_with_a_past(tmp_path)
    two = CheckpointSettings(keep_newest=2)
    rows = prune(store, two, dry_run=True)
    assert positions(store) == [64, 56, 48, 32, 16]
    assert [(row["images"], row["kept"], row["why"]) for row in rows] == [
        (64, True, "newest"),
        (56, True, "newest"),
        (48, False, "no rule keeps it"),
        (32, True, "images-000000056/attempt-1 has parts in it"),
        (16, True, "protected"),
    ]
    assert prune(store, two, dry_run=False) == rows
    assert positions(store) == [64, 56, 32, 16]
    assert prune(store, two, dry_run=False) == [row for row in rows if row["kept"]]

    # Even where the lender's own manifest is gone, its parts are named by the other one.
    store.delete(CheckpointName(32, 1).manifest_key)
    assert sweep(store, take_attempt(store, {"config": {"run": "test"}})) == 0
    store.delete(CheckpointName(64, 1).manifest_key)
    found = restored(store, saved_at=32)
    assert found.name.position == 56
    assert not verify_checkpoints(str(tmp_path))
    (part, *_) = read_manifest(store, found.name.manifest_key).parts
    (tmp_path / part_key(found.name, part)).unlink()
    assert [row["verified"] for row in list_checkpoints(str(tmp_path))] == [False, True]
    assert "56/attempt-1/part-00000" in verify_checkpoints(str(tmp_path))[0]["part"]


class Refusing(LocalStore):
    """Deletes so many objects, then none until `allowed` is set again."""

    allowed = 0

    def delete(self, key: str) -> None:
        if self.allowed == 0:
            raise OSError("deleting is not allowed")
        self.allowed -= 1
        super().delete(key)


def test_a_store_that_refuses_deletes_costs_the_run_nothing_and_is_asked_again(tmp_path: Path) -> None:
    run_with_a_past(tmp_path)
    store = Refusing(tmp_path)
    retention = Retention(store, "test", 1, NEWEST)
    for allowed in range(4):
        store.allowed = allowed
        retention.after_commit(CheckpointName(64, 1))
        assert retention.failures == allowed + 1
        assert not verify_checkpoints(str(tmp_path)) and restored_position(store) == 64
    store.allowed = 99
    retention.after_commit(CheckpointName(64, 1))
    assert retention.failures == 4 and positions(store) == [64, 16] and not unnamed(store)


def test_a_superseded_attempt_removes_nothing(tmp_path: Path) -> None:
    store = run_with_a_past(tmp_path)
    take_attempt(store, {"config": {"run": "test"}})
    Retention(store, "test", 1, NEWEST).after_commit(CheckpointName(64, 1))
    assert positions(store) == [64, 56, 48, 32, 16]


def test_a_sweep_within_an_attempt_takes_what_is_older_than_its_newest_commit(tmp_path: Path) -> None:
    store = run_with_a_past(tmp_path)
    dropped, running = CheckpointName(60, 1).folder, CheckpointName(80, 1).folder
    for folder in (dropped, running):
        store.put(f"{folder}part-00000-of-00002.safetensors", [b"of a save"])
        (tmp_path / folder / f".upload-{'0' * 32}-part-00001-of-00002.safetensors").write_bytes(b"half")
    grid = tmp_path / "samples" / f".upload-{'0' * 32}-grid.png"
    grid.parent.mkdir()
    grid.write_bytes(b"half")
    assert sweep(store, 1, before=64) == 2
    assert not any(key.startswith(dropped) for key in unnamed(store))
    assert len([key for key in unnamed(store) if key.startswith(running)]) == 2 and grid.exists()
    assert positions(store) == [64, 56, 48, 32, 16]

    assert sweep_by_hand(store) == (0, 1)  # attempt 1 may still be running
    record_end(store, AttemptEnd(1, "died", 64, None))
    assert sweep_by_hand(store) == (3, None) and unnamed(store) == {"ended/00001.json"}


def test_protection_names_a_committed_checkpoint_and_can_be_taken_back(tmp_path: Path) -> None:
    store = run_with_a_past(tmp_path)
    protect(store, CheckpointName(16, 1))  # twice is once
    with pytest.raises(UserError, match=r"images-000000017/attempt-1: expected a committed one, found none"):
        protect(store, CheckpointName(17, 1))
    with pytest.raises(UserError, match=r"one that is protected: images-000000016/attempt-1"):
        unprotect(store, CheckpointName(48, 1))
    assert [row["protected"] for row in list_checkpoints(str(tmp_path))] == [False] * 4 + [True]
    unprotect(store, CheckpointName(16, 1))
    prune(store, NEWEST, dry_run=False)
    assert positions(store) == [64]


def test_damage_neither_counts_nor_is_removed_before_its_time(tmp_path: Path) -> None:
    store = run_with_a_past(tmp_path)
    unprotect(store, CheckpointName(16, 1))
    unreadable, cut = CheckpointName(48, 1), CheckpointName(64, 1)
    (tmp_path / unreadable.manifest_key).write_bytes(b"{")
    (tmp_path / cut.folder / "part-00000-of-00002.safetensors").write_bytes(b"cut")
    prune(store, NEWEST, dry_run=False)
    assert positions(store) == [64, 56, 48, 32]  # 56 is the newest that is whole, and has its parts in 32
    assert restored(store, saved_at=32).name.position == 56
    save(store, 1, 80)
    prune(store, NEWEST, dry_run=False)
    assert positions(store) == [80, 48]


def test_what_a_restart_passed_over_does_not_count_though_its_sizes_are_right(tmp_path: Path) -> None:
    store = run_with_a_past(tmp_path)
    part = tmp_path / CheckpointName(64, 1).folder / "part-00001-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\x01")
    attempt = take_attempt(store, {})
    found = restored(store, saved_at=32)
    assert found.name == CheckpointName(56, 1)
    save(store, attempt, 72)
    retention = Retention(store, "test", attempt, CheckpointSettings(keep_newest=2))
    retention.began_from(found.name)
    retention.after_commit(CheckpointName(72, attempt))
    assert positions(store) == [72, 64, 56, 32, 16]  # of the two newest that are whole, 56 needs 32; 16 is protected
    save(store, attempt, 80)
    retention.after_commit(CheckpointName(80, attempt))
    assert positions(store) == [80, 72, 16] and not unnamed(store)


def test_a_checkpoint_that_was_passed_over_never_takes_the_place_of_the_one_made_instead(tmp_path: Path) -> None:
    """By any later attempt, and by hand while the attempt that passed it over has not saved yet."""
    store = run_with_a_past(tmp_path)
    second = take_attempt(store, {"config": {"run": "test"}})
    Retention(store, "test", second, NEWEST).began_from(CheckpointName(56, 1))  # 64 did not verify
    assert [row["kept"] for row in prune(store, NEWEST, dry_run=True)] == [True, True, False, True, True]
    save(store, second, 64)
    third = take_attempt(store, {"config": {"run": "test"}})
    rules = CheckpointSettings(keep_newest=1, keep_every_images=64)
    retention = Retention(store, "test", third, rules)
    retention.began_from(CheckpointName(64, second))
    save(store, third, 80)
    retention.after_commit(CheckpointName(80, third))
    assert committed(store) == [CheckpointName(80, third), CheckpointName(64, second), CheckpointName(16, 1)]


def test_what_is_protected_while_others_are_removed_stays(tmp_path: Path) -> None:
    store = run_with_a_past(tmp_path)
    late = CheckpointName(48, 1)

    class Protecting(LocalStore):
        def delete(self, key: str) -> None:
            protect(LocalStore(tmp_path), late)
            super().delete(key)

    Retention(Protecting(tmp_path), "test", 1, NEWEST).after_commit(CheckpointName(64, 1))
    assert positions(store) == [64, 48, 16]


def test_a_commit_during_a_removal_is_looked_at_when_that_has_ended(tmp_path: Path) -> None:
    store, begun, go_on = run_with_a_past(tmp_path), threading.Event(), threading.Event()

    class Slow(LocalStore):
        def delete(self, key: str) -> None:
            begun.set()
            assert go_on.wait(60)
            super().delete(key)

    retention = Retention(Slow(tmp_path), "test", 1, NEWEST)
    retention.begin(CheckpointName(64, 1))
    assert begun.wait(60)
    save(store, 1, 80)
    retention.begin(CheckpointName(80, 1))
    go_on.set()
    retention.settle(60)
    assert positions(store) == [80, 16]
