"""A build that is stopped at points of its commit protocol: half a dataset is never seen, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.drills.crash_points import Place, drop_folder, folder_place, shard_protocols, stop_everywhere
from data_pipeline.storage import LocalStore
from data_pipeline.storage.crash import StoppingStore

AT_MOST = 30  # points, from the first to the last; the drill stops at every one of them


@pytest.mark.parametrize("protocol", [0, 1], ids=["swept", "unswept"])
def test_a_build_stopped_at_any_operation_is_invisible_or_whole_and_a_rebuild_gives_the_same_bytes(
    tmp_path: Path, protocol: int
) -> None:
    chosen = shard_protocols(tmp_path / "corpus")[protocol]
    points, failures = stop_everywhere(chosen, folder_place(tmp_path), at_most=AT_MOST)
    assert points == AT_MOST and not failures


def test_so_is_one_whose_every_write_is_done_or_not_and_never_answered(tmp_path: Path) -> None:
    """As in a bucket, whose steps are whole requests."""
    numbers = iter(range(10**6))
    requests = Place("bucket", lambda: LocalStore(tmp_path / f"{next(numbers)}"), StoppingStore, drop_folder)
    points, failures = stop_everywhere(shard_protocols(tmp_path / "corpus")[1], requests, at_most=AT_MOST)
    assert points == AT_MOST and not failures
