"""Which checkpoints stay: for any run, any settings and any damage."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainer.checkpoint.manifest import CheckpointName
from trainer.checkpoint.retention import Known, staying, to_delete
from trainer.config import CheckpointSettings, KeepBest

METRIC = "heldout/total"
names = st.builds(CheckpointName, st.integers(0, 60), st.integers(1, 3))


@st.composite
def runs(draw: st.DrawFn) -> list[Known]:
    """Checkpoints in any state; each refers to older ones only, as a rollback does."""
    found: list[Known] = []
    for name in sorted(draw(st.sets(names, max_size=14))):
        readable = draw(st.booleans()) or draw(st.booleans())
        older = [one.name for one in found]
        found.append(
            Known(
                name,
                readable,
                whole=readable and (draw(st.booleans()) or draw(st.booleans())),
                figures=draw(st.sampled_from([{}, {METRIC: 1.0}, {METRIC: 2.0}, {"other": 0.0}])) if readable else {},
                refers_to=draw(st.frozensets(st.sampled_from(older), max_size=2))
                if readable and older
                else frozenset(),
            )
        )
    return draw(st.permutations(found))


bests = st.builds(
    KeepBest, metric=st.just(METRIC), count=st.integers(1, 3), better=st.sampled_from(["smallest", "largest"])
)


@st.composite
def settings(draw: st.DrawFn) -> CheckpointSettings:
    if not draw(st.booleans()):
        return CheckpointSettings(keep_newest=draw(st.none() | st.integers(1, 6)))
    return CheckpointSettings(
        keep_newest=draw(st.integers(1, 6)),
        keep_every_images=draw(st.none() | st.integers(1, 30)),
        keep_best=draw(st.none() | bests),
    )


@given(runs(), settings(), st.sets(names, max_size=4))
def test_what_must_stay_stays_and_once_is_as_good_as_twice(
    run: list[Known], rules: CheckpointSettings, protected: set[CheckpointName]
) -> None:
    stay = staying(run, rules, protected)
    there = {one.name for one in run}
    assert stay.keys() <= there and all(stay.values())
    whole = sorted(one.name for one in run if one.whole)
    assert set(whole[-1:]) <= stay.keys(), "the newest that is whole"
    assert protected & there <= stay.keys()
    assert {one.name for one in run if not one.readable} <= stay.keys()
    for one in run:
        if one.name in stay:
            assert one.refers_to & there <= stay.keys(), "parts that a kept one refers to"
    if rules.keep_newest is None:
        assert stay.keys() == there
    left = [one for one in run if one.name in stay]
    assert staying(left, rules, protected).keys() == stay.keys()
    assert to_delete(left, stay) == []


@given(runs(), settings(), st.integers(1, 5), st.integers(1, 30), bests, st.sets(names, max_size=4))
def test_a_rule_more_or_a_larger_number_removes_nothing_more(
    run: list[Known],
    rules: CheckpointSettings,
    more: int,
    every_images: int,
    best: KeepBest,
    protected: set[CheckpointName],
) -> None:
    stay = staying(run, rules, set()).keys()
    assert stay <= staying(run, rules, protected).keys()
    for one in protected & {known.name for known in run}:
        assert stay <= staying(run, rules, {one}).keys()
    everything = rules.model_copy(update={"keep_newest": None, "keep_every_images": None, "keep_best": None})
    larger = [everything]
    if rules.keep_newest is not None:
        larger.append(rules.model_copy(update={"keep_newest": rules.keep_newest + more}))
        if rules.keep_every_images is None:
            larger.append(rules.model_copy(update={"keep_every_images": every_images}))
        elif rules.keep_every_images % more == 0:
            larger.append(rules.model_copy(update={"keep_every_images": rules.keep_every_images // more}))
        if rules.keep_best is None:
            larger.append(rules.model_copy(update={"keep_best": best}))
        else:
            wider = rules.keep_best.model_copy(update={"count": rules.keep_best.count + more})
            larger.append(rules.model_copy(update={"keep_best": wider}))
    for other in larger:
        assert stay <= staying(run, other, set()).keys(), other


def known(position: int, figure: float | None = None, whole: bool = True, attempt: int = 1) -> Known:
    figures = {} if figure is None else {METRIC: figure}
    return Known(CheckpointName(position, attempt), whole=whole, figures=figures)


def test_each_rule_keeps_what_it_says_and_gives_its_reason() -> None:
    figures = {100: 3.0, 250: 1.0, 310: 1.0, 420: 2.0, 500: 5.0, 600: None, 700: None}
    run = [known(position, figure) for position, figure in figures.items()] + [known(650, whole=False)]
    rules = CheckpointSettings(
        keep_newest=2, keep_every_images=200, keep_best=KeepBest(metric=METRIC, better="smallest", count=1)
    )
    stay = staying(run, rules, {CheckpointName(100, 1)})
    assert {name.position: reason for name, reason in stay.items()} == {
        700: "newest",
        650: "damaged, and newer than one that is kept",
        600: "newest",
        420: "every 200 images",  # 600 is there already
        250: "every 200 images",  # and the best: of two equal ones the older
        100: "protected",
    }
    worst = rules.model_copy(update={"keep_best": KeepBest(metric=METRIC, better="largest")})
    assert staying(run, worst, set())[CheckpointName(500, 1)] == "best"
    again = [known(700, attempt=2), *run]  # a run that fell back passes a position once more
    newest = staying(again, CheckpointSettings(keep_newest=2), set())
    assert {name for name, why in newest.items() if why == "newest"} == {CheckpointName(700, 1), CheckpointName(700, 2)}


def test_a_checkpoint_that_only_lends_its_parts_stays_as_long_as_it_does() -> None:
    lender = known(100)
    borrower = Known(CheckpointName(300, 2), refers_to=frozenset({lender.name}))
    run = [lender, known(200), borrower]
    one = CheckpointSettings(keep_newest=1)
    assert staying(run, one, set()) == {
        borrower.name: "newest",
        lender.name: f"{borrower.name} has parts in it",
    }
    stay = staying([*run, known(400, attempt=2)], one, set())
    assert to_delete([*run, known(400, attempt=2)], stay) == [borrower.name, CheckpointName(200, 1), lender.name]
