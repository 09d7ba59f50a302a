"""The laws of inpainting masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import parse
from data_pipeline.draws import Draws
from data_pipeline.errors import UserError
from trainer.recipes.masks import MaskSettings, random_masks


@settings(max_examples=40, deadline=None)
@given(
    law=st.sampled_from(["boxes", "strokes", "mixed"]), side=st.sampled_from([8, 32, 64]), first=st.integers(0, 2**40)
)
def test_every_mask_erases_something_and_is_of_its_sample_alone(law: str, side: int, first: int) -> None:
    config = parse(MaskSettings, {"law": law, "everything": 0.0}, "test")
    positions = np.arange(first, first + 6, dtype=np.int64)
    masks = random_masks(config, side, Draws(0, positions))
    assert masks.shape == (6, 1, side, side) and masks.dtype == torch.float32
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert (masks.amin(dim=(1, 2, 3)) == 0).all()
    alone = random_masks(config, side, Draws(0, positions[4:5]))
    assert torch.equal(alone[0], masks[4])


def test_the_settings_say_how_much_is_erased() -> None:
    draws = Draws(3, np.arange(400, dtype=np.int64))
    erased = {
        share: 1 - float(random_masks(parse(MaskSettings, values, "test"), 64, draws).mean())
        for share, values in {
            "small": {"law": "boxes", "regions": [1, 1], "box_side": [0.5, 0.5], "everything": 0.0},
            "large": {"law": "boxes", "regions": [4, 4], "box_side": [0.5, 0.5], "everything": 0.0},
            "all": {"everything": 1.0},
        }.items()
    }
    assert erased["small"] == pytest.approx(0.25, abs=0.001)
    assert 0.4 < erased["large"] < 0.9 and erased["all"] == 1.0
    kept_whole = random_masks(parse(MaskSettings, {"everything": 0.25}, "test"), 16, draws).amax(dim=(1, 2, 3)) == 0
    assert float(kept_whole.float().mean()) == pytest.approx(0.25, abs=0.08)


def test_ranges_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(UserError, match=r"box_side as \[smallest, largest\], found \[0.6, 0.2\]"):
        parse(MaskSettings, {"box_side": [0.6, 0.2]}, "test")
