"""Checkpoints that are not what they should be: named, passed over for the newest that is whole, nothing else lost.

That another dataset is refused with both ids is tested in `tests/cluster/test_command_line.py`, damage found in a real
run in `tests/end_to_end/test_training.py`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_case import SIZE, attempt_and_save, order_at, save

from data_pipeline.manifests import seal, unseal
from data_pipeline.storage import LocalStore
from trainer.checkpoint.inspect import list_checkpoints, verify_checkpoints
from trainer.checkpoint.load import restore_newest
from trainer.checkpoint.manifest import CheckpointName
from trainer.checkpoint.retention import prune
from trainer.config import CheckpointSettings
from trainer.engine.engine import KINDS, Interval
from trainer.engine.group import Group

OLD, NEW = CheckpointName(16, 1), CheckpointName(32, 2)
PARTS = ("part-00000-of-00002.safetensors", "part-00001-of-00002.safetensors")
Spoil = Callable[[Path, Path], None]  # given the folder of the newest checkpoint, and the one before it


def truncated(new: Path, old: Path) -> None:
    (new / PARTS[1]).write_bytes((new / PARTS[1]).read_bytes()[:-4])


def emptied(new: Path, old: Path) -> None:
    (new / PARTS[0]).write_bytes(b"")


def missing(new: Path, old: Path) -> None:
    (new / PARTS[1]).unlink()


def swapped(new: Path, old: Path) -> None:
    first, second = ((new / part).read_bytes() for part in PARTS)
    assert len(first) == len(second)
    (new / PARTS[0]).write_bytes(second)
    (new / PARTS[1]).write_bytes(first)


def stale(new: Path, old: Path) -> None:
    assert (new / PARTS[0]).stat().st_size == (old / PARTS[0]).stat().st_size
    shutil.copy(old / PARTS[0], new / PARTS[0])


def foreign(new: Path, old: Path) -> None:
    other = LocalStore(new.parent / "other-run")
    save(other, 2, 64)
    shutil.copy(other.root / CheckpointName(64, 2).folder / PARTS[1], new / PARTS[1])
    shutil.rmtree(other.root)


def resealed(manifest: Path, **changes: Any) -> None:
    document = unseal(manifest.read_bytes())
    del document["sha256"]
    manifest.write_bytes(seal(document | changes))


def unknown_fields(new: Path, old: Path) -> None:
    resealed(new / "manifest.json", guards={}, zeal=3)


def of_another_run(new: Path, old: Path) -> None:
    """As if its folder had been copied here: whole, of the same model and dataset."""
    resealed(new / "manifest.json", run="other")


def of_an_older_checkpoint(new: Path, old: Path) -> None:
    for file in old.iterdir():
        shutil.copy(file, new / file.name)


def cut_manifest(new: Path, old: Path) -> None:
    (new / "manifest.json").write_bytes((new / "manifest.json").read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (truncated, rf"{PARTS[1]} block 0: expected \d+ bytes, found \d+ bytes"),
        (emptied, rf"{PARTS[0]} block 0: expected \d+ bytes, found 0 bytes"),
        (missing, rf"{PARTS[1]}: expected \d+ bytes, found no such part"),
        (swapped, rf"{PARTS[0]} block 0: expected crc32 [0-9a-f]{{8}}, found [0-9a-f]{{8}}"),
        (stale, rf"{PARTS[0]} block 0: expected crc32 [0-9a-f]{{8}}, found [0-9a-f]{{8}}"),
        (foreign, rf"{PARTS[1]} block 0: expected crc32 [0-9a-f]{{8}}, found [0-9a-f]{{8}}"),
        (unknown_fields, "manifest.json: expected the keys of glidepath-checkpoint-3, found unknown key guards, zeal"),
        (of_another_run, "manifest.json: expected one of run test, found one of run other"),
        (of_an_older_checkpoint, f"manifest.json: expected that of {NEW}, found that of {OLD}"),
        (cut_manifest, "manifest.json: expected canonical JSON with its sha256, found other bytes"),
    ],
)
def test_a_bad_checkpoint_is_named_and_passed_over_and_nothing_else_is_lost(
    spoil: Spoil, named: str, tmp_path: Path
) -> None:
    store = LocalStore(tmp_path)
    attempt_and_save(store, 16)
    attempt_and_save(store, 32)
    assert verify_checkpoints(store.uri) == []
    spoil(tmp_path / NEW.folder, tmp_path / OLD.folder)
    spoiled = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    wanted = [Interval("net/w", kind, 0, torch.zeros(SIZE)) for kind in KINDS]
    found = restore_newest(store, Group(), wanted, {"net/w": SIZE}, order_at(0), run="test")
    assert found is not None and found.name == OLD
    assert all(interval.values.eq(16.0).all() for interval in wanted)
    (line,) = found.passed_over
    assert re.fullmatch(rf"checkpoint {NEW}: {named}; trying {OLD}", line), line

    bad = verify_checkpoints(store.uri)
    assert {entry["part"].split(" ")[0] for entry in bad} <= {f"{NEW}/{part}" for part in (*PARTS, "manifest.json")}
    lines = [f"{one['part']}: expected {one['expected']}, found {one['found']}" for one in bad]
    assert any(re.fullmatch(f"{NEW}/{named}", line) for line in lines), lines
    rows = list_checkpoints(store.uri)
    assert [row["images"] for row in rows] == [32, 16] and rows[1]["verified"]
    # It neither counts as the newest, nor is it taken away from whoever may repair it.
    whole_by_size = spoil in (swapped, stale, foreign)
    stay = {row["images"]: row["kept"] for row in prune(store, CheckpointSettings(keep_newest=1), dry_run=True)}
    assert stay == {32: True, 16: not whole_by_size}
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == spoiled
