"""R8: its judgement of what it is told; the drill itself, which takes minutes, in full."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.drills import slow_ranks
from cluster.drills.scratch import Wishes, scratch
from cluster.launch import Event, WorkerDied
from cluster.watching import Hung


def test_a_wrong_name_a_late_end_and_an_alarm_without_a_cause_fail_r8(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    killed = WorkerDied("worker 0", "to end well", "SIGKILL", "go on", "killed", 0)
    ends: list[WorkerDied] = [Hung(rank, "here", "data", 11.0, 10.0, "") for rank in (1, 0)] + [killed]
    ago_s = 5.0
    monkeypatch.setattr(slow_ranks, "attempt", lambda *_: ends.pop(0))
    with scratch(Wishes(), print) as place:
        campaign = slow_ranks.Campaign()
        for number in range(3):
            (place.folder / f"hang-{number}").write_text(str(time.time() - ago_s))
            slow_ranks.hang(place, campaign, None, "sleep", "data", 1, number)  # type: ignore[arg-type]
            ago_s = 10 * slow_ranks.LIMIT_S
    assert campaign.named == 1 and len(campaign.detected_s) == 3
    assert [failure.split(":")[0] for failure in campaign.failures] == ["hang 1", "hang 1", "hang 2", "hang 2"]
    assert "told as rank 0 on here" in campaign.failures[0] and "two deadlines are 20" in campaign.failures[1]


@pytest.mark.parametrize("named", [[1], [0], [], [1, 0]])
def test_a_slow_rank_counts_as_named_only_if_it_alone_was(named: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(config: Any, worker: str, on_event: Callable[[Event], None]) -> WorkerDied:
        on_event({"event": "progress"})
        for rank in named:
            on_event({"event": "straggler", "rank": rank, "node": "here", "factor": 3.0})
        on_event({"event": "progress"})
        return WorkerDied("all ranks", "to go on", "an end", "go on")

    monkeypatch.setattr(slow_ranks, "attempt", attempt)
    with scratch(Wishes(), print) as place:
        campaign = slow_ranks.Campaign()
        slow_ranks.slow_down(place, campaign, None, 1, 0)  # type: ignore[arg-type]
        assert len(slow_ranks.false_alarms(place, None, 1.0)) == 1 + len(named)  # type: ignore[arg-type]
    assert campaign.slow_named == (named == [1]) and bool(campaign.failures) == (named != [1])


@pytest.mark.drill
def test_r8_in_full() -> None:
    with scratch(Wishes(seed=1), print) as place:
        score = slow_ranks.run(place)
    assert not score.failures and score.faults == 14
