"""Loading: any checkpoint into any world size, verified, falling back past damage.

Always holds: which bytes are read follows from a pure plan over the manifest; no byte is used before its block was
checked; all ranks load the same checkpoint or, together, the next older one, and say so.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.errors import UserError
from data_pipeline.order import OrderState
from data_pipeline.storage import ObjectStore
from trainer.checkpoint.manifest import CheckpointName, Manifest, committed, read_manifest
from trainer.checkpoint.parts import ELEMENT_BYTES, CheckpointDamaged, PartInfo, PartReader
from trainer.engine.engine import Interval
from trainer.engine.group import Group

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """The checkpoint that was loaded, and a line for each newer one that this rank found damaged."""

    name: CheckpointName
    manifest: Manifest
    passed_over: tuple[str, ...]


@dataclass(frozen=True)
class Read:
    """Bytes [begin, end) of part number `part` go to elements from `at` of wanted interval number `wanted`."""

    part: int
    begin: int
    end: int
    wanted: int
    at: int


def plan_reads(wanted: Sequence[tuple[str, str, int, int]], parts: Sequence[PartInfo]) -> list[Read]:
    """The reads that fill the wanted intervals (name, kind, offset, length), in file order within each part.

    Raises CheckpointDamaged if the parts do not hold all of an interval.
    """
    stored = defaultdict(list)
    for number, part in enumerate(parts):
        for interval in part.intervals:
            stored[interval.name, interval.kind].append((interval.offset, interval.length, interval.begin, number))
    for pieces in stored.values():
        pieces.sort()
    reads = []
    for index, (name, kind, offset, length) in enumerate(wanted):
        at, end = offset, offset + length
        for piece_offset, piece_length, begin, number in stored[name, kind]:
            if piece_offset <= at < min(piece_offset + piece_length, end):
                stop = min(piece_offset + piece_length, end)
                first = begin + (at - piece_offset) * ELEMENT_BYTES
                reads.append(Read(number, first, first + (stop - at) * ELEMENT_BYTES, index, at - offset))
                at = stop
        if at != end:
            raise CheckpointDamaged(f"{kind} of {name}", f"elements up to {end}", f"up to {at}")
    return sorted(reads, key=lambda read: (read.part, read.begin))


def fill(store: ObjectStore, name: CheckpointName, manifest: Manifest, wanted: Iterable[Interval]) -> None:
    """Overwrite the values of `wanted` from a checkpoint. Raises CheckpointDamaged; some values may be written by
    then."""
    intervals = list(wanted)
    reads = plan_reads([(i.name, i.kind, i.offset, len(i.values)) for i in intervals], manifest.parts)
    number, reader = -1, None
    for read in reads:
        if reader is None or read.part != number:  # reads are sorted by part, and a reader holds on to a block
            number, part = read.part, manifest.parts[read.part]
            reader = PartReader(store, name.folder + part.file, part)
        data = reader.read(read.begin, read.end)
        values = torch.from_numpy(np.frombuffer(data, np.float32).copy())
        target = intervals[read.wanted].values
        target[read.at : read.at + len(values)].copy_(values)


def refuse_other_model(manifest: Manifest, parameters: dict[str, int], uri: str) -> None:
    """Raise UserError naming the first parameter in which checkpoint and model differ."""
    for name in sorted(manifest.parameters.keys() | parameters.keys()):
        expected, found = parameters.get(name), manifest.parameters.get(name)
        if expected != found:
            raise UserError(
                f"checkpoint {uri}: parameter {name}",
                f"{expected} elements" if expected else "no such parameter",
                f"{found} elements" if found else "none",
                "it is of another model; choose the configuration it was trained with",
            )


def refuse_other_order(manifest: Manifest, order: OrderState, uri: str) -> None:
    """Raise UserError naming what of the sample order (the dataset first) is not as it was; the position may differ."""
    for key, now in dataclasses.asdict(order).items():
        then = manifest.order.get(key)
        if key != "position" and then != now:
            raise UserError(
                f"checkpoint {uri}",
                f"{key} {str(then)[:12]}",
                f"{key} {str(now)[:12]}",
                "give the dataset and the version it was trained with, or start another run",
            )


def restore_newest(
    store: ObjectStore, group: Group, wanted: Sequence[Interval], parameters: dict[str, int], order: OrderState
) -> Restored | None:
    """Fill `wanted` from the newest checkpoint that verifies on all ranks; None if the run has none yet.

    Raises UserError if the model or dataset is another one, or if there are checkpoints and none verifies.
    """
    names = [CheckpointName(*pair) for pair in group.broadcast([(n.position, n.attempt) for n in committed(store)])]
    passed_over: list[str] = []
    for number, name in enumerate(names):
        manifest: Manifest | None = None
        try:
            manifest = read_manifest(store, name.manifest_key)
            refuse_other_model(manifest, parameters, f"{store.uri}/{name.folder}")
            refuse_other_order(manifest, order, f"{store.uri}/{name.folder}")
            fill(store, name, manifest, wanted)
        except CheckpointDamaged as error:
            following = f"trying {names[number + 1]}" if number + 1 < len(names) else "no older one is left"
            passed_over.append(f"checkpoint {name}: {error}; {following}")
            log.warning(passed_over[-1])
            manifest = None
        if group.all_agree(manifest is not None) and manifest is not None:
            return Restored(name, manifest, tuple(passed_over))
        if manifest is not None:
            passed_over.append(f"checkpoint {name}: another rank found it damaged")
            log.warning(passed_over[-1])
    if names:
        raise UserError(
            f"run store {store.uri}",
            "a checkpoint that verifies",
            f"{len(names)} that do not ({passed_over[-1]})",
            "restore the store from a copy, or start another run",
        )
    return None
