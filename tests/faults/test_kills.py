"""SIGKILL at any moment: the run goes on from a committed checkpoint and ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.launch import Event, WorkerDied
from cluster.training import train_run
from data_pipeline.storage import LocalStore
from trainer.checkpoint.inspect import verify_checkpoints
from trainer.checkpoint.manifest import committed, read_manifest
from trainer.recipes import parse_train_config

Values = Callable[..., dict[str, Any]]

IMAGES, KILLS = 160, 10


def parts_at_the_end(store: str) -> list[str]:
    name = committed(LocalStore(Path(store)))[0]
    assert name.position == IMAGES
    return [part.sha256 for part in read_manifest(LocalStore(Path(store)), name.manifest_key).parts]


def kill_after(delay_s: float, victim: int, timers: list[threading.Timer]) -> Callable[[Event], None]:
    """Kill one worker some seconds after the workers were started; the timer is added to `timers`."""

    def on_event(event: Event) -> None:
        if event["event"] == "started":
            timers.append(threading.Timer(delay_s, os.kill, (event["pids"][victim], signal.SIGKILL)))
            timers[-1].start()

    return on_event


@pytest.mark.drill
def test_ten_kills_at_seeded_moments_change_no_bit_of_the_result(train_values: Values) -> None:
    whole = train_values("whole", images=IMAGES, launcher={"workers": 2})
    train_run(parse_train_config(whole, "test"))
    killed = train_values("killed", images=IMAGES, launcher={"workers": 2})
    chance = random.Random(0)
    kills = 0
    while kills < KILLS:
        timers: list[threading.Timer] = []
        delay_s, victim = chance.uniform(0.5, 9.0), chance.randrange(2)
        try:
            train_run(parse_train_config(killed, "test"), kill_after(delay_s, victim, timers))
        except WorkerDied:
            kills += 1
            assert not verify_checkpoints(killed["store"])
            continue
        finally:
            for timer in timers:
                timer.cancel()
        # The run outlived the timer: begin another, to the same end.
        assert parts_at_the_end(killed["store"]) == parts_at_the_end(whole["store"])
        killed = train_values(f"killed-after-{kills}", images=IMAGES, launcher={"workers": 2})
    train_run(parse_train_config(killed, "test"))
    assert parts_at_the_end(killed["store"]) == parts_at_the_end(whole["store"])
