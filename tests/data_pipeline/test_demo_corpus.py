"""The demo corpus: enough pictures, disjoint splits, captions that say what is seen."""

from __future__ import annotations

from itertools import combinations, islice

import numpy as np

from data_pipeline import demo, images
from data_pipeline.records import Record
from data_pipeline.sources import Input, list_units


def test_there_are_at_least_four_thousand_pictures_and_the_splits_share_no_emoji() -> None:
    train, heldout = demo.emoji_of("train"), demo.emoji_of("heldout")
    assert demo.GROUNDS_PER_EMOJI * (len(train) + len(heldout)) >= 4000
    assert not set(train) & set(heldout)
    assert not {emoji.name for emoji in train} & {emoji.name for emoji in heldout}
    assert 0.04 < len(heldout) / len(train) < 0.09


def test_slices_share_out_the_split() -> None:
    slices = [demo.slice_of("train", part) for part in range(demo.SLICES["train"])]
    assert sorted(emoji for part in slices for emoji in part) == list(demo.emoji_of("train"))


def test_the_eight_grounds_are_far_apart() -> None:
    assert len(demo.GROUNDS) == 8
    for one, other in combinations(demo.GROUNDS.values(), 2):
        assert np.linalg.norm(np.subtract(one, other)) > 75


def test_the_border_of_a_picture_shows_the_ground_that_its_caption_names() -> None:
    for record in islice(demo.read_slice("heldout", 0), 40):
        assert isinstance(record, Record)
        pixels = images.decode(record.image_bytes)
        assert pixels.shape == (demo.SIDE, demo.SIDE, 3)
        ground = record.captions[0].decode().split()[-2]
        border = np.concatenate([pixels[:12].reshape(-1, 3), pixels[:, -12:].reshape(-1, 3)])
        assert (border == demo.GROUNDS[ground]).all(), record.captions
        assert (pixels != demo.GROUNDS[ground]).any(axis=2).mean() > 0.02, record.captions


def test_captions_read_as_english() -> None:
    apple = demo.Emoji("1F34E", "red apple")
    assert demo.caption_of(apple, "blue") == "red apple on a blue ground"
    assert demo.caption_of(apple, "orange") == "red apple on an orange ground"


def test_a_unit_is_the_same_each_time() -> None:
    first, second = (list_units([Input(kind="demo", uri="heldout")]) for _ in range(2))
    assert first == second
    assert list(islice(demo.read_slice("heldout", 0), 4)) == list(islice(demo.read_slice("heldout", 0), 4))
