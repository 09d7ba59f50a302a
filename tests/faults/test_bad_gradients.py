"""Drill R9: its checks can fail, and in full."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cluster.drills import bad_gradients
from cluster.drills.bad_gradients import BATCH, CASES, FAINT, FLAT, Case, cases, wrong_windows
from cluster.drills.scratch import Wishes, scratch


def row(kind: str, begin: int, end: int) -> dict[str, Any]:
    return {"kind": kind, "begin": begin * BATCH, "end": end * BATCH}


def test_ten_cases_are_of_every_kind_and_other_ones_with_another_seed() -> None:
    found = list(cases(0, CASES, 3))
    assert [case.poison for case in found] == ["", "", "", FLAT, FAINT] * 2
    assert {case.zero_stage for case in found} == {0, 2}
    assert all(case.since for case in found if case.poison == FAINT)
    assert found == list(cases(0, CASES, 3)) != list(cases(1, CASES, 3))


def test_what_is_listed_beside_or_instead_of_the_bad_updates_fails_the_drill() -> None:
    few, many = Case("", 0, ((13, 15, math.nan),)), Case("", 0, ((13, 17, math.nan),))
    skips = [row("skip", 13, 14), row("skip", 14, 15)]
    back = [*skips, row("skip", 15, 16), row("rollback", 12, 17)]
    assert not list(wrong_windows(few, skips)) and not list(wrong_windows(many, back))
    older = [*back[:-1], row("rollback", 9, 17)]  # a save was put off
    assert not list(wrong_windows(many, older))
    for wrong in (skips[:1], [*skips, row("skip", 20, 21)], [*skips, row("rollback", 12, 17)]):
        assert list(wrong_windows(few, wrong))
    for wrong in (back[:-1], back[1:], [*back[:-1], row("rollback", 14, 17)], [*back, row("quarantine", 13, 17)]):
        assert list(wrong_windows(many, wrong))


@pytest.mark.drill
def test_the_drill_in_full() -> None:
    with scratch(Wishes(seed=1), print) as place:
        score = bad_gradients.run(place)
    assert not score.failures and score.faults == CASES
