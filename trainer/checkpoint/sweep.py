"""Sweep: remove what saves that never committed left behind.

Always holds: nothing that a committed manifest names is touched, nor anything of the current or a later attempt; a
manifest that cannot be read keeps its whole folder.
"""

from __future__ import annotations

from data_pipeline.storage import ObjectStore
from trainer.checkpoint.attempts import ATTEMPTS, number_of
from trainer.checkpoint.manifest import CHECKPOINTS, CheckpointName, committed, name_of_key, read_manifest
from trainer.checkpoint.parts import CheckpointDamaged


def sweep(store: ObjectStore, attempt: int) -> int:
    """Delete the orphans of attempts below `attempt`; how many objects. Called by the driver that holds `attempt`."""
    # First the files, then who owns them: a manifest that an old attempt commits meanwhile must still keep its parts.
    files_there = list(store.list(CHECKPOINTS))
    kept = {name: _files_of(store, name) for name in committed(store)}
    swept = 0
    for info in files_there:
        name = name_of_key(info.key)
        if name is None or name.attempt >= attempt:
            continue
        files = kept.get(name, frozenset())
        if files is not None and info.key.removeprefix(name.folder) not in files:
            store.delete(info.key)
            swept += 1

    def ours_to_take(key: str) -> bool:
        name = name_of_key(key)
        if name is not None:
            return name.attempt < attempt
        if key.startswith(ATTEMPTS):  # a driver that starts right now writes the record of a higher attempt
            return number_of(key) <= attempt
        # A stop may be asked for right now; whatever else lies here is not this run's.
        return key.startswith(("samples/", "tracking/"))

    return swept + store.sweep_uploads("", ours_to_take)


def _files_of(store: ObjectStore, name: CheckpointName) -> frozenset[str] | None:
    """File names that a committed checkpoint owns; None when its manifest is damaged and nothing can be said."""
    try:
        return frozenset({"manifest.json", *(part.file for part in read_manifest(store, name.manifest_key).parts)})
    except CheckpointDamaged:
        return None
