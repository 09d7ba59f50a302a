"""R12: one run through every ZeRO stage and world size, then there and back between worlds and stages: nothing is
converted on the way, no sample is dropped or repeated, and the loss stays that of a run that never changed.

Dropout inside the network is drawn per rank, so it is off here; all else is a function of the position.

In bf16 a change of the last bit of each weight moves the losses after it as far as a change of the world size does
(docs/decisions.md, 148). So there each link has a control: the same checkpoint continued in the link's stage on one
rank, in other micro batches, which differs from the reference by rounding alone.
"""

from __future__ import annotations

import itertools
import math
import random
import shutil
from typing import Any

import torch

from cluster.drills.scoreboard import CannotRun, Score
from cluster.drills.scratch import BATCH, Scratch, consumed, losses, newest_manifest, resumes
from trainer.config import TrainConfig, ZeroSettings
from trainer.engine.group import Group
from trainer.run import prepare_run, train

UPDATES = 20  # between one change and the next
TOLERANCE = 1e-5  # relative, of the loss
FIRST_IN_BF16 = 3e-4  # of the first update after a change, against the control's
ROUNDING = 3.0  # in bf16 the losses may be so many times as far from the reference, RMS, as those of the controls are
THERE_AND_BACK = ((1, 2), (1, 1), (1, 2), (2, 2), (2, 1), (2, 2), (3, 2), (3, 1), (3, 2), (2, 2), (1, 2))

Link = tuple[int, int]  # ZeRO stage, ranks


def run(scratch: Scratch) -> Score:
    """`faults` resumes; by default twelve in a seeded order, which meet every pair, then there and back."""
    require_deepspeed()
    links = chain(scratch.wishes.seed, scratch.wishes.faults)
    failures: list[str] = []
    bf16 = scratch.wishes.precision == "bf16"
    off: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    rounding: list[float] = []
    for number, (stage, ranks) in enumerate(links):
        told = f"{number}: ZeRO {stage} on {ranks}"
        expected = plain_losses(scratch, number, min(stage, 1) if bf16 else 0) if number else {}
        control = plain_losses(scratch, number, stage, micro_batch=BATCH // 2) if number and bf16 else {}
        link = config_of(scratch, number + 1, zero={"stage": stage}, launcher={"workers": ranks})
        scratch.train(link)
        _, manifest = newest_manifest(link)
        if (manifest.zero_stage, manifest.world_size, manifest.position) != (stage, ranks, link.images):
            failures.append(f"{told}: the newest checkpoint is of ZeRO {manifest.zero_stage} at {manifest.position}")
        if number:
            if missing := updates_of(number) - expected.keys():
                failures.append(f"{told}: the reference has no finite loss at {sorted(missing)}")
            off[told] = deviations(losses(link), expected)
            scratch.tell(f"{told} ranks: loss within {max(off[told]):.1e}")
            if bf16:
                rounding += deviations(control, expected)
                first[told] = deviations(losses(link), control)[0]
            checked, bound = (first[told], FIRST_IN_BF16) if bf16 else (max(off[told]), TOLERANCE)
            if not checked <= bound:
                failures.append(f"{told}: the loss is {checked:.1e} off")
    every_update = rms(list(itertools.chain.from_iterable(off.values())))
    if bf16 and not every_update <= ROUNDING * rms(rounding):
        failures.append(f"losses are {every_update:.1e} off, RMS, where rounding makes {rms(rounding):.1e}")
    resumed = [line["images"] for line in resumes(link)]
    if resumed != [UPDATES * BATCH * number for number in range(1, len(links))]:
        failures.append(f"resumed at {resumed}")
    batches, wrong = compare_ids(scratch, link)
    if wrong:
        failures.append(f"{wrong} of {batches} batches hold other samples, are missing or come twice")
    figures = {
        "resumes": len(resumed),
        "batches_listed": batches,
        "batches_with_other_samples": wrong,
        "precision": scratch.wishes.precision,
        "updates_after_each_change": UPDATES,
        "worst_relative_loss": in_json(max(map(max, off.values()))),
        "by_link": {name: in_json(max(values)) for name, values in off.items()},
    }
    if bf16:
        figures["worst_first_update"] = in_json(max(first.values()))
        figures["rms"] = in_json(every_update)
        figures["rms_of_the_controls"] = in_json(rms(rounding))
    return Score(len(resumed), figures, failures)


def compare_ids(scratch: Scratch, link: TrainConfig) -> tuple[int, int]:
    """(batches, wrong ones) of the list that the chain wrote, line by line, against that of an uninterrupted run."""
    alone = scratch.config("alone", images=link.images, dropout=0.0, checkpoint={"every_images": link.images})
    train_here(alone)
    lines = list(itertools.zip_longest(consumed(link), consumed(alone)))
    return len(lines), sum(found != expected for found, expected in lines)


def config_of(scratch: Scratch, links: int, **changes: Any) -> TrainConfig:
    """The chain's run up to the end of so many links."""
    span = UPDATES * BATCH
    settings = {"images": span * links, "dropout": 0.0, "checkpoint": {"every_images": span}}
    return scratch.config("chained", **settings, **changes)


def plain_losses(scratch: Scratch, number: int, stage: int, **changes: Any) -> dict[int, float]:
    """images -> loss of what the chain's newest checkpoint becomes on one rank, in the plain engine (stage 0) or under
    ZeRO. Runs that differ by rounding alone drift apart for ever, so each link has references of its own.

    In bf16 the plain engine rounds what it computes, DeepSpeed the weights too: other arithmetic, so that a link under
    ZeRO is compared with ZeRO-1.
    """
    # The same run in another place: a store with another run's checkpoint is refused.
    folder = scratch.folder / "plain"
    elsewhere = {"store": str(folder / "run"), "tracking": {"uri": str(folder / "tracking")}}
    plain = config_of(scratch, number + 1, **elsewhere, **changes)
    name, _ = newest_manifest(config_of(scratch, number))
    shutil.copytree(scratch.store_folder(config_of(scratch, number)) / name.folder, folder / "run" / name.folder)
    if stage:
        scratch.train(plain.model_copy(update={"zero": ZeroSettings(stage=stage)}))
    else:
        train_here(plain)
    found = losses(plain)
    shutil.rmtree(folder)
    return found


def train_here(config: TrainConfig) -> None:
    """In this process: on one rank a launcher would only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(config.model_dump(mode="json"), prepare_run(config), Group(), lambda event: None)
    finally:
        torch.set_num_threads(threads)


def updates_of(number: int) -> set[int]:
    """Where the updates of that link of the chain end, in images."""
    begin = UPDATES * BATCH * number
    return set(range(begin + BATCH, begin + UPDATES * BATCH + 1, BATCH))


def deviations(found: dict[int, float], expected: dict[int, float]) -> list[float]:
    """The relative differences by update; infinite where an expected loss was not found, as one that is no number never
    is, and where none is expected."""
    return [abs(found.get(at, math.inf) / expected[at] - 1) for at in sorted(expected)] or [math.inf]


def rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def in_json(figure: float) -> float | None:
    """JSON has no infinity."""
    return figure if math.isfinite(figure) else None


def chain(seed: int, resumes_wanted: int | None) -> list[Link]:
    """One link more than there are resumes."""
    pairs = list(itertools.product(range(4), (1, 2, 3)))
    random.Random(seed).shuffle(pairs)
    whole = [(0, 2), *pairs, *THERE_AND_BACK]
    return whole if resumes_wanted is None else list(itertools.islice(itertools.cycle(whole), resumes_wanted + 1))


def require_deepspeed() -> None:
    """By its metadata: importing it takes the GPU of a machine that has one."""
    from importlib import metadata

    try:
        metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        raise CannotRun("no DeepSpeed; pip install 'glidepath[cluster]'") from None
