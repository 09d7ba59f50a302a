"""Training on a mixture of two datasets: what is consumed, what a resume continues, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import consumed_ids

from cluster.training import train_run
from data_pipeline.build import CorpusConfig, build_corpus
from data_pipeline.config import parse
from data_pipeline.errors import UsageError, UserError
from data_pipeline.loader import Column, read_rows
from data_pipeline.mixture import Mixture
from data_pipeline.shards import Dataset, open_dataset
from data_pipeline.storage import LocalStore
from trainer.checkpoint.load import refuse_other_order
from trainer.checkpoint.manifest import committed, read_manifest
from trainer.engine.group import Group
from trainer.recipes import parse_train_config
from trainer.run import open_training_data, prepare_run, train

Values = Callable[..., dict[str, Any]]
SMALL = 40  # pictures


@pytest.fixture(scope="module")
def small_uri(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A smaller dataset; a picture's id says of which input it is, so that none is in both."""
    folder, output = tmp_path_factory.mktemp("few-pictures"), tmp_path_factory.mktemp("small-dataset")
    for name in sorted(path.stem for path in picture_folder.glob("*.png"))[:SMALL]:
        for suffix in (".png", ".txt"):
            shutil.copy(picture_folder / f"{name}{suffix}", folder)
    values = {"inputs": [{"kind": "folder", "uri": str(folder)}], "output": str(output), "filters": {"preset": "none"}}
    build_corpus(parse(CorpusConfig, {**values, "shard_rows": 16}, "test"))
    return str(output)


def mixed(*shares: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"uri": uri, "weight": weight} for uri, weight in shares]


def ids_of(dataset: Dataset) -> np.ndarray:
    """Of all rows, shard after shard."""
    shards = np.repeat(np.arange(len(dataset.shard_rows)), dataset.shard_rows)
    rows = np.concatenate([np.arange(count) for count in dataset.shard_rows])
    ids: np.ndarray = read_rows(dataset, [Column("base", "n_tokens")], shards, rows)["id"]
    return ids


def train_here(values: dict[str, Any]) -> None:
    """The run in this process, as its only worker."""
    config = parse_train_config(values, "test")
    train(config.model_dump(mode="json"), prepare_run(config), Group(), lambda event: None)


def test_a_mixture_is_consumed_in_exact_proportions_and_a_resume_on_two_workers_goes_on_in_it(
    train_values: Values, dataset_uri: str, small_uri: str, one_thread: None
) -> None:
    changes: dict[str, Any] = {"dataset": mixed((dataset_uri, 3), (small_uri, 1)), "images": 96}
    whole, resumed = train_values("whole", **changes), train_values("resumed", **changes)
    train_here(whole)
    train_here({**resumed, "images": 32})
    train_run(parse_train_config({**resumed, "launcher": {"workers": 2}}, "test"))
    assert consumed_ids(resumed["store"]) == consumed_ids(whole["store"])

    large, small = (set(ids_of(open_dataset(uri)).tolist()) for uri in (dataset_uri, small_uri))
    assert not large & small and len(small) == SMALL
    of_small = []
    for _, ids in consumed_ids(whole["store"]):
        assert large | small >= set(ids)
        of_small += [image for image in ids if image in small]
        assert sum(image in large for image in ids) == 12, "three of four, in every batch of 16"
    # 24 of the first epoch of 40: each once, and a part of the dataset is not needed.
    assert len(of_small) == len(set(of_small)) == 24


def test_a_resume_with_other_weights_or_datasets_is_refused_by_name(
    train_values: Values, dataset_uri: str, small_uri: str
) -> None:
    values = train_values("refused", dataset=mixed((dataset_uri, "0.75"), (small_uri, 0.25)), images=16)
    train_here(values)
    store = LocalStore(Path(values["store"]))
    manifest = read_manifest(store, committed(store)[0].manifest_key)
    datasets = [open_dataset(uri) for uri in (dataset_uri, small_uri)]
    assert manifest.order["weights"] == "3:1"
    assert manifest.order["datasets"] == " ".join(dataset.id for dataset in datasets)

    for other in (mixed((dataset_uri, 1), (small_uri, 1)), dataset_uri):
        with pytest.raises(
            UsageError, match=r"run refused: key dataset: expected .*'weight': '0.75'.* as the run began"
        ):
            prepare_run(parse_train_config({**values, "dataset": other, "images": 32}, "test"))
    # The same configuration may come to mean other data.
    now = [
        (Mixture(datasets, [1, 1]), r"expected weights 3:1, found weights 1:1"),
        (Mixture(datasets[::-1], [3, 1]), r"expected dataset_id \w+, found dataset_id"),
        (datasets[0], r"expected dataset_id \w+, found dataset_id"),
    ]
    refuse_other_order(manifest, Mixture(datasets, [6, 2]).order(0, 16).state(0), "uri")
    for data, message in now:
        with pytest.raises(UserError, match=message):
            refuse_other_order(manifest, data.order(0, 16).state(0), "uri")
    alone = manifest.model_copy(
        update={"order": json.loads(json.dumps(dataclasses.asdict(datasets[0].order(0, 16).state(0))))}
    )
    with pytest.raises(UserError, match="expected dataset_id"):
        refuse_other_order(alone, Mixture(datasets, [3, 1]).order(0, 16).state(0), "uri")


def test_a_mixture_that_cannot_be_is_refused_before_the_run_begins(
    train_values: Values, dataset_uri: str, small_uri: str, tmp_path: Path
) -> None:
    copy = str(shutil.copytree(dataset_uri, tmp_path / "copy"))
    refused: list[tuple[list[dict[str, Any]], type[UserError], str]] = [
        ([], UsageError, "key dataset.mixture: "),
        (mixed((dataset_uri, 0)), UsageError, "key dataset.mixture.0.weight: expected a number above 0, found 0;"),
        (mixed((dataset_uri, 1), (small_uri, -1)), UsageError, "mixture.1.weight: expected a number above 0, found -1"),
        (mixed((dataset_uri, "nan")), UsageError, "expected a number above 0, found nan"),
        (mixed((dataset_uri, "1/0")), UsageError, "expected a number above 0, found 1/0"),
        (mixed((dataset_uri, 1), (small_uri, 10**6)), UsageError, "at most 100000 .* found 1:1000000"),
        (
            mixed((dataset_uri, 1), (copy, 2)),
            UserError,
            f"expected once in a mixture, found {dataset_uri}.* and {copy}",
        ),
        (mixed((dataset_uri, 1), (str(tmp_path / "none"), 2)), UserError, "expected one committed dataset, found none"),
        ([{"uri": dataset_uri, "wieght": 1}], UsageError, "key dataset.mixture.0.weight: expected a value, found none"),
    ]
    for dataset, kind, message in refused:
        values = train_values("impossible", dataset=dataset)
        with pytest.raises(kind, match=message):
            prepare_run(parse_train_config(values, "test"))
        assert not Path(values["store"], "attempts").exists()
    values = train_values("impossible", dataset=mixed((dataset_uri, 1), (small_uri, 3)), batch=64)
    with pytest.raises(UserError, match=r"at least \d+ rows for a global batch of 48, found 40 rows"):
        prepare_run(parse_train_config(values, "test"))


def test_datasets_whose_values_were_made_differently_do_not_mix(
    train_values: Values, dataset_uri: str, small_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_train_config(train_values(dataset=mixed((dataset_uri, 1), (small_uri, 1))), "test")
    mixture = open_training_data(config)
    assert isinstance(mixture, Mixture)
    small = mixture.datasets[1]
    small._families["base"] = small.family_manifest("base") | {"producer": "area filter of another version"}
    with pytest.raises(UserError, match=f"dataset {small.id[:12]} family base: expected producer .* area filter of an"):
        mixture.family_manifest("base")
    with pytest.raises(UserError, match=f"dataset {mixture.datasets[0].id[:12]} family labels: .* no such family"):
        mixture.family_manifest("labels")


def test_a_mixture_reads_as_one_dataset_and_one_of_a_single_dataset_has_all_of_its_rows(
    dataset_uri: str, small_uri: str
) -> None:
    datasets = [open_dataset(uri) for uri in (dataset_uri, small_uri)]
    mixture = Mixture(datasets, [1, 2])
    assert ids_of(mixture).tolist() == [*ids_of(datasets[0]).tolist(), *ids_of(datasets[1]).tolist()]
    assert (mixture.rows, mixture.families()) == (96 + SMALL, ("base", "upsampler"))
    sizes = [entry["bytes"] for dataset in datasets for entry in dataset.family_manifest("base")["shards"]]
    assert [mixture.shard_file("base", index).bytes for index in range(len(mixture.shard_rows))] == sizes
    # What lies in a folder takes no room in the cache.
    assert mixture.distant is False and mixture.shard_bytes("base", 0) == 0 and mixture.fetch("base", 0) is None
    order = Mixture(datasets[:1], [7]).order(0, 8)
    assert len(set(zip(*(values.tolist() for values in order.rows_at(np.arange(96))), strict=True))) == 96
