"""The judge's result is that of judging the records one by one, however many tasks share the work."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import near
from data_pipeline.dedup import Bands
from data_pipeline.errors import UserError
from data_pipeline.filters import Judged
from data_pipeline.judge import KeepList, judge
from data_pipeline.judge_rows import JudgeSettings, Task, Work
from data_pipeline.score import VERDICT_SCHEMA, verdicts_key
from data_pipeline.spills import write_spill
from data_pipeline.storage import LocalStore

Verdict = dict[str, Any]


@st.composite
def corpora(draw: st.DrawFn) -> list[list[Verdict]]:
    """Units of verdicts with few different values, so that pictures meet in every way."""
    hashes = draw(st.lists(st.integers(1, 2**64 - 1), min_size=1, max_size=3))
    units: list[list[Verdict]] = []
    for unit in range(draw(st.integers(1, 4))):
        verdicts: list[Verdict] = []
        for picture in range(draw(st.integers(0, 7))):
            number = int.from_bytes(hashlib.sha256(b"%d %d" % (unit, picture)).digest()[:8], "big")
            flips = draw(st.lists(st.integers(0, 63), max_size=4, unique=True))
            hash_ = draw(st.sampled_from([0, *hashes, *hashes, *hashes])) ^ sum(1 << bit for bit in flips)
            facts = {
                "picture": number,
                "width": draw(st.integers(1, 3)),
                "height": 2,
                "file_bytes": draw(st.integers(1, 2)),
                "image_digest": hashlib.sha256(b"%d" % draw(st.integers(0, 12))).digest(),
                "pixels_digest": hashlib.sha256(b"%d" % draw(st.integers(0, 12))).digest(),
                "perceptual_hash": hash_,
                "key": f"{picture}",
            }
            for index in range(draw(st.integers(1, 2))):
                caption = draw(st.sampled_from(["a cat", "A cat", "a dog", "the sea"]))
                row = None if draw(st.integers(0, 5)) == 0 else sum(v["row"] is not None for v in verdicts)
                verdicts.append(facts | {"id": number + index, "caption": caption, "row": row})
        units.append(verdicts)
    return units


PART_ROWS = 6  # of a unit's verdicts
SETTINGS = st.builds(
    JudgeSettings,
    seed=st.integers(0, 3),
    exact=st.sampled_from(["pair", "picture", "none"]),
    near=st.sampled_from([None, 0, 1, 3, 4]),
    judged=st.builds(Judged, st.sampled_from([None, 1, 3])),
)


class Folder(LocalStore):
    """Nobody pulls the plug of a property test, so nothing waits for the disk."""

    def _sync(self, path: Path) -> None:
        pass


@contextmanager
def judged(
    units: Sequence[Sequence[Verdict]],
    wanted: JudgeSettings,
    task_rows: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[KeepList]:
    with tempfile.TemporaryDirectory() as folder:
        store, scored = Folder(Path(folder)), []
        for number, verdicts in enumerate(units):
            parts = []
            for start in range(0, len(verdicts), PART_ROWS):
                part, sink = list(verdicts[start : start + PART_ROWS]), io.BytesIO()
                pa.parquet.write_table(pa.Table.from_pylist(part, VERDICT_SCHEMA), sink, row_group_size=4)
                store.put(verdicts_key(f"{number}/", len(parts)), [sink.getvalue()])
                parts.append({"rows": len(part), "sha256": hashlib.sha256(sink.getvalue()).hexdigest()})
            scored.append({"out": sum(verdict["row"] is not None for verdict in verdicts), "verdicts": parts})
        prefixes = [f"{number}/" for number in range(len(units))]
        yield judge(store, prefixes, scored, wanted, progress=progress, task_rows=task_rows)


def one_by_one(units: Sequence[Sequence[Verdict]], wanted: JudgeSettings) -> tuple[set[int], dict[int, tuple]]:
    """Ids that stay; (reason, lost to, distance) of each that goes."""
    rows = [verdict for unit in units for verdict in unit if verdict["row"] is not None]
    gone: dict[int, tuple] = {}

    def left() -> list[Verdict]:
        open_ = [row for row in rows if row["id"] not in gone]
        side = {row["id"]: min(row["width"], row["height"]) for row in rows}
        return sorted(open_, key=lambda row: (-side[row["id"]], -row["file_bytes"], row["picture"], row["id"]))

    if wanted.judged.max_caption_repeats is not None:
        pairs = {(row["caption"].lower(), row["pixels_digest"]) for row in rows}
        times = Counter(caption for caption, _ in pairs)
        frequent = [row for row in rows if times[row["caption"].lower()] > wanted.judged.max_caption_repeats]
        gone |= {row["id"]: ("caption_frequent", None, None) for row in frequent}
    for column in ("image_digest", "pixels_digest") if wanted.exact != "none" else ():
        first: dict[Any, int] = {}
        for row in left():
            key = row[column] if wanted.exact == "picture" else (row[column], row["caption"].lower())
            winner = first.setdefault(key, row["id"] if wanted.exact == "pair" else row["picture"])
            if winner != (row["id"] if wanted.exact == "pair" else row["picture"]):
                gone[row["id"]] = (
                    "duplicate",
                    next(r["picture"] for r in rows if winner in (r["id"], r["picture"])),
                    None,
                )
    if wanted.near is not None:
        stay: dict[int, int] = {}
        for row in left():
            if row["perceptual_hash"] == 0 or row["picture"] in stay:
                continue
            near = ((p, (h ^ row["perceptual_hash"]).bit_count()) for p, h in stay.items())
            taker = next((pair for pair in near if pair[1] <= wanted.near), None)
            if taker:
                gone[row["id"]] = ("near_duplicate", *taker)
            else:
                stay[row["picture"]] = row["perceptual_hash"]
    return {row["id"] for row in rows} - set(gone), gone


def outcome(keep: KeepList) -> tuple[list[tuple[int, ...]], bytes, dict[str, int]]:
    """Everything that the judge says."""
    document = keep.write_dropped("dropped.parquet")
    data = keep.store.get(document["key"])
    assert document["sha256"] == hashlib.sha256(data).hexdigest()
    return [row.item() for rows in keep.slices(3) for row in rows], data, keep.dropped


@given(corpora(), SETTINGS, st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_any_number_of_tasks_judges_as_one_by_one(
    units: list[list[Verdict]], wanted: JudgeSettings, task_rows: int
) -> None:
    with judged(units, wanted, 10**6) as keep:
        whole = outcome(keep)
        assert len(keep) == len(whole[0])
    with judged(units, wanted, task_rows) as keep:
        assert outcome(keep) == whole
    kept, data, counts = whole
    stay, gone = one_by_one(units, wanted)
    assert {row[0] for row in kept} == stay
    table = pa.parquet.read_table(io.BytesIO(data)).to_pylist()
    assert {row["id"]: (row["reason"], row["lost_to"], row["distance"]) for row in table} == gone
    assert counts == Counter(reason for reason, _, _ in gone.values())
    places = {(number, verdict["row"]): verdict["id"] for number, unit in enumerate(units) for verdict in unit}
    assert all(places[unit, row] == id_ for id_, unit, row in kept)
    pictures = [{verdict["id"]: verdict["picture"] for verdict in unit} for unit in units]
    assert all(pictures[row["unit"]][row["id"]] == row["picture"] for row in table)


def plain_unit(number: int) -> list[Verdict]:
    """Five rows that nothing drops."""
    ids = [int.from_bytes(hashlib.sha256(b"%d %d" % (number, row)).digest()[:8], "big") for row in range(5)]
    facts = {"width": 1, "height": 1, "file_bytes": 1, "perceptual_hash": 0}
    return [
        facts
        | {"id": id_, "picture": id_, "row": row, "caption": "x", "key": f"key {row} of {number}"}
        | {name: hashlib.sha256(b"%d" % id_).digest() for name in ("image_digest", "pixels_digest")}
        for row, id_ in enumerate(ids)
    ]


def test_the_order_does_not_depend_on_the_order_of_the_units() -> None:
    units = [plain_unit(number) for number in range(4)]
    with judged(units, JudgeSettings(), 3) as keep, judged(units[::-1], JudgeSettings(), 7) as reversed_:
        assert keep.digest() == reversed_.digest()


def test_an_id_that_two_records_have_is_refused_by_their_names() -> None:
    units = [plain_unit(number) for number in range(3)]
    units[2][1]["id"] = units[0][4]["id"]
    found = f"id {units[0][4]['id']:016x} for 'key 4 of 0' and 'key 1 of 2'"
    with pytest.raises(UserError, match=f"one id per record, found {found}"), judged(units, JudgeSettings(), 3):
        pass


def test_the_last_step_is_heard_of_too() -> None:
    heard: list[tuple[int, int]] = []
    with judged([plain_unit(0)], JudgeSettings(near=4), 3, lambda done, total: heard.append((done, total))):
        assert heard == [(done, 5) for done in range(6)]


def test_pairs_are_stored_alike_in_whatever_order_a_processor_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, nodes = Folder(tmp_path), np.zeros(40, near.NODE)
    nodes["hash"] = np.arange(40, dtype=np.uint64) << np.uint64(58)  # equal in all blocks but the last
    nodes["rank"] = np.arange(40, dtype=np.uint64)[::-1]
    [piece] = write_spill(store, "nodes", nodes, np.zeros(40, np.int64), 1).pieces()
    assert piece is not None

    def stored() -> bytes:
        work = Work(store, "scratch", JudgeSettings(near=4), 1)
        _, spill = near._pairs(work, Bands(4, 1), np.array([7], np.uint64), Task("pairs", 0, [piece]))
        assert len(spill) > 40
        return store.get(spill.key)

    once, find = stored(), near.near_pairs
    monkeypatch.setattr(near, "near_pairs", lambda *given: [found[::-1] for found in find(*given)][::-1])
    assert stored() == once
