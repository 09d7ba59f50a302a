"""Quarantine: which shards are to blame for refused updates, and the list of all that a run was not trained on.

Always holds: a shard is blamed only if its own rows, the others of the batch left out, still make the guard refuse the
update, and the others without it do not; weights, histories and the recipe's state stay as they were while that is
found out; all ranks take the same number of steps for it. The list is small objects beside the checkpoints,
`skipped/…json`, put if absent, each there before the next checkpoint is. Called by the loop; `read_skipped` by
`glidepath status`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.loader import Loader, micro_batches
from data_pipeline.storage import ObjectStore, canonical_json
from trainer.engine.group import Group
from trainer.guard import Decision, GuardHistory, objection
from trainer.step import Trainee, backward_of

SKIPPED = "skipped/"
MOST_TO_BLAME = 8  # shards of one batch: more of them, or all of it, and it is not the data

Refused = Callable[[NDArray[np.int64]], str]  # why an update on these positions alone is refused; empty if it is not


@dataclass(frozen=True)
class Skipped:
    """Images [begin, end) that were not trained on, or not any more after `reason`, as `attempt` found out.

    `skip`: a refused update of the phase `part`. `rollback`: updates that were undone, with those that were refused.
    `quarantine`: the shard `shard` of `dataset`, found in those images; other rows take its place from `end` on.
    """

    kind: Literal["skip", "rollback", "quarantine"]
    begin: int
    end: int
    reason: str
    attempt: int
    part: str = ""
    dataset: str = ""
    shard: str = ""

    @property
    def key(self) -> str:
        """The same for what a resumed run skips again, which is then listed once."""
        what = "-".join(filter(None, (self.kind, self.part, self.dataset[:12], self.shard)))
        return f"{SKIPPED}images-{self.begin:09d}-{self.end:09d}-{what}.json"


class SkipList:
    """Rank 0's: what was skipped and is not in the store yet. `add` by the main thread, `write` by any."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._pending: dict[str, Skipped] = {}

    def add(self, skipped: Skipped) -> None:
        self._pending[skipped.key] = skipped

    def write(self) -> None:
        """Store what is not stored yet. Raises OSError; what it did not come to is stored the next time."""
        for key, skipped in list(self._pending.items()):
            self._store.put_if_absent(key, canonical_json(asdict(skipped)))
            self._pending.pop(key, None)


def read_skipped(store: ObjectStore) -> list[dict[str, Any]]:
    """All that the run skipped, as `Skipped` in JSON, by images. Raises UserError for an object that is damaged."""
    rows = []
    for info in store.list(SKIPPED):
        try:
            rows.append(asdict(Skipped(**json.loads(store.get(info.key)))))
        except (ValueError, TypeError):
            raise UserError(
                f"{store.uri}/{info.key}", "a JSON record of what was skipped", "other bytes", "delete it"
            ) from None
    return sorted(rows, key=lambda row: (row["begin"], row["end"], row["kind"], row["shard"]))


def shards_to_blame(trainee: Trainee, loader: Loader, begin: int, end: int) -> dict[int, str]:
    """{shard: why} of the shards whose rows alone make the guard refuse an update among those on images [begin, end),
    with the weights as they are. A collective call.

    Updates are looked at in turn, each without the shards that were found by then. The gradients that are left in the
    engines are forgotten.
    """
    batch, found = trainee.config.batch, dict[int, str]()
    scales = {part: engine.loss_scale() for part, engine in trainee.engines.items()}
    for start in range(begin, end, batch):
        positions = np.arange(start, start + batch, dtype=np.int64)
        shards = shards_read(trainee.group, loader, positions)
        suspects = [shard for shard in np.unique(shards).tolist() if shard not in found]

        def refused(of: NDArray[np.int64], start: int = start) -> str:
            return refused_alone(trainee, loader, of, start)

        found |= blamed(suspects, positions, shards, refused)
    for part, scale in scales.items():
        engine = trainee.engines[part]
        if engine.loss_scale() != scale:  # gradients overflowed fp16
            engine.loaded(engine.optimizer_steps(), scale)
    return found


def shards_read(group: Group, loader: Loader, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The shard that each row of a global batch is read from: int64 [B], the same on all ranks. A collective call.

    Each rank brings its own rows: only the one that has read a damaged row knows what took its place.
    """
    begin, end = loader.cut[0][0], loader.cut[-1][1]
    shards = torch.zeros(len(positions), dtype=torch.int64)
    shards[begin:end] = torch.from_numpy(loader.shards_at(positions[begin:end]))
    return group.sum_(shards).numpy()


def blamed(
    suspects: list[int], positions: NDArray[np.int64], shards: NDArray[np.int64], refused: Refused
) -> dict[int, str]:
    """Those of the suspects that are refused alone, if the others without them are not. Else none: whatever is wrong
    with many shards, or still is without the worst, is not a few shards' rows."""
    found = bisect(suspects, positions, shards, refused)
    rest = positions[np.isin(shards, [shard for shard in suspects if shard not in found])]
    if not found or len(found) > MOST_TO_BLAME or not len(rest) or refused(rest):
        return {}
    return found


def bisect(
    suspects: list[int], positions: NDArray[np.int64], shards: NDArray[np.int64], refused: Refused
) -> dict[int, str]:
    """Those of the suspects that are refused alone; ends early when there are too many. A half that is not refused has
    no such shard: what a row adds to loss and gradient does not depend on which others are left out. A contrastive
    loss does, since a row is compared with the others; there a shard can be missed, but none is blamed that is not
    refused alone."""
    found: dict[int, str] = {}
    open_ = [suspects] if suspects else []
    while open_ and len(found) <= MOST_TO_BLAME:
        some = open_.pop()
        why = refused(positions[np.isin(shards, some)])
        if why and len(some) == 1:
            found[some[0]] = why
        elif why:
            half = len(some) // 2
            open_ += [some[half:], some[:half]]
    return found


def refused_alone(trainee: Trainee, loader: Loader, positions: NDArray[np.int64], start: int) -> str:
    """Why the guard would refuse an update on these positions of the batch at `start`, the others left out; empty if it
    would not. Forward and backward passes, no update. A collective call."""
    config, group = trainee.config, trainee.group
    cut = micro_batches(len(positions), group.rank, group.world_size, config.micro_batch_size())
    with group.watch.section("data"):
        steps = [loader.micro_batch(positions[begin:end], int(positions[0])) for begin, end in cut]
    for phase in trainee.recipe.phases():
        if not phase.active(start // config.batch):
            continue
        norms: list[float] = []

        def look(norm: float, norms: list[float] = norms) -> Decision:
            norms.append(norm)
            return Decision.SKIP

        # Divided by the whole batch, as in training: fewer rows must not look worse for being fewer.
        values = backward_of(trainee, phase, steps, start)[phase.terms.index("total")]
        trainee.engines[phase.part].update(config.lr, look)
        history = trainee.guards.get(phase.label, GuardHistory())
        # Nobody asked: a gradient beyond fp16, at a scale with which the run got here.
        if why := objection(history, float(values.mean()), norms[0] if norms else float("inf"), config.guard):
            return why
    return ""
