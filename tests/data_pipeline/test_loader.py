"""The loader: rows in the order's order, whatever is read ahead, whatever the world size."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from data_pipeline.draws import Draws
from data_pipeline.loader import Column, Loader, Rows, read_rows
from data_pipeline.order import SampleOrder, micro_batches
from data_pipeline.shards import Dataset, open_dataset

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
    loader = Loader(dataset, order, (Column("base", "n_tokens"),), prepare, cut, ahead, threads)
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

    batches = Loader(dataset, order, (Column("base", "caption"),), prepare, [(0, 8)]).batches(0, 800)
    next(batches)
    next(batches)
    with pytest.raises(RuntimeError, match="row is bad"):
        next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
