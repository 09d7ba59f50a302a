"""What a configuration will need, without a GPU and without its weights: size, arithmetic, memory, time, choices.

Always holds: parameters, FLOPs and activations are counted on the modules that training would build; what stands
beside them (state by ZeRO stage, speed, days) are pure functions of those counts. Called by `glidepath plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from trainer.config import TrainConfig
from trainer.engine.engine import KINDS
from trainer.evaluation.heldout import EVALUATION_BATCH
from trainer.plan.counting import BatchCost, CountedPart, batch_cost, parameter_counts
from trainer.plan.hardware import Cluster
from trainer.plan.memory import FP32_BYTES, Holding, largest_micro_batch, state_bytes, whole_ema_bytes
from trainer.plan.speed import SECONDS_PER_DAY, images_per_s
from trainer.recipes import make_recipe
from trainer.recipes.recipe import BatchWide

WORKERS_COMPARED = (8, 64, 256)  # beside those of the configuration


def plan(config: TrainConfig, cluster: Cluster | None = None) -> dict[str, Any]:
    """The document of `glidepath plan`; sums over the recipe's parts, activations of the part that needs most.

    `flops_per_image` is one forward pass; `flops_train_per_image` forward and backward, `flops_computed_per_image`
    with what activation checkpointing and the recipe's update compute again. A multiply-add is two FLOPs.
    `memory_per_gpu_bytes` is for the micro batch that training would use, its total the sum of its kinds;
    `evaluation_peak_bytes` the total during held-out loss and grids (0: the configuration has neither);
    `largest_micro_batch` what fits into the GPU (0: not even one image, or not the evaluation).
    """
    cluster = cluster or Cluster()
    planned = _Plan(config, cluster)
    micro_batch = planned.micro_batch
    memory = planned.memory(planned.holding(), planned.checkpointing, micro_batch)
    evaluation = planned.evaluation_bytes(planned.holding())
    computed = planned.computed_flops(planned.checkpointing, micro_batch, config.launcher.workers)
    speed = images_per_s(computed, config.launcher.workers, config.precision, cluster)
    checkpoint_bytes = planned.parameters["total"] * FP32_BYTES * len(KINDS)
    upload_s = checkpoint_bytes / (config.launcher.workers * cluster.upload_bytes_per_s)
    return {
        "parameters": planned.parameters,
        "flops_per_image": planned.flops("forward", False),
        "flops_train_per_image": planned.flops("total", False),
        "flops_computed_per_image": computed,
        "memory_per_gpu_bytes": memory,
        "evaluation_peak_bytes": evaluation,
        "host_bytes_per_gpu": planned.host_bytes(planned.holding()),
        "micro_batch": micro_batch,
        "accumulation": -(-planned.share(config.launcher.workers) // micro_batch),
        "largest_micro_batch": planned.largest(planned.holding(), planned.checkpointing),
        "fits": max(memory["total"], evaluation) <= cluster.usable_bytes,
        "images_per_s": speed,
        "mfu": cluster.utilisation * planned.flops("total", False) / computed,
        "gpu_days": config.images / speed * config.launcher.workers / SECONDS_PER_DAY,
        # fp32 masters, both Adam moments and EMA; headers and the manifest are below a thousandth of it.
        "checkpoint_bytes": checkpoint_bytes,
        "checkpoint_upload_s": upload_s,
        # The grace that a stop needs at most: the step that runs, the save that is under way, and its own.
        "stop_s": config.batch / speed + 2 * upload_s,
        "cluster": {"gpu": cluster.gpu.name, "workers": config.launcher.workers, **asdict(cluster.assumed)},
        "choices": planned.choices(),
    }


def training_flops_per_image(config: TrainConfig) -> int:
    """`flops_train_per_image` of `plan` alone, which takes a part of its time."""
    parts = make_recipe(config).parts().values()
    return sum(CountedPart(part.build, config.precision).cost(1, checkpointing=False).total_flops for part in parts)


class _Plan:
    """The counts of one configuration, taken once, and the rows that follow from them."""

    def __init__(self, config: TrainConfig, cluster: Cluster) -> None:
        self.config, self.cluster = config, cluster
        recipe = make_recipe(config)
        updates: dict[str, object] = {phase.part: phase.accumulate for phase in recipe.phases()}
        parts = recipe.parts()
        self.parts = [CountedPart(part.build, config.precision) for part in parts.values()]
        self.updates = [update if isinstance(update := updates.get(name), BatchWide) else None for name in parts]
        self.holds = [part.hold for part in parts.values()]
        self.counts = [parameter_counts(part.module) for part in self.parts]
        self.parameters = {key: sum(count[key] for count in self.counts) for key in ("total", "text", "visual")}
        self.micro_batch = min(config.micro_batch_size(), self.share(config.launcher.workers))
        self.checkpointing = bool(getattr(config, "activation_checkpointing", False))
        self.inference_bytes = self._inference_bytes([part.build for part in parts.values()])
        self._batch_costs: dict[int, list[BatchCost | None]] = {}

    def _inference_bytes(self, builds: Sequence[Callable[[], nn.Module]]) -> int:
        """Of a batch of held-out rows, or of a grid, whose pictures guidance computes twice; 0 without either."""
        # Without prompts a grid has half as many pictures as there are held-out rows in a batch.
        batch = max(EVALUATION_BATCH if self.config.heldout else 0, 2 * len(self.config.samples.prompts))
        # EMA weights are float32 whatever the run's precision is.
        return max(CountedPart(build, "fp32").inference(batch).peak_bytes for build in builds) if batch else 0

    def share(self, workers: int) -> int:
        """Samples of the global batch on one rank."""
        return -(-self.config.batch // workers)

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

    def batch_costs(self, workers: int) -> list[BatchCost | None]:
        """For each part, what its update computes of the whole batch, if anything."""
        if workers not in self._batch_costs:
            self._batch_costs[workers] = [
                batch_cost(update, self.config.batch, self.share(workers)) if update else None
                for update in self.updates
            ]
        return self._batch_costs[workers]

    def computed_flops(self, checkpointing: bool, micro_batch: int, workers: int) -> int:
        """Per image, with what checkpointing and the recipe's update compute beside a forward and backward pass."""
        share = self.share(workers)
        total = self.flops("total", checkpointing)
        for part, update, extra in zip(self.parts, self.updates, self.batch_costs(workers), strict=True):
            if update and extra:
                again = update.passed_twice(-(-share // micro_batch)) * micro_batch
                forward = part.cost(self.micro_batch, checkpointing).forward_flops
                total += (again * forward + extra.flops) // share
        return total

    def activation_bytes(self, checkpointing: bool, micro_batch: int, workers: int) -> int:
        """Of the part that needs most: counted at the configured micro batch, in proportion elsewhere (what does not
        grow with the images is below a hundredth at 16 of them)."""
        most = 0
        for part, extra in zip(self.parts, self.batch_costs(workers), strict=True):
            cost = part.cost(self.micro_batch, checkpointing)
            passes, saved = (
                -(-counted * micro_batch // self.micro_batch) for counted in (cost.activation_bytes, cost.saved_bytes)
            )
            # Either in a backward pass, or before the first of them, while a micro batch waits with its graph.
            most = max(most, max(passes + extra.lasting_bytes, saved + extra.highest_bytes) if extra else passes)
        return most

    def memory(self, holding: Holding, checkpointing: bool, micro_batch: int) -> dict[str, int]:
        kinds = self._states(holding, "gpu")
        kinds["activations"] = self.activation_bytes(checkpointing, micro_batch, holding.workers)
        return kinds | {"total": sum(kinds.values())}

    def evaluation_bytes(self, holding: Holding) -> int:
        """The total while the EMA weights of all parts are whole; 0 where nothing is evaluated."""
        if not self.inference_bytes:
            return 0
        whole = sum(whole_ema_bytes(count["total"], held) for count, held in self._held(holding))
        return sum(self._states(holding, "gpu").values()) + whole + self.inference_bytes

    def host_bytes(self, holding: Holding) -> int:
        """State under offload, and the snapshot that saves are stored from: this rank's share of a checkpoint."""
        snapshot = FP32_BYTES * len(KINDS) * -(-self.parameters["total"] // holding.workers)
        return sum(self._states(holding, "host").values()) + snapshot

    def _held(self, holding: Holding) -> list[tuple[dict[str, int], Holding]]:
        """Each part's parameters, and how it is held."""
        return [
            (count, holding if hold == "sharded" else holding.replicated())
            for count, hold in zip(self.counts, self.holds, strict=True)
        ]

    def _states(self, holding: Holding, where: str) -> dict[str, int]:
        rows = [getattr(state_bytes(count["total"], held), where) for count, held in self._held(holding)]
        return {kind: sum(row[kind] for row in rows) for kind in rows[0]}

    def largest(self, holding: Holding, checkpointing: bool) -> int:
        if self.evaluation_bytes(holding) > self.cluster.usable_bytes:
            return 0
        states = sum(self._states(holding, "gpu").values())
        return largest_micro_batch(
            lambda micro_batch: states + self.activation_bytes(checkpointing, micro_batch, holding.workers),
            self.cluster.usable_bytes,
            self.share(holding.workers),
        )

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
        largest = self.largest(holding, checkpointing)
        micro_batch = max(largest, 1)
        memory = self.memory(holding, checkpointing, micro_batch)
        computed = self.computed_flops(checkpointing, micro_batch, workers)
        speed = images_per_s(computed, workers, self.config.precision, self.cluster)
        return {
            "workers": workers,
            "zero_stage": stage,
            "checkpointing": checkpointing,
            "largest_micro_batch": largest,
            "state_gib": round((memory["total"] - memory["activations"]) / 2**30, 1),
            "activations_gib": round(memory["activations"] / 2**30, 1),
            "evaluation_gib": round(self.evaluation_bytes(holding) / 2**30, 1),
            "images_per_s": round(speed, 1),
            "gpu_days": round(self.config.images / speed * workers / SECONDS_PER_DAY, 1),
        }
