"""Who is shown what: balanced, never twice, and a function of the answers alone."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.judging.policy import Judged, Shown, next_shown

MODELS, ITEMS, SEEDS = st.integers(2, 4), st.integers(1, 6), st.integers(0, 2**32)


def spread(counts: list[int]) -> int:
    return max(counts) - min(counts)


def pair_counts(models: int, shown: list[Shown]) -> list[int]:
    counts = Counter(one.pair for one in shown)
    return [counts[first, second] for first in range(models) for second in range(first + 1, models)]


def left_differences(shown: list[Shown]) -> list[int]:
    """By pair, how much more often the first model was on the left than the second."""
    differences: Counter[tuple[int, int]] = Counter()
    for one in shown:
        differences[one.pair] += 1 if one.left < one.right else -1
    return list(differences.values())


@given(MODELS, ITEMS, SEEDS, st.lists(st.sampled_from("abc"), max_size=60))
def test_judges_in_any_order_are_balanced_over_pairs_and_sides_and_see_nothing_twice(
    models: int, items: int, seed: int, turns: list[str]
) -> None:
    judged: list[Judged] = []
    for judge in turns:
        shown = next_shown(models, items, judged, judge, seed)
        mine = [answer.shown for answer in judged if answer.judge == judge]
        if shown is None:
            assert len(mine) == items * models * (models - 1) // 2  # all there is
            continue
        assert shown.left != shown.right and 0 <= shown.item < items
        assert (shown.item, shown.pair) not in {(one.item, one.pair) for one in mine}
        judged.append(Judged(judge, shown))
        mine.append(shown)
        assert spread(pair_counts(models, mine)) <= 1
        assert all(abs(difference) <= 1 for difference in left_differences(mine))
    judges = len(set(turns))
    every = [answer.shown for answer in judged]
    assert spread(pair_counts(models, every)) <= max(1, judges)
    assert all(abs(difference) <= max(1, judges) for difference in left_differences(every))


@given(MODELS, ITEMS, SEEDS)
def test_a_judge_sees_every_pair_of_every_item_in_an_order_of_their_own(models: int, items: int, seed: int) -> None:
    def order(judge: str) -> list[Shown]:
        judged: list[Judged] = []
        while shown := next_shown(models, items, judged, judge, seed):
            assert shown == next_shown(models, items, judged, judge, seed)  # the answers decide, nothing else
            judged.append(Judged(judge, shown))
        return [answer.shown for answer in judged]

    first = order("first")
    assert len({(one.item, one.pair) for one in first}) == len(first) == items * models * (models - 1) // 2


def test_judges_and_seeds_see_other_orders_and_other_sides() -> None:
    def order(judge: str, seed: int) -> list[Shown]:
        judged: list[Judged] = []
        for _ in range(12):
            shown = next_shown(3, 8, judged, judge, seed)
            assert shown
            judged.append(Judged(judge, shown))
        return [answer.shown for answer in judged]

    orders = [order("a", 0), order("b", 0), order("a", 1)]
    assert len({tuple(shown) for shown in orders}) == 3
    assert len({shown[0].left < shown[0].right for shown in (order("a", seed) for seed in range(9))}) == 2
