"""R5: damage stored bytes of a run's newest checkpoint: each damage is found by name, and loading falls back past it.

Bits, cuts, additions, zeroed blocks and exchanges, of parts and of the manifest, one at a time and each undone; every
element that is loaded after a fallback is compared with the older checkpoint's own.
"""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path

import torch

from cluster.drills.scoreboard import Score
from cluster.drills.scratch import Scratch
from cluster.faults import DAMAGES, damaged
from data_pipeline.order import OrderState
from data_pipeline.storage import LocalStore
from trainer.checkpoint.inspect import verify_checkpoints
from trainer.checkpoint.load import restore_newest
from trainer.checkpoint.manifest import CheckpointName, Manifest, committed, part_key, read_manifest
from trainer.engine.engine import KINDS, Interval, Kind
from trainer.engine.group import Group

CORRUPTIONS = 200
CHECKPOINTS_KEPT = 3  # an exchange between two damages both

Values = dict[tuple[Kind, str], torch.Tensor]  # (kind, parameter) -> its elements


def run(scratch: Scratch) -> Score:
    store = copy_newest(scratch.store_folder(scratch.whole), scratch.folder / "corrupted")
    return corrupt(store, CORRUPTIONS if scratch.wishes.faults is None else scratch.wishes.faults, scratch.wishes.seed)


def corrupt(store: LocalStore, count: int, seed: int) -> Score:
    """Damage the newest of the store's checkpoints, of which there are CHECKPOINTS_KEPT, so many times."""
    names = committed(store)
    manifests = {name: read_manifest(store, name.manifest_key) for name in names}
    originals = {name: restore(only(store, name), manifests[name])[2] for name in names[1:]}
    newest = keys_of(names[0], manifests[names[0]])
    stored = {key: store.get(key) for name in names[:2] for key in keys_of(name, manifests[name])}
    detected = fell_back = 0
    failures: list[str] = []
    for number in range(count):
        chance = random.Random(f"{seed}-{number}")
        # Every kind of damage meets every object in turn.
        damage, key = DAMAGES[number % len(DAMAGES)], newest[number // len(DAMAGES) % len(newest)]
        # After a refused update a part is what it was before, and to exchange the two would be no damage.
        other = chance.choice([o for o, data in stored.items() if data != stored[key]])
        with damaged(store, key, damage, other, chance) as told:
            named = {bad["part"].rpartition("/")[0] for bad in verify_checkpoints(store.uri)}
            loaded, passed_over, values = restore(store, manifests[names[0]])
        touched = (key, other) if damage == "swapped" else (key,)
        hurt = [name for name in names if any(one.startswith(name.folder) for one in touched)]
        expected = names[len(hurt)]
        if named == {str(name) for name in hurt}:
            detected += 1
        else:
            failures.append(f"{told}: verifying names {sorted(named)}")
        if (loaded, passed_over) == (expected, len(hurt)) and equal(values, originals[expected]):
            fell_back += 1
        else:
            failures.append(f"{told}: loaded {loaded}, expected {expected} whole")
    return Score(count, {"corruptions": count, "detected": detected, "fell_back": fell_back}, failures)


def keys_of(name: CheckpointName, manifest: Manifest) -> list[str]:
    return [name.manifest_key, *(part_key(name, part) for part in manifest.parts)]


def copy_newest(store: Path, to: Path) -> LocalStore:
    """A store with the newest checkpoints of another."""
    for name in committed(LocalStore(store))[:CHECKPOINTS_KEPT]:
        shutil.copytree(store / name.folder, to / name.folder)
    return LocalStore(to)


def only(store: LocalStore, name: CheckpointName) -> LocalStore:
    """A store with one checkpoint of `store`."""
    alone = LocalStore(store.root.with_name(f"{store.root.name}-only-{name.position}"))
    shutil.copytree(store.root / name.folder, alone.root / name.folder)
    return alone


def restore(store: LocalStore, manifest: Manifest) -> tuple[CheckpointName, int, Values]:
    """What a process that starts now loads: checkpoint, how many newer ones it passed over, all values."""
    values = {(kind, name): torch.zeros(size) for name, size in manifest.parameters.items() for kind in KINDS}
    wanted = [Interval(name, kind, 0, flat) for (kind, name), flat in values.items()]
    logging.getLogger("trainer.checkpoint.load").setLevel(logging.ERROR)  # each fallback is a warning there
    found = restore_newest(store, Group(), wanted, manifest.parameters, OrderState(**manifest.order))
    assert found is not None
    return found.name, len(found.passed_over), values


def equal(some: Values, others: Values) -> bool:
    return all(torch.equal(flat, others[place]) for place, flat in some.items())
