"""Where a rank is in its work, told about once a second, so that somebody else can see that it hangs or is slow.

Always holds: `Watch` is the main thread's, whom a section costs two looks at the clock and no lock, thread or system
call; `Heartbeat` only reads it, from a thread of its own, and decides nothing. All ranks enter the same sections in the
same order, so the counts of two ranks say which is behind. What follows from the beats is decided where those of all
ranks meet (cluster/watching.py). Opened by workers of every launcher; sections are entered by the loop, the step, and
every collective call (trainer/engine/group.py).
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, NamedTuple, get_args

import torch

from trainer.config import WatchSettings

log = logging.getLogger(__name__)

Section = Literal["data", "forward", "backward", "reduce", "update", "save", "commit", "restore", "sample", "evaluate"]
BEAT_S = 1.0
STDERR = 2  # the file descriptor: faulthandler writes without Python, also while another call holds its lock


def own_work(zero_stage: int) -> tuple[Section, ...]:
    """Sections in which a rank waits for no other: what a slow rank takes longer for than the others do. ZeRO reduces
    gradients while it computes them, and stage 3 gathers weights before it uses them."""
    return (("data", "forward", "backward", "update"), ("data", "forward"), ("data", "forward"), ("data",))[zero_stage]


class Place(NamedTuple):
    """Where the main thread is: a section, since when, and how many were entered or left before."""

    section: str
    since_s: float
    passed: int


@dataclass(frozen=True)
class Done:
    """Sums over the steps that have ended."""

    steps: int = 0
    step_s: float = 0.0
    busy_s: dict[str, float] = field(default_factory=dict)


class Watch:
    """Sections of one rank's main thread. `clock` in seconds, monotonic."""

    def __init__(self, own: tuple[Section, ...] = own_work(0), clock: Callable[[], float] = time.monotonic) -> None:
        self._own, self._clock = own, clock
        self._outer: list[str] = []
        self._seconds: dict[str, float] = {}
        self._sections: dict[str, _Section] = {}
        self._gpu: _GpuTime | None = None
        self._step_began = clock()
        self.place = Place("start", self._step_began, 0)  # outside all sections it is there, later in "loop"
        self.done = Done()

    def section(self, name: Section) -> _Section:
        """A context: inside, the main thread is in section `name`. Sections nest; each counts its own seconds only."""
        found = self._sections.get(name)
        if found is None:
            found = self._sections[name] = _Section(self, name)
        return found

    def now_s(self) -> float:
        return self._clock()

    def on_gpu(self, device: torch.device) -> None:
        """From now on forward and backward are timed on this GPU, which works on long after the calls have returned."""
        self._gpu = _GpuTime(device)

    def await_gpu(self) -> None:
        """Until the GPU has done what was asked of it, so that one that hangs hangs here and not in a collective."""
        if self._gpu is not None:
            self._gpu.wait()

    def begin_steps(self) -> None:
        """The start is over, or a rollback: what comes now is a step."""
        self._move("loop")
        self._seconds.clear()
        if self._gpu is not None:
            self._gpu.take()
        self._step_began = self.place.since_s

    def end_step(self) -> dict[str, float]:
        """Seconds by section, and "step", of the step that ends now; the next one begins."""
        self._move(self.place.section)
        seconds, self._seconds = self._seconds, {}
        if self._gpu is not None:
            seconds |= self._gpu.take()
        now = self.place.since_s
        step_s, self._step_began = max(now - self._step_began, 1e-9), now
        before = self.done
        busy_s: dict[str, float] = {}
        for name in self._own:
            busy_s[name] = before.busy_s.get(name, 0.0) + seconds.get(name, 0.0)
        self.done = Done(before.steps + 1, before.step_s + step_s, busy_s)
        # All of them, so that each has a point per update.
        return dict.fromkeys(get_args(Section), 0.0) | seconds | {"step": step_s}

    def enter(self, name: str) -> None:
        self._outer.append(self.place.section)
        self._go_to(name)

    def leave(self) -> None:
        self._go_to(self._outer.pop())

    def _go_to(self, section: str) -> None:
        if self._gpu is not None:
            self._gpu.mark(self.place.section)
            self._gpu.mark(section)
        self._move(section)

    def _move(self, section: str) -> None:
        place, now = self.place, self._clock()
        self._seconds[place.section] = self._seconds.get(place.section, 0.0) + now - place.since_s
        self.place = Place(section, now, place.passed + 1)  # one assignment: the other thread sees either place whole


class _Section:
    """See Watch.section. Kept and used again; what it must remember is on the watch's own stack."""

    def __init__(self, watch: Watch, name: str) -> None:
        self._watch, self._name = watch, name

    def __enter__(self) -> None:
        self._watch.enter(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.leave()


class _GpuTime:
    """Seconds that a GPU took for forward and backward, from events that it notes in passing."""

    SECTIONS = ("forward", "backward")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: dict[str, list[torch.cuda.Event]] = {name: [] for name in self.SECTIONS}

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()

    def mark(self, section: str) -> None:
        if section in self._marks:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record(torch.cuda.current_stream(self._device))
            self._marks[section].append(mark)

    def take(self) -> dict[str, float]:
        """Of the marks so far, which are forgotten. Waits for the last of them: a step's come before its `await_gpu`,
        or right after it, so that the update goes on meanwhile."""
        for marks in self._marks.values():
            if marks:
                marks[-1].synchronize()
        seconds = {
            name: sum(begin.elapsed_time(end) for begin, end in zip(marks[::2], marks[1::2], strict=True)) / 1000
            for name, marks in self._marks.items()
        }
        for marks in self._marks.values():
            marks.clear()
        return seconds


class Heartbeat:
    """Tells `report` where a watch is, about once a second, with the stacks in the log once a deadline is overstayed.

    A context manager around all that a worker does. A beat is {"event": "beat", "rank", "step", "section", "since_s",
    "deadline_s" (null: none), "passed" (sections entered or left), "steps" (that have ended since the beat before),
    "step_s" and "busy_s" {section: seconds of own work} (both per step, over those), "where" (in the code, once
    overstayed)}. The last one has the section "ended".
    """

    def __init__(
        self, watch: Watch, rank: int, settings: WatchSettings, report: Callable[[dict[str, Any]], None]
    ) -> None:
        """`report` is called from another thread."""
        self._watch, self._rank, self._settings, self._report = watch, rank, settings, report
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._told, self._dumped = watch.done, -1  # what the last beat told of; the place whose stacks were shown
        # A daemon: it may wait for a launcher that reads no more, and must not keep a finished worker from ending.
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(BEAT_S)
        faulthandler.cancel_dump_traceback_later()
        try:
            self._report({**self._beat(), "section": "ended", "deadline_s": None})
        except OSError as closed:
            if error is None:
                raise
            log.warning("the end was not told: %s", closed)  # and `error` says why it came

    def _run(self) -> None:
        while True:
            # A call that holds Python's lock stops this thread too, but not this timer, which needs neither.
            faulthandler.dump_traceback_later(self._settings.silent_s / 2, file=STDERR)
            try:
                self._report(self._beat())
            except OSError as error:
                log.warning("no heartbeat: %s", error)
            if self._over.wait(BEAT_S):
                return

    def _beat(self) -> dict[str, Any]:
        place, done, before = self._watch.place, self._watch.done, self._told
        since_s, deadline_s = self._watch.now_s() - place.since_s, self._deadline_s(place.section, done.steps)
        self._told, steps = done, done.steps - before.steps
        busy_s = {name: (s - before.busy_s.get(name, 0.0)) / max(steps, 1) for name, s in done.busy_s.items()}
        beat = {
            "event": "beat",
            "rank": self._rank,
            "step": done.steps,
            "section": place.section,
            "since_s": since_s,
            "deadline_s": deadline_s,
            "passed": place.passed,
            "steps": steps,
            "step_s": (done.step_s - before.step_s) / max(steps, 1),
            "busy_s": busy_s,
        }
        if deadline_s is not None and since_s > deadline_s:
            beat["where"] = self._show_stacks(place, since_s)
        return beat

    def _deadline_s(self, section: str, steps: int) -> float | None:
        """None for `commit`, which a save's own deadline ends."""
        if section == "commit":
            return None
        seconds = float(getattr(self._settings, f"{section}_s"))
        return seconds if steps or section == "start" else max(seconds, self._settings.first_step_s)

    def _show_stacks(self, place: Place, since_s: float) -> str:
        """Of all threads, in the log, once for each stay; where the main thread is."""
        if self._dumped != place.passed:
            self._dumped = place.passed
            log.error("in %s for %.0f s; the stacks of all threads:", place.section, since_s)
            faulthandler.dump_traceback(file=STDERR)
        return _where(sys._current_frames().get(self._main))


def _where(frame: FrameType | None) -> str:
    """The innermost line of our own code, or of anybody's."""
    ours = Path(__file__).parents[1]
    inner = frame
    while inner is not None and not Path(inner.f_code.co_filename).is_relative_to(ours):
        inner = inner.f_back
    found = inner or frame
    return f"{found.f_code.co_filename}:{found.f_lineno} in {found.f_code.co_name}" if found else "unknown"


@contextmanager
def watched(values: dict[str, Any], rank: int, report: Callable[[dict[str, Any]], None]) -> Iterator[Watch]:
    """A watch of this thread with its heartbeat, as the resolved configuration `values` wants them."""
    watch = Watch(own_work(values["zero"]["stage"]))
    with Heartbeat(watch, rank, WatchSettings.model_validate(values["watch"]), report):
        yield watch
