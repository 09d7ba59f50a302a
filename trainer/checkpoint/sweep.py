"""Sweep: remove what saves that never committed left behind.

Always holds: nothing that a committed manifest names is touched, in whatever folder it lies; a manifest that cannot be
read keeps its whole folder. What is left over is told by owner and age, and no clock is asked: a new attempt ends the
one before, and saves of an attempt follow each other, so what is older than its newest commit is over.
Called by the driver that took an attempt, after a commit, and by `glidepath checkpoints sweep`.
"""

from __future__ import annotations

from data_pipeline.storage import ObjectStore
from trainer.checkpoint.attempts import ATTEMPTS, newest_attempt, number_of
from trainer.checkpoint.manifest import (
    CHECKPOINTS,
    CheckpointName,
    OtherFormat,
    committed,
    name_of_key,
    part_key,
    read_manifest,
)
from trainer.checkpoint.parts import CheckpointDamaged
from trainer.stop import read_end


def sweep(store: ObjectStore, attempt: int, before: int | None = None) -> int:
    """Delete the orphans of attempts below `attempt`, and its own of saves at positions below `before`; how many
    objects. `before`: the position of a commit of its own; None: the attempt has only been taken."""

    def left_over(name: CheckpointName) -> bool:
        return name.attempt < attempt or (before is not None and name.attempt == attempt and name.position < before)

    # First the files, then who owns them: a manifest that an old attempt commits meanwhile must still keep its parts.
    files_there = list(store.list(CHECKPOINTS))
    keys, folders = _owned(store)
    swept = 0
    for info in files_there:
        name = name_of_key(info.key)
        if name is not None and left_over(name) and info.key not in keys and name not in folders:
            store.delete(info.key)
            swept += 1

    def ours_to_take(key: str) -> bool:
        name = name_of_key(key)
        if name is not None:
            return left_over(name)
        if key.startswith(ATTEMPTS):  # a driver that starts right now writes the record of a higher attempt
            return number_of(key) <= attempt
        # A stop may be asked for right now; whatever else lies here is not this run's. These do not say whose they
        # are: only before an attempt begins is none of them under way.
        return before is None and key.startswith(("samples/", "skipped/", "tracking/", "driver/"))

    return swept + store.sweep_uploads("", ours_to_take)


def sweep_by_hand(store: ObjectStore) -> tuple[int, int | None]:
    """Delete what is left over for sure, by somebody who holds no attempt: all orphans once the newest attempt has
    ended, until then not what it may be writing. (objects deleted, the attempt that has not ended or None)."""
    attempt = newest_attempt(store)
    if read_end(store, attempt) is not None:
        return sweep(store, attempt + 1), None
    own = (name.position for name in committed(store) if name.attempt == attempt)
    return sweep(store, attempt, max(own, default=0)), attempt


def _owned(store: ObjectStore) -> tuple[frozenset[str], frozenset[CheckpointName]]:
    """Keys that committed manifests name, their own included; and checkpoints of which nothing can be said."""
    keys, unreadable = set(), set()
    for name in committed(store):
        try:
            keys |= {part_key(name, part) for part in read_manifest(store, name.manifest_key).parts}
        except (CheckpointDamaged, OtherFormat):
            unreadable.add(name)
        keys.add(name.manifest_key)
    return frozenset(keys), frozenset(unreadable)
