"""What a driver does after deaths and with its size: for any history, any budgets and any room."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from cluster.launch import Cause
from cluster.policy import (
    Death,
    GiveUp,
    Restart,
    Sizes,
    after_death,
    node_to_exclude,
    reason_to_resize,
    size_for,
)
from trainer.config import RestartBudgets, RestartSettings

CAUSES = get_args(Cause)
budgets = st.builds(RestartBudgets, **{name: st.integers(0, 4) for name in RestartBudgets.model_fields})
settings = st.builds(RestartSettings, budgets=budgets, backoff_s=st.floats(0.5, 10), backoff_most_s=st.floats(0.5, 100))
deaths = st.builds(
    Death,
    attempt=st.integers(1, 9),
    committed=st.booleans(),
    cause=st.sampled_from(CAUSES),
    error=st.sampled_from(["RuntimeError: shape 3", "RuntimeError: shape 4", "another"]),
    node=st.sampled_from([None, "a", "b"]),
    images=st.none() | st.integers(0, 3),
)


def allowed(cause: str, rules: RestartSettings) -> int:
    return int(getattr(rules.budgets, cause.replace("-", "_")))


@given(st.lists(deaths, max_size=40), settings)
def test_between_two_checkpoints_no_cause_gets_more_restarts_than_its_budget_and_pauses_double_to_the_most(
    stream: list[Death], rules: RestartSettings
) -> None:
    """A driver that heeds the policy, over any stream of deaths."""
    history: list[Death] = []
    restarts = dict.fromkeys(CAUSES, 0)
    pauses: list[float] = []
    for death in stream:
        if death.committed:
            restarts, pauses = dict.fromkeys(CAUSES, 0), []
        history.append(death)
        decision = after_death(history, rules)
        if isinstance(decision, GiveUp):
            assert decision.expected and decision.found
            return
        if not death.committed:
            restarts[death.cause] += 1
            pauses.append(decision.pause_s)
        else:
            assert decision.pause_s == 0
        assert restarts[death.cause] <= allowed(death.cause, rules)
        assert pauses[:1] in ([], [0.0]) and all(pause <= rules.backoff_most_s for pause in pauses)
        assert all(b == min(2 * a, rules.backoff_most_s) for a, b in pairwise(pauses[1:]))


@given(st.lists(deaths, max_size=20), settings, st.sampled_from(["killed", "node-lost"]), st.integers(1, 60))
def test_a_preempted_run_that_stores_checkpoints_goes_on_for_ever(
    before: list[Death], rules: RestartSettings, cause: Cause, times: int
) -> None:
    history = [*before]
    for attempt in range(times):
        history.append(Death(100 + attempt, committed=True, cause=cause, error="ended by SIGKILL", images=64))
        assert after_death(history, rules) == Restart(0.0)


@given(st.lists(deaths, max_size=20), deaths, settings)
def test_the_same_step_and_the_same_error_twice_is_a_crash_loop_whatever_the_budget_unless_machines_did_it(
    before: list[Death], death: Death, rules: RestartSettings
) -> None:
    endless = rules.model_copy(update={"budgets": RestartBudgets(**dict.fromkeys(RestartBudgets.model_fields, 10**6))})
    again = replace(death, attempt=death.attempt + 1, error=death.error.replace("3", "12"))
    decision = after_death([*before, death, again], endless)
    if death.images is not None and death.cause in ("raised", "out-of-memory"):
        assert isinstance(decision, GiveUp)
        assert f"step at {death.images} images" in decision.expected and again.error in decision.found
    else:
        assert isinstance(decision, Restart)
    elsewhere = replace(again, images=None if death.images is None else death.images + 1)
    assert isinstance(after_death([*before, death, elsewhere], endless), Restart)


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 20))
def test_no_attempt_has_fewer_workers_than_the_least_or_more_than_the_most_or_than_there_is_room_for(
    least: int, more: int, room: int
) -> None:
    bounds = Sizes(least, least + more)
    size = size_for(room, bounds)
    assert (size is None) == (room < least)
    assert size is None or (least <= size <= bounds.most and size <= room)
    assert size is None or size in (room, bounds.most), "as many as fit"


@given(
    st.integers(1, 8),
    st.integers(0, 12),
    st.floats(0, 100),
    st.dictionaries(st.sampled_from("ab"), st.floats(0, 100) | st.just(float("inf"))),
    st.integers(0, 8),
    st.floats(0, 100),
)
def test_a_running_attempt_is_ended_for_another_size_only_if_nodes_leave_or_lasting_room_makes_it_larger(
    workers: int, room: int, roomy_s: float, leaving: dict[str, float], more: int, grow_after_s: float
) -> None:
    bounds = Sizes(1, workers + more)
    reason = reason_to_resize(workers, room, roomy_s, leaving, bounds, grow_after_s)
    grows = min(room, bounds.most) > workers and roomy_s >= grow_after_s
    assert (reason is not None) == bool(leaving or grows)
    if leaving:
        assert reason is not None and f"node {min(leaving, key=lambda node: leaving[node])}" in reason


@given(st.lists(deaths, max_size=12), settings, st.integers(1, 4))
def test_a_node_is_left_out_only_after_so_many_deaths_in_a_row_that_all_began_there(
    history: list[Death], rules: RestartSettings, times: int
) -> None:
    rules = rules.model_copy(update={"exclude_after": times})
    node = node_to_exclude(history, rules)
    newest = [death.node for death in history[-times:]]
    assert node == (newest[0] if len(newest) == times and set(newest) == {newest[0]} else None)
