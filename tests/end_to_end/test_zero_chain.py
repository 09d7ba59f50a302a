"""One run through every ZeRO stage and world size, by the launcher and the store: nothing is converted on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import consumed_ids

from cluster.training import train_run
from data_pipeline.storage import LocalStore
from trainer.checkpoint.manifest import committed, read_manifest
from trainer.recipes import parse_train_config
from trainer.tracking.jsonl import read_curves

Values = Callable[..., dict[str, Any]]

CHAIN = ((3, 2), (1, 1), (2, 2), (0, 3))  # (ZeRO stage, ranks)


def test_a_run_goes_through_every_zero_stage_and_several_world_sizes_without_conversion(train_values: Values) -> None:
    """Dropout inside the network is drawn per rank, and is off here; all else is a function of the position."""
    alone = train_values("alone", images=128, dropout=0.0, checkpoint={"every_images": 32})
    train_run(parse_train_config(alone, "test"))
    chained = train_values("chained", dropout=0.0, checkpoint={"every_images": 32})
    for number, (stage, workers) in enumerate(CHAIN, 1):
        changes = {"images": 32 * number, "zero": {"stage": stage}, "launcher": {"workers": workers}}
        train_run(parse_train_config(chained | changes, "test"))
    assert consumed_ids(chained["store"]) == consumed_ids(alone["store"])
    losses = [read_curves(Path(values["store"], "tracking"))["loss/total"] for values in (alone, chained)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    store = LocalStore(Path(chained["store"]))
    written = [read_manifest(store, name.manifest_key) for name in sorted(committed(store))]
    assert [(manifest.zero_stage, manifest.world_size) for manifest in written] == list(CHAIN)
    assert [manifest.position for manifest in written] == [32, 64, 96, 128]
