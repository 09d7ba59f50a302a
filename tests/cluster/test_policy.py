"""The restart policy by example; for any history see tests/properties/test_restart_policy.py."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.policy import Death, GiveUp, Restart, after_death, signature
from data_pipeline.config import parse
from data_pipeline.errors import UsageError
from trainer.config import LauncherSettings, RestartSettings

DEFAULTS = RestartSettings()


def test_the_default_budget_gives_a_run_up_at_the_fourth_kill_without_a_checkpoint_and_waits_longer_each_time() -> None:
    deaths = [Death(attempt, committed=False, error="ended by SIGKILL") for attempt in (1, 2, 3, 4)]
    decisions = [after_death(deaths[:count], DEFAULTS) for count in (1, 2, 3, 4)]
    assert decisions[:3] == [Restart(0.0), Restart(5.0), Restart(10.0)]
    assert decisions[3] == GiveUp(
        "at most 3 restarts of the cause killed between two checkpoints", "death 4 of it: ended by SIGKILL"
    )
    deaths[1] = Death(2, committed=True)
    assert after_death(deaths, DEFAULTS) == Restart(5.0)


def test_a_crash_loop_is_told_with_its_step_and_its_error() -> None:
    error = "RuntimeError: the size of tensor a (128) must match tensor b (77)"
    deaths = [Death(attempt, committed=attempt == 2, cause="raised", error=error, images=4096) for attempt in (1, 2)]
    assert after_death(deaths, DEFAULTS) == GiveUp(
        "to get past the step at 4096 images", f"the same end there in attempts 1 and 2: {error}"
    )


def test_an_error_is_known_again_by_its_text_without_numbers_and_addresses() -> None:
    one = "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.7]:49152 at 0x7f3a"
    other = "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.12]:1234 at 0xbeef"
    assert signature(one) == signature(other) != signature(one.replace("closed", "refused"))
    assert signature("no module named added") == "no module named added", "words of hexadecimal letters stay"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"restart": {"budgets": {}}}, "key restart.budgets: expected restarts allowed by cause (killed, node_lost, "),
        ({"restart": {"budgets": None}}, "for a run must not restart without end, found none; correct the value"),
        ({"restart": {"budgets": {"hung": None}}}, "key restart.budgets.hung: expected a valid integer, found None"),
        ({"restart": {"budgets": {"killed": -1}}}, "key restart.budgets.killed: expected greater than or equal to 0"),
        ({"restart": {"budgets": {"node-lost": 1}}}, "found an unknown key; did you mean node_lost?"),
        ({"restart": {"backoff_s": float("inf")}}, "key restart.backoff_s: expected a finite number"),
        ({"min_workers": 3, "workers": 2}, "expected min_workers of at most workers (2), found 3"),
        ({"min_workers": 0}, "key min_workers: expected greater than 0, found 0"),
    ],
)
def test_a_policy_without_budgets_and_sizes_that_contradict_each_other_are_refused(
    values: dict[str, Any], line: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        parse(LauncherSettings, values, "launcher")
    assert line in str(refusal.value)


def test_a_partial_budget_leaves_the_others_at_their_defaults() -> None:
    budgets = parse(LauncherSettings, {"restart": {"budgets": {"hung": 0}}}, "launcher").restart.budgets
    assert budgets.hung == 0 and budgets.killed == DEFAULTS.budgets.killed
