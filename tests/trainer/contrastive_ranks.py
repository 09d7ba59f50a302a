"""Two ranks that train a contrastive recipe at every ZeRO stage; test_contrastive.py reads what rank 0 found.

Run as `contrastive_ranks.py RANK WORLD_SIZE FOLDER`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from trainer.engine.group import Group, open_group
from trainer.step import train_step

sys.path.insert(0, str(Path(__file__).parent))
from contrastive_case import config_of, plain_torch, share_of, trainee_of

UPDATES = 3


def check(group: Group, **changes: Any) -> dict[str, Any]:
    config = config_of(**changes)
    trainee = trainee_of(config, group)
    figures = [
        train_step(trainee, share_of(config, trainee.recipe, group, update * config.batch), update * config.batch)
        for update in range(UPDATES)
    ]
    clip, losses, norms = plain_torch(config, UPDATES)
    with trainee.engines["clip"].weights("master") as module:
        difference = max(
            float((mine - its).detach().abs().max())
            for mine, its in zip(module.parameters(), clip.parameters(), strict=True)
        )
    return {
        "loss": [float(found["loss/total"]) for found in figures],
        "plain loss": losses,
        "norm": [float(found["grad_norm"]) for found in figures],
        "plain norm": norms,
        "largest difference of a weight": difference,
        "figures": sorted(figures[-1]),
        "engine": type(trainee.engines["clip"]).__name__,
    }


def main() -> None:
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    group = open_group(rank, world_size, f"file://{folder}/rendezvous")
    results = {str(stage): check(group, zero={"stage": stage}) for stage in (0, 1, 2, 3)}
    results["3 with checkpointing"] = check(group, zero={"stage": 3}, activation_checkpointing=True)
    for stage in (0, 2, 3):
        results[f"{stage} locked"] = check(group, zero={"stage": stage}, lock_image=True, weight_decay=0.0)
    results["2 in bf16"] = check(group, zero={"stage": 2}, precision="bf16")
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    group.close()


if __name__ == "__main__":
    main()
