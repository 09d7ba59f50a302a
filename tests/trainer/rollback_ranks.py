"""Two ranks that roll back twice, at each of some ZeRO stages; test_rollback.py reads what rank 0 found.

The first time for a poisoned shard, with no checkpoint yet; the second for gradients that are no number. Run as
`rollback_ranks.py RANK WORLD_SIZE FOLDER CONFIG_JSON STAGE...`.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cluster.drills.poked import poke
from data_pipeline.loader import Column, Loader, LoaderSettings, micro_batches
from data_pipeline.shards import open_dataset
from data_pipeline.storage import LocalStore
from trainer import loop
from trainer.checkpoint.inspect import verify_checkpoints
from trainer.checkpoint.load import Restored, fill
from trainer.checkpoint.manifest import committed, read_manifest
from trainer.engine.engine import Interval
from trainer.engine.group import Group, open_group
from trainer.quarantine import read_skipped, shards_read
from trainer.recipes import parse_train_config
from trainer.run import prepare_run, train

BAD_UPDATES = (3, 5)  # right after the only save since the first rollback, so that none is put off


class Watched(loop.TrainingLoop):
    """Looks at the state right before a rollback is committed."""

    same: ClassVar[list[bool]] = []

    def commit_rollback(self, found: Restored | None) -> None:
        if found is not None:
            mine = [interval for engine in self.trainee.engines.values() for interval in engine.wanted()]
            stored = [Interval(i.name, i.kind, i.offset, torch.zeros_like(i.values)) for i in mine]
            fill(self.store, found.name, found.manifest, stored)
            self.same.append(all(same(a.values, b.values) for a, b in zip(mine, stored, strict=True)))
        super().commit_rollback(found)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.detach(), other)


def rolled_back(group: Group, folder: Path, values: dict[str, Any], stage: int) -> dict[str, Any]:
    store = LocalStore(folder / f"run-{stage}")
    config = parse_train_config(values | {"run": f"{stage}", "store": store.uri, "zero": {"stage": stage}}, "test")
    attempt = group.broadcast(prepare_run(config) if group.rank == 0 else 0)
    Watched.same = []
    events: list[dict[str, Any]] = []
    train(config.model_dump(mode="json"), attempt, group, events.append)
    together = group.all_agree(Watched.same == [True])
    skipped = read_skipped(store)
    newest = read_manifest(store, committed(store)[0].manifest_key)
    lines = [json.loads(line) for line in (store.root / "tracking" / "consumed.jsonl").read_text().splitlines()]
    return {
        "windows": [[row["kind"], row["begin"] // config.batch, row["end"] // config.batch] for row in skipped],
        "quarantined": [row["shard"] for row in skipped if row["kind"] == "quarantine"],
        "state after the second rollback is that of the checkpoint, on every rank": together,
        "bad": verify_checkpoints(store.uri),
        "updates": newest.optimizer_steps,
        "consumed": [(line["position"], line["ids"]) for line in lines],
        "losses": [event["loss"] for event in events if event["event"] == "progress"],
    }


def shards_agreed(group: Group, folder: Path, values: dict[str, Any]) -> bool:
    """Whether all ranks name the same shards for a batch, although only rank 0 has met the shard that is gone."""
    copy = folder / "gone"
    if group.rank == 0:
        shutil.copytree(values["dataset"], copy)
        next(copy.glob("datasets/*/base/shard-00002.arrow")).unlink()
    group.all_agree(True)
    dataset, positions = open_dataset(str(copy)), np.arange(values["batch"])
    cut = micro_batches(values["batch"], group.rank, group.world_size, values["batch"])
    settings = LoaderSettings(on_damage="substitute")
    order = dataset.order(0, values["batch"])
    loader = Loader(dataset, order, [Column("base", "caption")], lambda rows, draws: rows, cut, settings)
    if group.rank == 0:
        loader.micro_batch(positions[slice(*cut[0])], 0)
    else:
        assert 2 in loader.shards_at(positions[: values["batch"] // 2])  # so it takes them by itself
    found = torch.from_numpy(shards_read(group, loader, positions))
    equal = group.sum_(found.clone()).equal(found * group.world_size)
    return group.all_agree(equal and 2 not in found[: values["batch"] // 2])


def main() -> None:
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    group = open_group(rank, world_size, f"file://{folder}/rendezvous")
    values = json.loads(sys.argv[4])
    poke("glide_base", [(*(update * values["batch"] for update in BAD_UPDATES), math.nan)])
    loop_module: Any = sys.modules["trainer.run"]
    loop_module.TrainingLoop = Watched
    results: dict[str, Any] = {"shards agreed": shards_agreed(group, folder, values)}
    for stage in sys.argv[5:]:
        results[stage] = rolled_back(group, folder, values, int(stage))
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    group.close()


if __name__ == "__main__":
    main()
