"""What a configuration will need, without a GPU and without its weights: the networks are built on the meta device.

Always holds: figures are counted from the modules that training would build. Called by `glidepath plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainer.config import TrainConfig
from trainer.engine.engine import KINDS
from trainer.models.glide import parameter_counts
from trainer.recipes import make_recipe

FP32_BYTES = 4


def plan(config: TrainConfig) -> dict[str, Any]:
    """{"parameters" {"total", "text", "visual"}, "checkpoint_bytes", "micro_batch", "accumulation"}, over all parts."""
    modules = [build_on_meta(part.build) for part in make_recipe(config).parts().values()]
    counts = [parameter_counts(module) for module in modules]
    parameters = {key: sum(count[key] for count in counts) for key in ("total", "text", "visual")}
    workers, micro_batch = config.launcher.workers, config.micro_batch_size()
    share = -(-config.batch // workers)
    return {
        "parameters": parameters,
        # fp32 masters, both Adam moments and EMA; headers and the manifest are below a thousandth of it.
        "checkpoint_bytes": parameters["total"] * FP32_BYTES * len(KINDS),
        "micro_batch": min(micro_batch, share),
        "accumulation": -(-share // micro_batch),
    }


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()
