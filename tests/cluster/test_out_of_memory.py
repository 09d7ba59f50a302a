"""Deaths for want of memory: how they are told from others, and what stands beside them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.out_of_memory import (
    RECENT_S,
    KernelKills,
    is_out_of_memory,
    kernel_kills,
    machine_bytes,
    out_of_memory,
    raised_event,
    what_to_lower,
)
from trainer.config import TrainConfig
from trainer.recipes import parse_train_config

Values = Callable[..., dict[str, Any]]
GIB = 2**30


def caught(what: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as found:
        what()
    return found.value


def test_what_libraries_raise_for_want_of_memory_is_known_and_nothing_else_is() -> None:
    real = caught(lambda: torch.empty(2**50, dtype=torch.uint8))
    assert type(real) is RuntimeError and is_out_of_memory(real)
    assert is_out_of_memory(caught(lambda: bytearray(2**60)))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not is_out_of_memory(RuntimeError("Connection closed by peer [127.0.0.1]:4242"))
    event = raised_event(3, ValueError("of two\nlines"))
    assert (event["rank"], event["cause"], event["error"]) == (3, "raised", "ValueError: of two lines")
    assert event["memory"]["rss_bytes"] > 2**20


def test_a_kill_by_the_kernel_counts_for_a_while_and_one_of_long_ago_does_not() -> None:
    count, now = 7, 0.0
    kills = KernelKills(lambda: count, lambda: now)
    assert not kills.recent()
    count = 8
    assert kills.recent()
    for _ in range(40):
        now += RECENT_S / 20
        kills.look()
        if not RECENT_S <= now <= 1.5 * RECENT_S:
            assert kills.recent() == (now < RECENT_S), now
    count = 9
    assert kills.recent()


def test_this_machine_says_how_much_it_has_and_how_many_it_killed() -> None:
    assert 2**28 < machine_bytes() <= 2**50
    killed = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    assert killed is not None and kernel_kills() >= int(killed[1])


def test_a_death_for_want_of_memory_has_the_plan_beside_it(
    train_values: Values, caplog: pytest.LogCaptureFixture
) -> None:
    values = parse_train_config(train_values(launcher={"workers": 4}), "test").model_dump(mode="json")
    death = out_of_memory(values, 2, 1, "node-a", "ended by the kernel", {"rss_bytes": 3 * GIB}, machine=2 * GIB)
    assert (death.cause, death.rank, death.node) == ("out-of-memory", 1, "node-a")
    assert "of 2.0 GiB a worker, found ended by the kernel; go on with zero.stage=2" in str(death)
    table = {line.split(": ")[1].rsplit(None, 2)[0].strip(): line.split()[-2] for line in caplog.messages}
    assert table["there is"] == "2.00" and table["held at the end"] == "3.00"
    assert {"model", "optimizer", "activations", "snapshot and offload", "planned in all"} <= table.keys()


def test_a_plan_that_fails_hides_no_death(train_values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: TrainConfig) -> dict[str, Any]:
        raise KeyError(config.recipe)

    monkeypatch.setattr("cluster.out_of_memory.plan", fail)
    values = parse_train_config(train_values(), "test").model_dump(mode="json")
    death = out_of_memory(values, 1, 0, None, "ended by the kernel")
    assert "to fit into memory, found ended by the kernel" in str(death)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"batch": 1, "micro_batch": 1}, "use a machine with more memory"),
        ({"micro_batch": "auto"}, "a new run may take micro_batch=8 (it was 16)"),
        (
            {"launcher": {"workers": 8, "device": "cuda"}, "zero": {"stage": 2}, "micro_batch": 2},
            "go on with zero.stage=3 or zero.offload=cpu or more launcher.workers; "
            "a new run may take micro_batch=1 (it was 2)",
        ),
    ],
)
def test_the_advice_names_what_takes_less_and_only_what_a_resume_may_change_for_a_resume(
    changes: dict[str, Any], advice: str, train_values: Values
) -> None:
    config = parse_train_config(train_values(**{"activation_checkpointing": True, **changes}), "test")
    assert what_to_lower(config) == advice
