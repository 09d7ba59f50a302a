"""Helpers that tests of several folders share."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.launch import Event
from data_pipeline.shards import open_dataset

TINY_CLIP = {
    "image_size": 16,
    "embedding": 16,
    "image_layers": 1,
    "image_heads": 1,
    "image_head_channels": 32,
    "text_layers": 1,
    "text_heads": 1,
    "text_head_channels": 32,
    "text_context": 12,
    "vocabulary": 49408,
}

# A driver of a run in a process of its own, as in a job: each event is a line, the last one its summary.
RUN = """
import json, logging, sys
from cluster.cli import load_train_config
from cluster.training import train_run

logging.basicConfig(level=logging.INFO)
report = lambda event: print("EVENT", json.dumps(event), flush=True)
report({"event": "summary", **train_run(load_train_config(sys.argv[1], []), report)})
"""


def kill_worker_1_at(images: int) -> Callable[[Event], None]:
    """An `on_event` that ends worker 1 with SIGKILL once the run has consumed so many images."""
    pids: list[int] = []

    def on_event(event: Event) -> None:
        if event["event"] == "started":
            pids.extend(event["pids"])
        if event["event"] == "progress" and event["images"] == images:
            os.kill(pids[1], signal.SIGKILL)

    return on_event


def consumed_ids(store: str) -> list[tuple[int, list[int]]]:
    """(position, ids of the global batch) in the order in which a run consumed them."""
    lines = Path(store, "tracking", "consumed.jsonl").read_text().splitlines()
    return [(line["position"], line["ids"]) for line in map(json.loads, lines)]


def ids_in_order(uri: str, seed: int, batch: int, images: int) -> list[tuple[int, list[int]]]:
    """What a run is to consume, batch by batch: by the closed form of the order and from the files."""
    data = open_dataset(uri)
    folder = data.store.local_path(f"{data.prefix}base")
    assert folder is not None
    shards = [pa.ipc.open_file(str(path)).read_all()["id"].to_pylist() for path in sorted(folder.glob("*.arrow"))]
    places = zip(*(found.tolist() for found in data.order(seed, batch).rows_at(np.arange(images))), strict=True)
    ids = [shards[shard][row] for shard, row in places]
    return [(start, ids[start : start + batch]) for start in range(0, images, batch)]


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(done: Callable[[], Any], seconds: float = 120) -> Any:
    """The first true answer of `done`. Polls, since other processes cannot tell."""
    until = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < until, f"nothing after {seconds} s"
        time.sleep(0.2)
    return found
