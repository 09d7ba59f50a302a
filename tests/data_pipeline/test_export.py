"""Export: tars that webdataset reads and the builder takes back; the same bytes however they came about."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline import images
from data_pipeline.build import CorpusConfig, build_corpus
from data_pipeline.errors import UserError
from data_pipeline.executor import InlineExecutor
from data_pipeline.export import export_webdataset
from data_pipeline.loader import Column, read_rows
from data_pipeline.shards import open_dataset, verify_dataset
from data_pipeline.storage import LocalStore, open_store
from data_pipeline.storage.crash import Crashed, CrashPointStore

COLUMNS = [Column("base", name) for name in ("caption", "tokens", "n_tokens", "image64")]
COLUMNS.append(Column("upsampler", "image256"))


def all_rows(uri: str) -> dict:
    dataset = open_dataset(uri)
    shards = np.repeat(np.arange(len(dataset.shard_rows)), dataset.shard_rows)
    return dict(read_rows(dataset, COLUMNS, shards, np.concatenate([np.arange(n) for n in dataset.shard_rows])))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def mean_square_error(first: images.Pixels, second: images.Pixels) -> float:
    return float(np.square(first.astype(np.float64) - second).mean())


def test_an_export_is_read_by_webdataset_row_by_row_and_built_again_with_the_same_captions_and_tokens(
    dataset_uri: str, tmp_path: Path
) -> None:
    done = export_webdataset(dataset_uri, str(tmp_path / "tars"), 40, InlineExecutor())
    assert (done["rows"], done["shards"]) == (96, 3)
    manifest = json.loads((tmp_path / "tars" / "manifest.json").read_text())
    assert [(tar["name"], tar["rows"]) for tar in manifest["tars"]] == [
        ("00000.tar", 40), ("00001.tar", 40), ("00002.tar", 16)
    ]  # fmt: skip
    assert {tar["name"]: tar["sha256"] for tar in manifest["tars"]}.items() <= contents(tmp_path / "tars").items()
    rows = all_rows(dataset_uri)
    read = webdataset.WebDataset([str(tmp_path / "tars" / f"{n:05d}.tar") for n in range(3)], shardshuffle=False)
    samples = list(read)
    assert [sample["__key__"] for sample in samples] == [f"{number:016x}" for number in rows["id"]]
    assert [sample["jpg"] for sample in samples] == rows["image256"]
    assert [sample["txt"].decode() for sample in samples] == rows["caption"]
    facts = [json.loads(sample["json"]) for sample in samples]
    assert [(int(fact["id"], 16), fact["n_tokens"]) for fact in facts] == list(
        zip(rows["id"].tolist(), rows["n_tokens"].tolist(), strict=True)
    )

    entry = {"kind": "webdataset", "uri": str(tmp_path / "tars")}
    config = CorpusConfig(inputs=[entry], output=str(tmp_path / "again"), filters={"preset": "none"}, shard_rows=32)
    assert build_corpus(config)["funnel"] == {"in": 96, "out": 96, "dropped": {}}
    again = all_rows(str(tmp_path / "again"))
    where = {caption: place for place, caption in enumerate(again["caption"])}
    assert len(where) == 96 and set(where) == set(rows["caption"])
    for place, caption in enumerate(rows["caption"]):
        other = where[caption]
        np.testing.assert_array_equal(again["tokens"][other], rows["tokens"][place])
        # The pictures went through one more JPEG of quality 95: above 40 dB of the stored ones.
        large, larger = images.decode_stored(again["image256"][other]), images.decode_stored(rows["image256"][place])
        assert mean_square_error(large, larger) < 255**2 / 10**4.0
        assert mean_square_error(again["image64"][other], rows["image64"][place]) < 255**2 / 10**4.0


def test_bytes_depend_on_neither_workers_nor_stops_and_a_folder_takes_one_export(
    dataset_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import export as module

    with InlineExecutor(2) as executor:
        first = export_webdataset(dataset_uri, str(tmp_path / "two"), None, executor)
    assert first["shards"] == 3
    stop_at, stopped = 0, True
    monkeypatch.setattr(
        module, "open_store", lambda uri: CrashPointStore(Path(uri), stop_at) if "stop" in uri else LocalStore(uri)
    )
    while stopped:
        try:
            export_webdataset(dataset_uri, str(tmp_path / "stopped"), None, InlineExecutor())
            stopped = False
        except Crashed:
            LocalStore(tmp_path / "stopped").sweep_uploads()
            stop_at += 1
    assert stop_at > 10
    assert contents(tmp_path / "stopped") == contents(tmp_path / "two")
    with pytest.raises(UserError, match=r"in tars of 7 rows, found dataset \w+ in tars of 32 rows; choose another"):
        export_webdataset(dataset_uri, str(tmp_path / "two"), 7, InlineExecutor())


def test_an_export_to_a_bucket_has_the_bytes_of_one_to_a_folder(
    moto_uri: str, dataset_uri: str, tmp_path: Path, make_corpus: Callable
) -> None:
    export_webdataset(dataset_uri, str(tmp_path / "tars"), 50, InlineExecutor())
    export_webdataset(dataset_uri, f"{moto_uri}/tars", 50, InlineExecutor())
    bucket = open_store(f"{moto_uri}/tars")
    found = {info.key: hashlib.sha256(bucket.get(info.key)).hexdigest() for info in bucket.list()}
    assert found == contents(tmp_path / "tars")


def test_a_folder_that_holds_anything_else_is_not_exported_into(dataset_uri: str, tmp_path: Path) -> None:
    output = Path(shutil.copytree(dataset_uri, tmp_path / "output"))
    dataset = output / "datasets" / open_dataset(dataset_uri).id
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "00000.tar").write_bytes(b"of somebody else")
    for folder, found in ((output, "datasets/"), (dataset, "base/"), (tmp_path / "tars", "00000.tar")):
        before = set(folder.rglob("*"))
        with pytest.raises(UserError, match=rf"export .*: expected an empty folder, or one with .*, found {found}"):
            export_webdataset(str(dataset), str(folder), None, InlineExecutor())
        assert set(folder.rglob("*")) == before
    assert verify_dataset(str(output)) == []

    export_webdataset(str(output), str(tmp_path / "whole"), None, InlineExecutor())
    (tmp_path / "whole" / "00003.tar").write_bytes(b"of somebody else")
    with pytest.raises(UserError, match=r"found 00003.tar; choose another --out"):
        export_webdataset(str(output), str(tmp_path / "whole"), None, InlineExecutor())
