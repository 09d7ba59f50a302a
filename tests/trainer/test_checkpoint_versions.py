"""Formats of checkpoints: what an older one wrote is listed, verified, resumed and sampled; a newer one is refused by
name.

`tests/data/checkpoint-format-<n>` was written by the last version of format n (1: commit d96347d, 2: 0f3c1d3): two
ranks, two updates of `small_recipe` on the dataset of `conftest.py`. A format that replaces today's gets its own such
folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small_recipe import SmallRecipe

from data_pipeline.errors import UserError
from data_pipeline.manifests import seal, unseal
from data_pipeline.shards import Dataset
from data_pipeline.storage import LocalStore
from trainer.checkpoint.inspect import list_checkpoints, verify_checkpoints
from trainer.checkpoint.manifest import CheckpointName, OtherFormat, committed, read_manifest
from trainer.checkpoint.retention import prune
from trainer.checkpoint.sweep import sweep
from trainer.config import CheckpointSettings, SamplingSettings, TrainConfig
from trainer.engine.group import Group
from trainer.recipes import RECIPES, parse_train_config
from trainer.run import prepare_run, train
from trainer.sampling import draw_images
from trainer.weights import load_trained, open_checkpoint

WRITTEN = Path(__file__).parents[1] / "data"
NAME = CheckpointName(32, 1)


@pytest.fixture(params=["1", "2"])
def written_by(request: pytest.FixtureRequest) -> str:
    """The number of an older format."""
    return str(request.param)


@pytest.fixture
def store(written_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setitem(RECIPES, "small", (TrainConfig, SmallRecipe))
    shutil.copytree(WRITTEN / f"checkpoint-format-{written_by}", tmp_path / "run")
    return LocalStore(tmp_path / "run")


def values_in_parts(store: LocalStore) -> dict[str, np.ndarray[Any, Any]]:
    """`kind/name` -> all its elements, put together by another reader."""
    pieces: dict[str, list[tuple[int, Any]]] = {}
    for file in sorted((store.root / NAME.folder).glob("part-*.safetensors")):
        for key, values in load_file(file).items():
            name, _, offset = key.rpartition("@")
            pieces.setdefault(name, []).append((int(offset), values))
    return {name: np.concatenate([values for _, values in sorted(found)]) for name, found in pieces.items()}


def test_a_run_of_an_older_format_goes_on_at_another_world_size(
    store: LocalStore,
    written_by: str,
    dataset_uri: str,
    state_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> None:
    written = json.loads((store.root / NAME.manifest_key).read_bytes())
    assert written["format"] == f"glidepath-checkpoint-{written_by}" and written["world_size"] == 2
    opened: Callable[..., None] = Dataset.__init__

    def opened_as_it_was(self: Dataset, *arguments: Any) -> None:
        opened(self, *arguments)
        self.id = written["order"]["dataset_id"]  # its own changes with every change of the corpus builder

    families: Callable[..., dict[str, Any]] = Dataset.family_manifest

    def read_as_it_is(self: Dataset, family: str) -> dict[str, Any]:
        as_it_is = copy(self)
        as_it_is.id = self.manifest["id"]
        return families(as_it_is, family)

    monkeypatch.setattr(Dataset, "__init__", opened_as_it_was)
    monkeypatch.setattr(Dataset, "family_manifest", read_as_it_is)
    (state_folder / "datasets").mkdir(parents=True)
    (state_folder / "datasets" / written["config"]["dataset"]).symlink_to(dataset_uri)
    config = parse_train_config({**written["config"], "store": store.uri, "images": 64}, "test")
    events: list[dict[str, Any]] = []
    train(config.model_dump(mode="json"), prepare_run(config), Group(), events.append)

    assert [event["images"] for event in events if event["event"] == "progress"] == [48, 64]
    after = read_manifest(store, committed(store)[0].manifest_key)
    assert (after.position, after.attempt, after.world_size) == (64, 2, 1)
    assert after.format == "glidepath-checkpoint-3" and after.order == written["order"] | {"position": 64}
    assert after.optimizer_steps == {"net": 4} and after.recipe_state == {"updates": 4}
    assert after.guard["net"]["losses"][:2] == written["guard"]["net"]["losses"]
    assert after.guard["net"]["accepted"] == 4 and after.parameters == written["parameters"]


def test_an_older_format_is_listed_verified_and_sampled(store: LocalStore) -> None:
    (row,) = list_checkpoints(store.uri)
    assert (row["images"], row["world_size"], row["bytes"], row["verified"]) == (32, 2, 1832 + 1528, True)
    assert verify_checkpoints(store.uri) == []
    expected = values_in_parts(store)
    assert sum(values.size for values in expected.values()) == 4 * 112
    for kind in ("ema", "master"):
        trained = load_trained(row["uri"], kind)  # type: ignore[arg-type]
        for name, parameter in trained.modules["net"].named_parameters():
            np.testing.assert_array_equal(parameter.detach().numpy().ravel(), expected[f"{kind}/net/{name}"])
    with torch.no_grad():
        drawn = draw_images(trained.recipe, trained.modules, ["one", "two"], SamplingSettings(), seed=0)
    assert drawn.shape == (2, 2, 2, 3) and drawn.std() > 0

    stored = (store.root / NAME.manifest_key).read_bytes()
    # Its children know it by the bytes that are stored, which today's code would write otherwise.
    assert open_checkpoint(row["uri"]).manifest_sha256 == hashlib.sha256(stored).hexdigest()

    part = store.root / NAME.folder / "part-00001-of-00002.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    (bad,) = verify_checkpoints(store.uri)
    assert "part-00001-of-00002" in bad["part"] and "crc32" in bad["expected"]


def test_a_newer_format_is_refused_by_name_and_left_alone(store: LocalStore) -> None:
    manifest = store.root / NAME.manifest_key
    document = unseal(manifest.read_bytes())
    del document["sha256"]
    newer = CheckpointName(48, 1)
    store.put(newer.manifest_key, [seal(document | {"format": "glidepath-checkpoint-4", "position": 48})])
    part = f"{newer.folder}part-00000-of-00001.newer"
    store.put(part, [b"what it may hold is not known"])
    line = "expected format .*-1 or .*-2 or glidepath-checkpoint-3, found glidepath-checkpoint-4"
    with pytest.raises(UserError, match=f"{newer.manifest_key}: {line}; use the version of Glidepath that wrote it"):
        load_trained(store.uri)
    with pytest.raises(OtherFormat):  # not passed over: an older one would silently undo what the newer version did
        read_manifest(store, newer.manifest_key)
    assert [row["verified"] for row in list_checkpoints(store.uri)] == [False, True]
    (bad,) = verify_checkpoints(store.uri)
    assert bad["part"] == f"{newer}/manifest.json" and bad["found"] == "glidepath-checkpoint-4"
    assert sweep(store, 9) == 0
    rows = prune(store, CheckpointSettings(keep_newest=1), dry_run=False)
    assert [row["why"] for row in rows] == ["its manifest cannot be read as one of this run", "newest"]
    assert store.exists(part)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"figurs": {}, "zeal": 1}, "found unknown key figurs, zeal"),
        ({"parts": [{"folder": "../../elsewhere/"}]}, "found parts.0.folder"),
        ({"position": "many"}, "found position: Input should be a valid integer"),
    ],
)
def test_a_manifest_unlike_its_format_is_damaged_and_says_which_key(
    store: LocalStore, written_by: str, changes: dict[str, Any], found: str
) -> None:
    manifest = store.root / NAME.manifest_key
    document = unseal(manifest.read_bytes())
    del document["sha256"]
    if "parts" in changes:
        changes = {"parts": [{**document["parts"][0], **changes["parts"][0]}]}
    manifest.write_bytes(seal(document | changes))
    (bad,) = verify_checkpoints(store.uri)
    assert bad["expected"] == f"the keys of glidepath-checkpoint-{written_by}" and f"found {bad['found']}".startswith(
        found
    )
