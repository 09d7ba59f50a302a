"""Fetching ahead: what is needed is announced, comes in order, once, within its room; and its failure is nobody's."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_shards import DistantStore, write_numbered
from numpy.typing import NDArray

from data_pipeline.ahead import Ahead, shards_needed
from data_pipeline.draws import Draws
from data_pipeline.loader import Column, Loader, LoaderSettings, Rows
from data_pipeline.mixture import Mixture
from data_pipeline.open_shards import OpenShards
from data_pipeline.order import SampleOrder, micro_batches
from data_pipeline.shard_reader import ShardReader
from data_pipeline.shards import Dataset, open_from
from data_pipeline.storage import LocalStore
from data_pipeline.storage.cache import Cache, machine_cache

SHARD_ROWS = (40,) * 30
COLUMNS = (Column("base", "n_tokens"), Column("base", "caption"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of thirty shards of about half a megabyte."""
    folder = tmp_path_factory.mktemp("thirty")
    write_numbered(DistantStore(folder), SHARD_ROWS)
    return folder


def ids(rows: Rows, draws: Draws) -> list[int]:
    return [int(number) for number in rows["id"]]


def eventually(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not what():
        assert time.monotonic() < until
        time.sleep(0.005)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_shard_that_a_batch_reads_was_announced_for_it_and_no_other(data: st.DataObject) -> None:
    shard_rows = tuple(data.draw(st.lists(st.integers(1, 3000), min_size=1, max_size=40)))
    batch = data.draw(st.integers(1, min(200, max(1, sum(shard_rows) - 64))))
    if sum(shard_rows) < batch + 64:
        return
    order = SampleOrder("id", shard_rows, data.draw(st.integers(0, 9)), batch)
    world = data.draw(st.integers(1, batch))
    cut = micro_batches(batch, data.draw(st.integers(0, world - 1)), world, data.draw(st.integers(1, 16)))
    begin, end = cut[0][0], cut[-1][1]
    # Around the end of an epoch as well.
    first = batch * data.draw(st.integers(0, 2 * order.epoch_images // batch))
    announced = list(shards_needed(order, (begin, end), ["base"], first, first + 9 * batch))
    assert [start for start, _ in announced] == list(range(first, first + 9 * batch, batch))
    for start, shards in announced:
        read = [order.rows_at(np.arange(start + low, start + high))[0] for low, high in cut]
        assert [shard for _, shard in shards] == list(dict.fromkeys(np.concatenate(read).tolist()))


def test_shards_come_once_in_the_order_of_need_and_within_the_room(folder: Path, tmp_path: Path) -> None:
    store = DistantStore(folder)
    dataset = open_from(store)
    size = dataset.shard_bytes("base", 0)
    cache = machine_cache()
    needs = [(16 * number, [("base", number), ("base", number + 1)]) for number in range(20)]
    order_of_need = [f"shard-{number:05d}.arrow" for number in range(21)]

    def fetched() -> list[str]:
        return [name for name in store.reads if name.endswith(".arrow")]

    with Ahead(dataset, iter(needs), cache, 4 * size, 0, 10**6) as ahead:
        for reached in range(20):
            ahead.reached(16 * reached)
            # The room is for four: those of this batch and two more.
            eventually(lambda: len(fetched()) == min(reached + 4, 21))  # noqa: B023
            time.sleep(0.01)
            assert sorted(fetched()) == order_of_need[: reached + 4]
            before = dict(store.reads)
            dataset.shard("base", reached)
            assert {**store.reads, "manifest": 0} == {**before, "manifest": 0}, "it lay in the cache"
    assert {store.reads[name] for name in order_of_need} == {size}


def test_ranks_that_want_the_same_shards_fetch_each_once_and_all_is_read_from_the_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DistantStore(folder)
    size = open_from(store).shard_bytes("base", 0)
    monkeypatch.setenv("GLIDEPATH_CACHE_BYTES", str(64 * size))
    order = SampleOrder("id", SHARD_ROWS, 3, 24)
    datasets = [open_from(store) for _ in range(2)]
    got: dict[int, list[int]] = {0: [], 1: []}
    with_ranks = [
        Loader(dataset, order, COLUMNS, ids, micro_batches(24, rank, 2, 5), ranks_here=2).batches(0, 960)
        for rank, dataset in enumerate(datasets)
    ]
    for steps in zip(*with_ranks, strict=True):
        for rank, step in enumerate(steps):
            got[rank] += [number for micro in step for number in micro.batch]
    shards, rows = order.rows_at(np.arange(960))
    expected = (10_000 * shards + rows).reshape(40, 2, 12)
    assert got == {rank: expected[:, rank].ravel().tolist() for rank in range(2)}
    assert {count for name, count in store.reads.items() if name.endswith(".arrow")} == {size}


def test_a_store_that_fails_ahead_ends_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DistantStore(folder)
    dataset = open_from(store)
    store.down = True
    cache = Cache(machine_cache().folder, 2**30)
    with caplog.at_level(logging.WARNING), Ahead(dataset, iter([(0, [("base", 3)])]), cache, 2**30, 0, 1):
        eventually(lambda: "not fetched ahead, its reader will ask again" in caplog.text)
    with pytest.raises(ConnectionResetError):
        dataset.shard("base", 3)
    store.down = False
    assert dataset.shard("base", 3).take(["id"], np.array([7]))["id"].tolist() == [30_007]


def test_a_batch_whose_shards_do_not_fit_is_said_once_and_read_without_the_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, state_folder: Path
) -> None:
    dataset: Dataset = open_from(DistantStore(folder))
    monkeypatch.setenv("GLIDEPATH_CACHE_BYTES", str(4 * dataset.shard_bytes("base", 0)))
    order = SampleOrder("id", SHARD_ROWS, 3, 64)  # 64 lanes: all thirty shards at once
    loader = Loader(dataset, order, COLUMNS, ids, [(0, 64)])
    got = [number for step in loader.batches(0, 192) for micro in step for number in micro.batch]
    shards, rows = order.rows_at(np.arange(192))
    assert got == (10_000 * shards + rows).tolist()
    assert caplog.text.count("reading from the store instead") == 1 and not dataset.cached


def test_what_is_still_needed_outlives_what_another_rank_brings(folder: Path) -> None:
    dataset = open_from(DistantStore(folder))
    size = dataset.shard_bytes("base", 0)
    cache = Cache(machine_cache().folder, 6 * size)
    with Ahead(dataset, iter([(0, [("base", 0)]), (1000, [("base", 0)])]), cache, size, 0, 2000) as ahead:
        eventually(lambda: len(list(cache.folder.glob("?" * 64))) == 1)
        (needed,) = cache.folder.iterdir()
        for number in range(1, 20):  # another rank's: more than the cache holds
            ahead.reached(number)
            eventually(lambda: ahead._let_go_at == number)  # noqa: B023
            path = cache.folder / f"{number:064x}"
            cache.open(path.name, size, lambda: [bytes(size)], Path.stat)
            assert needed.exists()


def test_it_looks_a_horizon_beyond_where_the_reader_is_from_its_first_batch_on(folder: Path) -> None:
    dataset = open_from(DistantStore(folder))
    looked: list[int] = []

    def needs() -> Iterator[tuple[int, list[tuple[str, int]]]]:
        for start in range(5000, 10**6, 10):
            looked.append(start)
            yield start, [("base", 0)]

    with Ahead(dataset, needs(), machine_cache(), 2**30, 5000, 1000) as ahead:
        eventually(lambda: looked[-1:] == [6000])
        ahead.reached(5500)
        eventually(lambda: looked[-1] == 6500)
        time.sleep(0.02)
        assert looked == list(range(5000, 6501, 10))


class RowByRow(SampleOrder):
    """One shard after the other, as where shards are many times larger than a batch."""

    def rows_at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ends = np.cumsum(self.shard_rows)
        shards = np.searchsorted(ends, positions, side="right")
        return shards, positions - ends[shards] + np.asarray(self.shard_rows)[shards]


def deleted_bytes(folder: Path) -> int:
    """Of files under `folder` that this process has mapped and that are in no folder any more."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [
        line[0].split("-") for line in lines if line[-1].startswith(str(folder)) and line[-1].endswith("(deleted)")
    ]
    return sum(int(end, 16) - int(begin, 16) for begin, end in spans)


@pytest.mark.parametrize("mixed", [False, True])
def test_what_the_cache_removed_stays_mapped_within_the_bound_of_the_readers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state_folder: Path, mixed: bool
) -> None:
    store = DistantStore(folder)
    dataset: Dataset = open_from(store)
    size = dataset.shard_bytes("base", 0)
    if mixed:
        near = write_numbered(LocalStore(tmp_path / "near"), (128,))
        dataset = Mixture([dataset, near], [Fraction(3), Fraction(1)])
    limit_bytes = 12 * size
    monkeypatch.setenv("GLIDEPATH_CACHE_BYTES", str(limit_bytes))
    order = RowByRow("id", dataset.shard_rows, 0, 20)
    loader = Loader(dataset, order, COLUMNS, ids, [(0, 20)], LoaderSettings(threads=1))
    seen, deleted = set(), []
    for step in loader.batches(0, dataset.rows // 20 * 20):
        seen |= {row // 10_000 for micro in step for row in micro.batch}
        deleted.append(deleted_bytes(state_folder))
    assert max(deleted) <= limit_bytes // 2 + size + 8 * 4096, [count / size for count in deleted]
    assert dataset.cached and len(seen) == len(SHARD_ROWS)
    assert {count for name, count in store.reads.items() if name.endswith(".arrow")} == {size}, "each came once"


def test_threads_that_want_one_shard_open_it_once_and_a_failure_is_told_to_each(folder: Path) -> None:
    store = DistantStore(folder)
    dataset, opened = open_from(store), []
    reader = dataset.shard("base", 1)

    def opener(family: str, index: int) -> ShardReader:
        opened.append(index)
        time.sleep(0.02)
        if store.down:
            raise ConnectionResetError
        return reader

    shards = OpenShards(opener)
    with ThreadPoolExecutor(8) as pool:
        assert {*pool.map(lambda _: shards("base", 1), range(8))} == {reader} and opened == [1]
        store.down = True
        failed = [pool.submit(shards, "base", 2) for _ in range(3)]
        assert all(isinstance(future.exception(), ConnectionResetError) for future in failed)
    store.down = False
    assert shards("base", 2) is reader
