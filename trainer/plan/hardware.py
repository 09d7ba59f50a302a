"""The GPUs and the cluster that a plan is made for.

Always holds: peaks are the makers' for dense products, without sparsity. Called by `plan`, by the command line (the
names) and by `benchmarks/gpu.py` (the peak that MFU is of).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipeline.errors import UsageError
from trainer.config import Precision


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU; FLOP/s of dense matrix products. bf16 and fp16 are equally fast on all of these."""

    name: str
    memory_bytes: int
    half_flops_per_s: float
    fp32_flops_per_s: float  # outside the tensor cores: torch leaves TF32 off for matrix products

    def peak(self, precision: Precision) -> float:
        return self.fp32_flops_per_s if precision == "fp32" else self.half_flops_per_s


# Memory as the driver reports it, in whole GiB below it; peaks of NVIDIA's data sheets (SXM where there is one).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", 178 << 30, 2250e12, 75e12),
        Gpu("h200", 139 << 30, 989e12, 67e12),
        Gpu("h100", 79 << 30, 989e12, 67e12),
        Gpu("a100-80", 79 << 30, 312e12, 19.5e12),
        Gpu("a100-40", 39 << 30, 312e12, 19.5e12),
        Gpu("l40s", 44 << 30, 362e12, 91.6e12),
    )
}


@dataclass(frozen=True)
class Assumed:
    """What no count can tell."""

    utilisation: float = 0.5
    """Share of the peak that the arithmetic done reaches, what checkpointing computes again included."""
    memory_share: float = 0.9
    """Of the GPU's memory that tensors may fill; the rest is CUDA's context, workspaces and fragmentation."""
    upload_gb_per_s: float = 0.5
    """Each worker's way to the store, 10^9 bytes per second."""


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind; their number is the configuration's `launcher.workers`."""

    gpu: Gpu = GPUS["h200"]
    assumed: Assumed = field(default_factory=Assumed)

    @property
    def utilisation(self) -> float:
        return self.assumed.utilisation

    @property
    def usable_bytes(self) -> int:
        return int(self.gpu.memory_bytes * self.assumed.memory_share)

    @property
    def upload_bytes_per_s(self) -> float:
        return self.assumed.upload_gb_per_s * 1e9


def named_cluster(gpu: str, utilisation: float, upload_gb_per_s: float) -> Cluster:
    """The cluster that the command line names. Raises UsageError for an unknown GPU and for shares or speeds that
    cannot be."""
    if gpu not in GPUS:
        raise UsageError("--gpu", f"one of {', '.join(GPUS)}", repr(gpu), "name the nearest of them")
    if not 0 < utilisation <= 1:
        raise UsageError("--utilisation", "a share above 0, at most 1", f"{utilisation}", "0.5 is usual")
    if not upload_gb_per_s > 0:
        raise UsageError("--upload", "GB/s above 0", f"{upload_gb_per_s}", "name what one worker reaches")
    return Cluster(GPUS[gpu], Assumed(utilisation=utilisation, upload_gb_per_s=upload_gb_per_s))
