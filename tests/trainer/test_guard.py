"""The guard's decisions."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import GuardSettings
from trainer.guard import (
    Decision,
    GuardHistory,
    Verdict,
    after_rollback,
    all_after_rollback,
    doubted_since,
    judge,
)

SETTINGS = GuardSettings(
    window=10, spike_factor=10.0, warmup=5, rollback_after=3, sustained_factor=2.0, sustained_after=4, halt_after=2
)
SEVERITY = [Decision.CONTINUE, Decision.SKIP, Decision.ROLLBACK, Decision.HALT]
BATCH = 16

positive = st.floats(1e-3, 1e3)
observations = st.tuples(st.one_of(positive, st.just(math.nan)), st.one_of(positive, st.just(math.inf)))


def after(updates: int, loss: float = 1.0, norm: float = 1.0, history: GuardHistory | None = None) -> GuardHistory:
    history = history or GuardHistory()
    for _ in range(updates):
        history = judge(history, loss, norm, SETTINGS, 0).history
    return history


def verdicts(history: GuardHistory, seen: Sequence[tuple[float, float]]) -> list[Verdict]:
    """Of updates that begin at images 0, BATCH, … Nobody heeds them."""
    found = []
    for number, (loss, norm) in enumerate(seen):
        found.append(judge(history, loss, norm, SETTINGS, BATCH * number))
        history = found[-1].history
    return found


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["loss", "norm"])
def test_a_number_that_is_not_finite_is_skipped_even_at_the_first_update(bad: float, which: str) -> None:
    figures = {"loss": 1.0, "norm": 1.0, which: bad}
    verdict = judge(GuardHistory(), **figures, settings=SETTINGS, position=0)
    assert verdict.decision is Decision.SKIP and str(bad) in verdict.reason


def test_a_fifty_fold_gradient_with_a_normal_loss_is_skipped() -> None:
    verdict = judge(after(20), 1.0, 50.0, SETTINGS, 0)
    assert verdict.decision is Decision.SKIP and "gradient norm 50" in verdict.reason


def test_spikes_are_not_judged_before_there_is_a_history() -> None:
    assert judge(after(4), 1.0, 50.0, SETTINGS, 0).decision is Decision.CONTINUE


def test_refused_updates_in_a_row_roll_back_to_before_the_first_of_them() -> None:
    good, bad = (1.0, 1.0), (math.nan, 1.0)
    found = verdicts(after(20), [good, bad, good, bad, bad, bad])
    decisions = [one.decision for one in found]
    assert decisions[-3:] == [Decision.SKIP, Decision.SKIP, Decision.ROLLBACK]
    assert doubted_since([found[-1].history, GuardHistory()]) == 3 * BATCH
    assert "3 refused updates in a row, the last because loss is nan" in found[-1].reason
    assert doubted_since([found[2].history]) is None, "a good update between ends the doubt"


def test_a_sustained_spike_that_no_update_is_refused_for_rolls_back_as_well() -> None:
    found = verdicts(after(20), [(1.0, 1.0), *[(3.0, 1.0)] * 4])
    assert [one.decision for one in found] == [Decision.CONTINUE] * 4 + [Decision.ROLLBACK]
    assert "loss 3 is over 2 times its median 1" in found[-1].reason and found[-1].history.doubted_since == BATCH


def test_a_loss_that_stays_high_does_not_become_its_own_median_where_the_window_is_short() -> None:
    settings, history = SETTINGS.model_copy(update={"window": 5, "sustained_after": 8}), after(20)
    for number in range(8):
        verdict = judge(history, 3.0, 1.0, settings, BATCH * number)
        history = verdict.history
    assert (verdict.decision, history.doubted_since, history.accepted) == (Decision.ROLLBACK, 0, 28)


def test_the_run_halts_after_rollbacks_that_brought_it_no_further_and_not_after_others() -> None:
    checkpoint = after(20)

    def roll_back(history: GuardHistory) -> tuple[Decision, GuardHistory]:
        verdict = verdicts(history, [(math.nan, 1.0)] * 3)[-1]
        return verdict.decision, after_rollback(checkpoint, verdict.history)

    history, decisions = after(25, history=checkpoint), []
    for _ in range(3):
        decision, history = roll_back(history)
        decisions.append(decision)
        history = after(9, history=history)
    assert decisions == [Decision.ROLLBACK, Decision.ROLLBACK, Decision.HALT]
    _, history = roll_back(after(5, history=checkpoint))
    assert (history.rollbacks, history.furthest, history.accepted) == (1, 25, 20)
    further = after(25 + SETTINGS.window - 20, history=history)
    assert (further.rollbacks, further.accepted) == (0, 35)


def test_a_rollback_brings_the_history_of_the_checkpoint_and_keeps_the_count_of_what_was_refused() -> None:
    checkpoint, left = after(20, loss=1.0), verdicts(after(30, loss=0.5), [(math.nan, 1.0)] * 3)[-1].history
    history = all_after_rollback({"net": checkpoint}, {"net": left, "critic": left})
    assert history["net"].losses == checkpoint.losses and history["critic"].losses == ()
    assert {one.skipped for one in history.values()} == {3}
    assert {(one.consecutive_skips, one.doubtful, one.doubted_since) for one in history.values()} == {(0, 0, None)}


@given(st.lists(observations, max_size=40))
def test_equal_observations_give_equal_verdicts_also_through_json(seen: list[tuple[float, float]]) -> None:
    found = verdicts(GuardHistory(), seen)
    assert verdicts(GuardHistory(), seen) == found
    for one in found:
        document = json.loads(json.dumps(dataclasses.asdict(one.history)))
        assert GuardHistory.from_document(document) == one.history


@given(st.lists(observations, max_size=40), positive, positive, st.floats(1, 1e3), st.floats(1, 1e3))
def test_a_larger_loss_or_gradient_is_never_judged_milder(
    seen: list[tuple[float, float]], loss: float, norm: float, more: float, larger: float
) -> None:
    history = verdicts(GuardHistory(), seen)[-1].history if seen else GuardHistory()

    def severity(loss: float, norm: float) -> int:
        return SEVERITY.index(judge(history, loss, norm, SETTINGS, 0).decision)

    assert severity(loss, norm) <= severity(loss * more, norm * larger) <= severity(math.inf, math.nan)


@given(st.lists(st.floats(0.5, 0.9), max_size=40))
def test_a_refused_update_changes_nothing_but_the_counts_of_what_was_refused(losses: list[float]) -> None:
    history = GuardHistory()
    for loss in losses:
        history = judge(history, loss, 1.0, SETTINGS, 0).history
    refused = judge(history, math.nan, 1.0, SETTINGS, 7).history
    counts = {"skipped": 0, "consecutive_skips": 0, "doubtful": 0, "doubted_since": None}
    assert dataclasses.replace(refused, **counts) == history
    assert (refused.doubted_since, len(refused.losses) <= SETTINGS.window) == (7, True)


def test_a_history_of_before_rollbacks_is_read() -> None:
    document = {"losses": [1.0], "norms": [2.0], "accepted": 1, "skipped": 3, "consecutive_skips": 0}
    history = GuardHistory.from_document(document)
    assert (history.accepted, history.rollbacks, history.doubted_since) == (1, 0, None)
