"""A mixture through the loader, when one of its datasets is in a bucket and the other in a folder."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from data_pipeline.build import CorpusConfig, build_corpus
from data_pipeline.config import parse
from data_pipeline.loader import Column, Loader, read_rows
from data_pipeline.mixture import Mixture
from data_pipeline.order import micro_batches
from data_pipeline.shards import open_dataset


def test_a_mixture_of_a_bucket_and_a_folder_gives_the_rows_of_both_and_fetches_those_of_the_bucket_ahead(
    moto_uri: str, dataset_uri: str, picture_folder: Path, state_folder: Path
) -> None:
    inputs = [{"kind": "folder", "uri": str(picture_folder)}]
    values = {"inputs": inputs, "output": moto_uri, "filters": {"preset": "none"}, "shard_rows": 24, "seed": 1}
    build_corpus(parse(CorpusConfig, values, "test"))
    near, far = open_dataset(dataset_uri), open_dataset(moto_uri)
    mixture = Mixture([near, far], [Fraction(1), Fraction(3)])
    assert mixture.distant and mixture.shard_bytes("base", 0) == 0 < mixture.shard_bytes("base", 3)
    assert [mixture.shard_label(shard) for shard in (2, 3)] == [(near.id, "shard-00002"), (far.id, "shard-00000")]

    before = set((state_folder / "cache").iterdir())
    assert mixture.fetch("base", 0) is None, "it lies in a folder"
    fetched = mixture.fetch("base", 3)
    assert fetched is not None and {path.name for path in set((state_folder / "cache").iterdir()) - before} <= {fetched}

    order, columns = mixture.order(seed=0, batch=8), (Column("base", "image64"),)
    loader = Loader(mixture, order, columns, lambda rows, draws: rows["image64"], micro_batches(8, 0, 1, 4))
    got = [micro for step in loader.batches(64, 128) for micro in step]
    datasets, own = order.split(np.arange(64, 128))
    ids, images = np.empty(64, np.uint64), np.empty((64, 12288), np.uint8)
    for number, dataset in enumerate((near, far)):
        chosen = datasets == number
        rows = read_rows(dataset, columns, *order.orders[number].rows_at(own[chosen]))
        ids[chosen], images[chosen] = rows["id"], rows["image64"]
    assert np.array_equal(np.concatenate([micro.ids for micro in got]), ids)
    assert np.array_equal(np.concatenate([micro.batch for micro in got]), images)
