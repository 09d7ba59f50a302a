"""Who is shown what next, left and right: pure.

Always holds, at every moment, for each judge by itself: no two pairs of models were shown more than once more often
than each other, no model of a pair was on the left more than once more often than the other, and no pair of pictures
comes twice. Over all judges these differ by at most their number. It depends on the answers so far and the seed alone,
so a study goes on wherever it was left. Called by `cluster.judging.answers`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from data_pipeline.draws import key64


class Shown(NamedTuple):
    """What a judge sees: the pictures of two models, by their numbers, for one item of a question."""

    item: int
    left: int
    right: int

    @property
    def pair(self) -> tuple[int, int]:
        return min(self.left, self.right), max(self.left, self.right)


class Judged(NamedTuple):
    """That a judge has answered it."""

    judge: str
    shown: Shown


def next_shown(models: int, items: int, judged: Sequence[Judged], judge: str, seed: int) -> Shown | None:
    """What `judge` is to see next of one question; None once all was answered. `judged`: of this question, by
    anybody."""
    mine = [answer.shown for answer in judged if answer.judge == judge]
    every = [answer.shown for answer in judged]
    my_pairs, all_pairs = Counter(shown.pair for shown in mine), Counter(shown.pair for shown in every)
    open_pairs = [pair for pair in combinations(range(models), 2) if my_pairs[pair] < items]
    if not open_pairs:
        return None
    pair = min(
        open_pairs, key=lambda pair: (my_pairs[pair], all_pairs[pair], key64("pair", seed, judge, len(mine), *pair))
    )

    done = {shown.item for shown in mine if shown.pair == pair}
    by_item = Counter(shown.item for shown in every if shown.pair == pair)
    item = min(
        (item for item in range(items) if item not in done),
        key=lambda item: (by_item[item], key64("item", seed, judge, item, *pair)),
    )

    def on_the_left(model: int, answers: Sequence[Shown]) -> int:
        return sum(shown.left == model for shown in answers if shown.pair == pair)

    left, right = sorted(
        pair,
        key=lambda model: (
            on_the_left(model, mine),
            on_the_left(model, every),
            key64("left", seed, judge, item, model),
        ),
    )
    return Shown(item, left, right)
