"""Shards: what was written is what is read; any changed bit is found and named."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import manifests
from data_pipeline.build import CorpusConfig, build_corpus
from data_pipeline.errors import UserError
from data_pipeline.families import FAMILIES
from data_pipeline.shards import (
    ShardDamaged,
    commit_dataset,
    commit_family,
    open_dataset,
    verify_dataset,
    write_shard,
)
from data_pipeline.staging import column_of
from data_pipeline.storage import LocalStore, canonical_json
from data_pipeline.tokenizer import TOKENIZER_SHA256

ROWS = (600, 300)


def batches(first: int, rows: int) -> list[pa.RecordBatch]:
    made = []
    for start in range(first, first + rows, 256):
        values = [
            {
                "id": number.to_bytes(8, "little"),
                "caption": f"caption {number}".encode(),
                "tokens": np.full(128, number, np.uint16).tobytes(),
                "n_tokens": (number % 129).to_bytes(2, "little"),
                "image64": np.full(12288, number % 251, np.uint8).tobytes(),
            }
            for number in range(start, min(start + 256, first + rows))
        ]
        schema = FAMILIES["base"].schema
        made.append(pa.RecordBatch.from_arrays([column_of(field, values) for field in schema], schema=schema))
    return made


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with a dataset of two shards in one family."""
    folder = tmp_path_factory.mktemp("written")
    store = LocalStore(folder)
    identity = {"tokenizer": TOKENIZER_SHA256, "rows": sum(ROWS)}
    dataset_id = manifests.digest_of(identity)
    shards = [
        write_shard(store, dataset_id, FAMILIES["base"], index, batches(1000 * index, rows))
        for index, rows in enumerate(ROWS)
    ]
    family = commit_family(store, dataset_id, FAMILIES["base"], shards[::-1])
    commit_dataset(store, identity, [family], {"funnel": {}, "quarantined": 0})
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_every_row_comes_back(written: Path) -> None:
    dataset = open_dataset(str(written))
    assert (dataset.rows, dataset.shard_rows, dataset.families()) == (900, ROWS, ("base",))
    for index, rows in enumerate(ROWS):
        shard = dataset.shard("base", index)
        assert shard.rows == rows and len(shard) == -(-rows // shard.batch_rows)
        for number, expected in enumerate(batches(1000 * index, rows)):
            assert shard.batch(number).equals(expected)


def test_arrow_itself_reads_a_shard(written: Path) -> None:
    path = next(written.rglob("shard-00000.arrow"))
    assert pa.ipc.open_file(path).read_all().num_rows == ROWS[0]


def test_a_dataset_opens_by_its_output_folder_or_by_its_own(written: Path) -> None:
    dataset = open_dataset(str(written))
    own = open_dataset(f"{written}/datasets/{dataset.id}")
    assert own.id == dataset.id
    assert own.shard("base", 1).batch(0).equals(dataset.shard("base", 1).batch(0))
    assert own.families() == dataset.families()
    assert verify_dataset(own) == verify_dataset(str(written)) == []


def test_one_flipped_bit_in_a_batch_is_named_when_it_is_read(copied: Path) -> None:
    path = next(copied.rglob("shard-00000.arrow"))
    place = json.loads(path.with_suffix(".json").read_bytes())["file"]["batches"][1]
    flip(path, 8 * (place["offset"] + place["length"] // 2))
    shard = open_dataset(str(copied)).shard("base", 0)
    shard.batch(0)
    for _ in range(2):
        with pytest.raises(ShardDamaged, match=r"shard-00000.arrow batch 1: expected crc32 [0-9a-f]{8}, found"):
            shard.batch(1)


def test_a_shortened_shard_is_refused_not_mapped(copied: Path) -> None:
    path = next(copied.rglob("shard-00001.arrow"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardDamaged, match="shard-00001"):
        open_dataset(str(copied)).shard("base", 1)


def test_threads_share_a_reader(written: Path) -> None:
    shard = open_dataset(str(written)).shard("base", 0)
    expected = batches(0, ROWS[0])
    wrong: list[int] = []

    def read(offset: int) -> None:
        for step in range(60):
            number = (step + offset) % len(shard)
            if not shard.batch(number).equals(expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_found_and_its_file_named(written: Path, data: st.DataObject) -> None:
    files = sorted(path for path in written.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    size = path.stat().st_size
    edges = st.sampled_from([0, 8, 100, size // 2, size - 10, size - 1])
    byte = data.draw(edges | st.integers(0, size - 1)) % size
    bit = 8 * byte + data.draw(st.integers(0, 7))
    flip(path, bit)
    try:
        bad = verify_dataset(str(written))
        assert bad and all(path.parent.name in part.part for part in bad)
        assert any(path.name in part.part for part in bad) or path.name == "manifest.json"
    finally:
        flip(path, bit)
    assert verify_dataset(str(written)) == []


def test_a_missing_part_is_named(copied: Path) -> None:
    for name in ("shard-00000.arrow", "shard-00001.json"):
        next(copied.rglob(name)).unlink()
    assert sorted(Path(bad.part).name for bad in verify_dataset(str(copied))) == [
        "shard-00000.arrow",
        "shard-00001.json",
    ]


def test_several_datasets_in_one_folder_are_named_not_chosen_among(tmp_path: Path, make_corpus: Callable) -> None:
    tar = make_corpus(tmp_path / "a.tar", range(3))
    inputs = [{"kind": "webdataset", "uri": str(tar)}]
    ids = [
        build_corpus(CorpusConfig(inputs=inputs, output=str(tmp_path / "out"), seed=seed))["dataset_id"]
        for seed in (0, 1)
    ]
    with pytest.raises(UserError) as refused:
        open_dataset(str(tmp_path / "out"))
    assert all(dataset_id in str(refused.value) for dataset_id in ids)


def test_no_dataset_is_refused_with_the_way_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected one committed dataset, found none; build it"):
        open_dataset(str(tmp_path / "nothing"))


def test_tokens_of_another_tokenizer_are_refused(copied: Path) -> None:
    path = next(copied.glob("datasets/*/manifest.json"))
    document = json.loads(path.read_bytes())
    del document["sha256"]
    document["identity"]["tokenizer"] = "0" * 64
    document["id"] = manifests.digest_of(document["identity"])
    path.write_bytes(canonical_json(document | {"sha256": manifests.digest_of(document)}))
    with pytest.raises(UserError, match=f"expected tokenizer {TOKENIZER_SHA256[:12]}, found 000000000000"):
        open_dataset(str(copied))


def test_an_unknown_family_is_refused_by_name(written: Path) -> None:
    with pytest.raises(UserError, match="family labels: expected one of base"):
        open_dataset(str(written)).shard("labels", 0)
