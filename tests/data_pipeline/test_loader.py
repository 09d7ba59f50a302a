"""The loader: rows in the order's order, whatever is read ahead, whatever the world size."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numbered_shards import DistantStore, write_numbered

from data_pipeline.arrow_files import write_arrow
from data_pipeline.draws import Draws
from data_pipeline.errors import UserError
from data_pipeline.families import KNOWN_FAMILIES
from data_pipeline.loader import Column, Loader, LoaderSettings, Rows, read_rows
from data_pipeline.order import SampleOrder, micro_batches
from data_pipeline.shard_reader import ShardReader
from data_pipeline.shards import Dataset, ShardDamaged, open_dataset, open_from
from data_pipeline.storage import LocalStore

COLUMNS = (Column("base", "caption"), Column("base", "image64"), Column("upsampler", "image256"))


@pytest.fixture
def dataset(dataset_uri: str) -> Dataset:
    return open_dataset(dataset_uri)


def test_rows_come_back_in_the_order_asked_from_every_family(dataset: Dataset) -> None:
    shards, rows = np.array([2, 0, 1, 0]), np.array([5, 31, 0, 0])
    together = read_rows(dataset, COLUMNS, shards, rows)
    for number in range(4):
        alone = read_rows(dataset, COLUMNS, shards[number : number + 1], rows[number : number + 1])
        assert alone["id"][0] == together["id"][number]
        assert alone["caption"][0] == together["caption"][number]
        assert alone["image256"][0] == together["image256"][number]
        np.testing.assert_array_equal(alone["image64"][0], together["image64"][number])
    assert together["image64"].shape == (4, 12288) and together["image64"].dtype == np.uint8


@pytest.mark.parametrize(("ahead", "threads"), [(1, 1), (5, 3)])
def test_reading_ahead_changes_nothing(dataset: Dataset, ahead: int, threads: int) -> None:
    order = SampleOrder(dataset.id, dataset.shard_rows, 0, 8)

    def prepare(rows: Rows, draws: Draws) -> list[float]:
        return draws.uniform("noise").tolist()

    cut = micro_batches(8, 0, 1, 3)
    settings = LoaderSettings(ahead=ahead, threads=threads)
    loader = Loader(dataset, order, (Column("base", "n_tokens"),), prepare, cut, settings)
    got = [micro for step in loader.batches(64, 128) for micro in step]
    shards, rows = order.rows_at(np.arange(64, 128))
    expected = read_rows(dataset, (Column("base", "n_tokens"),), shards, rows)
    np.testing.assert_array_equal(np.concatenate([micro.ids for micro in got]), expected["id"])
    assert [value for micro in got for value in micro.batch] == Draws(0, np.arange(64, 128)).uniform("noise").tolist()


def test_a_share_that_is_used_up_gives_stand_ins_without_positions(dataset: Dataset) -> None:
    order = SampleOrder(dataset.id, dataset.shard_rows, 0, 5)
    cuts = [micro_batches(5, rank, 2, 1) for rank in range(2)]
    steps = [
        next(Loader(dataset, order, (Column("base", "caption"),), lambda r, d: len(r["id"]), cut).batches(0, 5))
        for cut in cuts
    ]
    assert [[len(micro.positions) for micro in step] for step in steps] == [[1, 1, 0], [1, 1, 1]]
    stand_in = steps[0][2]
    assert stand_in.batch == 1 and len(stand_in.ids) == 0
    assert stand_in.draws.positions.tolist() == [0], "a row that another rank counts"


def test_closing_the_iterator_ends_its_threads_and_an_error_reaches_the_caller(dataset: Dataset) -> None:
    order = SampleOrder(dataset.id, dataset.shard_rows, 0, 8)

    def prepare(rows: Rows, draws: Draws) -> None:
        if draws.positions[0] == 16:
            raise RuntimeError("row is bad")

    before = set(threading.enumerate())  # an iterator of another test may not have been collected yet
    batches = Loader(dataset, order, (Column("base", "caption"),), prepare, [(0, 8)]).batches(0, 800)
    next(batches)
    next(batches)
    own = set(threading.enumerate()) - before
    assert own and all(thread.name.startswith("loader") for thread in own)
    with pytest.raises(RuntimeError, match="row is bad"):
        next(batches)
    assert not own & set(threading.enumerate())

    closed = Loader(dataset, order, (Column("base", "caption"),), prepare, [(0, 8)]).batches(0, 800)
    next(closed)
    own = set(threading.enumerate()) - before
    assert own
    closed.close()
    assert not own & set(threading.enumerate())


SHARD_ROWS = (600, 300, 600)
SUBSTITUTE = LoaderSettings(on_damage="substitute")


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three shards of several record batches, in which ids tell shard and row."""
    folder = tmp_path_factory.mktemp("numbered")
    write_numbered(LocalStore(folder), SHARD_ROWS)
    return folder


@pytest.fixture
def copied(numbered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(numbered, tmp_path / "copied"))


def damage(folder: Path, shard: int, batch: int) -> None:
    path = next(folder.rglob(f"shard-{shard:05d}.arrow"))
    place = json.loads(path.with_suffix(".json").read_bytes())["file"]["batches"][batch]
    data = bytearray(path.read_bytes())
    data[place["offset"] + place["length"] // 2] ^= 4
    path.write_bytes(data)


def shorten(folder: Path, shard: int, to: int) -> None:
    os.truncate(next(folder.rglob(f"shard-{shard:05d}.arrow")), to)


def ids_and_places(
    dataset: Dataset, world: int, settings: LoaderSettings = SUBSTITUTE, quarantined: tuple[int, ...] = ()
) -> tuple[list[int], list]:
    """The ids that all ranks together read in 25 global batches of 60, in order; and what was replaced."""
    order = SampleOrder(dataset.id, dataset.shard_rows, 1, 60)
    columns = (Column("base", "n_tokens"), Column("base", "image64"))
    ids, replaced = np.zeros(1500, np.uint64), []
    for rank in range(world):
        cut = micro_batches(60, rank, world, 7)
        loader = Loader(dataset, order, columns, lambda rows, draws: rows, cut, settings, quarantined=quarantined)
        for step in loader.batches(0, 1500):
            for micro in step:
                ids[micro.positions] = micro.ids
                replaced += micro.replaced
                for id_, pixels in zip(micro.batch["id"], micro.batch["image64"], strict=True):
                    assert (pixels == int(id_) % 251).all()
    return ids.tolist(), sorted(replaced)


def expected_ids(dataset: Dataset) -> np.ndarray:
    shards, rows = SampleOrder(dataset.id, dataset.shard_rows, 1, 60).rows_at(np.arange(1500))
    return 10_000 * shards + rows


def test_a_damaged_batch_stops_the_run_by_name_or_its_rows_are_replaced_alike_at_every_world_size(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = expected_ids(open_dataset(str(copied)))
    damage(copied, 0, 1)
    damage(copied, 2, 2)
    with pytest.raises(ShardDamaged, match=r"shard-0000[02]\.arrow batch [12]: expected crc32"):
        ids_and_places(open_dataset(str(copied)), 1, LoaderSettings())
    found, replaced = ids_and_places(open_dataset(str(copied)), 1)
    # Rows 256 to 511 of shard 0 become those at the same place of the next 88 rows; the last 88 of shard 2 its first.
    expected = whole.copy()
    shards, rows = np.divmod(whole, 10_000)
    first, second = (shards == 0) & (rows // 256 == 1), (shards == 2) & (rows // 256 == 2)
    expected[first] = 512 + (rows[first] - 256) % 88
    expected[second] = 20_000 + rows[second] - 512
    assert found == expected.tolist() and len(replaced) == first.sum() + second.sum() > 300
    assert set(replaced) == {(0, 1), (2, 2)}
    assert caplog.text.count("shard-00000.arrow batch 1: expected crc32") == 1
    for world in (2, 7):
        assert ids_and_places(open_dataset(str(copied)), world) == (found, replaced)


def test_a_shard_that_is_gone_is_replaced_by_the_next_and_nothing_whole_is_an_error(copied: Path) -> None:
    whole = expected_ids(open_dataset(str(copied)))
    shorten(copied, 1, 5000)
    found, replaced = ids_and_places(open_dataset(str(copied)), 2)
    assert set(replaced) == {(1, None)} and len(replaced) == (whole // 10_000 == 1).sum()
    expected = np.where(whole // 10_000 == 1, whole + 10_000, whole)
    assert found == expected.tolist()
    for shard in (0, 2):
        shorten(copied, shard, 100)
    with pytest.raises(ShardDamaged, match=r"shard-0000.\.arrow: expected [0-9]+ bytes, found"):
        ids_and_places(open_dataset(str(copied)), 1)


def test_rows_of_a_quarantined_shard_are_replaced_alike_at_every_world_size_and_damage_still_stops(
    copied: Path,
) -> None:
    dataset = open_dataset(str(copied))
    whole = expected_ids(dataset)
    shards, rows = np.divmod(whole, 10_000)
    found, replaced = ids_and_places(dataset, 1, LoaderSettings(), quarantined=(0,))
    # Shard 1 has 300 rows: batch 0 goes to its batch 0, batch 1 to its last 44 rows, batch 2 to its batch 0.
    batch, place = np.divmod(rows, 256)
    expected = np.where(shards == 0, 10_000 + np.where(batch == 1, 256 + place % 44, place), whole)
    assert found == expected.tolist() and replaced == [(0, None)] * int((shards == 0).sum())
    order = SampleOrder(dataset.id, dataset.shard_rows, 1, 60)
    loader = Loader(
        dataset, order, (Column("base", "n_tokens"),), lambda rows, draws: rows, [(0, 60)], quarantined=(0,)
    )
    assert set(loader.shards_at(np.arange(1500)).tolist()) == {1, 2}
    for world in (2, 7):
        assert ids_and_places(dataset, world, LoaderSettings(), quarantined=(0,)) == (found, replaced)
    with pytest.raises(UserError, match="quarantine: expected a shard that is not in it, found all shards"):
        ids_and_places(dataset, 1, quarantined=(0, 1, 2))
    damage(copied, 1, 0)
    with pytest.raises(ShardDamaged, match=r"shard-00001\.arrow batch 0: expected crc32"):
        ids_and_places(open_dataset(str(copied)), 1, LoaderSettings(), quarantined=(0,))
    found, replaced = ids_and_places(open_dataset(str(copied)), 1, quarantined=(0,))
    assert set(replaced) == {(0, None), (1, 0)} and min(found) >= 10_256


def test_shards_that_were_swapped_are_named_and_rows_of_a_whole_one_take_their_place(copied: Path) -> None:
    first, third = (next(copied.rglob(f"shard-0000{shard}.arrow")) for shard in (0, 2))
    content = first.read_bytes()
    shutil.copyfile(third, first)
    third.write_bytes(content)
    whole = expected_ids(open_dataset(str(copied)))
    with pytest.raises(ShardDamaged, match=r"shard-0000[02]\.arrow batch [012]: expected crc32"):
        ids_and_places(open_dataset(str(copied)), 1, LoaderSettings())
    found, replaced = ids_and_places(open_dataset(str(copied)), 3)
    assert set(replaced) == {(shard, batch) for shard in (0, 2) for batch in range(3)}
    assert len(replaced) == (whole // 10_000 != 1).sum()
    assert {id_ // 10_000 for id_ in found} == {1}


def test_of_a_damaged_object_in_a_distant_store_everything_whole_is_still_read(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = expected_ids(open_dataset(str(copied)))
    damage(copied, 0, 1)
    path = next(copied.rglob("shard-00002.arrow"))
    third = json.loads(path.with_suffix(".json").read_bytes())["file"]["batches"][2]
    shorten(copied, 2, third["offset"] + 100)
    found, replaced = ids_and_places(open_from(DistantStore(copied)), 1)
    assert set(replaced) == {(0, 1), (2, 2)}
    assert (np.array(found) == whole).sum() == 1500 - len(replaced)
    assert "the file is not cached, but read from the store, batch by batch" in caplog.text
    with pytest.raises(ShardDamaged, match=r"shard-0000[02]\.arrow batch [12]"):
        ids_and_places(open_from(DistantStore(copied)), 1, LoaderSettings())


@pytest.mark.parametrize("cached", [True, False])
def test_a_bit_that_flips_on_the_way_is_read_again_and_damages_nothing(
    numbered: Path, cached: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class FlippingOnce(DistantStore):
        def get_range(self, key: str, start: int, length: int) -> bytes:
            again = (key, start) in places
            places.append((key, start))
            data = super().get_range(key, start, length)
            return data if again or length < 10_000 else bytes([*data[:5000], data[5000] ^ 4, *data[5001:]])

    places: list[tuple[str, int]] = []
    dataset = open_from(FlippingOnce(numbered))
    dataset.cached = cached
    reader = dataset.shard("base", 2)
    assert reader.take(["id"], np.array([7, 300]))["id"].tolist() == [20_007, 20_300]
    assert reader.in_cache == cached
    assert caplog.text.count("reading it from the store once more") == (3 if cached else 2)


def test_a_full_cache_disk_slows_and_ends_nothing(
    numbered: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, state_folder: Path
) -> None:
    monkeypatch.setattr("data_pipeline.storage.cache._free_bytes", lambda folder: 100_000)
    dataset = open_from(DistantStore(numbered))
    found, replaced = ids_and_places(dataset, 2)
    assert (found, replaced) == (expected_ids(dataset).tolist(), [])
    assert "do not fit into" in caplog.text and not list((state_folder / "cache").iterdir())


def test_every_kind_of_column_comes_back_as_arrow_reads_it(numbered: Path, dataset: Dataset) -> None:
    rows = np.random.default_rng(0).integers(0, 600, 500)
    shard = open_dataset(str(numbered)).shard("base", 2)
    names = shard.schema.names
    table = pa.Table.from_batches([shard.batch(number) for number in range(len(shard))]).take(pa.array(rows))
    found = shard.take(names, rows)
    for name in names:
        values = found[name] if isinstance(found[name], list) else found[name].tolist()
        assert values == table[name].to_pylist(), name
    jpegs = dataset.shard("upsampler", 1).take(["image256"], np.array([31, 0, 31]))["image256"]
    stored = dataset.shard("upsampler", 1).batch(0)["image256"].to_pylist()
    assert jpegs == [stored[31], stored[0], stored[31]]


class Repeated(Dataset):
    """As many shards as it says, all of them one file."""

    def _open_shard(self, family: str, index: int) -> ShardReader:
        schema = KNOWN_FAMILIES[family].schema
        return ShardReader(self.store, "one.arrow", schema, self.manifest["file"])


def anonymous_bytes() -> int:
    """Of this process, without mapped files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["RssAnon"].split()[0])


def test_memory_is_flat_from_ten_thousand_to_a_billion_rows(tmp_path: Path) -> None:
    store, schema = LocalStore(tmp_path), KNOWN_FAMILIES["labels"].schema
    made = [
        pa.record_batch([np.arange(256, dtype=np.uint64), np.arange(256, dtype=np.int32)], schema) for _ in range(16)
    ]
    file = write_arrow(store, "one.arrow", schema, made)
    peaks = {}
    for rows in (10_000, 1_000_000_000):
        shards = (4096,) * (rows // 4096)
        dataset = Repeated(store, "", {"id": "id", "rows": sum(shards), "shard_rows": shards, "file": file})
        begin = anonymous_bytes()
        order = SampleOrder("id", dataset.shard_rows, 0, 2048)
        loader = Loader(dataset, order, (Column("labels", "label"),), lambda rows, draws: None, [(0, 2048)])
        peak = 0
        # In the middle of an epoch that no reader could have walked to.
        for start in (0, 2048 * 10**9):
            for _ in loader.batches(start, start + 40 * 2048):
                peak = max(peak, anonymous_bytes() - begin)
        peaks[rows] = peak
    print({rows: f"{peak / 2**20:.1f} MiB" for rows, peak in peaks.items()})
    assert peaks[1_000_000_000] - peaks[10_000] < 64 * 2**20
