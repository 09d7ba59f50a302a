"""Staged rows: what was staged comes back or is refused, and a distant store is asked for little more than the rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.arrow_files import ShardDamaged
from data_pipeline.build import build_corpus
from data_pipeline.corpus import CorpusConfig
from data_pipeline.corpus_plan import reads_of_a_shard
from data_pipeline.families import FAMILIES
from data_pipeline.shards import open_dataset
from data_pipeline.staging import INDEX_ROWS, STAGED_FILE, StagedUnit, Survivor, write_staged
from data_pipeline.storage import LocalStore

ROWS = 40


class DistantStore(LocalStore):
    """As a bucket: no path on this machine; counts what is asked of staged rows."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.staged_bytes = self.staged_reads = 0

    def local_path(self, key: str) -> None:  # type: ignore[override]
        return None

    def get_range(self, key: str, start: int, length: int) -> bytes:
        data = super().get_range(key, start, length)
        if key.endswith(STAGED_FILE):
            self.staged_bytes += len(data)
            self.staged_reads += 1
        return data


def survivors(rows: int) -> list[Survivor]:
    chance = np.random.default_rng(0)
    return [
        Survivor(
            int(chance.integers(2**63)),
            f"picture {number} " * (number % 3),
            chance.integers(0, 256, (64, 64, 3), np.uint8),
            chance.bytes(100 + number),
        )
        for number in range(rows)
    ]


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalStore, dict[str, Any], bytes]:
    store = LocalStore(tmp_path_factory.mktemp("staged"))
    document = write_staged(store, "u/", [survivors(ROWS)[:7], [], survivors(ROWS)[7:]])
    return store, document, store.get(f"u/{STAGED_FILE}")


def test_every_row_comes_back_alone_and_with_others(tmp_path: Path) -> None:
    made = survivors(INDEX_ROWS + 3)  # more than one piece of the index
    store = LocalStore(tmp_path)
    document = write_staged(store, "u/", [made])
    unit = StagedUnit(store, "u/", document, 1)
    together = unit.rows(FAMILIES["base"], INDEX_ROWS - 2, len(made))
    for number, row in zip(range(INDEX_ROWS - 2, len(made)), together, strict=True):
        [alone] = unit.rows(FAMILIES["base"], number, number + 1)
        assert {name: bytes(value) for name, value in alone.items()} == {k: bytes(v) for k, v in row.items()}
        assert bytes(row["image64"]) == made[number].image64.tobytes()
        assert bytes(row["caption"]).decode() == made[number].caption
        [large] = unit.rows(FAMILIES["upsampler"], number, number + 1)
        assert bytes(large["image256"]) == made[number].image256
        assert int.from_bytes(large["id"], "little") == made[number].id


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 2**62), bit=st.integers(0, 7), cut=st.booleans(), distant=st.booleans(), data=st.data())
def test_a_row_is_as_it_was_staged_or_is_refused_whichever_byte_is_damaged(
    staged: tuple[LocalStore, dict[str, Any], bytes],
    tmp_path: Path,
    place: int,
    bit: int,
    cut: bool,
    distant: bool,
    data: st.DataObject,
) -> None:
    _, document, whole = staged
    damaged = bytearray(whole)
    place %= len(damaged)
    if cut:
        del damaged[place:]
    else:
        damaged[place] ^= 1 << bit
    store = DistantStore(tmp_path) if distant else LocalStore(tmp_path)
    store.put(f"u/{STAGED_FILE}", [bytes(damaged)])
    row = data.draw(st.integers(0, ROWS - 1))
    family = FAMILIES[data.draw(st.sampled_from(sorted(FAMILIES)))]
    try:
        # Too few for the cache, whose copies outlive an example.
        [found] = StagedUnit(store, "u/", document, 1).rows(family, row, row + 1)
    except ShardDamaged:
        return
    [expected] = StagedUnit(staged[0], "u/", document, 1).rows(family, row, row + 1)
    assert {name: bytes(value) for name, value in found.items()} == {k: bytes(v) for k, v in expected.items()}


def test_a_damaged_copy_in_the_cache_is_replaced_from_the_store(
    staged: tuple[LocalStore, dict[str, Any], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLIDEPATH_HOME", str(tmp_path / "home"))
    _, document, whole = staged
    store = DistantStore(tmp_path / "store")
    store.put(f"u/{STAGED_FILE}", [whole])
    unit = StagedUnit(store, "u/", document, ROWS)
    [copy] = (tmp_path / "home" / "cache").iterdir()
    copy.write_bytes(bytes(len(whole)))
    assert len(unit.rows(FAMILIES["base"], 0, ROWS)) == ROWS
    assert list((tmp_path / "home" / "cache").iterdir()) == []


def test_a_shard_reads_from_a_bucket_a_few_times_what_it_writes_however_many_units_its_rows_come_from(
    tmp_path: Path, make_corpus: Callable[..., Path]
) -> None:
    units, rows, shard_rows = 4, 80, 4  # so few of a unit in a shard that none is copied to the cache
    for number in range(units):
        make_corpus(tmp_path / "in" / f"{number}.tar", range(rows * number, rows * (number + 1)))
    values = {"inputs": [{"kind": "webdataset", "uri": str(tmp_path / "in")}], "shard_rows": shard_rows}
    store = DistantStore(tmp_path / "out")
    build_corpus(CorpusConfig.model_validate(values | {"output": str(tmp_path / "out")}), store=store)
    written = open_dataset(str(tmp_path / "out")).manifest["bytes"]
    # Each family reads its rows whole, and their places; here a shard takes one row in eighty of a unit.
    assert 0 < store.staged_bytes < 3 * written
    # Of the manifests, which a plan counts as well, there are as many as of the indices.
    reads = units * rows // shard_rows * reads_of_a_shard(shard_rows, units)
    indices = store.staged_reads - 2 * units * rows
    assert store.staged_reads + indices == pytest.approx(reads, rel=0.05)
