"""P6 and checkpoints against others: how long training stands still, how long a save and a load take, bytes and memory.

    python -m benchmarks.checkpoint [--parameters 50e6] [--repetitions 5]
    python -m benchmarks.checkpoint --run [--config demo-base] [--steps 200] [--repetitions 3]

The first saves one state (masters, two moments, EMA: 16 bytes per parameter, on the CPU) from one process to one local
disk, and loads it back into the same tensors:

- glidepath: `Saver` and `restore_newest`; digests taken and, on the way back, every block checked;
- torch.save: one file, torch.load with weights_only;
- torch DCP: async_save and load (a process group of one rank on gloo), with defaults, and with the stager that keeps
  its memory between saves;
- DeepSpeed: save_checkpoint and load_checkpoint of a ZeRO-1 engine, the EMA as its client state. It stores the weights
  beside the masters, so it has a quarter more to write.

stall: until the caller may go on. save: until the bytes are on disk; torch.save's and DeepSpeed's files are flushed
(fsync) for that, as the other two do. memory: the most that the process held above what it had before, snapshot buffers
that stay included.

The second is P6: a real run with two workers that saves every 10 steps. stall share = seconds in the save section /
seconds of all steps, on rank 0; beside it the same run without saves, which shows what the uploads cost the steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.measuring import ratio, write_result
from data_pipeline.config import find_config, read_values, state_folder
from data_pipeline.order import OrderState
from data_pipeline.storage import LocalStore
from trainer.checkpoint.load import restore_newest
from trainer.checkpoint.save import RunIdentity, Saver
from trainer.engine.engine import KINDS, Interval
from trainer.engine.group import Group

WIDTH = 1024
STALL_TARGET = 0.01
SAVE_EVERY_STEPS = 10
ORDER = OrderState("d" * 64, "lanes", seed=0, batch=1, lanes=1, position=0)

State = dict[str, Tensor]  # kind/parameter -> float32


def make_state(parameters: int) -> State:
    """Matrices and vectors as in a transformer: half of the tensors are tiny."""
    torch.manual_seed(0)
    state = {}
    for kind in KINDS:
        for number in range(max(1, parameters // (4 * WIDTH * WIDTH))):
            state[f"{kind}/layer{number}.weight"] = torch.randn(4 * WIDTH, WIDTH)
            state[f"{kind}/layer{number}.bias"] = torch.randn(4 * WIDTH)
    return state


class Candidate(Protocol):
    """One way to keep a state. `save` returns when the caller may go on, `finish` when the bytes are on disk."""

    held_bytes: int  # of buffers that stay between saves

    def save(self, folder: Path) -> None: ...

    def finish(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class Glidepath:
    def __init__(self, state: State) -> None:
        self.state = state
        self.parameters = {
            name.partition("/")[2]: len(values.view(-1)) for name, values in state.items() if name.startswith("master/")
        }
        identity = RunIdentity(
            run="benchmark",
            attempt=1,
            rank=0,
            world_size=1,
            zero_stage=0,
            parameters=self.parameters,
            config={},
            code_version="0",
        )
        self.saver = Saver(LocalStore(Path()), identity)
        self.saver.memory.reserve(self.intervals())  # as the loop does before its first step
        self.held_bytes = self.saver.memory.bytes

    def intervals(self) -> list[Interval]:
        split = ((name.partition("/"), values) for name, values in self.state.items())
        return [Interval(name, kind, 0, values.view(-1)) for (kind, _, name), values in split]  # type: ignore[arg-type]

    def save(self, folder: Path) -> None:
        self.saver.store = LocalStore(folder)
        state = {"optimizer_steps": {"net": 1}, "guard": {}, "order": dataclasses.asdict(ORDER)}
        self.saver.save(1, self.intervals(), state)

    def finish(self, folder: Path) -> None:
        self.saver.wait()

    def load(self, folder: Path) -> None:
        assert restore_newest(LocalStore(folder), Group(), self.intervals(), self.parameters, ORDER)


class TorchSave:
    held_bytes = 0

    def __init__(self, state: State) -> None:
        self.state = state

    def save(self, folder: Path) -> None:
        torch.save(self.state, folder / "state.pt")

    def finish(self, folder: Path) -> None:
        flush(folder)

    def load(self, folder: Path) -> None:
        loaded = torch.load(folder / "state.pt", weights_only=True)
        for name, values in self.state.items():
            values.copy_(loaded[name])


class TorchDcp:
    """`cached`: with the stager that keeps its copy of the state between saves, as ours does."""

    held_bytes = 0

    def __init__(self, state: State, cached: bool = False) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.state = state
        self.under_way: Any = None
        # Without what needs a GPU.
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        self.stager = DefaultStager(options) if cached else None
        if cached:
            self.held_bytes = sum(values.nbytes for values in state.values())

    def save(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp

        self.under_way = dcp.async_save(self.state, checkpoint_id=str(folder), async_stager=self.stager)

    def finish(self, folder: Path) -> None:
        self.under_way.result()

    def load(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(self.state, checkpoint_id=str(folder))


class DeepSpeed:
    """An engine of ZeRO stage 1 with the same masters and moments; the EMA travels as client state."""

    held_bytes = 0

    def __init__(self, state: State) -> None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles an extension first
        self.ema = {name: values for name, values in state.items() if name.startswith("ema/")}
        module = nn.ParameterDict(
            {
                name.replace(".", "_"): nn.Parameter(values.clone())
                for name, values in state.items()
                if "master/" in name
            }
        )
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 1},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        adam = torch.optim.AdamW(module.parameters(), lr=1e-3)
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=adam, config=settings, dist_init_required=False)
        self.engine.backward(sum(values.sum() for values in self.engine.module.values()))
        self.engine.step()  # moments exist from here on

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag="saved", client_state={"ema": self.ema})

    def finish(self, folder: Path) -> None:
        flush(folder)

    def load(self, folder: Path) -> None:
        _, found = self.engine.load_checkpoint(str(folder), tag="saved")
        for name, values in self.ema.items():
            values.copy_(found["ema"][name])


def flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


class Peak:
    bytes = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """The most that this process held meanwhile above what it had before (Linux)."""
    peak, before = Peak(), resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again
    yield peak
    peak.bytes = max(0, resident("VmHWM") - before)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(candidate: Candidate, scratch: Path) -> dict[str, float]:
    """One save and one load; seconds and bytes."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    held = candidate.held_bytes
    with peak_memory() as saving:
        began = time.perf_counter()
        candidate.save(folder)
        stall_s = time.perf_counter() - began
        candidate.finish(folder)
        save_s = time.perf_counter() - began
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with peak_memory() as loading:
        began = time.perf_counter()
        candidate.load(folder)
        load_s = time.perf_counter() - began
    shutil.rmtree(folder)
    figures = {"stall_s": stall_s, "save_s": save_s, "load_s": load_s, "bytes": float(size)}
    return figures | {"save_memory_bytes": float(held + saving.bytes), "load_memory_bytes": float(loading.bytes)}


def compare(parameters: int, repetitions: int, scratch: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    Group().ensure_process_group()
    state = make_state(parameters)
    makers: dict[str, Callable[[State], Candidate]] = {
        "glidepath": Glidepath,
        "torch.save": TorchSave,
        "torch DCP": TorchDcp,
        "torch DCP cached": partial(TorchDcp, cached=True),
        "DeepSpeed": DeepSpeed,
    }
    candidates = {name: make(state) for name, make in makers.items()}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in candidates}
    for repetition in range(repetitions + 1):
        for name, candidate in candidates.items():
            found = measure(candidate, scratch)
            label = f"repetition {repetition}" if repetition else "warm-up"
            print(f"{label}  {name:<16} " + "  ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)
            if repetition:
                figures[name].append(found)
    ratios = {
        key: {
            name: ratio({n: [one[key] for one in runs] for n, runs in figures.items()}, name, "glidepath")
            for name in candidates
            if name != "glidepath"
        }
        for key in ("stall_s", "save_s", "load_s", "bytes", "save_memory_bytes")
    }
    for key, of in ratios.items():
        print(f"{key}: " + ", ".join(f"{name} {value:.2f} times ours" for name, value in of.items()))
    state_bytes = sum(values.nbytes for values in state.values())
    return {"parameters": parameters, "state_bytes": state_bytes, "repetitions": figures, "times ours": ratios}


def stall_share(config_name: str, steps: int, saves: bool, scratch: Path) -> dict[str, float]:
    """One run of two workers from its first step; its seconds per step, and the share of them spent in saves."""
    from cluster.training import train_run
    from trainer.recipes import parse_train_config
    from trainer.tracking.jsonl import read_curves, read_events

    values = read_values(find_config("train", config_name), ())
    batch = int(values["batch"])
    every = SAVE_EVERY_STEPS * batch if saves else 10**9
    store = Path(tempfile.mkdtemp(dir=scratch))
    values |= {
        "store": str(store),
        "images": steps * batch,
        "launcher": {"workers": 2},
        "checkpoint": {"every_images": every},
        "heldout": None,
        "samples": {"prompts": []},
        "tracking": {"uri": str(store / "tracking")},
    }
    result = train_run(parse_train_config(values, config_name))
    curves = read_curves(store / "tracking")
    step_s, save_s = (sum(curves[name].values()) for name in ("time/step_s", "time/save_s"))
    delayed = len(read_events(store / "tracking", "save-delayed"))
    committed = len(list(store.glob("checkpoints/*/*/manifest.json")))
    state_bytes = sum(path.stat().st_size for path in store.glob(f"checkpoints/images-{result['images']:09d}/*/part-*"))
    shutil.rmtree(store)
    return {
        "step_s": step_s / steps,
        "stall_share": save_s / step_s,
        "committed": committed,
        "delayed": delayed,
        "checkpoint_bytes": state_bytes,
    }


def measure_run(config_name: str, steps: int, repetitions: int, scratch: Path) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {"with saves": [], "without": []}
    for repetition in range(1, repetitions + 1):
        for name, found in runs.items():
            found.append(stall_share(config_name, steps, name == "with saves", scratch))
            print(f"repetition {repetition}  {name:<12} {found[-1]}", flush=True)
    shares = [run["stall_share"] for run in runs["with saves"]]
    slower = ratio({name: [run["step_s"] for run in found] for name, found in runs.items()}, "with saves", "without")
    print(f"P6: stall share {statistics.median(shares):.4%} (largest {max(shares):.4%}), target {STALL_TARGET:.0%}")
    print(f"a step with saves takes {slower:.3f} times as long as one without")
    return {
        "config": config_name,
        "steps": steps,
        "runs": runs,
        "stall_share": shares,
        "step with saves / without": slower,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=50e6)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--run", action="store_true", help="P6: the stall of a real run")
    parser.add_argument("--config", default="demo-base")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--name", default="", help="of the json")
    arguments = parser.parse_args()
    folder = state_folder() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if arguments.run:
            found = measure_run(arguments.config, arguments.steps, arguments.repetitions, Path(scratch))
            write_result(arguments.name or "checkpoint_stall", found)
        else:
            found = compare(int(arguments.parameters), arguments.repetitions, Path(scratch))
            write_result(arguments.name or "checkpoint", found)


if __name__ == "__main__":
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}  # before DeepSpeed is imported
    main()
