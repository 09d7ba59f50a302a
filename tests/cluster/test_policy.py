"""The restart policy: a run that gets on goes on, one that does not is given up."""

from __future__ import annotations

from cluster.policy import FRUITLESS_DEATHS, Death, may_restart


def history(*committed: bool) -> list[Death]:
    return [Death(attempt, stored) for attempt, stored in enumerate(committed, 1)]


def test_a_run_is_given_up_after_three_deaths_in_a_row_without_a_checkpoint() -> None:
    assert FRUITLESS_DEATHS == 3
    assert may_restart(history(False))
    assert may_restart(history(False, False))
    assert not may_restart(history(False, False, False))
    assert not may_restart(history(True, False, False, False))


def test_a_checkpoint_of_its_own_clears_an_attempt_and_those_before_it() -> None:
    assert may_restart(history(*[True] * 50))
    assert may_restart(history(False, False, True, False, False))
