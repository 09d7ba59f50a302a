"""Retention in a run, and `glidepath checkpoints prune | sweep | protect | unprotect`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_recipe import SmallRecipe

from data_pipeline.errors import UsageError
from data_pipeline.storage import LocalStore, ObjectStore
from trainer.checkpoint.inspect import verify_checkpoints
from trainer.checkpoint.manifest import CheckpointName, committed, read_manifest
from trainer.checkpoint.save import Saver
from trainer.config import TrainConfig
from trainer.engine.group import Group
from trainer.recipes import RECIPES, parse_train_config
from trainer.run import prepare_run, train

Values = Callable[..., dict[str, Any]]
Cli = Callable[..., tuple[int, Any, str]]


@pytest.fixture
def small_values(train_values: Values, dataset_uri: str, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Values:
    """Values of a run of the small recipe that saves at every step."""
    monkeypatch.setitem(RECIPES, "small", (TrainConfig, SmallRecipe))
    heldout = {"dataset": dataset_uri, "images": 16, "every_images": 16}

    def make(images: int, **checkpoint: Any) -> dict[str, Any]:
        values = train_values(images=images, recipe="small", model=None, heldout=heldout, lr=0.1)
        del values["caption_dropout"]
        return values | {"checkpoint": {"every_images": 16, **checkpoint}}

    return make


@pytest.fixture(autouse=True)
def every_save_ends_before_the_next_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of so small a net are faster than saves, which would be put off."""
    begin = Saver.save

    def save(self: Saver, *arguments: Any) -> None:
        begin(self, *arguments)
        assert self._save is not None and self.retention is not None
        self._save.thread.join()
        self.retention.settle(60)

    monkeypatch.setattr(Saver, "save", save)


def trained(values: dict[str, Any]) -> dict[str, Any]:
    """Train here, on one rank; the result."""
    config = parse_train_config(values, "test")
    events: list[dict[str, Any]] = []
    train(config.model_dump(mode="json"), prepare_run(config), Group(), events.append)
    return events[-1]


def positions(uri: str) -> list[int]:
    return [name.position for name in committed(LocalStore(Path(uri)))]


def test_a_run_keeps_what_its_settings_say_and_its_manifests_carry_the_figures_they_say_it_by(
    small_values: Values,
) -> None:
    keep = {"keep_newest": 2, "keep_every_images": 64, "keep_best": {"metric": "heldout/total"}}
    values = small_values(144, **keep)
    result = trained(values)
    store = LocalStore(Path(values["store"]))
    left = {name: read_manifest(store, name.manifest_key) for name in committed(store)}
    assert [name.position for name in left][:2] == [144, 128] and CheckpointName(64, 1) in left
    assert result["removed_checkpoints"] == 9 - len(left) >= 5 and result["failed_removals"] == 0
    lines = [json.loads(line) for line in (store.root / "tracking" / "metrics.jsonl").read_text().splitlines()]
    taken = {
        line["images"]: line["values"]["heldout/total"] for line in lines if "heldout/total" in line.get("values", ())
    }
    assert {name.position: manifest.figures["heldout/total"] for name, manifest in left.items()} == {
        name.position: taken[name.position] for name in left
    }
    del taken[0]  # the initial weights, which are not saved
    assert min(taken, key=lambda images: taken[images]) in {name.position for name in left}
    assert not verify_checkpoints(store.uri)
    folders = {path.parent for path in store.root.glob("checkpoints/**/*") if path.is_file()}
    assert folders == {store.root / name.folder for name in left}

    mistyped = values["checkpoint"] | {"keep_best": {"metric": "heldout/loss"}}
    result = trained(values | {"images": 160, "checkpoint": mistyped})  # a run that goes on keeps to its settings too
    assert "no figure heldout/loss; there are heldout/total" in (store.root / "tracking" / "metrics.jsonl").read_text()
    assert positions(store.uri)[:2] == [160, 144] and result["removed_checkpoints"] <= 1


def test_without_settings_nothing_is_removed_and_best_needs_figures(small_values: Values) -> None:
    values = small_values(48)
    assert trained(values)["removed_checkpoints"] == 0
    assert positions(values["store"]) == [48, 32, 16]
    with pytest.raises(UsageError, match="expected keep_newest with keep_every_images"):
        parse_train_config(small_values(48, keep_every_images=32), "test")
    best = {"keep_newest": 1, "keep_best": {"metric": "heldout/total"}}
    with pytest.raises(UsageError, match="found no heldout"):
        parse_train_config(small_values(48, **best) | {"heldout": None}, "test")
    with pytest.raises(UsageError, match=r"multiples of checkpoint.every_images \(32\).*found 16"):
        parse_train_config(small_values(48, **best | {"every_images": 32}), "test")


def test_a_store_that_refuses_to_delete_costs_a_run_nothing(
    small_values: Values, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: ObjectStore, key: str) -> None:
        raise PermissionError(13, "Permission denied", key)

    monkeypatch.setattr(LocalStore, "delete", refuse)
    values = small_values(64, keep_newest=1)
    with caplog.at_level(logging.WARNING):
        result = trained(values)
    assert positions(values["store"]) == [64, 48, 32, 16] and not verify_checkpoints(values["store"])
    assert result["failed_saves"] == 0 and result["failed_removals"] >= 1
    assert "old checkpoints stay until the next save" in caplog.text


def test_checkpoints_are_protected_pruned_and_swept_by_hand(cli: Cli, small_values: Values) -> None:
    values = small_values(64)
    trained(values)
    store = values["store"]
    assert "expected checkpoint.keep_newest, or --keep-newest" in cli("checkpoints", "prune", store)[1]["error"]
    code, protected, _ = cli("checkpoints", "protect", store, f"{store}/checkpoints/images-000000016/attempt-1")
    assert (code, protected) == (0, {"checkpoint": "images-000000016/attempt-1", "protected": True})
    code, line, _ = cli("checkpoints", "protect", store, "images-000000017/attempt-1")
    assert code == 1 and "expected a committed one, found none" in line["error"]
    assert cli("checkpoints", "protect", store, "newest")[0] == 2
    assert [row["protected"] for row in cli("checkpoints", "list", store)[1]] == [False, False, False, True]

    prune = ("checkpoints", "prune", store, "--keep-newest", "1")
    code, shown, _ = cli(*prune, "--dry-run")
    assert code == 0 and shown["dry_run"] and positions(store) == [64, 48, 32, 16]
    assert [(row["images"], row["kept"]) for row in shown["checkpoints"]] == [
        (64, True),
        (48, False),
        (32, False),
        (16, True),
    ]
    assert cli(*prune)[1]["checkpoints"] == shown["checkpoints"] and positions(store) == [64, 16]
    assert cli("checkpoints", "unprotect", store, "images-000000016/attempt-1")[0] == 0
    cli(*prune)
    assert positions(store) == [64] and not list(Path(store).glob("checkpoints/images-000000016/attempt-1/*"))

    Path(store, CheckpointName(16, 1).folder, "part-00000-of-00001.safetensors").write_bytes(b"of a save")
    code, swept, stderr = cli("checkpoints", "sweep", store)
    assert (code, swept) == (0, {"removed_objects": 1, "attempt_not_ended": 1})
    assert "attempt 1 has not ended" in stderr and not verify_checkpoints(store)
