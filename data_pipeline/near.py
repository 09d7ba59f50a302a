"""Near duplicates over tasks: the pairs of all near hashes, and which of them stay.

Always holds: what is lost does not depend on the number of tasks. Equal hashes are taken together first: of those the
best stays or all lose to the same picture, so one stands for all. Called by the judge pass, which says how rows reach
the tasks (judge_rows.Work).

    collapse   rows of a range of hashes -> one node for each hash, to the tasks of each of its first d + 1 blocks
    pairs      nodes of a range of values of one block -> edges from the better to the worse, by rank
    resolve    range after range of ranks: who stays; what they take away later goes to the later ranges
    applied    rows of a range of hashes and the losses of these hashes -> rows that are dropped

Resolving in the order of ranks needs one range at a time in memory, since everything that can take a picture away lies
in its own range or in earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup import Bands, choose_bands, kept_in_order, near_pairs
from data_pipeline.draws import mix64
from data_pipeline.executor import Executor
from data_pipeline.judge_rows import ROW, Task, Work, drop
from data_pipeline.spills import Piece, Rows, Spill, by_section, gather, read_pieces, section_of, write_spill

NODE = np.dtype([("hash", "<u8"), ("rank", "<u8"), ("picture", "<u8")])
# `early` is the better of the two; `late` is lost if early stays.
EDGE = np.dtype([("early", NODE), ("late", NODE), ("distance", "u1")])
LOSS = np.dtype([("hash", "<u8"), ("lost_to", "<u8"), ("distance", "u1")])

SAMPLED = 64  # ranks that each task names, from which ranges of about equal size are cut
SECTIONS_PER_RANGE = 8  # ranges of ranks are resolved one after the other, so there are fewer of them


def losses(work: Work, executor: Executor, sections: Sequence[list[Piece]], rows: int) -> list[list[Piece]]:
    """For each section of hashes the pieces of LOSS. `sections`: of each, the pieces of ROW; `rows`: in all."""
    bands = choose_bands(work.settings.near or 0, rows)
    collapsing = (Task("collapse", number, pieces) for number, pieces in enumerate(sections))
    collapsed = sorted(executor.map(partial(_collapse, work, bands), collapsing), key=lambda found: found[0])
    ranks = np.sort(np.concatenate([sample for _, _, sample in collapsed]))
    ranges = -(-work.sections // SECTIONS_PER_RANGE)
    borders = ranks[len(ranks) * np.arange(1, ranges) // ranges] if len(ranks) else ranks
    nodes = by_section([spill for _, spill, _ in collapsed])
    pairing = (Task("pairs", number, pieces) for number, pieces in enumerate(nodes))
    edges = sorted(executor.map(partial(_pairs, work, bands, borders), pairing), key=lambda found: found[0])
    return _resolve_all(work, executor, borders, [spill for _, spill in edges])


def _resolve_all(
    work: Work, executor: Executor, borders: NDArray[np.uint64], edges: Sequence[Spill]
) -> list[list[Piece]]:
    edge_pieces = by_section(edges)
    waiting: list[list[Piece]] = [[] for _ in edge_pieces]
    found: list[Spill] = []
    for number, pieces in enumerate(edge_pieces):
        task = Task("resolve", number, pieces, waiting[number])
        [(lost, later)] = executor.map(partial(_resolve, work, borders), [task])
        found.append(lost)
        for place, piece in zip(waiting, later.pieces(), strict=True):
            place += [piece] if piece else []
    return by_section(found)


def _collapse(work: Work, bands: Bands, task: Task) -> tuple[int, Spill, NDArray[np.uint64]]:
    """One node for each hash; and some of their ranks."""
    rows = read_pieces(work.store, task.pieces, ROW)
    nodes = best_of_equal_hashes(rows[rows["hash"] != 0])
    blocks = bands.distance + 1
    sections = [
        block * work.sections + section_of(mix64(nodes["hash"] & bands.mask(block)), work.sections)
        for block in range(blocks)
    ]
    key = f"{work.folder}/nodes-{task.number:05d}"
    spill = write_spill(work.store, key, np.tile(nodes, blocks), np.concatenate(sections), blocks * work.sections)
    return task.number, spill, np.sort(nodes["rank"])[:: max(1, len(nodes) // SAMPLED)]


def best_of_equal_hashes(rows: Rows) -> Rows:
    """NODE for each hash among `rows`, sorted by hash: the picture that comes first."""
    order = np.lexsort((rows["picture"], rows["rank"], rows["hash"]))
    _, first = np.unique(rows["hash"][order], return_index=True)
    return rows[order[first]][["hash", "rank", "picture"]].astype(NODE)


def _pairs(work: Work, bands: Bands, borders: NDArray[np.uint64], task: Task) -> tuple[int, Spill]:
    nodes = read_pieces(work.store, task.pieces, NODE)
    found = [edges_of(nodes, pairs) for pairs in near_pairs(nodes["hash"], bands, task.number // work.sections)]
    edges = gather(found, EDGE)
    # Processors order equal keys differently, and whoever runs this task has to store the same bytes.
    edges = edges[np.lexsort((edges["late"]["hash"], edges["early"]["hash"]))]
    ranges = np.searchsorted(borders, edges["early"]["rank"], "right")
    return task.number, write_spill(
        work.store, f"{work.folder}/edges-{task.number:05d}", edges, ranges, len(borders) + 1
    )


def edges_of(nodes: Rows, pairs: NDArray[np.int64]) -> Rows:
    """EDGE [m] of pairs [m, 3] of positions in NODE [n] and distance."""
    first, second = nodes[pairs[:, 0]], nodes[pairs[:, 1]]
    swap = (second["rank"] < first["rank"]) | (
        (second["rank"] == first["rank"]) & (second["picture"] < first["picture"])
    )
    edges = np.empty(len(pairs), EDGE)
    edges["early"], edges["late"] = np.where(swap, second, first), np.where(swap, first, second)
    edges["distance"] = pairs[:, 2]
    return edges


def _resolve(work: Work, borders: NDArray[np.uint64], task: Task) -> tuple[Spill, Spill]:
    """The losses of one range of ranks, by hash; and the edges from pictures that stay into later ranges, by rank."""

    def range_of(edges: Rows) -> NDArray[np.int64]:
        return np.searchsorted(borders, edges["late"]["rank"], "right")

    edges, decided = (read_pieces(work.store, pieces, EDGE) for pieces in (task.pieces, task.more))
    lost, taking = resolve(edges, decided, range_of(edges) == task.number)
    later = taking[range_of(taking) > task.number]
    name, sections = f"{work.folder}/range-{task.number:05d}", section_of(mix64(lost["hash"]), work.sections)
    return (
        write_spill(work.store, f"{name}.lost", lost, sections, work.sections),
        write_spill(work.store, f"{name}.later", later, range_of(later), len(borders) + 1),
    )


def resolve(edges: Rows, decided: Rows, inside: NDArray[np.bool_]) -> tuple[Rows, Rows]:
    """LOSS of the nodes of one range, and those of its `edges` whose early end stays.

    `edges` EDGE [m] start in the range, those `inside` bool [m] end in it too; `decided` come from pictures of earlier
    ranges that stay.
    """
    nodes = np.concatenate([edges["early"], edges["late"][inside]])
    nodes = nodes[np.lexsort((nodes["picture"], nodes["rank"]))]
    hashes, position = np.unique(nodes["hash"], return_index=True)
    in_order = np.argsort(np.argsort(position))  # of each hash: its place among the nodes
    dropped = np.zeros(len(hashes), np.bool_)
    dropped[in_order[np.isin(hashes, decided["late"]["hash"])]] = True
    early = in_order[np.searchsorted(hashes, edges["early"]["hash"])]
    late = in_order[np.searchsorted(hashes, edges["late"]["hash"][inside])]
    kept_in_order(len(hashes), early[inside], late, dropped)
    stays = ~dropped[early]
    takers = np.concatenate([decided, edges[stays & inside]])
    best_first = np.lexsort((takers["early"]["picture"], takers["early"]["rank"], takers["late"]["hash"]))
    lost_hashes, first = np.unique(takers["late"]["hash"][best_first], return_index=True)
    best = takers[best_first[first]]
    lost = np.empty(len(best), LOSS)
    lost["hash"], lost["lost_to"], lost["distance"] = lost_hashes, best["early"]["picture"], best["distance"]
    return lost, edges[stays]


def applied(rows: Rows, losses_: Rows) -> tuple[NDArray[np.bool_], Rows]:
    """Rows of ROW [n] that are dropped for another picture: bool [n], and DROPPED rows. `losses_`: LOSS of hashes."""
    lost = np.zeros(len(rows), np.bool_)
    hashed = np.flatnonzero(rows["hash"] != 0)
    best = best_of_equal_hashes(rows[hashed])
    # What each hash's pictures lose to: the best among them, or what that one lost to itself.
    taker, distance = best["picture"].copy(), np.zeros(len(best), np.int64)
    place = np.searchsorted(best["hash"], losses_["hash"])
    taker[place], distance[place] = losses_["lost_to"], losses_["distance"]
    group = np.searchsorted(best["hash"], rows["hash"][hashed])
    goes = rows["picture"][hashed] != taker[group]
    lost[hashed[goes]] = True
    return lost, drop(rows[hashed[goes]], "near_duplicate", taker[group][goes], distance[group][goes])
