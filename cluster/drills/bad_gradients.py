"""R9: gradients that are no number, gradients fifty times too large, a shard whose rows are poison: each is passed over
by itself, and the run ends where a run without them would.

A case is a run of two workers under the local launcher, on ZeRO stage 0 or 2. Gradients are multiplied at a seam of the
drill's own workers (poked.py); a poisoned shard is a real one, with its checksums, whose pictures are flat.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.drills.poked import POKES, Poke
from cluster.drills.scoreboard import Score
from cluster.drills.scratch import BATCH, Scratch, consumed, environment, losses
from cluster.local_launch import LocalLauncher
from data_pipeline.families import FAMILIES
from data_pipeline.shards import Dataset, commit_dataset, commit_family, open_dataset, write_shard
from data_pipeline.storage import open_store
from trainer.config import TrainConfig
from trainer.quarantine import read_skipped
from trainer.run import prepare_run

CASES = 10
UPDATES, LAST = 30, 6  # of a run; those whose losses are compared
BEGIN = 12  # updates before something is wrong: the guard has a history
ROLLBACK_AFTER = 4
SAVE_EVERY = 3  # updates
WITHIN = 1.25  # of the loss of a run without faults

FLAT, FAINT = "flat", "faint"  # poison: no contrast at all, so the loss is infinite; or hardly any, so it is very large


@dataclass(frozen=True)
class Case:
    """`pokes` in updates [begin, end). `poison`: of the pictures of `shard`, which lie there from update `since` on.
    `faults`: what is done, in words."""

    faults: str
    zero_stage: int
    pokes: tuple[tuple[int, int, float], ...] = ()
    poison: str = ""
    shard: int = -1
    since: int = 0


@dataclass
class Outcome:
    """Of one case: what a user would be shown, and a line for each broken promise."""

    figures: dict[str, Any]
    failures: list[str] = field(default_factory=list)


def run(scratch: Scratch) -> Score:
    wanted = CASES if scratch.wishes.faults is None else scratch.wishes.faults
    shards = len(open_dataset(scratch.dataset).shard_rows)
    reference = clean_losses(scratch)
    outcomes = []
    for number, case in enumerate(cases(scratch.wishes.seed, wanted, shards)):
        scratch.tell(f"case {number + 1} of {wanted}: {case.faults}, ZeRO {case.zero_stage}")
        outcomes.append(meet(scratch, f"case-{number}", case, reference))
    failures = [f"case {n + 1}: {line}" for n, outcome in enumerate(outcomes) for line in outcome.failures]
    passed = sum(not outcome.failures for outcome in outcomes)
    figures = {"cases": wanted, "passed": passed, "manual_actions": 0, "each": [one.figures for one in outcomes]}
    return Score(wanted, figures, failures)


def cases(seed: int, wanted: int, shards: int) -> Iterator[Case]:
    """Kinds in turn, at other moments and of other lengths with every seed."""
    for number in range(wanted):
        chance = random.Random(f"{seed}-{number}")
        begin = chance.randrange(BEGIN, UPDATES - LAST - ROLLBACK_AFTER - 2)
        stage = (0, 2)[number // 5 % 2] if number % 5 < 3 else (2, 0)[number // 5 % 2]
        few, many = (begin, begin + chance.randrange(1, ROLLBACK_AFTER)), (begin, begin + ROLLBACK_AFTER)
        kind = number % 5
        if kind < 3:
            span, factor = ((few, math.nan), (many, math.nan), (many, 50.0))[kind]
            if kind == 2 and chance.random() < 0.5:
                span = few
            name = "NaN gradients" if math.isnan(factor) else "gradients x 50"
            yield Case(f"{name} in updates {span[0]} to {span[1] - 1}", stage, pokes=((*span, factor),))
        else:
            shard, poison = chance.randrange(shards), (FLAT, FAINT)[kind - 3]
            # From the start faint pictures would be what the guard takes for normal.
            since = 0 if poison == FLAT and chance.random() < 0.5 else begin
            name = f"{poison} pictures in shard {shard} from update {since} on"
            yield Case(name, stage, poison=poison, shard=shard, since=since)


def clean_losses(scratch: Scratch) -> dict[int, float]:
    scratch.tell("training without faults")
    config = config_of(scratch, "clean", scratch.dataset)
    train(config, ())
    return losses(config)


def config_of(scratch: Scratch, run: str, dataset: str, stage: int = 0, updates: int = UPDATES) -> TrainConfig:
    guard = {"warmup": 6, "window": 10, "rollback_after": ROLLBACK_AFTER}
    checkpoint = {"every_images": SAVE_EVERY * BATCH, "keep_newest": 3}
    changes = {"dataset": dataset, "zero": {"stage": stage}, "guard": guard, "checkpoint": checkpoint}
    return scratch.config(run, images=updates * BATCH, launcher={"workers": 2}, lr=3e-4, **changes)


def train(config: TrainConfig, pokes: tuple[tuple[int, int, float], ...]) -> dict[str, Any]:
    in_images: list[Poke] = [(begin * BATCH, end * BATCH, factor) for begin, end, factor in pokes]
    spec = {"values": config.model_dump(mode="json"), "attempt": prepare_run(config)}
    with environment({POKES: json.dumps(in_images)}):
        return LocalLauncher("cluster.drills.poked").launch(spec, config.launcher.workers, lambda event: None)


def meet(scratch: Scratch, run: str, case: Case, reference: dict[int, float]) -> Outcome:
    """Train through the case's faults and look at what became of it."""
    dataset = scratch.dataset
    if case.poison:
        output = scratch.folder / "poison" / run
        dataset = str(output)
        if case.since:  # first it is whole, and is written anew while the run stands still
            poisoned(open_dataset(scratch.dataset), None, "", dataset)
            train(config_of(scratch, run, dataset, case.zero_stage, case.since), ())
            shutil.rmtree(output)
        poisoned(open_dataset(scratch.dataset), case.shard, case.poison, dataset)
    config = config_of(scratch, run, dataset, case.zero_stage)
    result = train(config, case.pokes)
    assert config.store is not None
    skipped, found = read_skipped(open_store(config.store)), losses(config)
    last = sorted(reference)[-LAST:]
    ratio = statistics.fmean(found[at] for at in last) / statistics.fmean(reference[at] for at in last)
    outcome = Outcome({"faults": case.faults, "zero_stage": case.zero_stage, "loss_to_clean": round(ratio, 4)})
    outcome.figures["skipped"] = [f"{row['kind']} {row['begin']}-{row['end']}" for row in skipped]
    if not ratio <= WITHIN:
        outcome.failures.append(f"the loss is {ratio:.3f} times that of a run without faults")
    if [at for at, _ in consumed(config)] != list(range(0, UPDATES * BATCH, BATCH)):
        outcome.failures.append("not every position was passed once")
    outcome.failures += wrong_quarantine(config, case, skipped) if case.poison else wrong_windows(case, skipped)
    if case.poison and not result["substituted_rows"]:
        outcome.failures.append("no row took the place of a quarantined one")
    return outcome


def wrong_windows(case: Case, skipped: list[dict[str, Any]]) -> Iterator[str]:
    """What is listed must be the updates that were bad, and those that a rollback undid before them."""
    ((begin, end, _),) = case.pokes
    rolled_back = end - begin >= ROLLBACK_AFTER
    updates = {(row["begin"] // BATCH, row["end"] // BATCH) for row in skipped if row["kind"] == "skip"}
    if updates != {(at, at + 1) for at in range(begin, end - rolled_back)}:
        yield f"listed as refused: updates {sorted(updates)}"
    windows = [(row["begin"], row["end"]) for row in skipped if row["kind"] == "rollback"]
    newest = begin // SAVE_EVERY * SAVE_EVERY * BATCH  # a save that was put off leaves an older one to go back to
    if len(windows) != rolled_back or any(at > newest or to != end * BATCH for at, to in windows):
        yield f"listed as undone: images {windows}, expected from at most {newest} to {end * BATCH}"
    if [row for row in skipped if row["kind"] == "quarantine"]:
        yield "a shard was quarantined that was not to blame"


def wrong_quarantine(config: TrainConfig, case: Case, skipped: list[dict[str, Any]]) -> Iterator[str]:
    """The poisoned shard, it alone, once; and none of its rows from then on."""
    assert isinstance(config.dataset, str)
    dataset = open_dataset(config.dataset)
    label = dataset.shard_label(case.shard)
    rows = [row for row in skipped if row["kind"] == "quarantine"]
    if [(row["dataset"], row["shard"]) for row in rows] != [label]:
        yield f"quarantined: {[row['shard'] for row in rows]}, poisoned: {label[1]}"
        return
    ids = set(ids_of(dataset, case.shard))
    since = rows[0]["end"]
    if any(ids & set(batch) for at, batch in consumed(config) if at >= since):
        yield f"a row of {label[1]} was trained on after its quarantine"
    if rolled := [row for row in skipped if row["kind"] != "quarantine" and row["begin"] >= since]:
        yield f"something was skipped after the quarantine: {rolled}"


def ids_of(dataset: Dataset, shard: int) -> list[int]:
    reader = dataset.shard("base", shard)
    return [int(one) for one in reader.take(["id"], np.arange(reader.rows))["id"]]


def poisoned(dataset: Dataset, shard: int | None, poison: str, output: str) -> None:
    """A copy of the dataset's base family with other pictures in one shard, committed as a builder would."""
    store, family = open_store(output), FAMILIES["base"]
    shards = []
    for index in range(len(dataset.shard_rows)):
        reader = dataset.shard("base", index)
        batches = [reader.batch(number) for number in range(len(reader))]
        if index == shard:
            batches = [_with_pictures(batch, poison) for batch in batches]
        shards.append(write_shard(store, dataset.id, family, index, batches))
    facts = {"funnel": dataset.manifest["funnel"], "quarantined": 0}
    commit_dataset(store, dataset.manifest["identity"], [commit_family(store, dataset.id, family, shards)], facts)


def _with_pictures(batch: pa.RecordBatch, poison: str) -> pa.RecordBatch:
    """Grey pictures, each of its own brightness; faint ones are one step brighter in a corner of 8 x 8."""
    pixels = np.repeat(np.arange(batch.num_rows) % 250, 64 * 64 * 3).reshape(-1, 64, 64, 3).astype(np.uint8)
    if poison == FAINT:
        pixels[:, :8, :8] += 1
    kind = batch.schema.field("image64").type
    column = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), kind.list_size).cast(kind)
    return batch.set_column(batch.schema.get_field_index("image64"), batch.schema.field("image64"), column)
