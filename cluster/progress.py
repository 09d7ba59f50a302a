"""How far a corpus build is: images per second and time left of each pass, as a bar or as lines of a log.

Always holds: speed is that of the last WINDOW_S, so work that was found finished at the start is soon forgotten; the
clock is given, nothing here waits. Called by the command line, the demo and the job of a build.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from cluster.console import say, stderr
from data_pipeline.build import Progress as BuildProgress

WINDOW_S = 30.0
LINE_EVERY_S = 10.0


class Speed:
    """Of one pass: what it did within the last WINDOW_S."""

    def __init__(self, now_s: float, total: int) -> None:
        self.total = total
        self.seen = deque([(now_s, 0, 0)])  # time, items done, images in them

    def note(self, now_s: float, done: int, images: int) -> None:
        self.seen.append((now_s, done, images))
        while len(self.seen) > 2 and self.seen[1][0] <= now_s - WINDOW_S:
            self.seen.popleft()

    def per_s(self) -> tuple[float, float]:
        """(items, images) per second; zeros where no time has passed yet."""
        (begin_s, done, images), (end_s, done_now, images_now) = self.seen[0], self.seen[-1]
        took_s = end_s - begin_s
        return ((done_now - done) / took_s, (images_now - images) / took_s) if took_s > 0 else (0.0, 0.0)

    def told(self) -> str:
        """Such as "412 images/s, 0:03:10 left"; empty where nothing is known."""
        items, images = self.per_s()
        facts = [f"{images:,.0f} images/s"] if images > 0 else []
        left = self.total - self.seen[-1][1]
        if items > 0 and left > 0:
            minutes, seconds = divmod(round(left / items), 60)
            facts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
        return ", ".join(facts)


def progress_lines(tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> BuildProgress:
    """A build's progress as lines: the end of each pass, and every LINE_EVERY_S within it."""
    speeds: dict[str, Speed] = {}
    said_s: dict[str, float] = {}

    def report(stage: str, done: int, total: int, images: int = 0) -> None:
        now_s = clock()
        if stage not in speeds:
            speeds[stage], said_s[stage] = Speed(now_s, total), now_s
        speeds[stage].total = total
        speeds[stage].note(now_s, done, images)
        if done == total or now_s - said_s[stage] >= LINE_EVERY_S:
            said_s[stage] = now_s
            tell(f"{stage}: {done} of {total}" + (f", {note}" if (note := speeds[stage].told()) else ""))

    return report


@contextmanager
def build_progress() -> Iterator[BuildProgress]:
    """On stderr: a bar for each pass on a terminal, else lines."""
    if not stderr.is_terminal:
        yield progress_lines(say)
        return
    columns = (
        TextColumn("{task.description:<7}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=stderr) as bars:
        tasks: dict[str, tuple[TaskID, Speed]] = {}

        def report(stage: str, done: int, total: int, images: int = 0) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note=""), Speed(time.monotonic(), total)
            task, speed = tasks[stage]
            speed.total = total
            speed.note(time.monotonic(), done, images)
            bars.update(task, completed=done, total=total, note=speed.told())

        yield report
