"""Training on a dataset of which a record batch is damaged: it ends by name; or, if so asked, other rows serve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import consumed_ids

from cluster.training import train_run
from data_pipeline.errors import UserError
from data_pipeline.loader import Column, read_rows
from data_pipeline.order import SampleOrder
from data_pipeline.shards import open_dataset
from trainer.engine.group import Group
from trainer.recipes import parse_train_config
from trainer.run import prepare_run, train

Values = Callable[..., dict[str, Any]]


def run(values: dict[str, Any], workers: int) -> dict[str, Any]:
    """The run's result; a single worker is this process."""
    config = parse_train_config({**values, "launcher": {"workers": workers}}, "test")
    if workers > 1:
        return train_run(config, lambda event: None)
    events: list[dict[str, Any]] = []
    train(config.model_dump(mode="json"), prepare_run(config), Group(), events.append)
    return events[-1]


def lines(values: dict[str, Any]) -> list[dict[str, Any]]:
    return list(map(json.loads, Path(values["store"], "tracking", "metrics.jsonl").read_text().splitlines()))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.drill)])
def test_a_run_ends_at_a_damaged_batch_by_name_and_goes_on_with_other_rows_when_told_to(
    train_values: Values, dataset_uri: str, tmp_path: Path, workers: int, one_thread: None
) -> None:
    folder = Path(shutil.copytree(dataset_uri, tmp_path / "damaged"))
    dataset = open_dataset(str(folder))
    order = SampleOrder(dataset.id, dataset.shard_rows, 0, 16)
    shards, rows = order.rows_at(np.arange(64))
    hit = shards == 1
    replaced = read_rows(dataset, (Column("base", "n_tokens"),), np.where(hit, 2, shards), rows)["id"].tolist()

    path = next(folder.rglob("base/shard-00001.arrow"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    values = train_values(dataset=str(folder))
    with pytest.raises(UserError, match=r"shard-00001\.arrow batch 0: expected crc32"):
        run(values, workers)
    tolerant = values | {"loader": {"on_damage": "substitute"}}
    result = run(tolerant, workers)
    assert dict(consumed_ids(values["store"])) == {start: replaced[start : start + 16] for start in range(0, 64, 16)}
    # Those before the last checkpoint that the first attempt saved may have been trained on by it.
    assert 0 < result["substituted_rows"] <= hit.sum()
    told = [line for line in lines(tolerant) if line.get("event") == "substituted"]
    assert [line["text"] for line in told] == [
        f"shard 1 batch 0 is damaged; other rows take its place, from image {told[0]['images']} on"
    ]
    counted = [line["values"].get("substituted_rows", 0) for line in lines(tolerant) if "values" in line]
    assert sum(counted) == result["substituted_rows"]
