"""The guard's decisions."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import GuardSettings
from trainer.guard import Decision, GuardHistory, judge

SETTINGS = GuardSettings(window=10, spike_factor=10.0, warmup=5, halt_after=3)


def after(updates: int, loss: float = 1.0, norm: float = 1.0) -> GuardHistory:
    history = GuardHistory()
    for _ in range(updates):
        history = judge(history, loss, norm, SETTINGS).history
    return history


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["loss", "norm"])
def test_a_number_that_is_not_finite_is_skipped_even_at_the_first_update(bad: float, which: str) -> None:
    figures = {"loss": 1.0, "norm": 1.0, which: bad}
    verdict = judge(GuardHistory(), **figures, settings=SETTINGS)
    assert verdict.decision is Decision.SKIP and str(bad) in verdict.reason


def test_a_fifty_fold_gradient_with_a_normal_loss_is_skipped() -> None:
    verdict = judge(after(20), 1.0, 50.0, SETTINGS)
    assert verdict.decision is Decision.SKIP and "gradient norm 50" in verdict.reason


def test_spikes_are_not_judged_before_there_is_a_history() -> None:
    assert judge(after(4), 1.0, 50.0, SETTINGS).decision is Decision.CONTINUE


def test_a_run_that_skips_too_often_in_a_row_halts() -> None:
    history = after(20)
    decisions = []
    for _ in range(3):
        verdict = judge(history, math.nan, 1.0, SETTINGS)
        history = verdict.history
        decisions.append(verdict.decision)
    assert decisions == [Decision.SKIP, Decision.SKIP, Decision.HALT]


def test_a_good_update_between_skips_starts_the_count_again() -> None:
    history = judge(judge(after(20), math.nan, 1.0, SETTINGS).history, 1.0, 1.0, SETTINGS).history
    assert (history.consecutive_skips, history.skipped, history.accepted) == (0, 1, 21)


@given(st.lists(st.floats(0.5, 2.0), max_size=40))
def test_a_refused_update_changes_nothing_but_the_count_of_skips(losses: list[float]) -> None:
    history = GuardHistory()
    for loss in losses:
        history = judge(history, loss, 1.0, SETTINGS).history
    refused = judge(history, math.nan, 1.0, SETTINGS).history
    assert dataclasses.replace(refused, skipped=0, consecutive_skips=0) == history
    assert len(history.losses) <= SETTINGS.window


def test_the_history_survives_json() -> None:
    history = judge(after(12), math.nan, 1.0, SETTINGS).history
    assert GuardHistory.from_document(json.loads(json.dumps(dataclasses.asdict(history)))) == history
