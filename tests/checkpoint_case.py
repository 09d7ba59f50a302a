"""Checkpoints that are quickly made, for tests of what becomes of them: two ranks, one parameter, values that tell the
position they were saved at."""

from __future__ import annotations

import torch

from cluster.drills import crash_points
from cluster.drills.crash_points import SIZE, order_at
from data_pipeline.storage import LocalStore
from trainer.checkpoint.attempts import take_attempt
from trainer.checkpoint.load import Restored, restore_newest
from trainer.checkpoint.manifest import committed, part_key, read_manifest
from trainer.checkpoint.sweep import sweep
from trainer.engine.engine import KINDS, Interval
from trainer.engine.group import Group

RUN = "test"


def save(store: LocalStore, attempt: int, position: int) -> None:
    crash_points.save(store, attempt, position, RUN)


def attempt_and_save(store: LocalStore, position: int) -> None:
    attempt = take_attempt(store, {"config": {"run": RUN}})
    sweep(store, attempt)
    save(store, attempt, position)


def restored(store: LocalStore, saved_at: int | None = None) -> Restored:
    """What the newest checkpoint restores. Every element must be its position, or `saved_at` where it refers to parts
    of another one."""
    wanted = [Interval("net/w", kind, 0, torch.zeros(SIZE)) for kind in KINDS]
    found = restore_newest(store, Group(), wanted, {"net/w": SIZE}, order_at(0))
    assert found is not None
    for interval in wanted:
        assert interval.values.tolist() == [float(saved_at or found.name.position)] * SIZE
    return found


def restored_position(store: LocalStore) -> int:
    """The position of the newest checkpoint, whose every element must be that number."""
    return restored(store).name.position


def orphans(store: LocalStore) -> set[str]:
    """Files that no manifest names and that are no attempt."""
    owned = set()
    for name in committed(store):
        owned |= {name.manifest_key}
        owned |= {part_key(name, part) for part in read_manifest(store, name.manifest_key).parts}
    files = {path.relative_to(store.root).as_posix() for path in store.root.rglob("*") if path.is_file()}
    return {file for file in files - owned if not (file.startswith("attempts/") and file.endswith(".json"))}
