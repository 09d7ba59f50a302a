"""Which elements a rank holds under ZeRO, as DeepSpeed deals them: (parameter, offset, length). Pure, so that plans for
any number of ranks are made without it; zero_ranks.py compares it with the real engine."""

from __future__ import annotations

from collections.abc import Mapping

Pieces = list[tuple[str, int, int]]

ALIGNMENT = 2  # elements: the flat group is padded to a multiple of this times the ranks


def pieces_of(stage: int, sizes: Mapping[str, int], rank: int, world_size: int) -> Pieces:
    """Stages 1 and 2: one share of all parameters laid end to end. Stage 3: one share of each parameter."""
    if stage < 3:
        unit = ALIGNMENT * world_size
        share = -(-sum(sizes.values()) // unit) * ALIGNMENT
        return flat_share(sizes, rank * share, (rank + 1) * share)
    pieces = []
    for name, size in sizes.items():
        share = -(-size // world_size)
        if (length := min(share, size - rank * share)) > 0:
            pieces.append((name, rank * share, length))
    return pieces


def flat_share(sizes: Mapping[str, int], low: int, high: int) -> Pieces:
    """Elements [low, high) of the parameters laid end to end."""
    pieces, at = [], 0
    for name, size in sizes.items():
        begin, end = max(low, at), min(high, at + size)
        if begin < end:
            pieces.append((name, begin - at, end - begin))
        at += size
    return pieces
