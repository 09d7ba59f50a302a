"""Progress of a build: speed and time left from what was done lately."""

from __future__ import annotations

from cluster.progress import LINE_EVERY_S, WINDOW_S, progress_lines


def test_lines_tell_the_speed_of_late_and_the_time_left_and_are_few() -> None:
    now_s, lines = 0.0, []
    report = progress_lines(lines.append, lambda: now_s)
    report("score", 0, 200)
    report("score", 100, 200, 100_000)  # found finished: in no time
    for second in range(1, 61):
        now_s = float(second)
        report("score", 100 + second, 200, 100_000 + 50 * second)
    assert len(lines) == 60 / LINE_EVERY_S
    assert lines[-1] == "score: 160 of 200, 50 images/s, 0:00:40 left", "the jump at the start is out of the window"
    assert now_s > WINDOW_S
    report("score", 200, 200, 102_000)
    report("judge", 0, 1)
    report("judge", 1, 1)
    assert lines[-2].startswith("score: 200 of 200") and "left" not in lines[-2]
    assert lines[-1] == "judge: 1 of 1"
