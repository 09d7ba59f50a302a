"""Runs that start from another run's checkpoint: its weights, its record, and parents that do not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.training import train_run
from data_pipeline.errors import UserError
from data_pipeline.manifests import seal, unseal
from data_pipeline.storage import LocalStore
from trainer.checkpoint.manifest import committed, read_manifest
from trainer.engine.group import Group
from trainer.recipes import parse_train_config
from trainer.run import prepare_run, run_lineage, train
from trainer.weights import lineage_of, load_trained, open_checkpoint, start_of

Values = Callable[..., dict[str, Any]]


def trained(values: dict[str, Any]) -> dict[str, Any]:
    """Train here, on one rank; the result."""
    config = parse_train_config(values, "test")
    events: list[dict[str, Any]] = []
    train(config.model_dump(mode="json"), prepare_run(config), Group(), events.append)
    return events[-1]


@pytest.fixture
def parent(train_values: Values) -> str:
    values = train_values("parent", images=32)
    trained(values)
    return str(values["store"])


def weights(uri: str, kind: Any) -> dict[str, Tensor]:
    return dict(load_trained(uri, kind).modules["base"].named_parameters())


@pytest.mark.parametrize(("kind", "stage", "start"), [("ema", 3, train_run), ("master", 0, None)])
def test_a_fine_tune_starts_from_its_parents_weights_in_fp32(
    train_values: Values, parent: str, kind: str, stage: int, start: Callable[..., Any] | None
) -> None:
    changes = {"parent": parent, "parent_weights": kind, "zero": {"stage": stage}, "precision": "bf16"}
    config = parse_train_config(train_values("child", **changes), "test")
    starts = start_of(config, lineage_of(config))
    expected = weights(parent, kind)
    assert starts["base"].keys() == expected.keys()
    assert all(torch.equal(starts["base"][name], values) for name, values in expected.items())
    other = weights(parent, "master" if kind == "ema" else "ema")
    assert not all(torch.equal(starts["base"][name], values) for name, values in other.items())

    values = train_values("child", **changes, images=16, lr=1e-30)
    if start:  # DeepSpeed, in a process of its own
        start(parse_train_config(values, "test"))
    else:
        trained(values)
    for which in ("ema", "master"):  # an update of almost nothing shows what the run began with
        moved = weights(train_values("child")["store"], which)
        for name, values in expected.items():
            torch.testing.assert_close(moved[name], values, rtol=0, atol=1e-25)


def test_the_lineage_is_in_the_first_attempt_and_in_every_manifest_and_a_resume_needs_no_parent(
    train_values: Values, parent: str, tmp_path: Path
) -> None:
    values = train_values("child", parent=parent)
    trained({**values, "images": 16})
    facts = {"parent": open_checkpoint(parent).uri, "weights": "ema", "run": "parent", "recipe": "glide_base"}
    store = LocalStore(Path(values["store"]))
    assert run_lineage(store)["base"].items() >= (facts | {"images": 32}).items()
    shutil.rmtree(parent)
    assert trained({**values, "images": 48})["images"] == 48
    manifests = [read_manifest(store, name.manifest_key) for name in committed(store)]
    assert len(manifests) >= 2
    assert all(manifest.lineage == run_lineage(store) for manifest in manifests)


def test_a_run_can_be_named_as_a_parent_and_the_checkpoint_it_stood_for_then_stays_its_parent(
    train_values: Values, parent: str, state_folder: Path
) -> None:
    shutil.copytree(parent, state_folder / "runs" / "parent")
    config = parse_train_config(train_values("child", parent="parent"), "test")
    lineage = lineage_of(config)
    assert lineage["base"]["parent"].endswith("runs/parent/checkpoints/images-000000032/attempt-1")
    manifest = Path(lineage["base"]["parent"]) / "manifest.json"
    document = unseal(manifest.read_bytes())
    del document["sha256"]
    manifest.write_bytes(seal(document | {"code_version": "another"}))
    with pytest.raises(UserError, match=r"expected the manifest \w{12} that the run began from"):
        start_of(config, lineage)


def test_a_parent_that_does_not_fit_is_refused_with_both_shapes_before_anything_starts(
    train_values: Values, parent: str
) -> None:
    wider = train_values()["model"] | {"channels": 64}
    values = train_values("child", parent=parent, model=wider)
    with pytest.raises(UserError, match=r"base/\S+: expected shape \(64,.*\), found shape \(32,.*same model"):
        prepare_run(parse_train_config(values, "test"))
    same = {**train_values()["model"], "norm_groups": 8}
    for changes, message in (
        ({"model": same}, r"model.norm_groups: expected 8, found \d+; set model.norm_groups="),
        ({"diffusion": {"schedule": "linear"}}, "diffusion.schedule: expected linear, found cosine"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_run(parse_train_config(train_values("child", parent=parent, **changes), "test"))
    upsampler = {**wider, "low_resolution": 8}
    values = train_values("child", parent=parent, recipe="glide_upsampler", model=upsampler)
    with pytest.raises(UserError, match="a recipe with the part upsampler, found glide_base with base"):
        prepare_run(parse_train_config(values, "test"))
    with pytest.raises(UserError, match="run nowhere: expected a run with a committed checkpoint, found none"):
        prepare_run(parse_train_config(train_values("child", parent="nowhere"), "test"))
    assert not Path(values["store"], "attempts").exists()
