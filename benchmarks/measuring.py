"""What the benchmarks share: networks with no layer at zero, interleaved timing, the machine, the json.

Always holds: candidates take turns within each repetition, so that a busy machine is equally slow for all of them, and
every repetition is printed and kept.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.models.config import GlideModelConfig
from trainer.models.glide import Glide

RESULTS = Path(__file__).parent / "results"
# To see that a benchmark works, not to measure.
TINY = GlideModelConfig(
    image_size=16,
    channels=32,
    res_blocks=1,
    channel_mult=(1, 2),
    attention_resolutions=(8,),
    head_channels=32,
    text_context=16,
    text_width=32,
    text_layers=1,
    text_heads=1,
)


def filled_glide(config: GlideModelConfig, seed: int = 0, dropout: float = 0.0) -> Glide:
    """A network in which no weight is zero: a fresh one predicts zero, and half of it would have no gradient."""
    torch.manual_seed(seed)
    model = Glide(config, dropout)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def interleaved(candidates: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each repetition of each candidate, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(repetitions + 1):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            took = time.perf_counter() - began
            print(
                f"{'warm-up' if repetition == 0 else f'repetition {repetition}'}  {name:<24} {took:8.3f} s", flush=True
            )
            if repetition:
                seconds[name].append(took)
    return seconds


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """Median of the ratios within the repetitions."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_result(name: str, document: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **document}, indent=1) + "\n")
    print(f"written: {path}")
