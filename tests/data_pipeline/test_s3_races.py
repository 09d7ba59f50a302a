"""Races on conditional writes, against a server whose conditional writes are atomic: exactly one wins."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from cluster.drills.crash_points import SIZE, WORLD, identity, order_at, restored_position
from data_pipeline.storage import open_store
from trainer.checkpoint.attempts import newest_attempt, take_attempt
from trainer.checkpoint.manifest import CheckpointName, committed, read_manifest
from trainer.checkpoint.save import SaveFailed, commit, upload_share
from trainer.engine.engine import KINDS, Interval

WRITERS, ROUNDS = 8, 3


def at_once(task: Callable[[int], object]) -> list[object]:
    """What each of WRITERS threads returns or raises."""
    barrier = threading.Barrier(WRITERS)

    def begin(number: int) -> object:
        barrier.wait()
        try:
            return task(number)
        except SaveFailed as error:
            return error

    with ThreadPoolExecutor(WRITERS) as pool:
        return list(pool.map(begin, range(WRITERS)))


def test_drivers_that_start_at_once_take_different_attempts(moto_uri: str) -> None:
    taken = at_once(lambda number: take_attempt(open_store(moto_uri), {"config": {"driver": number}}))
    assert sorted(map(int, taken)) == list(range(1, WRITERS + 1))  # type: ignore[call-overload]
    assert newest_attempt(open_store(moto_uri)) == WRITERS


def test_of_writers_that_commit_one_checkpoint_at_once_one_succeeds_and_the_others_say_whose_it_is(
    moto_uri: str,
) -> None:
    store = open_store(moto_uri)
    attempt = take_attempt(store, {})
    for position in range(16, 16 * (ROUNDS + 1), 16):
        for rank in range(WORLD):
            begin, end = SIZE * rank // WORLD, SIZE * (rank + 1) // WORLD
            values = torch.full((end - begin,), float(position))
            upload_share(store, identity(attempt, rank), position, [Interval("net/w", k, begin, values) for k in KINDS])
        state = {"guard": {}, "order": dataclasses.asdict(order_at(position))}
        ends = at_once(
            lambda number, position=position, state=state: commit(
                open_store(moto_uri), identity(attempt, 0), position, {"optimizer_steps": {"net": number}, **state}, 5
            )
        )
        winners = [number for number, end in enumerate(ends) if end == CheckpointName(position, attempt)]
        assert len(winners) == 1, ends
        losers = [end for end in ends if isinstance(end, SaveFailed)]
        assert len(losers) == WRITERS - 1
        assert all("one of another writer" in str(error) or "a receipt" in str(error) for error in losers)
        manifest = read_manifest(store, committed(store)[0].manifest_key)
        assert manifest.optimizer_steps == {"net": winners[0]} and restored_position(store) == position
