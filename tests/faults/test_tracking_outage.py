"""R10: a tracking server that is killed or locked costs a run no step and its curves no point."""

from __future__ import annotations

import pytest

from cluster.drills import tracking_outage
from cluster.drills.scratch import Wishes, scratch
from cluster.drills.tracking_outage import Observed, slower_steps, step_figures


def progress(images: int, step_s: float) -> dict[str, object]:
    return {"event": "progress", "images": images, "loss": 1.0, "loss/total": 1.0, "time/step_s": step_s}


def test_a_step_counts_for_the_stretch_that_it_began_and_ended_in_and_slow_ones_fail_the_drill() -> None:
    seen, images = Observed(), 0
    for phase, step_s in (("answering", 0.10), ("killed", 0.15), ("answering", 0.11), ("locked", 0.105)):
        seen.enter(phase)  # type: ignore[arg-type]
        for seconds in (9.0, *[step_s] * 5):  # the first of them began in the stretch before
            images += 16
            seen.saw(progress(images, seconds))
    figures = step_figures(seen)
    assert figures["answering_ms"] == [100.0, 110.0] and figures["noise"] == pytest.approx(0.0476, abs=1e-3)
    assert figures["killed_ratio"] == pytest.approx(1.4286, abs=1e-3) and figures["locked_ratio"] == 1.0
    assert slower_steps(figures) == [
        f"steps slower while the server is killed: {figures['killed_ratio']} of the others, noise {figures['noise']}"
    ]
    assert slower_steps(step_figures(Observed())) == ["too few steps to compare"]


def test_a_point_that_is_missing_or_there_twice_fails_the_drill(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Observed()
    for images in (16, 32, 48):
        seen.saw(progress(images, 0.1))
        seen.saw({"event": "system", "node": "n", "images": images, "figures": {"cpu_utilization_percentage": 5.0}})
    stored = {
        "loss/total": [16, 32, 48],
        "time/step_s": [16, 48],
        "system/n/cpu_utilization_percentage": [16, 32, 32, 48],
    }
    monkeypatch.setattr(tracking_outage, "list_runs", lambda url: [type("Run", (), {"mlflow_run_id": "id"})])
    monkeypatch.setattr(tracking_outage, "metric_steps", lambda url, run_id, key: stored[key])
    assert tracking_outage.wrong_curves("http://…", 48, seen) == [
        "system/n/cpu_utilization_percentage: 4 points for 3, 0 lost, 1 twice",
        "time/step_s: 2 points for 3, 1 lost, 0 twice",
    ]
    assert "the drill did not see each update" in tracking_outage.wrong_curves("http://…", 64, seen)


def test_a_server_that_is_killed_for_five_seconds_leaves_no_gap_and_no_double() -> None:
    with scratch(Wishes(faults=1, outage_s=5), print) as place:
        score = tracking_outage.run(place)
    # How long steps take here says how busy the machine is.
    assert not [failure for failure in score.failures if not failure.startswith("steps slower")]
    assert score.faults == 1 and score.figures["killed_ms"] and score.figures["answering_ms"]


@pytest.mark.drill
def test_r10_in_full() -> None:
    with scratch(Wishes(), print) as place:
        score = tracking_outage.run(place)
    assert not score.failures and score.figures["locked_ms"]
