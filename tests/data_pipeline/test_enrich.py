"""Enrich: an added family has the dataset's rows; it can be stopped anywhere; two makings of it are never mixed."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from data_pipeline.build import sweep_build
from data_pipeline.clip_tokenizer import clip_tokens
from data_pipeline.enrich import enrich, enrich_shard, make_clip_tokens
from data_pipeline.errors import UsageError, UserError
from data_pipeline.executor import InlineExecutor
from data_pipeline.loader import Column, read_rows
from data_pipeline.shards import open_dataset, verify_dataset
from data_pipeline.storage import LocalStore
from data_pipeline.storage.crash import Crashed, CrashPointStore


@pytest.fixture
def dataset_folder(dataset_uri: str, tmp_path: Path) -> Path:
    """A copy of the shared dataset, to be added to."""
    return Path(shutil.copytree(dataset_uri, tmp_path / "dataset"))


def all_rows(uri: Path, *columns: Column) -> dict:
    dataset = open_dataset(str(uri))
    shards = np.repeat(np.arange(len(dataset.shard_rows)), dataset.shard_rows)
    return dict(read_rows(dataset, columns, shards, np.concatenate([np.arange(n) for n in dataset.shard_rows])))


def write_csv(path: Path, rows: list[tuple]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "label"), *rows])
    return str(path)


def test_the_tokens_of_clip_are_added_to_the_same_rows_and_the_dataset_keeps_its_id(dataset_folder: Path) -> None:
    before = open_dataset(str(dataset_folder))
    with InlineExecutor(2) as executor:
        added = enrich(str(dataset_folder), "tokens_clip", None, executor)
    after = open_dataset(str(dataset_folder))
    assert (after.id, after.families()) == (before.id, ("base", "tokens_clip", "upsampler"))
    assert added["rows"] == 96 and added["shards"] == 3 and verify_dataset(after) == []
    base = all_rows(dataset_folder, Column("base", "caption"))
    clip = all_rows(dataset_folder, Column("tokens_clip", "tokens"), Column("tokens_clip", "n_tokens"))
    tokens, n_tokens = clip_tokens(base["caption"])
    np.testing.assert_array_equal(clip["id"], base["id"])
    np.testing.assert_array_equal(clip["tokens"], tokens)
    np.testing.assert_array_equal(clip["n_tokens"], n_tokens)

    shard = dataset_folder / "datasets" / before.id / "tokens_clip" / "shard-00001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert [bad.part for bad in verify_dataset(str(dataset_folder))] == [str(shard)]


def test_labels_come_by_id_from_csv_or_parquet_and_rows_without_one_get_minus_one(dataset_folder: Path) -> None:
    dataset = open_dataset(str(dataset_folder))
    ids = all_rows(dataset_folder, Column("base", "n_tokens"))["id"]
    assert (ids > 2**63).any()
    given = {int(number): place for place, number in enumerate(ids) if place % 3}
    in_csv = write_csv(Path("labels.csv"), [*reversed(given.items()), (7, 7)])  # 7: a row that was dropped
    there = f"{dataset_folder}/datasets/{dataset.id}"
    first = enrich(there, "labels", in_csv, InlineExecutor())
    labels = all_rows(dataset_folder, Column("labels", "label"))
    assert labels["label"].dtype == np.int32
    assert labels["label"].tolist() == [place if place % 3 else -1 for place in range(len(ids))]

    table = pa.table(
        {"label": [*given.values(), 7], "more": [0.0] * (len(given) + 1), "id": pa.array([*given, 7], pa.uint64())}
    )
    pa.parquet.write_table(table, "labels.parquet")
    assert enrich(there, "labels", "labels.parquet", InlineExecutor()) == first, "the same labels"
    other = write_csv(Path("other.csv"), [(int(ids[0]), 5)])
    with pytest.raises(UserError, match=r"family labels: expected made by producer .*; it was made from something el"):
        enrich(there, "labels", other, InlineExecutor())
    shutil.rmtree(dataset_folder / "datasets" / dataset.id / "labels")
    assert enrich(there, "labels", other, InlineExecutor())["producer"] != first["producer"]


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([(1, 2)], "ids of this dataset, found none of them"),
        ([(1, 2), (1, 3)], "one label for an id, found 2 and 3 for 1"),
        ([(1, "cat")], "CSV conversion error to int32"),
        ([], "an empty table"),
    ],
)
def test_a_table_that_cannot_label_the_dataset_is_refused_in_one_line(
    dataset_folder: Path, rows: list[tuple], found: str
) -> None:
    with pytest.raises(UserError, match=found) as refused:
        enrich(str(dataset_folder), "labels", write_csv(Path("labels.csv"), rows), InlineExecutor())
    assert "\n" not in str(refused.value)
    assert not list(dataset_folder.glob("datasets/*/labels"))


def test_what_cannot_be_added_is_refused(dataset_folder: Path) -> None:
    with pytest.raises(UsageError, match="one of labels, tokens_clip, found 'latents'"):
        enrich(str(dataset_folder), "latents", None, InlineExecutor())
    with pytest.raises(UsageError, match="--labels"):
        enrich(str(dataset_folder), "labels", None, InlineExecutor())
    with pytest.raises(UserError, match=r"labels .*absent.csv: expected a \.csv or \.parquet"):
        enrich(str(dataset_folder), "labels", "absent.csv", InlineExecutor())
    Path("columns.csv").write_text("key,label\n1,2\n")
    with pytest.raises(UserError, match="expected columns id and label, found key, label"):
        enrich(str(dataset_folder), "labels", "columns.csv", InlineExecutor())


def test_stopped_at_any_operation_the_family_is_not_seen_and_goes_on_from_what_is_committed(
    dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import enrich as module

    uri = str(dataset_folder)
    folder = dataset_folder / "datasets" / open_dataset(uri).id / "tokens_clip"
    enrich(uri, "tokens_clip", None, InlineExecutor())
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)

    stop_at, stopped = 0, True
    while stopped:
        store = CrashPointStore(dataset_folder, stop_at)
        monkeypatch.setattr(module, "output_of", lambda dataset, store=store: store)
        try:
            enrich(uri, "tokens_clip", None, InlineExecutor())
            stopped = False
        except Crashed:
            done = "manifest.json" in {path.name for path in folder.iterdir()}
            assert done or "tokens_clip" not in open_dataset(uri).families()
            sweep_build(LocalStore(dataset_folder))
            kept = {path.name: path.read_bytes() for path in folder.iterdir()}
            assert kept.items() <= expected.items(), f"stopped at {stop_at}"
        stop_at += 1
    assert stop_at > 10
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    first = enrich_shard(LocalStore(dataset_folder), open_dataset(uri).id, make_clip_tokens(None), 0)
    assert first["file"]["rows"] == 32
