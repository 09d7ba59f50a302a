"""P8: training steps of the paper's models on one GPU, one rung after the other, against the plan's estimate.

    python -m benchmarks.gpu --size base|upsampler [--gpu h200] [--budget-s 450] [--out FILE]
    python -m benchmarks.gpu --device cpu --size tiny        # proves the script where there is no GPU

Rungs: eager (`plain_glide`, bf16 autocast, AdamW with foreach=False), channels-last, SDPA (Glidepath's network, the
same AdamW), fused (Glidepath's engine: one fused AdamW on flat state), compile (each stage and text block), then larger
micro batches. Each rung has images/s, MFU of the model's counted FLOPs (nothing that is computed twice counts), peak
memory beside the plan's estimate, and the loss of its first step: all start from the same weights, none of them zero,
on the same batch without dropout, so rungs of equal micro batch must agree.

Needs torch, numpy, pydantic and pyyaml only. A rung starts only while the longest before it would still fit into the
budget, a compiled one while 2.5 times that would; the json is written after every rung, so that what was measured stays
whatever ends the run.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from benchmarks.measuring import RESULTS, TINY, filled_glide, machine
from benchmarks.plain_glide import PlainTrainer, plain
from benchmarks.train_step import DECAY, LR, TOLERANCE, Work, make_work
from trainer.config import TrainConfig
from trainer.ema import update_ema
from trainer.engine.engine import autocast
from trainer.engine.group import Group
from trainer.engine.replicated import ReplicatedEngine
from trainer.guard import Decision
from trainer.models.config import GlideModelConfig
from trainer.models.glide import Glide
from trainer.plan.counting import CountedPart, parameter_counts
from trainer.plan.hardware import GPUS, Cluster
from trainer.plan.memory import Holding, largest_micro_batch, state_bytes

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "model"
PRESETS = {"base": "glide-base-3.5b", "upsampler": "glide-upsampler-1.5b"}
FIRST_MICRO_BATCH = {"base": 8, "upsampler": 2, "tiny": 2}
TIMED_STEPS, WARM_STEPS = 5, 2
COMPILING = 2.5  # a compiled rung takes at most so many times the longest before it


@dataclass(frozen=True)
class Rung:
    """One measurement: which network and update, laid out and compiled how, at which micro batch."""

    name: str
    micro_batch: int
    plain_network: bool = False
    channels_last: bool = False
    fused: bool = False
    compiled: bool = False
    checkpointing: bool = False


class Bench:
    """The model and machine of one run."""

    def __init__(self, size: str, device: str, gpu: str) -> None:
        self.size, self.device = size, torch.device(device)
        values = (
            TINY.model_dump()
            if size == "tiny"
            else yaml.safe_load((CONFIGS / f"{PRESETS[size]}.yaml").read_text())["model"]
        )
        self.config = GlideModelConfig(**values)
        self.gpu = GPUS[gpu]
        self.counted = CountedPart(lambda: Glide(self.config), "bf16")
        self.state = sum(
            state_bytes(parameter_counts(self.counted.module)["total"], Holding(0, 1, "bf16")).gpu.values()
        )

    def expected_bytes(self, micro_batch: int, checkpointing: bool) -> int:
        return self.state + self.counted.cost(micro_batch, checkpointing).activation_bytes

    def rungs(self) -> Iterator[Rung]:
        first = FIRST_MICRO_BATCH[self.size]
        yield Rung("eager", first, plain_network=True)
        yield Rung("channels-last", first, plain_network=True, channels_last=True)
        yield Rung("sdpa", first)
        yield Rung("fused", first, fused=True)
        yield Rung("fused, channels-last", first, fused=True, channels_last=True)
        yield Rung("compile", first, fused=True, compiled=True)
        yield Rung("compile, channels-last", first, fused=True, compiled=True, channels_last=True)
        for checkpointing in (False, True):
            fits = self.largest(checkpointing)
            for micro_batch in sorted({2 * first, 4 * first, fits}):
                if first < micro_batch <= fits:
                    name = f"micro batch {micro_batch}{', checkpointing' if checkpointing else ''}"
                    yield Rung(name, micro_batch, fused=True, compiled=True, checkpointing=checkpointing)

    def largest(self, checkpointing: bool) -> int:
        most = 64 if self.size != "tiny" else 8
        one = self.counted.cost(FIRST_MICRO_BATCH[self.size], checkpointing).activation_bytes
        per_image = one / FIRST_MICRO_BATCH[self.size]
        usable = Cluster(self.gpu).usable_bytes
        return largest_micro_batch(lambda images: self.state + int(per_image * images), usable, most)

    def measure(self, rung: Rung) -> dict[str, Any]:
        self._empty()
        began = time.perf_counter()
        step = self._step(rung)
        loss = step().item()
        for _ in range(WARM_STEPS - 1):
            step()
        self._wait()
        ready_s = time.perf_counter() - began
        seconds = []
        for _ in range(TIMED_STEPS):
            began = time.perf_counter()
            step()
            self._wait()
            seconds.append(time.perf_counter() - began)
        figures = self._figures(rung, sorted(seconds)[len(seconds) // 2])
        return {**figures, "first_loss": loss, "ready_s": ready_s, "step_seconds": seconds}

    def _figures(self, rung: Rung, step_s: float) -> dict[str, Any]:
        images_per_s = rung.micro_batch / step_s
        flops = self.counted.cost(rung.micro_batch, False).total_flops
        expected = self.expected_bytes(rung.micro_batch, rung.checkpointing)
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        return {
            "rung": rung.name,
            "micro_batch": rung.micro_batch,
            "optimizer": "AdamW, fused, flat" if rung.fused else "AdamW, foreach=False",
            "images_per_s": images_per_s,
            "mfu": images_per_s * flops / self.gpu.peak("bf16") if on_gpu else None,
            "peak_bytes": peak,
            "planned_bytes": expected,
            "plan_error": None if peak is None else expected / peak - 1,
        }

    def _step(self, rung: Rung) -> Callable[[], Tensor]:
        """A step with everything it needs, which returns its loss."""
        with self.device:
            model = filled_glide(self.config)
        model.activation_checkpointing = rung.checkpointing
        if rung.compiled:
            # For a CPU, generating code takes minutes; tracing alone shows that every region can be compiled.
            model.compile_regions("inductor" if self.device.type == "cuda" else "aot_eager")
        work = make_work(self.config, rung.micro_batch, str(self.device))
        if rung.channels_last:
            work = Work({name: _channels_last(values) for name, values in work.batch.items()})
        if rung.fused:
            return self._fused_step(model, work)
        network = plain(model) if rung.plain_network else model
        if rung.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self._unfused_step(network, work)

    def _fused_step(self, model: nn.Module, work: Work) -> Callable[[], Tensor]:
        settings = TrainConfig(
            run="benchmark", recipe="none", dataset="none", images=1, batch=1, lr=LR, model=None, precision="bf16"
        )
        engine = ReplicatedEngine("model", model, settings, Group(device=str(self.device)))

        def step() -> Tensor:
            with engine.precision_context():
                loss = work.loss(engine.module)
            engine.backward(loss)
            engine.update(LR, lambda norm: Decision.CONTINUE)
            update_ema(engine.shard_view(), DECAY)
            return loss.detach()

        return step

    def _unfused_step(self, network: nn.Module, work: Work) -> Callable[[], Tensor]:
        trainer = PlainTrainer(network, LR, DECAY)

        def step() -> Tensor:
            with autocast("bf16", self.device):
                loss = work.loss(network)
            loss.backward()
            trainer.update()
            return loss.detach()

        return step

    def _empty(self) -> None:
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values


def attempt(bench: Bench, rung: Rung) -> dict[str, Any]:
    """A rung's row. One that does not fit is a result; the next starts from an empty GPU."""
    try:
        return bench.measure(rung)
    except torch.cuda.OutOfMemoryError as error:
        return {"rung": rung.name, "failed": str(error).splitlines()[0]}


def refuse_other_losses(rows: list[dict[str, Any]]) -> None:
    """Every rung's first loss must be that of the first rung with its micro batch, within bf16's rounding."""
    losses: dict[int, float] = {}
    for row in rows:
        if "first_loss" in row:
            expected = losses.setdefault(row["micro_batch"], row["first_loss"])
            error = abs(row["first_loss"] - expected) / abs(expected)
            assert error < TOLERANCE["bf16"], f"{row['rung']}: the loss {row['first_loss']} is not {expected}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=(*PRESETS, "tiny"), default="base")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="whose peak MFU is of")
    parser.add_argument("--budget-s", type=float, default=450)
    parser.add_argument("--out", type=Path, help="default: results/gpu_<size>.json")
    arguments = parser.parse_args()
    began = time.perf_counter()
    out = arguments.out or RESULTS / f"gpu_{arguments.size}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.size, arguments.device, arguments.gpu)
    document = {"machine": machine(), "size": arguments.size, "model": bench.config.model_dump(mode="json")}
    rows: list[dict[str, Any]] = []
    longest = 0.0
    for rung in bench.rungs():
        rung_began = time.perf_counter()
        if rung_began - began + longest * (COMPILING if rung.compiled else 1) > arguments.budget_s:
            rows.append({"rung": rung.name, "left_out": "the budget of time is used up"})
        else:
            rows.append(attempt(bench, rung))
            longest = max(longest, time.perf_counter() - rung_began)
        print(json.dumps(rows[-1]), flush=True)
        out.write_text(json.dumps({**document, "rungs": rows}, indent=1) + "\n")
    print(f"written: {out}")
    refuse_other_losses(rows)


if __name__ == "__main__":
    main()
