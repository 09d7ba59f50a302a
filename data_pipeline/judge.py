"""Judge: the second pass, over metadata alone: which of the surviving records the dataset keeps, and in which order.

Always holds: the result depends on the set of scored records and the settings, not on the order of units, on workers or
on the number of tasks; a task holds its share of the rows, of rows with an equal key all, and the driver a few numbers
for each pair of tasks. Called by the corpus builder, once per build.

The steps, each a shuffle by the key that equal rows have in common (see spills.py), each over what the one before left:

    gather     verdicts of some units -> rows; thresholds on scorers' columns, evaluation sets
    caption    a caption that too many different pictures have
    source     equal source bytes             } with an equal caption, or whatever the caption
    pixels     equal pixels of the square     }
    hash       perceptual hashes within a distance: collapse equal ones, find pairs, take pictures in order, apply
    order      what is left, by a key of its id and the seed: the order of the dataset

Every row that is dropped here is in `judge/<first 16 digits of the dataset id>/dropped.parquet`, in the order of the
same key, with DROPPED_SCHEMA; the dataset's manifest holds its sha256.
"""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from data_pipeline import decontaminate, near
from data_pipeline.decontaminate import Evaluation
from data_pipeline.errors import UserError
from data_pipeline.executor import Executor, InlineExecutor
from data_pipeline.judge_rows import (
    DROPPED,
    KEPT,
    REASONS,
    ROW,
    JudgeSettings,
    Task,
    Verdicts,
    Work,
    drop,
    read_verdicts,
    rows_of,
    with_caption,
)
from data_pipeline.manifests import Document
from data_pipeline.score import verdicts_key
from data_pipeline.scorers import first_failed, read_scores
from data_pipeline.spills import Piece, Rows, Spill, by_section, gather, read_pieces, write_spill
from data_pipeline.storage import ObjectStore

TASK_ROWS = 2**21  # of a task: 190 MB of rows, and a few times that while they are sorted
BATCH_ROWS = 65536  # of dropped.parquet

DROPPED_SCHEMA = pa.schema(
    {
        "id": pa.uint64(),
        "picture": pa.uint64(),
        "unit": pa.int32(),  # its number in the dataset manifest's `units`
        "reason": pa.utf8(),
        "distance": pa.int8(),  # bits by which the perceptual hashes differ, where they decided
        "lost_to": pa.uint64(),  # `picture` of the record that stays, where there is one
    }
)


@dataclass(frozen=True)
class HandedOn:
    """What a task hands on: the rows that are left, by tasks of the next step, and the others, by those of `order`."""

    number: int
    rows: Spill
    dropped: Spill
    reasons: dict[str, int]


@dataclass(frozen=True)
class KeepList:
    """The rows of the dataset in their order, in pieces in a scratch folder; see `judge`."""

    work: Work
    pieces: tuple[Piece, ...]
    dropped_pieces: tuple[Piece, ...]
    dropped: dict[str, int] = field(default_factory=dict)  # rows by reason

    @property
    def store(self) -> ObjectStore:
        return self.work.store

    def __len__(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    def digest(self) -> str:
        """sha256 of the ids in order."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(read_pieces(self.store, [piece], KEPT)["id"].tobytes())
        return digest.hexdigest()

    def slices(self, rows: int) -> Iterator[Rows]:
        """KEPT [rows] after KEPT [rows], the last maybe shorter; in memory one piece at a time."""
        return _resliced((read_pieces(self.store, [piece], KEPT) for piece in self.pieces), KEPT, rows)

    def write_dropped(self, key: str) -> Document:
        """Store what was dropped as a parquet file of DROPPED_SCHEMA: its key, rows, bytes and sha256."""
        with tempfile.TemporaryFile() as file:
            with pa.parquet.ParquetWriter(file, DROPPED_SCHEMA) as writer:
                pieces = (read_pieces(self.store, [piece], DROPPED) for piece in self.dropped_pieces)
                for rows in _resliced(pieces, DROPPED, BATCH_ROWS):
                    writer.write_table(_dropped_table(rows, self.work.settings.reasons()))
            digest, size = hashlib.sha256(), file.tell()
            file.seek(0)

            def chunks() -> Iterator[bytes]:
                while chunk := file.read(2**20):
                    digest.update(chunk)
                    yield chunk

            self.store.put(key, chunks())
        rows_in_all = sum(piece.rows for piece in self.dropped_pieces)
        return {"key": key, "rows": rows_in_all, "bytes": size, "sha256": digest.hexdigest()}

    def remove_scratch(self) -> None:
        """Once nothing of this list is needed any more."""
        self.work.remove()


def judge(
    store: ObjectStore,
    prefixes: Sequence[str],
    scored: Sequence[Document],
    settings: JudgeSettings,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    evaluation: Evaluation | None = None,
    task_rows: int = TASK_ROWS,
) -> KeepList:
    """The keep list of units stored under `prefixes`, with their manifests. Raises UserError on an id collision.

    `evaluation`: the sets that `settings.evaluation` are the rules of. `task_rows`: about how many rows one task holds.
    `progress` hears of steps done and in all.
    """
    rows = sum(unit["out"] for unit in scored)
    # A name of its own: two builds may judge at the same time in one folder.
    work = Work(store, f"judge/scratch-{uuid.uuid4().hex}", settings, max(1, -(-rows // task_rows)))
    parts = [
        Verdicts(number, prefix, verdicts_key(prefix, part), about["rows"], about["sha256"])
        for number, (prefix, unit) in enumerate(zip(prefixes, scored, strict=True))
        for part, about in enumerate(unit["verdicts"])
    ]
    try:
        if evaluation is not None:
            data = evaluation.to_bytes()
            work = replace(work, evaluation_sha256=hashlib.sha256(data).hexdigest())
            store.put(work.evaluation_key, [data])
        return _Judging(work, executor or InlineExecutor(), progress, parts).run(_groups(parts, task_rows))
    except BaseException:
        work.remove()
        raise


def _groups(parts: Sequence[Verdicts], task_rows: int) -> list[list[Verdicts]]:
    """Parts together, in their order, while they have at most `task_rows` rows."""
    groups: list[list[Verdicts]] = [[]]
    rows = 0
    for part in parts:
        if groups[-1] and rows + part.rows > task_rows:
            groups.append([])
            rows = 0
        groups[-1].append(part)
        rows += part.rows
    return groups


class _Judging:
    """The driver's side: hands pieces from the tasks of one step to those of the next."""

    def __init__(
        self, work: Work, executor: Executor, progress: Callable[[int, int], None], parts: Sequence[Verdicts]
    ) -> None:
        self.work, self.executor, self.progress, self.parts = work, executor, progress, parts
        self.steps = work.settings.steps()
        self.dropped: list[Spill] = []
        self.reasons: Counter[str] = Counter()

    def run(self, groups: Sequence[Sequence[Verdicts]]) -> KeepList:
        self.progress(0, len(self.steps) + 1)
        gathering = [Task("gather", number, verdicts=group) for number, group in enumerate(groups)]
        left = self._judged(partial(_gather, self.work, self.steps[0]), gathering)
        for done, (step, following) in enumerate(pairwise(self.steps), start=1):
            self.progress(done, len(self.steps) + 1)
            pieces = by_section(left)
            losses = near.losses(self.work, self.executor, pieces, sum(map(len, left))) if step == "hash" else pieces
            tasks = (Task(step, number, *both) for number, both in enumerate(zip(pieces, losses, strict=True)))
            left = self._judged(partial(_judge_step, self.work, following), tasks)
        self.progress(len(self.steps), len(self.steps) + 1)
        keep = self._ordered(left)
        self.progress(len(self.steps) + 1, len(self.steps) + 1)
        return keep

    def _judged(self, function: Callable[[Task], HandedOn], tasks: Iterable[Task]) -> list[Spill]:
        """Run one step; what it leaves. What it drops is noted."""
        results = sorted(self.executor.map(function, tasks), key=lambda judged: judged.number)
        for judged in results:
            self.dropped.append(judged.dropped)
            self.reasons.update(judged.reasons)
        return [judged.rows for judged in results]

    def _ordered(self, left: Sequence[Spill]) -> KeepList:
        pairs = zip(by_section(left), by_section(self.dropped), strict=True)
        tasks = (Task("order", number, *pair) for number, pair in enumerate(pairs))
        ranges = sorted(self.executor.map(partial(_order, self.work), tasks), key=lambda ordered: ordered.number)
        for ordered in ranges:
            _refuse_collision(self.work.store, self.parts, ordered.collision)
        kept = tuple(ordered.kept for ordered in ranges if ordered.kept)
        dropped = tuple(ordered.dropped for ordered in ranges if ordered.dropped)
        return KeepList(self.work, kept, dropped, dict(self.reasons))


def _gather(work: Work, following: str, task: Task) -> HandedOn:
    evaluation = work.evaluation()
    found = [_gather_part(work, part, evaluation) for part in task.verdicts]
    rows, dropped = (gather([pair[place] for pair in found], dtype) for place, dtype in ((0, ROW), (1, DROPPED)))
    return _hand_on(work, task, following, rows, dropped)


def _gather_part(work: Work, part: Verdicts, evaluation: Evaluation | None) -> tuple[Rows, Rows]:
    """ROW of the part's rows that are within the thresholds and in no evaluation set, and DROPPED of the others."""
    settings = work.settings
    verdicts = read_verdicts(work.store, part)
    rows = rows_of(verdicts, part.unit)
    reason, distance = np.full(len(rows), -1, np.int64), np.full(len(rows), -1, np.int64)
    if evaluation is not None and len(rows):
        captions = verdicts["caption"].to_pylist()
        place, distance = evaluation.judge(rows["source"], rows["hash"], captions)
        names = np.array([REASONS.index(name) for name in decontaminate.REASONS])
        reason = np.where(place >= 0, names[place], -1)
    if settings.judged.columns and len(rows):
        failed = first_failed(read_scores(work.store, part.prefix, settings.scorers), settings.judged)[rows["row"]]
        reason, distance = np.where(failed >= 0, len(REASONS) + failed, reason), np.where(failed >= 0, -1, distance)
    lost = reason >= 0
    return rows[~lost], drop(rows[lost], reason[lost], 0, distance[lost])


def _judge_step(work: Work, following: str, task: Task) -> HandedOn:
    rows, settings = read_pieces(work.store, task.pieces, ROW), work.settings
    if task.step == "caption":
        lost, dropped = frequent(rows, settings.judged.max_caption_repeats or 0)
    elif task.step == "hash":
        lost, dropped = near.applied(rows, read_pieces(work.store, task.more, near.LOSS))
    else:
        lost, dropped = equal(rows, task.step, settings.exact == "picture")
    return _hand_on(work, task, following, rows[~lost], dropped)


def _hand_on(work: Work, task: Task, following: str, rows: Rows, dropped: Rows) -> HandedOn:
    """Store what one task leaves and drops."""
    name = f"{work.folder}/{task.step}-{task.number:05d}"
    left = write_spill(work.store, f"{name}.rows", rows, work.sections_of(following, rows), work.sections)
    lost = write_spill(work.store, f"{name}.dropped", dropped, work.sections_of("order", dropped), work.sections)
    codes, counts = np.unique(dropped["reason"], return_counts=True)
    names = work.settings.reasons()
    return HandedOn(task.number, left, lost, {names[code]: int(n) for code, n in zip(codes, counts, strict=True)})


def frequent(rows: Rows, most: int) -> tuple[NDArray[np.bool_], Rows]:
    """Rows whose caption more than `most` different pictures have: lost bool [n], and DROPPED rows.

    Copies of one picture count once, so a picture that was found often does not take its caption away.
    """
    order = np.lexsort((*rows["pixels"].T, *rows["caption"].T))
    first = _firsts(rows["caption"][order])
    picture_first = first | _firsts(rows["pixels"][order])
    group = np.cumsum(first) - 1
    pictures = np.bincount(group, picture_first) if len(rows) else np.empty(0)
    lost = np.zeros(len(rows), np.bool_)
    lost[order] = (pictures > most)[group]
    return lost, drop(rows[lost], "caption_frequent")


def equal(rows: Rows, field_: str, whatever_caption: bool) -> tuple[NDArray[np.bool_], Rows]:
    """Rows that lose to an equal one: lost bool [n], and DROPPED rows. `field_`: source or pixels.

    Rows of one picture never lose to each other for the picture; equal captions of it still do with the caption.
    """
    keys = rows[field_] if whatever_caption else with_caption(rows[field_], rows["caption"])
    order = np.lexsort((rows["id"], rows["picture"], rows["rank"], *keys.T))
    first = _firsts(keys[order])
    pictures = rows["picture"][order]
    leader = pictures[first][np.cumsum(first) - 1] if len(rows) else pictures
    lost_in_order = pictures != leader if whatever_caption else ~first
    lost = np.zeros(len(rows), np.bool_)
    lost[order] = lost_in_order
    return lost, drop(rows[order[lost_in_order]], "duplicate", leader[lost_in_order])


def _firsts(words: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Where a new value begins in sorted words [n, 2]."""
    first = np.ones(len(words), np.bool_)
    first[1:] = (words[1:] != words[:-1]).any(1)
    return first


@dataclass(frozen=True)
class Ordered:
    """One range of the dataset's order, of what is kept and of what is dropped. `collision`: two KEPT of equal id."""

    number: int
    kept: Piece | None
    dropped: Piece | None
    collision: Rows


def _order(work: Work, task: Task) -> Ordered:
    rows = read_pieces(work.store, task.pieces, ROW)[["id", "unit", "row"]].astype(KEPT)
    rows = rows[np.argsort(work.order_key(rows), kind="stable")]
    twice = np.flatnonzero(rows["id"][1:] == rows["id"][:-1])[:1]
    dropped = read_pieces(work.store, task.more, DROPPED)
    dropped = dropped[np.lexsort((dropped["unit"], work.order_key(dropped)))]
    name = f"{work.folder}/order-{task.number:05d}"
    [kept_piece], [dropped_piece] = (
        write_spill(work.store, f"{name}.{kind}", part, np.zeros(len(part), np.int64), 1).pieces()
        for kind, part in (("rows", rows), ("dropped", dropped))
    )
    return Ordered(task.number, kept_piece, dropped_piece, rows[[*twice, *twice + 1]])


def _refuse_collision(store: ObjectStore, parts: Sequence[Verdicts], rows: Rows) -> None:
    if len(rows):
        keys = [repr(_key_of(store, parts, row["unit"], row["row"])) for row in rows]
        found = f"id {rows['id'][0]:016x} for {' and '.join(keys)}"
        raise UserError("corpus", "one id per record", found, "rename one of the two in its input")


def _key_of(store: ObjectStore, parts: Sequence[Verdicts], unit: int, row: int) -> Any:
    """The key of a staged row of a unit."""
    tables = (read_verdicts(store, part, ("key", "row")) for part in parts if part.unit == unit)
    return next(
        found["key"][0].as_py() for table in tables if len(found := table.filter(pa.compute.equal(table["row"], row)))
    )


def _dropped_table(rows: Rows, names: Sequence[str]) -> pa.Table:
    reasons = np.array(names, object)[rows["reason"]]
    columns = {name: rows[name] for name in ("id", "picture", "unit")} | {"reason": reasons}
    columns |= {name: pa.array(rows[name], mask=rows[name] == no) for name, no in (("distance", -1), ("lost_to", 0))}
    return pa.table({name: pa.array(columns[name], DROPPED_SCHEMA.field(name).type) for name in DROPPED_SCHEMA.names})


def _resliced(pieces: Iterable[Rows], dtype: np.dtype[Any], size: int) -> Iterator[Rows]:
    """The same rows in slices of `size`."""
    waiting = np.empty(0, dtype)
    for piece in pieces:
        waiting = np.concatenate([waiting, piece])
        whole = len(waiting) // size * size
        yield from (waiting[start : start + size] for start in range(0, whole, size))
        waiting = waiting[whole:]
    if len(waiting):
        yield waiting
