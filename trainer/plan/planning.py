"""What a configuration will need, without a GPU and without its weights: size, arithmetic, memory, time, choices.

Always holds: parameters, FLOPs and activations are counted on the modules that training would build; what stands
beside them (state by ZeRO stage, speed, days) are pure functions of those counts. Called by `glidepath plan`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from trainer.config import TrainConfig
from trainer.engine.engine import KINDS
from trainer.plan.counting import CountedPart, parameter_counts
from trainer.plan.hardware import Cluster
from trainer.plan.memory import FP32_BYTES, Holding, largest_micro_batch, state_bytes
from trainer.plan.speed import SECONDS_PER_DAY, images_per_s
from trainer.recipes import make_recipe

WORKERS_COMPARED = (8, 64, 256)  # beside those of the configuration


def plan(config: TrainConfig, cluster: Cluster | None = None) -> dict[str, Any]:
    """The document of `glidepath plan`; sums over the recipe's parts, activations of the part that needs most.

    `flops_per_image` is one forward pass; `flops_train_per_image` forward and backward, `flops_computed_per_image`
    with what activation checkpointing computes again. A multiply-add is two FLOPs. `memory_per_gpu_bytes` is for the
    micro batch that training would use, `largest_micro_batch` what fits into the GPU (0: not even one image).
    """
    cluster = cluster or Cluster()
    planned = _Plan(config, cluster)
    micro_batch, share = planned.micro_batch, planned.share
    memory = planned.memory(planned.holding(), planned.checkpointing, micro_batch)
    speed = planned.images_per_s(planned.checkpointing, config.launcher.workers)
    checkpoint_bytes = planned.parameters["total"] * FP32_BYTES * len(KINDS)
    return {
        "parameters": planned.parameters,
        "flops_per_image": planned.flops("forward", False),
        "flops_train_per_image": planned.flops("total", False),
        "flops_computed_per_image": planned.flops("total", planned.checkpointing),
        "memory_per_gpu_bytes": memory,
        "host_bytes_per_gpu": planned.host_bytes(planned.holding()),
        "micro_batch": micro_batch,
        "accumulation": -(-share // micro_batch),
        "largest_micro_batch": planned.largest(planned.holding(), planned.checkpointing),
        "fits": memory["total"] <= cluster.usable_bytes,
        "images_per_s": speed,
        "mfu": cluster.utilisation * planned.flops("total", False) / planned.flops("total", planned.checkpointing),
        "gpu_days": config.images / speed * config.launcher.workers / SECONDS_PER_DAY,
        # fp32 masters, both Adam moments and EMA; headers and the manifest are below a thousandth of it.
        "checkpoint_bytes": checkpoint_bytes,
        "checkpoint_upload_s": checkpoint_bytes / (config.launcher.workers * cluster.upload_bytes_per_s),
        "cluster": {"gpu": cluster.gpu.name, "workers": config.launcher.workers, **asdict(cluster.assumed)},
        "choices": planned.choices(),
    }


class _Plan:
    """The counts of one configuration, taken once, and the rows that follow from them."""

    def __init__(self, config: TrainConfig, cluster: Cluster) -> None:
        self.config, self.cluster = config, cluster
        parts = make_recipe(config).parts().values()
        self.parts = [CountedPart(part.build, config.precision) for part in parts]
        self.holds = [part.hold for part in parts]
        self.counts = [parameter_counts(part.module) for part in self.parts]
        self.parameters = {key: sum(count[key] for count in self.counts) for key in ("total", "text", "visual")}
        self.share = -(-config.batch // config.launcher.workers)
        self.micro_batch = min(config.micro_batch_size(), self.share)
        self.checkpointing = bool(getattr(config, "activation_checkpointing", False))

    def holding(self, **changes: Any) -> Holding:
        given = {
            "stage": self.config.zero.stage,
            "workers": self.config.launcher.workers,
            "precision": self.config.precision,
            "offload": self.config.zero.offload == "cpu",
        }
        return Holding(**given | changes)

    def flops(self, kind: str, checkpointing: bool) -> int:
        return sum(getattr(part.cost(self.micro_batch, checkpointing), f"{kind}_flops") for part in self.parts)

    def activation_bytes(self, checkpointing: bool, micro_batch: int) -> int:
        """Of the part that needs most: counted at the configured micro batch, in proportion elsewhere (what does not
        grow with the images is below a hundredth at 16 of them)."""
        counted = max(part.cost(self.micro_batch, checkpointing).activation_bytes for part in self.parts)
        return -(-counted * micro_batch // self.micro_batch)

    def memory(self, holding: Holding, checkpointing: bool, micro_batch: int) -> dict[str, int]:
        kinds = self._states(holding, "gpu")
        kinds["activations"] = self.activation_bytes(checkpointing, micro_batch)
        return kinds | {"total": sum(kinds.values())}

    def host_bytes(self, holding: Holding) -> int:
        return sum(self._states(holding, "host").values())

    def _states(self, holding: Holding, where: str) -> dict[str, int]:
        rows = [
            getattr(state_bytes(count["total"], holding if hold == "sharded" else holding.replicated()), where)
            for count, hold in zip(self.counts, self.holds, strict=True)
        ]
        return {kind: sum(row[kind] for row in rows) for kind in rows[0]}

    def largest(self, holding: Holding, checkpointing: bool) -> int:
        share = -(-self.config.batch // holding.workers)
        states = sum(self._states(holding, "gpu").values())
        return largest_micro_batch(
            lambda micro_batch: states + self.activation_bytes(checkpointing, micro_batch),
            self.cluster.usable_bytes,
            share,
        )

    def images_per_s(self, checkpointing: bool, workers: int) -> float:
        return images_per_s(self.flops("total", checkpointing), workers, self.config.precision, self.cluster)

    def choices(self) -> list[dict[str, Any]]:
        """A row for each ZeRO stage, checkpointing on or off and number of workers, for the largest micro batch."""
        here = self.config.launcher.workers
        stages = [stage for stage in (0, 1, 2, 3) if not self.holding(stage=stage).is_another_stage]
        if self.config.precision == "fp16":
            stages.remove(0)
        checkpointings = (False, True) if all(part.can_checkpoint for part in self.parts) else (False,)
        return [
            self._choice(stage, checkpointing, workers)
            for workers in sorted({here, *WORKERS_COMPARED})
            for stage in stages
            for checkpointing in checkpointings
        ]

    def _choice(self, stage: int, checkpointing: bool, workers: int) -> dict[str, Any]:
        holding = self.holding(stage=stage, workers=workers)
        micro_batch = self.largest(holding, checkpointing)
        memory = self.memory(holding, checkpointing, max(micro_batch, 1))
        speed = self.images_per_s(checkpointing, workers)
        return {
            "workers": workers,
            "zero_stage": stage,
            "checkpointing": checkpointing,
            "largest_micro_batch": micro_batch,
            "state_gib": round((memory["total"] - memory["activations"]) / 2**30, 1),
            "activations_gib": round(memory["activations"] / 2**30, 1),
            "images_per_s": round(speed, 1),
            "gpu_days": round(self.config.images / speed * workers / SECONDS_PER_DAY, 1),
        }
