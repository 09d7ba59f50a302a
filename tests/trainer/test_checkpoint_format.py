"""Part files, manifests and load plans."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.storage import LocalStore
from trainer.checkpoint import parts
from trainer.checkpoint.load import fill, plan_reads
from trainer.checkpoint.manifest import CheckpointName, Manifest, committed, read_manifest, split_checkpoint_uri
from trainer.checkpoint.parts import CheckpointDamaged, PartReader, encode_part
from trainer.engine.engine import Interval

SIZES = {"net/a": 7, "net/b": 1, "net/c": 30}


def state(seed: int = 0) -> dict[tuple[str, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kinds = ("master", "ema")
    return {(n, kind): torch.randn(size, generator=generator) for n, size in SIZES.items() for kind in kinds}


def shares(world: int) -> list[list[tuple[str, int, int]]]:
    """(parameter, begin, end) of each rank's contiguous share of the flat parameters."""
    total, found = sum(SIZES.values()), []
    for rank in range(world):
        low, high, at, mine = total * rank // world, total * (rank + 1) // world, 0, []
        for name, size in SIZES.items():
            begin, end = max(low, at), min(high, at + size)
            if begin < end:
                mine.append((name, begin - at, end - at))
            at += size
        found.append(mine)
    return found


def intervals(whole: dict[tuple[str, str], torch.Tensor], share: list[tuple[str, int, int]]) -> list[Interval]:
    return [Interval(n, kind, b, whole[n, kind][b:e].clone()) for kind in ("master", "ema") for n, b, e in share]  # type: ignore[arg-type]


def test_any_safetensors_reader_opens_a_part() -> None:
    info, chunks = encode_part("part", intervals(state(), shares(1)[0]))
    data = b"".join(chunks)
    assert len(data) == info.bytes
    loaded = safetensors.torch.load(data)
    torch.testing.assert_close(loaded["ema/net/c@0"], state()["net/c", "ema"], rtol=0, atol=0)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(4, 400))
def test_what_any_number_of_ranks_saved_any_other_number_loads(saved_by: int, loaded_by: int, block: int) -> None:
    whole, memory = state(), MemoryStore()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "BLOCK_BYTES", block)
        infos = []
        for rank, share in enumerate(shares(saved_by)):
            info, chunks = encode_part(f"part-{rank}", intervals(whole, share))
            memory.objects[CheckpointName(1, 1).folder + info.file] = b"".join(chunks)
            infos.append(info)
        manifest = make_manifest(tuple(infos))
        for share in shares(loaded_by):
            wanted = intervals(state(seed=1), share)
            fill(memory, CheckpointName(1, 1), manifest, wanted)  # type: ignore[arg-type]
            for got, expected in zip(wanted, intervals(whole, share), strict=True):
                torch.testing.assert_close(got.values, expected.values, rtol=0, atol=0)


def test_reads_go_through_each_part_once_and_in_order() -> None:
    infos = tuple(encode_part(f"p{rank}", intervals(state(), share))[0] for rank, share in enumerate(shares(3)))
    wanted = [(n, kind, 0, size) for kind in ("ema", "master") for n, size in SIZES.items()]
    reads = plan_reads(wanted, infos)
    assert [(read.part, read.begin) for read in reads] == sorted((read.part, read.begin) for read in reads)
    assert sum(read.end - read.begin for read in reads) == 4 * 2 * sum(SIZES.values())


def test_a_checkpoint_that_lacks_elements_is_damaged_not_zero() -> None:
    infos = tuple(encode_part(f"p{rank}", intervals(state(), share))[0] for rank, share in enumerate(shares(3)))
    with pytest.raises(CheckpointDamaged, match=r"master of net/c: expected elements up to 30"):
        plan_reads([("net/c", "master", 0, 30)], infos[:2])


@pytest.mark.parametrize("world", [1, 3])
def test_one_flipped_bit_anywhere_in_a_part_is_found(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "BLOCK_BYTES", 64)
    for rank, share in enumerate(shares(world)):
        info, chunks = encode_part("part", intervals(state(), share))
        data = b"".join(chunks)
        for bit in range(8 * len(data)):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            reader = PartReader(MemoryStore({"part": bytes(damaged)}), "part", info)  # type: ignore[arg-type]
            with pytest.raises(CheckpointDamaged, match="crc32"):
                list(reader.blocks())
        assert rank < world


@pytest.mark.parametrize("length", [0, 1, 100, -1, -65])
def test_a_part_of_another_length_is_found(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "BLOCK_BYTES", 64)
    info, chunks = encode_part("part", intervals(state(), shares(1)[0]))
    data = b"".join(chunks)
    other = data[:length] if length <= 0 else data + b"\0" * length
    with pytest.raises(CheckpointDamaged):
        list(PartReader(MemoryStore({"part": other}), "part", info).blocks())  # type: ignore[arg-type]


def test_a_byte_after_a_part_that_fills_its_last_block_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, chunks = encode_part("part", intervals(state(), shares(1)[0]))
    monkeypatch.setattr(parts, "BLOCK_BYTES", whole.bytes)
    info, chunks = encode_part("part", intervals(state(), shares(1)[0]))
    assert len(info.crc32) == 1
    with pytest.raises(CheckpointDamaged, match=f"expected {info.bytes} bytes, found more"):
        list(PartReader(MemoryStore({"part": b"".join(chunks) + b"!"}), "part", info).blocks())  # type: ignore[arg-type]


def test_a_part_that_the_disk_cannot_read_is_damage_and_not_the_end() -> None:
    class BadSector(MemoryStore):
        def get_range(self, key: str, start: int, length: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error", key)

    info, _ = encode_part("part", intervals(state(), shares(1)[0]))
    with pytest.raises(CheckpointDamaged, match="block 0: expected bytes that can be read"):
        PartReader(BadSector({}), "part", info).read(0, 1)  # type: ignore[arg-type]


def test_one_flipped_bit_anywhere_in_a_manifest_is_found(tmp_path: Path) -> None:
    store, key = LocalStore(tmp_path), CheckpointName(16, 1).manifest_key
    info, _ = encode_part("part-00000-of-00001.safetensors", intervals(state(), shares(1)[0]))
    data = make_manifest((info,)).encode()
    store.put(key, [data])
    assert read_manifest(store, key).parts == (info,)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / key).write_bytes(damaged)
        with pytest.raises(CheckpointDamaged, match=r"manifest\.json"):
            read_manifest(store, key)


def test_a_manifest_of_another_version_is_refused_not_damaged(tmp_path: Path) -> None:
    store, key = LocalStore(tmp_path), CheckpointName(16, 1).manifest_key
    store.put(key, [make_manifest((), format="glidepath-checkpoint-9").encode()])
    with pytest.raises(UserError, match=r"expected format .*-1 or .*-2 or .*-3, found glidepath-checkpoint-9"):
        read_manifest(store, key)


def test_the_newest_checkpoint_has_the_highest_position_then_the_highest_attempt(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for name in (CheckpointName(16, 10), CheckpointName(32, 2), CheckpointName(32, 1), CheckpointName(16, 9)):
        store.put(name.manifest_key, [b""])
    store.put(CheckpointName(64, 3).folder + "part-00000-of-00001.safetensors", [b""])
    assert [(name.position, name.attempt) for name in committed(store)] == [(32, 2), (32, 1), (16, 10), (16, 9)]


def test_a_checkpoint_uri_names_its_store_and_its_folder() -> None:
    name = CheckpointName(1600, 12)
    assert split_checkpoint_uri(f"/runs/a/{name.folder}") == ("/runs/a", name)
    with pytest.raises(UserError, match="images-<position>"):
        split_checkpoint_uri("/runs/a/checkpoints/latest")


class MemoryStore:
    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        self.objects = objects or {}

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self.objects[key][start : start + length]


def make_manifest(infos: tuple[Any, ...], **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "run": "test",
        "attempt": 1,
        "position": 16,
        "world_size": max(len(infos), 1),
        "zero_stage": 0,
        "parameters": SIZES,
        "parts": infos,
        "optimizer_steps": {"net": 1},
        "guard": {},
        "order": {"dataset_id": "0" * 64},
        "config": {"lr": float(np.float64(1e-4))},
        "code_version": "0",
        "committed_at": "2026-01-01T00:00:00+00:00",
    }
    return Manifest(**{**values, **changes})
