"""Checkpoints in S3, through the code that knows nothing of S3: saved, listed, verified, restored, swept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from data_pipeline.order import OrderState
from data_pipeline.storage import open_store, s3
from trainer.checkpoint.attempts import newest_attempt, take_attempt
from trainer.checkpoint.inspect import list_checkpoints, verify_checkpoints
from trainer.checkpoint.load import Restored, restore_newest
from trainer.checkpoint.manifest import name_of_key
from trainer.checkpoint.retention import prune
from trainer.checkpoint.save import RunIdentity, Saver
from trainer.checkpoint.sweep import sweep
from trainer.config import CheckpointSettings
from trainer.engine.engine import KINDS, Interval
from trainer.engine.group import Group

SIZE = 2**20
ORDER = OrderState("d" * 64, "lanes", seed=0, batch=16, lanes=1, position=0)


def saver(uri: str, deadline_s: float = 60.0) -> Saver:
    store = open_store(uri)
    identity = RunIdentity(
        run="test",
        attempt=take_attempt(store, {"config": {}}),
        rank=0,
        world_size=1,
        zero_stage=0,
        parameters={"net/w": SIZE},
        config={},
        code_version="0",
    )
    sweep(store, identity.attempt)
    return Saver(store, identity, deadline_s)


def save(to: Saver, position: int) -> None:
    view = [Interval("net/w", kind, 0, torch.full((SIZE,), float(position))) for kind in KINDS]
    order = dataclasses.asdict(dataclasses.replace(ORDER, position=position))
    to.save(position, view, {"optimizer_steps": {"net": 1}, "guard": {}, "order": order})


def restored(uri: str) -> Restored:
    wanted = [Interval("net/w", kind, 0, torch.zeros(SIZE)) for kind in KINDS]
    found = restore_newest(open_store(uri), Group(), wanted, {"net/w": SIZE}, ORDER)
    assert found is not None
    for interval in wanted:
        assert interval.values.eq(float(found.name.position)).all()
    return found


def test_a_run_saves_restores_and_falls_back_past_damage_in_a_bucket(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)  # so that a part of the checkpoint goes up in several
    first = saver(s3_uri)
    for position in (16, 32):
        save(first, position)
        first.wait()
    assert restored(s3_uri).name.position == 32
    assert [row["images"] for row in list_checkpoints(s3_uri) if row["verified"]] == [32, 16]
    assert not verify_checkpoints(s3_uri)

    store = open_store(s3_uri)
    key = next(info.key for info in store.list() if "images-000000032" in info.key and "safetensors" in info.key)
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 1
    store.put(key, [data])
    found = restored(s3_uri)
    assert found.name.position == 16 and len(found.passed_over) == 1
    assert len(verify_checkpoints(s3_uri)) >= 1

    second = saver(s3_uri)
    save(second, 48)
    second.wait()
    assert newest_attempt(store) == 2 and restored(s3_uri).name == second.committed

    rows = prune(store, CheckpointSettings(keep_newest=1), dry_run=False)
    assert [(row["images"], row["kept"]) for row in rows] == [(48, True), (32, False), (16, False)]
    assert {name_of_key(info.key) for info in store.list("checkpoints/")} == {second.committed}
    assert not verify_checkpoints(s3_uri)


def test_a_save_into_a_store_that_is_away_costs_that_save_alone(
    moto_uri: str, faulty_link: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PATIENCE_S", 0.2)
    run = saver(moto_uri, deadline_s=1.0)
    link = faulty_link()
    link.refuse_next = 10**6
    save(run, 16)
    failed = run.settle()
    assert failed is not None and "no answer from 127.0.0.1" in str(failed)
    link.refuse_next = 0
    run.deadline_s = 60.0
    save(run, 32)
    assert run.settle() is None and run.failures == 1
    assert restored(moto_uri).name.position == 32
