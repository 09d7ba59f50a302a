"""Rollback and quarantine: in one process with a net of 112 parameters, then on two ranks (rollback_ranks.py)."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_recipe import SmallRecipe
from torch import Tensor, nn

from cluster.drills.bad_gradients import FLAT, poisoned
from data_pipeline.draws import Draws
from data_pipeline.errors import UserError
from data_pipeline.loader import MicroBatch
from data_pipeline.shards import open_dataset
from data_pipeline.storage import LocalStore, StoreError
from trainer.checkpoint.inspect import verify_checkpoints
from trainer.checkpoint.manifest import CheckpointName, Manifest, committed, read_manifest
from trainer.checkpoint.retention import prune
from trainer.checkpoint.save import SaveFailed, Saver
from trainer.checkpoint.sweep import sweep
from trainer.config import CheckpointSettings, TrainConfig
from trainer.engine.group import Group
from trainer.loop import TrainingLoop
from trainer.quarantine import SKIPPED, SkipList, Skipped, read_skipped
from trainer.recipes import RECIPES, parse_train_config
from trainer.recipes.recipe import Batch, Losses
from trainer.run import prepare_run, train

BATCH, WORLD_SIZE = 16, 2
GUARD = {"warmup": 2, "window": 6, "rollback_after": 2, "halt_after": 1}

Values = Callable[..., dict[str, Any]]


class Sick(SmallRecipe):
    """Its loss is no number at the positions in `bad`; elsewhere it counts a picture by the inverse of its contrast."""

    bad: tuple[range, ...] = ()

    def loss(self, parts: Mapping[str, nn.Module], batch: Batch, draws: Draws) -> Losses:
        factors = [math.nan if any(at in some for some in self.bad) else 1.0 for at in draws.positions.tolist()]
        total: Tensor = super().loss(parts, batch, draws)["total"]
        return {"total": total * torch.tensor(factors) / batch["clean"].std(dim=1)}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setitem(RECIPES, "small", (TrainConfig, Sick))
    monkeypatch.setattr(Sick, "bad", ())
    polled = Saver.poll

    def poll_once_saved(self: Saver) -> SaveFailed | None:
        if self._save is not None:
            self._save.thread.join()
        return polled(self)

    # These steps take no time, so saves would be put off, now this one and now that; a rollback goes to the newest.
    monkeypatch.setattr(Saver, "poll", poll_once_saved)


def values_of(train_values: Values, run: str, **changes: Any) -> dict[str, Any]:
    settings = {"recipe": "small", "batch": BATCH, "images": 10 * BATCH, "guard": GUARD, "model": None, **changes}
    values = train_values(run, **settings)
    return {key: value for key, value in values.items() if key != "caption_dropout"}


def run(values: dict[str, Any]) -> tuple[LocalStore, list[dict[str, Any]]]:
    """One attempt on one rank; the run's store, and what it reported."""
    events: list[dict[str, Any]] = []
    config = parse_train_config(values, "test")
    train(config.model_dump(mode="json"), prepare_run(config), Group(), events.append)
    return LocalStore(Path(values["store"])), events


def manifest_at(store: LocalStore, images: int) -> tuple[CheckpointName, Manifest]:
    name = next(name for name in committed(store) if name.position == images)
    return name, read_manifest(store, name.manifest_key)


def windows(store: LocalStore) -> list[tuple[str, int, int]]:
    return [(row["kind"], row["begin"] // BATCH, row["end"] // BATCH) for row in read_skipped(store)]


def test_a_rollback_commits_the_older_state_at_the_new_position_before_the_next_step(
    train_values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sick, "bad", (range(5 * BATCH, 7 * BATCH),))
    # It ends where it rolls back.
    store, events = run(values_of(train_values, "whole", images=7 * BATCH, checkpoint={"every_images": 2 * BATCH}))
    older, older_manifest = manifest_at(store, 4 * BATCH)
    name, manifest = manifest_at(store, 7 * BATCH)
    assert [part.folder for part in manifest.parts] == [older.folder]
    digests = [[part.digest for part in one.parts] for one in (manifest, older_manifest)]
    assert digests[0] == digests[1]
    assert (manifest.optimizer_steps, manifest.recipe_state) == ({"net": 4}, {"updates": 4})
    history, before = manifest.guard["net"], older_manifest.guard["net"]
    assert history["losses"] == before["losses"] and (history["rollbacks"], history["furthest"]) == (1, 5)
    assert manifest.order == older_manifest.order | {"position": 7 * BATCH}
    assert windows(store) == [("rollback", 4, 7), ("skip", 5, 6)]
    assert [event["to"] for event in events if event["event"] == "rollback"] == [str(older)]

    assert not verify_checkpoints(store.uri)
    files = {path for path in store.root.rglob("*") if path.is_file()}
    assert sweep(store, 2) == 0
    rows = prune(store, CheckpointSettings(keep_newest=1), dry_run=False)
    assert {row["uri"].split("checkpoints/")[1]: row["why"] for row in rows if row["kept"]} == {
        str(name): "newest",
        str(older): f"{name} has parts in it",
    }
    gone = {path for path in files if not path.exists()}
    assert gone and all("images-000000032" in path.as_posix() for path in gone)
    part = store.root / older.folder / older_manifest.parts[0].file
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    assert {bad["part"].split("/part-")[0] for bad in verify_checkpoints(store.uri)} == {str(name), str(older)}


def test_a_resume_from_a_rollback_ends_as_the_run_that_was_not_interrupted_to_the_bit(
    train_values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sick, "bad", (range(5 * BATCH, 7 * BATCH),))
    ends = []
    for name, stops in (("whole", (10,)), ("interrupted", (7, 10))):
        for updates in stops:
            # Retention as tight as it gets: what was gone back to stays as long as it is referred to.
            checkpoint = {"every_images": BATCH, "keep_newest": 1}
            store, events = run(values_of(train_values, name, images=updates * BATCH, checkpoint=checkpoint))
            assert not verify_checkpoints(store.uri)
        _, manifest = manifest_at(store, 10 * BATCH)
        assert all(part.folder is None for part in manifest.parts)
        ends.append(([part.digest for part in manifest.parts], manifest.guard, manifest.recipe_state))
    assert ends[0] == ends[1]
    assert ends[0][2] == {"updates": 8}
    assert [event["images"] for event in events if event["event"] == "progress"] == [8 * BATCH, 9 * BATCH, 10 * BATCH]


def test_without_a_checkpoint_the_run_goes_back_to_its_seed(
    train_values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sick, "bad", (range(2 * BATCH, 4 * BATCH),))
    parents = values_of(train_values, "parent", images=BATCH)
    run(parents)
    for start in ({}, {"parent": parents["store"]}):
        values = values_of(train_values, f"child-{len(start)}", images=4 * BATCH, checkpoint={"every_images": 10_000})
        store, _ = run(values | start)
        name, manifest = manifest_at(store, 4 * BATCH)
        assert windows(store) == [("rollback", 0, 4), ("skip", 2, 3)]
        assert (manifest.optimizer_steps, manifest.recipe_state) == ({"net": 0}, {"updates": 0})
        assert manifest.guard["net"]["accepted"] == 0
        fresh, _ = run(values_of(train_values, f"fresh-{len(start)}", images=BATCH, lr=1e-30) | start)
        assert stored_values(store, name, "master") == pytest.approx(
            stored_values(fresh, manifest_at(fresh, BATCH)[0], "master"), rel=1e-6
        )


def stored_values(store: LocalStore, name: CheckpointName, kind: str) -> list[float]:
    from safetensors.numpy import load_file

    (file,) = (store.root / name.folder).glob("part-*.safetensors")
    return [float(x) for key, found in sorted(load_file(file).items()) if key.startswith(kind) for x in found]


def test_a_store_that_fails_what_a_rollback_commits_costs_a_checkpoint_and_not_the_run(
    train_values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_if_absent = LocalStore.put_if_absent

    def fails_the_main_thread(self: LocalStore, key: str, data: bytes) -> bool:
        # What refers to another checkpoint is committed there, a save of the usual kind behind the training's back.
        if "checkpoints/images-" in key and threading.current_thread() is threading.main_thread():
            raise StoreError(key, "the disk is on fire")
        return put_if_absent(self, key, data)

    monkeypatch.setattr(LocalStore, "put_if_absent", fails_the_main_thread)
    monkeypatch.setattr(Sick, "bad", (range(5 * BATCH, 7 * BATCH),))
    checkpoint = {"every_images": 2 * BATCH, "deadline_s": 0.2}
    store, events = run(values_of(train_values, "failing", checkpoint=checkpoint))
    (result,) = [event for event in events if event["event"] == "result"]
    assert (result["failed_saves"], result["images"]) == (1, 10 * BATCH)
    _, manifest = manifest_at(store, 7 * BATCH)
    assert all(part.folder is None for part in manifest.parts) and manifest.recipe_state == {"updates": 4}
    assert manifest_at(store, 10 * BATCH)[1].recipe_state == {"updates": 7}
    assert not verify_checkpoints(store.uri)


def test_a_run_whose_older_checkpoints_are_gone_ends_and_says_so(
    train_values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sick, "bad", (range(3 * BATCH, 9 * BATCH),))
    # The last save comes whatever the guard doubts, and here the only older one is taken away.
    store, _ = run(values_of(train_values, "gone", images=4 * BATCH))
    for name in committed(store):
        if name.position < 4 * BATCH:
            store.delete(name.manifest_key)
    with pytest.raises(UserError, match=r"a checkpoint of at most 48 images to go back to, found none before"):
        run(values_of(train_values, "gone"))


def test_a_run_that_rollbacks_bring_no_further_halts(train_values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sick, "bad", (range(3 * BATCH, 9 * BATCH),))
    with pytest.raises(UserError, match=r"run halts, part net, at 96 images: .* within 1 rollbacks.*in a row"):
        run(values_of(train_values, "halts"))


@pytest.fixture(scope="session")
def poisoned_uri(dataset_uri: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The dataset with flat pictures in shard 1."""
    output = str(tmp_path_factory.mktemp("poisoned"))
    poisoned(open_dataset(dataset_uri), 1, FLAT, output)
    return output


def test_a_poisoned_shard_is_found_and_other_rows_take_its_place_also_after_a_resume(
    train_values: Values, poisoned_uri: str
) -> None:
    changes = {"dataset": poisoned_uri, "checkpoint": {"every_images": 2 * BATCH}}
    store, events = run(values_of(train_values, "poisoned", **changes))
    dataset = open_dataset(poisoned_uri)
    (row,) = [row for row in read_skipped(store) if row["kind"] == "quarantine"]
    assert (row["dataset"], row["shard"], row["attempt"]) == (dataset.id, "shard-00001", 1)
    assert windows(store) == [("skip", 0, 1), ("quarantine", 0, 2), ("rollback", 0, 2)]
    assert manifest_at(store, 10 * BATCH)[1].order["quarantined"] == [1]
    (result,) = [event for event in events if event["event"] == "result"]
    assert result["substituted_rows"] > 0

    resumed, _ = run(values_of(train_values, "resumed", images=4 * BATCH, **changes))
    run(values_of(train_values, "resumed", **changes))
    assert consumed(resumed) == consumed(store)
    bad = {int(one) for one in dataset.shard("base", 1).batch(0).column("id").to_pylist()}
    assert all(bad & set(ids) for at, ids in consumed(store) if at < 2 * BATCH)
    assert not any(bad & set(ids) for at, ids in consumed(store) if at >= 2 * BATCH)
    digests = [[part.digest for part in manifest_at(one, 10 * BATCH)[1].parts] for one in (store, resumed)]
    assert digests[0] == digests[1]


def consumed(store: LocalStore) -> list[tuple[int, list[int]]]:
    lines = map(json.loads, (store.root / "tracking" / "consumed.jsonl").read_text().splitlines())
    return [(line["position"], line["ids"]) for line in lines]


def test_what_was_skipped_is_listed_once_and_a_damaged_record_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first = Skipped("skip", 16, 32, "loss is nan", 1, "net")
    for attempt in (1, 2):  # a resumed run skips it again
        again = SkipList(store)
        again.add(dataclasses.replace(first, attempt=attempt))
        again.write()
    assert read_skipped(store) == [dataclasses.asdict(first)]
    store.put(f"{SKIPPED}images-000000064-000000080-skip-net.json", [b'{"kind": "skip"}'])
    with pytest.raises(UserError, match=r"skipped/images-000000064.*a JSON record"):
        read_skipped(store)


RanksOf = Callable[..., dict[str, Any]]


@pytest.fixture
def ranks_of(poisoned_uri: str, tiny_model: dict[str, Any], tmp_path: Path) -> RanksOf:
    """What rollback_ranks.py finds on two ranks at the ZeRO stages it is called with."""
    return partial(found_on_ranks, poisoned_uri, tiny_model, tmp_path)


def found_on_ranks(poisoned_uri: str, tiny_model: dict[str, Any], folder: Path, *stages: str) -> dict[str, Any]:
    values = {
        "recipe": "glide_base",
        "dataset": poisoned_uri,
        "images": 6 * BATCH,
        "batch": BATCH,
        "micro_batch": 8,
        "lr": 1e-3,
        "model": tiny_model,
        "checkpoint": {"every_images": BATCH},
        "guard": GUARD | {"halt_after": 5},
        "tracking": {"consumed_ids": True},
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HOME": str(folder)}
    script = Path(__file__).with_name("rollback_ranks.py")
    processes = []
    for rank in range(WORLD_SIZE):
        command = [sys.executable, str(script), str(rank), str(WORLD_SIZE), str(folder), json.dumps(values), *stages]
        with (folder / f"rank-{rank}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    codes = [process.wait(300) for process in processes]
    logs = "\n".join((folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(WORLD_SIZE))
    assert codes == [0] * WORLD_SIZE, logs
    return dict(json.loads((folder / "results.json").read_text()))


def test_two_ranks_go_back_together_suspect_the_same_shards_and_blame_the_right_one(ranks_of: RanksOf) -> None:
    ranks = ranks_of("2")
    assert ranks["shards agreed"]  # where one rank alone has met a damaged one
    assert_both_rollbacks(ranks["2"])


@pytest.mark.drill
def test_zero_and_plain_torch_see_the_same_samples_after_a_quarantine(ranks_of: RanksOf) -> None:
    ranks = ranks_of("0", "2")
    assert_both_rollbacks(ranks["0"])
    assert ranks["0"]["consumed"] == ranks["2"]["consumed"]
    assert ranks["0"]["losses"] == pytest.approx(ranks["2"]["losses"], rel=1e-4, nan_ok=True)


def assert_both_rollbacks(found: dict[str, Any]) -> None:
    first = [["skip", 0, 1], ["quarantine", 0, 2], ["rollback", 0, 2]]
    assert found["windows"] == [*first, ["skip", 3, 4], ["rollback", 3, 5]]
    assert found["quarantined"] == ["shard-00001"]
    assert found["state after the second rollback is that of the checkpoint, on every rank"]
    assert found["bad"] == [] and found["updates"] == {"base": 2}


def test_damage_is_told_of_also_where_rows_of_a_quarantined_shard_come_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    loop = object.__new__(TrainingLoop)
    loop.group, loop.position, loop.damaged, loop.quarantined = Group(), 0, set(), frozenset({1})
    loop.substituted_rows = 0
    monkeypatch.setattr(loop, "say", lambda kind, text: told.append(text), raising=False)
    batch = MicroBatch(np.arange(4), np.zeros(4, np.uint64), Draws(0, np.arange(4)), {}, ((1, None), (2, 3), (4, None)))
    assert [loop.count_substituted([batch]) for _ in range(3)] == [3, 3, 3] and loop.substituted_rows == 9
    assert [text.partition(" is ")[0] for text in told] == ["shard 2 batch 3", "shard 4, all of it"]
