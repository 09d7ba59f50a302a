"""Sections, and the heartbeat that tells of them; hangs are real ones, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from trainer.config import WatchSettings
from trainer.engine.group import Group
from trainer.metrics import step_figures
from trainer.watch import Heartbeat, Watch, own_work


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_each_section_counts_its_own_seconds_and_a_step_their_sum() -> None:
    clock = Clock()
    watch = Watch(own_work(0), clock)
    clock.now = 100.0
    watch.begin_steps()
    with watch.section("data"):
        clock.now += 1
    for _ in range(2):
        with watch.section("forward"):
            clock.now += 2
        with watch.section("update"):
            clock.now += 3
            with watch.section("reduce"):
                clock.now += 40
            clock.now += 0.5
    clock.now += 7  # outside all sections
    figures = step_figures(watch.end_step(), images=10)
    expected = {"data": 1, "forward": 4, "backward": 0, "reduce": 80, "update": 7, "loop": 7, "step": 99}
    expected |= dict.fromkeys(("save", "commit", "restore", "sample", "evaluate"), 0)
    assert figures == {f"time/{name}_s": seconds for name, seconds in expected.items()} | {"images_per_s": 10 / 99}
    assert watch.done.busy_s == {"data": 1, "forward": 4, "backward": 0, "update": 7}  # no waiting in it
    with watch.section("data"):
        clock.now += 1
    assert watch.end_step()["step"] == 1 and watch.done.steps == 2


def test_a_watch_says_where_it_is_and_how_much_it_has_passed() -> None:
    clock = Clock()
    watch = Watch(clock=clock)
    assert watch.place == ("start", 0.0, 0)
    clock.now = 5.0
    with pytest.raises(ZeroDivisionError), watch.section("save"), watch.section("reduce"):
        assert watch.place == ("reduce", 5.0, 2)
        clock.now = 6.0
        raise ZeroDivisionError
    assert watch.place == ("start", 6.0, 4)  # left in good order by an exception too


def test_a_beat_holds_the_own_work_per_step_since_the_beat_before_and_the_first_step_has_longer() -> None:
    clock, beats = Clock(), list[dict[str, Any]]()
    watch = Watch(own_work(2), clock)
    heart = Heartbeat(watch, 3, WatchSettings(data_s=5, first_step_s=50), beats.append)
    watch.begin_steps()
    with watch.section("data"):
        clock.now = 20.0
        first = heart._beat()
        assert (first["rank"], first["section"], first["since_s"], first["deadline_s"]) == (3, "data", 20.0, 50)
        assert "where" not in first
    watch.end_step()
    for seconds in (1, 2):
        with watch.section("data"):
            clock.now += seconds
        with watch.section("backward"):  # with ZeRO 2 also waiting for others
            clock.now += 10
        watch.end_step()
    with watch.section("data"):
        second = heart._beat()
        assert (second["step"], second["steps"], second["deadline_s"]) == (3, 3, 5)
        assert second["busy_s"] == {"data": pytest.approx(23 / 3), "forward": 0}
    assert heart._beat()["steps"] == 0


def test_collective_calls_are_sections_only_where_there_are_others_to_wait_for() -> None:
    alone, two = Group(), Group(0, 2)
    alone.sum_(torch.zeros(1))
    assert alone.watch.place.passed == 0
    with pytest.raises(ValueError, match="process group"):
        two.sum_(torch.zeros(1))
    assert two.watch.place.passed == 2


def test_the_gpu_s_time_of_a_section_is_without_that_of_sections_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[str] = []

    class Noted:
        def mark(self, section: str) -> None:
            marks.append(section)

    watch = Watch()
    monkeypatch.setattr(watch, "_gpu", Noted())
    with watch.section("forward"), watch.section("reduce"):
        pass
    # Two marks of a section are its beginning and its end.
    assert [mark for mark in marks if mark != "start"] == [
        "forward",
        "forward",
        "reduce",
        "reduce",
        "forward",
        "forward",
    ]


def test_a_launcher_that_is_gone_does_not_hide_why_a_worker_ended(caplog: pytest.LogCaptureFixture) -> None:
    def closed(_: dict[str, Any]) -> None:
        raise BrokenPipeError("nobody reads")

    with pytest.raises(ZeroDivisionError), Heartbeat(Watch(), 0, WatchSettings(), closed):
        raise ZeroDivisionError
    assert "the end was not told: nobody reads" in caplog.text
    with pytest.raises(BrokenPipeError), Heartbeat(Watch(), 0, WatchSettings(), closed):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_forward_and_backward_are_timed_where_they_are_computed() -> None:
    group = Group(0, 1, "cuda:0")
    watch, square = group.watch, torch.randn(8192, 8192, device="cuda:0")
    watch.begin_steps()
    for _ in range(2):  # the first one loads the library
        with watch.section("forward"):
            for _ in range(50):
                square @ square
        with watch.section("backward"):
            watch.await_gpu()
        seconds = watch.end_step()
    assert 0.8 * seconds["step"] < seconds["forward"] <= seconds["step"]  # the call itself returns at once


HANGS = """
import ctypes, json, sys, time
from trainer.config import WatchSettings
from trainer.watch import watched
how, values = sys.argv[1], {"zero": {"stage": 0}}
values["watch"] = WatchSettings(forward_s=1.0, first_step_s=1.0, silent_s=4.0).model_dump()
with watched(values, 0, lambda event: print(json.dumps(event), flush=True)) as watch:
    watch.begin_steps()
    with watch.section("forward"):
        def hangs_here():
            if how == "sleep":
                time.sleep(3.5)
            else:
                ctypes.PyDLL(None).sleep(4)  # holds Python's lock, as a call into a broken driver does
        hangs_here()
"""


def test_a_rank_that_hangs_shows_its_stacks_even_while_no_thread_of_python_can_run() -> None:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = {how: subprocess.Popen([sys.executable, "-c", HANGS, how], **pipes) for how in ("sleep", "lock")}
    for how, process in running.items():
        stdout, stderr = process.communicate(timeout=60)
        beats = [json.loads(line) for line in stdout.splitlines()]
        assert "hangs_here" in stderr and "most recent call first" in stderr
        assert beats[-1]["section"] == "ended"
        overstayed = [beat for beat in beats if "where" in beat and beat["section"] == "forward"]
        if how == "sleep":
            assert "in hangs_here" in overstayed[0]["where"] and overstayed[0]["since_s"] > overstayed[0]["deadline_s"]
            assert stderr.count("in forward for") == 1  # once, however many beats follow
        else:
            assert [beat["since_s"] for beat in beats if 1.5 < beat["since_s"] < 3.9] == []  # silent meanwhile
