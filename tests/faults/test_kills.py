"""SIGKILL at any moment: drills R1 and R2 in full, on several seeds. CI's short sample is in end_to_end."""

from __future__ import annotations

import pytest

from cluster.drills import kills
from cluster.drills.scratch import Wishes, scratch


@pytest.mark.drill
@pytest.mark.parametrize("seed", range(2))
def test_twenty_kills_at_seeded_moments_change_no_bit_of_the_result(seed: int) -> None:
    with scratch(Wishes(seed=seed), print) as place:
        for drill in (kills.resume_drill, kills.equality_drill):
            score = drill(place)
            assert not score.failures and score.faults == kills.KILLS
