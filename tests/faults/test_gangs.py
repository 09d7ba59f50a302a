"""Faults of a submitted run on a whole local stack: short samples of R1 on a cluster, R11 and R13, and how their
figures are made."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from cluster.drills import killed_gang, lost_jobs, soak
from cluster.drills.gang import Step, usage
from cluster.drills.poked_gang import WrittenPokes
from cluster.drills.scratch import BATCH, Wishes, scratch


def steps(attempt: int, begin: int, end: int, at_s: float, step_s: float = 1.0) -> list[Step]:
    """Steps [begin, end) of an attempt, the first of which is seen at `at_s`."""
    return [Step(at_s + step_s * (number - begin), attempt, number * BATCH) for number in range(begin, end)]


def test_goodput_counts_steps_that_lasted_of_the_time_from_the_first_to_the_last() -> None:
    # Ten steps, of which four are lost; the rest comes after five seconds more.
    used = usage([*steps(1, 0, 10, 100.0), *steps(2, 6, 12, 115.0)])
    assert (used.wall_s, used.counted_s, used.step_s) == (21.0, 12.0, 1.0)
    assert (used.steps, used.wasted_steps) == (16, 4)
    assert used.goodput == pytest.approx(12 / 21)
    undone = usage([*steps(1, 0, 10, 100.0)], {2 * BATCH, 3 * BATCH})
    assert (undone.wall_s, undone.counted_s, undone.wasted_steps) == (10.0, 8.0, 2)


def test_a_soak_has_all_its_kinds_in_another_order_with_every_seed() -> None:
    orders = [soak.order(random.Random(seed), soak.FAULTS) for seed in range(3)]
    assert {tuple(sorted(Counter(order).items())) for order in orders} == {
        tuple(sorted((name, count) for name, (count, _) in soak.KINDS.items()))
    }
    assert orders[0] != orders[1] != orders[2] and orders[0] == soak.order(random.Random(0), soak.FAULTS)
    assert len(set(soak.order(random.Random(0), 5))) == 5 and len(soak.order(random.Random(0), 100)) == 100


def test_gradients_are_poked_as_the_file_says_when_they_are_asked_for(tmp_path: Path) -> None:
    pokes = WrittenPokes(tmp_path / "pokes.json")
    assert list(pokes) == []
    (tmp_path / "pokes.json").write_text("[[16, 32, NaN]]")
    ((begin, end, factor),) = pokes
    assert (begin, end) == (16, 32) and factor != factor


@pytest.mark.drill
@pytest.mark.parametrize(("drill", "faults"), [(killed_gang.on_cluster, 3), (lost_jobs.run, 3), (soak.run, 7)])
def test_a_submitted_run_goes_through_faults_without_a_person(drill, faults: int) -> None:  # type: ignore[no-untyped-def]
    with scratch(Wishes(seed=1, faults=faults), print) as place:
        score = drill(place)
    assert not score.failures and score.faults == faults
