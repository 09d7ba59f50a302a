"""Save and load plans of the 3.5B model's whole state, for 1 to 1,024 ranks: nothing is missing, nothing comes twice,
and no rank has much more to do than another. The parameters have names and sizes, and no values."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_pipeline.config import find_config, read_values
from trainer.checkpoint.load import plan_reads, plan_requests
from trainer.checkpoint.parts import BLOCK_BYTES, ELEMENT_BYTES, Layout, PartInfo, plan_part
from trainer.engine.engine import KINDS, Interval
from trainer.engine.group import Group
from trainer.engine.replicated import ReplicatedEngine
from trainer.recipes import make_recipe, parse_train_config

sys.path.insert(0, str(Path(__file__).parent))
from zero_layouts import pieces_of

PRESET, PARAMETERS = "glide-base-3.5b", 3_554_414_086
CONFIG = parse_train_config(read_values(find_config("train", PRESET), ()), PRESET)


@cache
def module() -> nn.Module:
    with torch.device("meta"):
        return make_recipe(CONFIG).parts()["base"].build()


@cache
def sizes() -> dict[str, int]:
    return {f"base/{name}": parameter.numel() for name, parameter in module().named_parameters()}


@cache
def saved_by(stage: int, world_size: int) -> tuple[PartInfo, ...]:
    """Every rank's part as its manifest would describe it, without digests."""
    infos = []
    for rank in range(world_size):
        pieces = pieces_of(stage, sizes(), rank, world_size)
        if rank < 2 or stage < 3:  # later headers are as long, and planning 4,096,000 intervals takes a minute
            # Only their length is asked for.
            intervals = [Interval(n, kind, at, range(length)) for kind in KINDS for n, at, length in pieces]  # type: ignore[arg-type]
            head, layout = plan_part(intervals)
        else:
            layout = (Layout(kinds=KINDS, pieces=tuple(pieces)),)
        size = len(head) + len(KINDS) * layout[0].bytes_per_kind()
        infos.append(
            PartInfo(
                file=f"p{rank}",
                bytes=size,
                digest="",
                block_bytes=BLOCK_BYTES,
                crc32=(),
                begin=len(head),
                layout=layout,
            )
        )
    return tuple(infos)


def assert_exactly_once(pieces: Iterable[tuple[str, int, int]]) -> None:
    """The pieces (parameter, offset, length) are all of the parameters and do not overlap."""
    reached = dict.fromkeys(sizes(), 0)
    for name, offset, length in sorted(pieces):
        assert offset == reached[name], f"{name}: elements from {reached[name]} to {offset} are missing or come twice"
        reached[name] += length
    assert reached == sizes()


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("world_size", [1, 8, 64, 1024])
def test_ranks_save_every_element_of_every_kind_once_in_equal_shares(stage: int, world_size: int) -> None:
    infos = saved_by(stage, world_size)
    assert sum(sizes().values()) == PARAMETERS
    for info in infos:
        (layout,) = info.layout
        assert layout.kinds == KINDS
    assert_exactly_once(piece for info in infos for piece in info.layout[0].pieces)
    mean = len(KINDS) * ELEMENT_BYTES * PARAMETERS / world_size
    balance = max(info.bytes for info in infos) / mean
    manifest_mb = sum(len(info.model_dump_json()) for info in infos) / 1e6
    print(f"stage {stage}, {world_size} ranks: largest part / mean {balance:.5f}, manifest {manifest_mb:.1f} MB")
    # Each part has its header: at 1,024 ranks of stage 3 it names 3,788 intervals of 14 kB.
    assert balance < 1.01


class UnknowingAdam:
    """torch's has no fused update for tensors without values, and none is made here."""

    def __init__(self, parameters: list[nn.Parameter], **settings: Any) -> None:
        self.state: dict[nn.Parameter, Any] = {}


@pytest.mark.parametrize("world_size", [1, 8, 64, 1024])
def test_ranks_of_the_replicated_engine_save_every_element_once_and_load_all_but_the_others_ema(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", UnknowingAdam)
    written: list[tuple[str, int, int]] = []
    largest = 0
    for rank in range(world_size) if world_size < 64 else (0, 1, world_size // 2, world_size - 1):
        engine = ReplicatedEngine("base", module(), CONFIG, Group(rank, world_size, "meta"))
        view = list(engine.shard_view())
        mine = [(i.name, i.offset, len(i.values)) for i in view if i.kind == "master"]
        for kind in KINDS:
            assert [(i.name, i.offset, len(i.values)) for i in view if i.kind == kind] == mine
        written += mine
        largest = max(largest, sum(length for _, _, length in mine))
        wanted = {kind: [i for i in engine.wanted() if i.kind == kind] for kind in KINDS}
        assert [(i.name, i.offset, len(i.values)) for i in wanted["ema"]] == mine
        assert {i.name: len(i.values) for i in wanted["master"]} == sizes()
    if world_size < 64:
        assert_exactly_once(written)
    assert largest - PARAMETERS / world_size <= 1


@pytest.mark.parametrize(
    ("stage", "saved_by_ranks", "to_stage", "loaded_by_ranks"),
    [
        (1, 1, 1, 1024),
        (1, 8, 1, 1),
        (1, 64, 1, 8),
        (1, 64, 1, 1024),
        (1, 1024, 1, 64),
        (1, 1024, 1, 1024),
        (3, 8, 1, 64),
        (3, 64, 3, 8),
        (3, 64, 3, 1024),
        (1, 64, 3, 64),
        (3, 1024, 3, 1024),
        (3, 1024, 1, 64),
    ],
)
def test_any_rank_reads_just_what_it_wants_once_whoever_saved_it(
    stage: int, saved_by_ranks: int, to_stage: int, loaded_by_ranks: int
) -> None:
    infos = saved_by(stage, saved_by_ranks)
    worst = 0.0
    for rank in sorted(
        {loaded_by_ranks // 3, loaded_by_ranks - 1} if saved_by_ranks < 1024 else {loaded_by_ranks // 3}
    ):
        pieces = pieces_of(to_stage, sizes(), rank, loaded_by_ranks)
        wanted = [(name, kind, offset, length) for kind in KINDS for name, offset, length in pieces]
        reads = plan_reads(wanted, infos)
        reached = [0] * len(wanted)
        for read in sorted(reads, key=lambda read: (read.wanted, read.at)):
            assert read.at == reached[read.wanted]
            reached[read.wanted] += (read.end - read.begin) // ELEMENT_BYTES
        assert reached == [length for _, _, _, length in wanted]
        asked = 0
        for request, after in pairwise([*plan_requests(reads, infos), None]):
            assert request is not None and request.first < request.end
            assert after is None or (request.part, request.end) <= (after.part, after.first), "a block read twice"
            asked += min(request.end * BLOCK_BYTES, infos[request.part].bytes) - request.first * BLOCK_BYTES
        worst = max(worst, asked / (ELEMENT_BYTES * sum(reached)))
    print(f"{stage} x {saved_by_ranks} -> {to_stage} x {loaded_by_ranks}: {worst:.2f} bytes read for each wanted")
    # A rank that wants a slice of each parameter of others that have each whole, or the reverse, reads whole blocks.
    assert worst < (1.2 if stage == to_stage == 1 else 20)
