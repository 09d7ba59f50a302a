"""Loading: any checkpoint into any world size, verified, falling back past damage.

Always holds: which bytes are read follows from a pure plan over the manifest; no byte is used before its block was
checked; all ranks load the same checkpoint or, together, the next older one, and say so.
"""

from __future__ import annotations

import dataclasses
import logging
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch

from data_pipeline.errors import UserError
from data_pipeline.order import OrderState
from data_pipeline.storage import ObjectStore
from trainer.checkpoint.manifest import CheckpointName, Manifest, committed, part_key, read_manifest
from trainer.checkpoint.parts import ELEMENT_BYTES, REQUEST_BYTES, CheckpointDamaged, PartInfo, PartReader
from trainer.engine.engine import Interval
from trainer.engine.group import Group

log = logging.getLogger(__name__)

READ_THREADS = 8  # a store far away answers each request late, and several at once


@dataclass(frozen=True)
class Restored:
    """The checkpoint that was loaded, and a line for each newer one that this rank found damaged."""

    name: CheckpointName
    manifest: Manifest
    passed_over: tuple[str, ...]


class Read(NamedTuple):
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
    stored = _stored_pieces(wanted, parts)
    reads = []
    for index, (name, kind, offset, length) in enumerate(wanted):
        at, end = offset, offset + length
        pieces = stored[name, kind]
        for number in range(max(bisect_right(pieces, at, key=itemgetter(0)) - 1, 0), len(pieces)):
            piece_offset, piece_length, begin, part = pieces[number]
            if at == end or piece_offset > at:
                break
            stop = min(piece_offset + piece_length, end)
            if stop > at:
                first = begin + (at - piece_offset) * ELEMENT_BYTES
                reads.append(Read(part, first, first + (stop - at) * ELEMENT_BYTES, index, at - offset))
                at = stop
        if at != end:
            raise CheckpointDamaged(f"{kind} of {name}", f"elements up to {end}", f"up to {at}")
    reads.sort()
    return reads


def _stored_pieces(
    wanted: Sequence[tuple[str, str, int, int]], parts: Sequence[PartInfo]
) -> dict[tuple[str, str], list[tuple[int, int, int, int]]]:
    """(offset, length, byte, part number) of the pieces of the wanted (name, kind), by offset; without most of those
    that lie outside of what is wanted, since under ZeRO-3 every rank holds a piece of every parameter."""
    stored: dict[tuple[str, str], list[tuple[int, int, int, int]]] = {(name, kind): [] for name, kind, _, _ in wanted}
    spans: dict[str, tuple[int, int]] = {}
    for name, _, offset, length in wanted:
        low, high = spans.get(name, (offset, offset))
        spans[name] = min(low, offset), max(high, offset + length)
    for number, part in enumerate(parts):
        begin = part.begin
        for layout in part.layout:
            bytes_per_kind = layout.bytes_per_kind()
            first = begin
            for name, offset, length in layout.pieces:
                low, high = spans.get(name, (0, 0))
                if offset < high and offset + length > low:
                    for place, kind in enumerate(layout.kinds):
                        if (name, kind) in stored:
                            stored[name, kind].append((offset, length, first + place * bytes_per_kind, number))
                first += length * ELEMENT_BYTES
            begin += bytes_per_kind * len(layout.kinds)
    for pieces in stored.values():
        pieces.sort()
    return stored


def fill(store: ObjectStore, name: CheckpointName, manifest: Manifest, wanted: Iterable[Interval]) -> None:
    """Overwrite the values of `wanted` from a checkpoint, each block of a part read once, several requests at a time.

    Beside the values it takes memory for READ_THREADS requests. Raises CheckpointDamaged; some values may be written by
    then.
    """
    intervals = list(wanted)
    reads = plan_reads([(i.name, i.kind, i.offset, len(i.values)) for i in intervals], manifest.parts)

    def copy(request: Request) -> None:
        part = manifest.parts[request.part]
        block = PartReader(store, part_key(name, part), part).read(request.first, request.end)
        data, base = np.frombuffer(block, np.uint8), request.first * part.block_bytes
        for read in request.reads:
            low, high = max(read.begin, base), min(read.end, base + len(data))
            at = read.at * ELEMENT_BYTES + low - read.begin
            target = intervals[read.wanted].values.view(torch.uint8)[at : at + high - low]
            _copy_bytes(data[low - base : high - base], target)

    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="load") as pool:
        for _ in pool.map(copy, plan_requests(reads, manifest.parts)):
            pass  # an exception of any of them is raised here, and ends the rest


@dataclass
class Request:
    """Blocks [first, end) of part number `part`, and the reads that touch them."""

    part: int
    first: int
    end: int
    reads: list[Read]


def plan_requests(reads: Iterable[Read], parts: Sequence[PartInfo]) -> list[Request]:
    """What to ask the store for: whole blocks, those that follow each other together, none twice. `reads` are as
    `plan_reads` sorts them."""
    requests: list[Request] = []
    for read in reads:
        size = parts[read.part].block_bytes
        at_once = max(1, REQUEST_BYTES // size)
        first, end = read.begin // size, -(-read.end // size)
        last = requests[-1] if requests and requests[-1].part == read.part else None
        if last is not None and last.first <= first <= last.end:
            last.end = max(last.end, min(end, last.first + at_once))
            if first < last.end:
                last.reads.append(read)
            first = last.end
        requests += [
            Request(read.part, begin, min(begin + at_once, end), [read]) for begin in range(first, end, at_once)
        ]
    return requests


def _copy_bytes(data: np.ndarray, target: torch.Tensor) -> None:
    if target.is_cpu:
        np.copyto(target.numpy(), data)
    else:
        target.copy_(torch.from_numpy(data.copy()))


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
    store: ObjectStore,
    group: Group,
    wanted: Sequence[Interval],
    parameters: dict[str, int],
    order: OrderState,
    run: str | None = None,
    not_after: int | None = None,
) -> Restored | None:
    """Fill `wanted` from the newest checkpoint of `run` that verifies on all ranks; None if the run has none yet.

    `not_after`: look at checkpoints up to that position only. Raises UserError if the model or dataset is another one,
    or if there are checkpoints and none up to there verifies.
    """
    found = [(name.position, name.attempt) for name in committed(store)] if group.rank == 0 else []
    all_names = [CheckpointName(*pair) for pair in group.broadcast(found)]
    names = [name for name in all_names if not_after is None or name.position <= not_after]
    if all_names and not names:
        raise UserError(
            f"run store {store.uri}",
            f"a checkpoint of at most {not_after} images to go back to",
            f"none before {all_names[-1]}",
            "keep more of them (checkpoint.keep_newest); those that are there stand",
        )
    passed_over: list[str] = []
    for number, name in enumerate(names):
        manifest: Manifest | None = None
        try:
            manifest = read_manifest(store, name.manifest_key, run)
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
