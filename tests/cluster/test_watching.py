"""Who hangs and who is slow, from simulated heartbeats: no process, no waiting."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.launch import Event
from cluster.watching import GangWatch, Hung
from trainer.config import WatchSettings

SECTIONS = ("data", "forward", "backward", "reduce", "update")
LIMIT_S = 20.0
SETTINGS = WatchSettings(
    silent_s=15.0, straggler_window_s=20.0, straggler_windows=2, **{f"{s}_s": LIMIT_S for s in SECTIONS}
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def beat(rank: int, section: str = "forward", since_s: float = 0.0, passed: int = 10, **more: Any) -> Event:
    deadline_s = {"commit": None, "ended": None}.get(section, LIMIT_S)
    steps = {"step": 9, "steps": 0, "step_s": 0.0, "busy_s": {}}
    return {
        "event": "beat",
        "rank": rank,
        "section": section,
        "since_s": since_s,
        "deadline_s": deadline_s,
        "passed": passed,
        **steps,
        **more,
    }


@dataclass(frozen=True)
class Hang:
    rank: int
    visit: int  # number of the section that it never leaves, counted from its start
    silent: bool  # it sends no more heartbeats either: stopped, or all its threads are blocked


def timelines(world: int, visits: int, seed: int, hang: Hang | None) -> list[list[tuple[float, str, int]]]:
    """For each rank (time, section, passed) of every section it enters; a `reduce` is left once all have entered it."""
    chance = random.Random(seed)
    now, entered = [0.0] * world, [[] for _ in range(world)]  # type: list[float], list[list[tuple[float, str, int]]]
    for visit in range(visits):
        section = SECTIONS[visit % len(SECTIONS)]
        for rank in range(world):
            if now[rank] < float("inf"):
                entered[rank].append((now[rank], section, 2 * visit))
        for rank in range(world):
            if hang == Hang(rank, visit, hang.silent if hang else False):
                now[rank] = float("inf")
        waited_for = max(now)
        now = [waited_for if section == "reduce" else time + chance.uniform(0.01, 2.0) for time in now]
    return entered


def watched(
    world: int, entered: Sequence[list[tuple[float, str, int]]], until_s: float, hang: Hang | None, seed: int
) -> Iterator[tuple[float, Hung | None]]:
    """(seconds, verdict) every half second while such beats arrive, each rank's at a phase of its own."""
    clock, phases = Clock(), [random.Random(seed + rank).random() for rank in range(world)]
    gang = GangWatch(SETTINGS, world, [f"node-{rank}" for rank in range(world)], clock)
    began, told = clock.now, [-2.0] * world
    for tick in range(int(until_s * 2)):
        now = tick / 2
        clock.now = began + now
        for rank in range(world):
            time, section, passed = entered[rank][bisect_right(entered[rank], (now, "~")) - 1]
            hangs = hang is not None and hang.rank == rank and passed == 2 * hang.visit
            if now - told[rank] >= 1 + 0.1 * phases[rank] and not (hangs and hang is not None and hang.silent):
                gang.saw(beat(rank, section, now - time, passed))
                told[rank] = now
        yield now, gang.hung()


@settings(max_examples=60, deadline=None)
@given(
    world=st.integers(1, 5),
    visit=st.integers(1, 24).filter(lambda visit: SECTIONS[visit % 5] != "reduce"),
    silent=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_the_rank_that_the_others_wait_for_is_named_within_two_deadlines(
    world: int, visit: int, silent: bool, seed: int, data: st.DataObject
) -> None:
    hang = Hang(data.draw(st.integers(0, world - 1)), visit, silent)
    entered = timelines(world, 60, seed, hang)
    hung_at = entered[hang.rank][-1][0]
    verdicts = watched(world, entered, hung_at + 2 * LIMIT_S, hang, seed)
    seconds, verdict = next((now, found) for now, found in verdicts if found)
    assert verdict is not None
    assert (verdict.rank, verdict.node, verdict.cause) == (hang.rank, f"node-{hang.rank}", "hung")
    assert verdict.section == ("silent" if silent else SECTIONS[visit % 5])
    limit_s = SETTINGS.silent_s if silent else LIMIT_S
    assert limit_s - 1.1 <= seconds - hung_at <= limit_s + 2.1  # the last beat before, the first after


@settings(max_examples=25, deadline=None)
@given(world=st.integers(1, 5), seed=st.integers(0, 1000))
def test_no_rank_is_blamed_while_all_get_on(world: int, seed: int) -> None:
    entered = timelines(world, 100, seed, None)
    until_s = min(places[-1][0] for places in entered)
    assert [verdict for _, verdict in watched(world, entered, until_s, None, seed) if verdict] == []


def gang_of(world: int, clock: Clock, wanted: WatchSettings = SETTINGS) -> GangWatch:
    return GangWatch(wanted, world, [f"node-{rank}" for rank in range(world)], clock)


def test_when_all_are_stuck_in_the_same_call_none_of_them_is_blamed() -> None:
    gang = gang_of(2, Clock())
    gang.saw(beat(0, "reduce", LIMIT_S + 1))
    gang.saw(beat(1, "reduce", LIMIT_S + 2))
    verdict = gang.hung()
    assert (
        verdict is not None and verdict.rank is None and str(verdict).startswith("all ranks: expected to leave reduce")
    )
    gang.saw(beat(0, "reduce", LIMIT_S + 1, passed=11))  # one came through: the other has not
    assert (verdict := gang.hung()) is not None and verdict.rank == 1


def test_waiting_for_a_rank_in_a_longer_section_is_no_hang_and_storing_the_last_save_has_no_deadline_here() -> None:
    gang = gang_of(2, Clock())
    gang.saw(beat(1, "reduce", 10 * LIMIT_S, passed=12))
    gang.saw(beat(0, "sample", 10 * LIMIT_S) | {"deadline_s": 100 * LIMIT_S})
    assert gang.hung() is None
    gang.saw(beat(0, "commit", 10 * LIMIT_S))
    assert gang.hung() is None


def test_a_rank_that_never_comes_up_is_named_and_one_that_has_ended_is_not() -> None:
    clock = Clock()
    gang = gang_of(3, clock)
    gang.saw(beat(0, "ended"))
    gang.saw(beat(1, "start", 1.0) | {"deadline_s": SETTINGS.start_s})
    for _ in range(int(SETTINGS.start_s / 5) + 1):
        clock.now += 5
        gang.saw(beat(1, "start", 1.0) | {"deadline_s": SETTINGS.start_s})
        verdict = gang.hung()
    assert verdict is not None and (verdict.rank, verdict.section) == (2, "start")


def test_a_pause_of_the_driver_itself_is_nobody_elses_silence() -> None:
    clock = Clock()
    gang = gang_of(2, clock)
    for rank in (0, 1):
        gang.saw(beat(rank))
    clock.now += 10 * SETTINGS.silent_s
    assert gang.hung() is None
    for _ in range(int(SETTINGS.silent_s) + 2):
        clock.now += 1
        gang.saw(beat(0))
        verdict = gang.hung()
    assert verdict is not None and (verdict.rank, verdict.section) == (1, "silent")


def slow_ranks(world: int, seconds: int, factors: dict[int, float], seed: int, others_s: float = 0.0) -> list[Event]:
    """What is told of ranks whose own work per step is 0.5 s, with noise and now and then a hiccup, times a factor."""
    chance, clock = random.Random(seed), Clock()
    gang = gang_of(world, clock)
    step_s, found, step = 0.5 * max([1.0, *factors.values()]) + others_s, [], 5
    for _ in range(seconds):
        clock.now += 1
        step += 2
        for rank in range(world):
            noise = chance.lognormvariate(0, 0.2) * (4 if chance.random() < 0.02 else 1)
            busy_s = {"data": 0.1 * noise, "forward": 0.4 * noise * factors.get(rank, 1.0)}
            gang.saw(beat(rank, step=step, steps=2, step_s=step_s, busy_s=busy_s))
        found += gang.stragglers()
    return found


@settings(max_examples=40, deadline=None)
@given(world=st.integers(2, 6), seed=st.integers(0, 10_000), data=st.data())
def test_a_slow_rank_is_named_once_and_nobody_else_whatever_the_noise(
    world: int, seed: int, data: st.DataObject
) -> None:
    slow = data.draw(st.integers(0, world - 1))
    [found] = slow_ranks(world, 120, {slow: 3.0}, seed)
    assert (found["event"], found["rank"], found["node"]) == ("straggler", slow, f"node-{slow}")
    assert 1.5 < found["factor"] < 6
    assert slow_ranks(world, 120, {}, seed) == []


def test_one_rank_alone_is_never_slow_nor_is_one_whose_delay_no_step_feels() -> None:
    assert slow_ranks(1, 60, {0: 3.0}, 0) == []
    assert slow_ranks(2, 60, {0: 3.0}, 0, others_s=60.0) == []
    assert [found["rank"] for found in slow_ranks(2, 60, {0: 3.0}, 0, others_s=1.0)] == [0]


def test_the_first_step_which_compiles_makes_nobody_slow() -> None:
    clock = Clock()
    gang = gang_of(2, clock, SETTINGS.model_copy(update={"straggler_windows": 1}))
    found = []
    for second in range(1, 41):
        clock.now += 1
        for rank in (0, 1):
            first_s = 500.0 if rank and second == 1 else 0.5
            gang.saw(beat(rank, step=second, steps=1, step_s=0.5, busy_s={"forward": first_s}))
        found += gang.stragglers()
    assert found == []


@pytest.mark.parametrize(("factor", "expected"), [(1.4, []), (1.8, [1])])
def test_the_factor_of_the_settings_is_the_border(factor: float, expected: list[int]) -> None:
    assert [found["rank"] for found in slow_ranks(4, 60, {1: factor}, 3)] == expected
