"""Substitutes: rows that take the place of those of quarantined shards, and, where the user has asked for that, of
those whose stored bytes are damaged.

Always holds: which row takes a row's place depends on the quarantined shards, on what is damaged in the store and on
nothing else, so it is the same at every world size and after a resume: the row at the same place of the next whole
record batch of its shard, or where the shard has none or is quarantined, of the next shard. Called by the loader.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.arrow_files import BATCH_ROWS, ShardDamaged
from data_pipeline.errors import UserError
from data_pipeline.shard_reader import Rows

log = logging.getLogger(__name__)

Integers = NDArray[np.int64]
Place = tuple[int, int | None]  # shard and record batch; None: all of the shard


class Substitutes:
    """Reads rows through `read(shards, rows)`, others in place of those in `quarantined` shards, and with `on_damage`
    substitute where it raises ShardDamaged. Shared by the loader's threads."""

    def __init__(
        self,
        shard_rows: Sequence[int],
        read: Callable[[Integers, Integers], Rows],
        quarantined: Collection[int] = (),
        on_damage: Literal["stop", "substitute"] = "substitute",
    ) -> None:
        self.shard_rows, self._read = shard_rows, read
        self._quarantined, self._on_damage = frozenset(quarantined), on_damage
        self._damaged: dict[Place, ShardDamaged] = {}  # as large as the damage

    def read(self, shards: Integers, rows: Integers) -> tuple[Rows, tuple[Place, ...]]:
        """The rows, and for each one that was replaced, where it would have been.

        Raises ShardDamaged when no whole record batch is left, or damage is to be no reason for a substitute; UserError
        when all shards are quarantined.
        """
        while True:
            whole_shards, whole_rows, replaced = self.replaced(shards, rows)
            try:
                return self._read(whole_shards, whole_rows), replaced
            except ShardDamaged as damage:
                if self._on_damage == "stop":
                    raise
                assert damage.shard is not None
                # In one step: other threads meet the same damage at the same time.
                if self._damaged.setdefault((damage.shard, damage.batch), damage) is damage:
                    log.warning("%s; the rows of the next whole record batch take its place", damage)

    def replaced(self, shards: Integers, rows: Integers) -> tuple[Integers, Integers, tuple[Place, ...]]:
        """(shards, rows) that are read instead, as far as damage is known, and where the replaced ones would be."""
        if not self._damaged and not self._quarantined:
            return shards, rows, ()
        new_shards, new_rows, replaced = shards.copy(), rows.copy(), list[Place]()
        for number, place in enumerate(zip(shards.tolist(), (rows // BATCH_ROWS).tolist(), strict=True)):
            if damaged := self._damage_of(place):
                replaced.append(damaged)
                shard, batch = self._next_whole(place)
                in_batch = min(BATCH_ROWS, self.shard_rows[shard] - batch * BATCH_ROWS)
                new_shards[number] = shard
                new_rows[number] = batch * BATCH_ROWS + int(rows[number]) % BATCH_ROWS % in_batch
        return new_shards, new_rows, tuple(replaced)

    def _damage_of(self, place: Place) -> Place | None:
        whole_shard = (place[0], None)
        if place[0] in self._quarantined or whole_shard in self._damaged:
            return whole_shard
        return place if place in self._damaged else None

    def _next_whole(self, place: Place) -> tuple[int, int]:
        """The next (shard, batch) that is not known to be damaged: of the shard, round to its start, then of others."""
        shard, batch = place
        assert batch is not None
        for further in range(len(self.shard_rows)):
            other = (shard + further) % len(self.shard_rows)
            batches = -(-self.shard_rows[other] // BATCH_ROWS)
            for step in range(batches):
                if not self._damage_of(found := (other, (batch + step) % batches)):
                    return found
        if self._damaged:
            raise next(reversed(self._damaged.values()))
        raise UserError("quarantine", "a shard that is not in it", "all shards", "look at the run's skipped/ objects")
