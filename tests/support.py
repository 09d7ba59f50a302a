"""Helpers that tests of several folders share."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.launch import Event


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


def wait_for(done: Callable[[], Any], seconds: float = 120) -> Any:
    """The first true answer of `done`. Polls, since other processes cannot tell."""
    until = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < until, f"nothing after {seconds} s"
        time.sleep(0.2)
    return found
