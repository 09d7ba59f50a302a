"""Bytes per GPU of a part's state, as Glidepath's engines hold it, and the micro batch that fits beside it.

Always holds: pure functions of a parameter count; nothing here knows a model. The figures follow
`trainer/engine/replicated.py` (stage 0) and `trainer/engine/deepspeed_engine.py` with DeepSpeed 0.19.8 (1 to 3).
Called by `plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from trainer.config import Precision

FP32_BYTES = 4
HALF_BYTES = 2

# DeepSpeed's defaults, in elements, which `deepspeed_config` leaves as they are. The bucket is allocated whole, however
# small the model; gathered parameters are kept for reuse up to the limit.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Holding:
    """How a part's state is spread: ZeRO stage (0: replicated), ranks, precision, and whether the host holds it."""

    stage: int
    workers: int
    precision: Precision
    offload: bool = False

    @property
    def is_another_stage(self) -> bool:
        """bf16 stage 1 runs as stage 2 (see `deepspeed_engine._stage`)."""
        return self.precision == "bf16" and self.stage == 1

    def replicated(self) -> Holding:
        return replace(self, stage=0, offload=False)


@dataclass(frozen=True)
class StateBytes:
    """Per GPU: {"model", "optimizer", "ema", "gradients"} in its memory, and the same kinds in the host's."""

    gpu: dict[str, int]
    host: dict[str, int]


def state_bytes(parameters: int, holding: Holding) -> StateBytes:
    """What of a part of so many parameters one rank holds between and during updates.

    Masters count as `optimizer`, except where the weights themselves are the masters (stage 0). `gradients` includes
    DeepSpeed's buckets, `model` what ZeRO-3 has gathered and the low-precision copies that autocast makes of fp32
    weights.
    """
    if holding.stage == 0:
        return StateBytes(gpu=_replicated(parameters, holding), host=dict.fromkeys(_KINDS, 0))
    share = -(-parameters // holding.workers)
    model, gathered, whole_gradients = _zero_weights(parameters, holding)
    gradients = FP32_BYTES * (parameters if whole_gradients else share)
    held = {"optimizer": 3 * FP32_BYTES * share, "ema": FP32_BYTES * share, "gradients": gradients}
    on_gpu = {"model": model + gathered, **(dict.fromkeys(held, 0) if holding.offload else held)}
    on_gpu["gradients"] += _bucket_bytes(parameters, holding, whole_gradients)
    return StateBytes(gpu=on_gpu, host={"model": 0, **(held if holding.offload else dict.fromkeys(held, 0))})


_KINDS = ("model", "optimizer", "ema", "gradients")


def _replicated(parameters: int, holding: Holding) -> dict[str, int]:
    autocast_copies = HALF_BYTES * parameters if holding.precision == "bf16" else 0
    return {
        "model": FP32_BYTES * parameters + autocast_copies,
        "optimizer": 2 * FP32_BYTES * parameters,
        "ema": FP32_BYTES * -(-parameters // holding.workers),
        "gradients": FP32_BYTES * parameters,
    }


def _zero_weights(parameters: int, holding: Holding) -> tuple[int, int, bool]:
    """Bytes of this rank's weights, bytes gathered from others, and whether gradients are kept whole."""
    width = FP32_BYTES if holding.precision == "fp32" else HALF_BYTES
    if holding.stage == 3:
        return width * -(-parameters // holding.workers), width * min(parameters, LIVE_PARAMETERS), False
    whole = holding.stage == 1 and not holding.is_another_stage
    return width * parameters, 0, whole


def _bucket_bytes(parameters: int, holding: Holding, whole_gradients: bool) -> int:
    filled = min(REDUCE_BUCKET, parameters)
    if holding.precision == "fp32" or whole_gradients or holding.stage == 3:
        # float32 from the start (in stage 3 whatever the precision); what fills it is copied in the order of ranks.
        return FP32_BYTES * (REDUCE_BUCKET + filled)
    # Stage 2 gathers gradients in the low precision, copies what there is, and casts the copy for the sum over ranks.
    return HALF_BYTES * REDUCE_BUCKET + (HALF_BYTES + FP32_BYTES) * filled


def whole_ema_bytes(parameters: int, holding: Holding) -> int:
    """What one rank holds beside its state while a part's EMA weights are whole, for held-out loss and grids.

    ReplicatedEngine puts the masters aside and gathers the average in as much again; DeepSpeedEngine fills a float32
    network of its own.
    """
    return FP32_BYTES * parameters * (2 if holding.stage == 0 else 1)


def largest_micro_batch(total_bytes: Callable[[int], int], memory_bytes: int, most: int) -> int:
    """The largest micro batch up to `most` whose `total_bytes`, which must not fall with it, is within `memory_bytes`;
    0 if none is."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total_bytes(middle) <= memory_bytes else (low, middle)
    return low
