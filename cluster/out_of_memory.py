"""Workers that ran out of memory: how that is told from other deaths, and what the plan says of what they needed.

Always holds: nothing here fails a death that is being told - what cannot be read or planned is left out, and said.
`raised_event` is called in workers of every launcher, the rest by the launchers in the driver.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from cluster.launch import Event, WorkerDied
from trainer.config import TrainConfig
from trainer.plan.planning import plan
from trainer.recipes import parse_train_config

log = logging.getLogger(__name__)

GIB = 2**30
RECENT_S = 10.0  # a worker's end is heard of well within this
CGROUP = Path("/sys/fs/cgroup")
NO_LIMIT = 2**60  # what version 1 of cgroups writes where there is none is a little below 2^63
TEXTS = ("can't allocate memory", "cannot allocate memory", "out of memory")


def raised_event(rank: int, error: BaseException) -> Event:
    """What a worker says of the exception that ends it: {"event": "raised", "rank", "cause", "error", "memory"}, the
    last {"device_bytes", "peak_bytes"} of its GPU or, without one, {"rss_bytes"}."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    cause = "out-of-memory" if is_out_of_memory(error) else "raised"
    return {"event": "raised", "rank": rank, "cause": cause, "error": text, "memory": _memory_here()}


def is_out_of_memory(error: BaseException) -> bool:
    """By name, so that torch's and Ray's need no import here; on a CPU torch raises a plain RuntimeError."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).lower()
    return bool(kinds & {"OutOfMemoryError", "MemoryError"}) or any(known in text for known in TEXTS)


def _memory_here() -> dict[str, int]:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return {"device_bytes": int(total), "peak_bytes": int(torch.cuda.max_memory_allocated())}
    return {"rss_bytes": int(psutil.Process().memory_info().rss)}


class KernelKills:
    """Whether the kernel has ended a process for want of memory just now. `count`: such kills so far."""

    def __init__(self, count: Callable[[], int] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._count, self._clock = count or kernel_kills, clock
        self._seen = deque([(clock(), self._count())])

    def look(self) -> None:
        """Now and then, so that a kill of long ago does not count."""
        now = self._clock()
        if now - self._seen[-1][0] >= RECENT_S / 2:
            self._seen.append((now, self._count()))
        while len(self._seen) > 1 and self._seen[1][0] <= now - RECENT_S:
            self._seen.popleft()

    def recent(self) -> bool:
        return self._count() > self._seen[0][1]


def kernel_kills() -> int:
    """Processes that the kernel ended for want of memory: of this control group, and of the machine. 0 where neither
    can be read."""
    files = [_group_file("memory.events"), _group_file("memory.oom_control"), Path("/proc/vmstat")]
    lines = [line.split() for file in files if file and file.exists() for line in file.read_text().splitlines()]
    return sum(int(line[1]) for line in lines if line[0] == "oom_kill")


def machine_bytes() -> int:
    """Memory of this machine, or of the control group if that has less."""
    limits = [int(psutil.virtual_memory().total)]
    for name in ("memory.max", "memory.limit_in_bytes"):
        file = _group_file(name)
        if file and (text := file.read_text().strip()).isdigit() and int(text) < NO_LIMIT:
            limits.append(int(text))
    return min(limits)


def _group_file(name: str) -> Path | None:
    """Of this process's control group, of either version; None where there is no such file."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return None
    for _, controllers, path in groups:
        if controllers not in ("", "memory"):
            continue
        root = CGROUP / controllers
        # In a container the path may be that of the host, whose tree is not here; then the root is our own group.
        for folder in (root / path.lstrip("/"), root):
            if (folder / name).exists():
                return folder / name
    return None


def out_of_memory(
    values: dict[str, Any],
    workers: int,
    rank: int,
    node: str | None,
    found: str,
    memory: dict[str, int] | None = None,
    machine: int = 0,
) -> WorkerDied:
    """The death of a worker that ran out of memory, with the plan's numbers beside it; a table of them in the log.

    `values`: the resolved configuration, of which `workers` ran; `found`: how it ended; `memory`: of its event
    "raised", if it came to say it; `machine`: bytes that a worker without a GPU has there, 0 if unknown.
    """
    # The configuration that the workers ran with, so it parses.
    values = {**values, "launcher": {**values["launcher"], "workers": workers}}
    config, memory = parse_train_config(values, "run"), memory or {}
    try:
        planned = plan(config)
    except Exception as error:  # whatever it is, the death is what is to be told
        log.warning("no plan of the memory beside it", exc_info=error)
        planned = {}
    there = memory.get("device_bytes") or machine
    for line in memory_table(config, planned, memory, there):
        log.error("%s", line)
    per_worker = sum(parts_planned(config, planned).values())
    expected = f"{per_worker / GIB:.1f} GiB at most, as planned" if planned else "to fit into memory"
    room = f" of {there / GIB:.1f} GiB a worker" if there else ""
    return WorkerDied(f"rank {rank}", expected + room, found, what_to_lower(config), "out-of-memory", rank, node)


def parts_planned(config: TrainConfig, planned: dict[str, Any]) -> dict[str, int]:
    """Bytes of one worker by part, in the memory that it computes in; {} without a plan."""
    if not planned:
        return {}
    parts = {name: count for name, count in planned["memory_per_gpu_bytes"].items() if name != "total"}
    if whole := max(0, planned["evaluation_peak_bytes"] - sum(parts.values())):
        parts["evaluation"] = whole  # more than training takes
    if config.launcher.device == "cpu":
        parts["snapshot and offload"] = planned["host_bytes_per_gpu"]
    return parts


def memory_table(config: TrainConfig, planned: dict[str, Any], memory: dict[str, int], there: int) -> list[str]:
    """Lines for people: what each part was planned to take, what was in use at the end, what there is."""
    rows = parts_planned(config, planned)
    rows |= {"planned in all": sum(rows.values())} if rows else {}
    names = {"peak_bytes": "at its highest", "rss_bytes": "held at the end"}
    rows |= {told: memory[name] for name, told in names.items() if name in memory}
    rows |= {"there is": there} if there else {}
    return [f"memory of a worker: {name:<20} {count / GIB:8.2f} GiB" for name, count in rows.items()]


def what_to_lower(config: TrainConfig) -> str:
    """What takes less memory: on a resume, and what only a new run may choose."""
    launcher, stage = config.launcher, config.zero.stage
    resume, new_run = [], []
    if launcher.workers > 1 and stage < 3:
        resume.append(f"zero.stage={max(2, stage + 1)}")
    if stage and config.zero.offload == "none" and launcher.device == "cuda":
        resume.append("zero.offload=cpu")
    if launcher.device == "cuda" and stage:
        resume.append("more launcher.workers")
    if launcher.device == "cpu" and launcher.workers > 1:
        resume.append("fewer launcher.workers on this machine")
    share = -(-config.batch // launcher.workers)
    if (micro_batch := min(config.micro_batch_size(), share)) > 1:
        new_run.append(f"micro_batch={micro_batch // 2} (it was {micro_batch})")
    if getattr(config, "activation_checkpointing", None) is False:
        new_run.append("activation_checkpointing=true")
    advice = [f"go on with {' or '.join(resume)}"] if resume else []
    advice += [f"a new run may take {' or '.join(new_run)}"] if new_run else []
    return "; ".join(advice) or "use a machine with more memory"
