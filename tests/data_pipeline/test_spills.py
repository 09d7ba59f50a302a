"""Rows between tasks: what comes back is what was sent, or an error that names the object."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.arrow_files import ShardDamaged
from data_pipeline.spills import by_section, gather, read_pieces, section_of, write_spill
from data_pipeline.storage import LocalStore

PAIR = np.dtype([("id", "<u8"), ("place", "<u4")])


def test_each_row_comes_back_once_in_its_section(tmp_path: Path) -> None:
    store, generator = LocalStore(tmp_path), np.random.default_rng(0)
    rows = np.zeros(1000, PAIR)
    rows["id"], rows["place"] = generator.integers(0, 2**64, 1000, dtype=np.uint64), np.arange(1000)
    halves = [rows[:300], rows[300:]]
    spills = [
        write_spill(store, f"half-{number}", half, section_of(half["id"], 7), 7) for number, half in enumerate(halves)
    ]
    nothing = write_spill(store, "nothing", rows[:0], np.empty(0, np.int64), 7)
    assert len(nothing) == 0 and [info.key for info in store.list()] == ["half-0", "half-1"]
    sections = [read_pieces(store, pieces, PAIR) for pieces in by_section([*spills, nothing])]
    assert len(sections) == 7
    for number, section in enumerate(sections):
        assert (section["id"] * (7 / 2**64) // 1 == number).all()
        assert (np.diff(section["place"].astype(int)) > 0).all()  # in the order in which they were given
    np.testing.assert_array_equal(np.sort(gather(sections, PAIR), order="place"), rows)


def test_a_changed_bit_or_a_missing_object_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    rows = np.zeros(10, PAIR)
    [piece] = write_spill(store, "rows", rows, np.zeros(10, np.int64), 1).pieces()
    assert piece is not None
    data = bytearray(store.get("rows"))
    data[50] ^= 4
    store.put("rows", [bytes(data)])
    with pytest.raises(ShardDamaged, match=r"rows row 0: expected crc32 [0-9a-f]{8}, found"):
        read_pieces(store, [piece], PAIR)
    store.delete("rows")
    with pytest.raises(ShardDamaged, match="expected 120 bytes, found nothing"):
        read_pieces(store, [piece], PAIR)
