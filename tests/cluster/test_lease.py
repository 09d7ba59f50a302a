"""Two drivers of one run: the second refuses while the first lives, and goes on at once when that is dead."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import wait_for

from cluster import lease, stopping
from cluster.lease import Beat, DriverLease, lives, read_beat, refuse_second_driver
from data_pipeline.errors import UserError
from data_pipeline.storage import LocalStore, canonical_json
from trainer.checkpoint.attempts import take_attempt
from trainer.stop import AttemptEnd, asked_of, record_end

Values = Callable[..., dict[str, Any]]
Cli = Callable[..., tuple[int, Any, str]]


def begun(folder: Path, **changes: Any) -> tuple[LocalStore, Beat]:
    """A store whose attempt 1 has a driver on another machine, as far as its sign of life tells."""
    store = LocalStore(folder)
    take_attempt(store, {"config": {"checkpoint": {"deadline_s": 1.0}}})
    with DriverLease(store) as held:
        held.hold(1, lambda: {"workers": 2})
    beat = read_beat(store, 1)
    assert beat is not None and beat.figures == {"workers": 2}
    return store, write(store, replace(beat, **{"machine": "elsewhere", "host": "node-7"} | changes))


def write(store: LocalStore, beat: Beat) -> Beat:
    store.put("driver/00001.json", [canonical_json(vars(beat))])
    return beat


def test_a_driver_elsewhere_is_watched_for_two_intervals_and_lives_while_its_count_moves(tmp_path: Path) -> None:
    store, beat = begun(tmp_path / "alive")
    waited: list[float] = []

    def beats_on(seconds: float) -> None:
        waited.append(seconds)
        if sum(waited) == 15:
            write(store, replace(beat, count=beat.count + 1))

    with pytest.raises(UserError) as refusal:
        refuse_second_driver(store, "tiny", beats_on)
    assert str(refusal.value) == (
        f"run tiny: expected no other driver, found process {beat.pid} on node-7, which drives its attempt 1; "
        "wait for its end, or stop it: glidepath stop RUN"
    )
    assert sum(waited) == 15

    store, beat = begun(tmp_path / "dead")
    waited.clear()
    refuse_second_driver(store, "tiny", waited.append)
    assert sum(waited) == 20, "two intervals of the other driver's"

    store, beat = begun(tmp_path / "ends meanwhile")
    assert not lives(store, beat, lambda _: record_end(store, AttemptEnd(1, "stopped", None, None)))
    refuse_second_driver(store, "tiny", lambda _: pytest.fail("an attempt that has ended is not waited for"))


def test_a_driver_of_a_newer_version_whose_sign_of_life_says_more_is_heeded(tmp_path: Path) -> None:
    store, beat = begun(tmp_path, machine=lease.machine())  # this process drives it
    store.put("driver/00001.json", [canonical_json(vars(beat) | {"mood": "good"})])
    assert read_beat(store, 1) == beat and lives(store, beat)


def test_a_dead_driver_of_this_machine_and_a_damaged_or_missing_sign_of_life_hold_nothing_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: float) -> None:
        pytest.fail("nothing is waited for")

    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    store, beat = begun(tmp_path / "dead", machine=lease.machine(), pid=process.pid)
    refuse_second_driver(store, "tiny", fail)
    write(store, replace(beat, pid=1, started_ticks=beat.started_ticks))  # a pid that is used again
    refuse_second_driver(store, "tiny", fail)
    (tmp_path / "dead" / "driver" / "00001.json").write_text("{")
    refuse_second_driver(store, "tiny", fail)
    assert "driver/00001.json is no sign of life" in caplog.text
    refuse_second_driver(LocalStore(tmp_path / "new"), "tiny", fail)


def test_a_stop_of_a_run_whose_driver_is_gone_says_so_and_one_whose_driver_goes_on_after_a_resize_asks_again(
    tmp_path: Path,
) -> None:
    store, beat = begun(tmp_path / "gone")
    with pytest.raises(UserError, match=r"whose driver is gone \(.* of node-7, from which nothing comes\)"):
        stopping.stop_run(store, "tiny", lambda _: None)

    store, beat = begun(tmp_path / "resized")

    def answer(_: float) -> None:
        """The attempt had made way already; the next one hears."""
        write(store, replace(beat, count=beat.count + 1))
        if asked_of(store, 2):
            record_end(store, AttemptEnd(2, "stopped", 32, None))
        elif not store.exists("ended/00001.json"):
            take_attempt(store, {"config": {}})
            record_end(store, AttemptEnd(1, "resized", 16, None))

    assert stopping.stop_run(store, "tiny", answer) == AttemptEnd(2, "stopped", 32, None)


class GoesOn(LocalStore):
    """Of a run whose driver takes the next attempt just when somebody looks how the newest one ended."""

    def get(self, key: str) -> bytes:
        if key == "ended/00001.json" and not self.exists("attempts/00002.json"):
            assert take_attempt(self, {"config": {}}) == 2
            record_end(self, AttemptEnd(1, "died", 16, None))
            me = json.loads(super().get("driver/00001.json"))
            self.put("driver/00002.json", [canonical_json(me | {"attempt": 2})])
        return super().get(key)


def test_a_driver_that_goes_on_while_somebody_looks_is_neither_missed_by_a_stop_nor_by_a_second_driver(
    tmp_path: Path,
) -> None:
    begun(tmp_path / "stopped")
    store = GoesOn(tmp_path / "stopped")
    ended = AttemptEnd(2, "stopped", 32, None)
    assert stopping.stop_run(store, "tiny", lambda _: record_end(store, ended)) == ended
    assert asked_of(store, 2) == "stop" and asked_of(store, 1) is None

    begun(tmp_path / "driven")
    store = GoesOn(tmp_path / "driven")

    def beats_on(_: float) -> None:
        beat = read_beat(store, 2)
        assert beat is not None
        store.put("driver/00002.json", [canonical_json(vars(beat) | {"count": beat.count + 1})])

    with pytest.raises(UserError, match="drives its attempt 2"):
        refuse_second_driver(store, "tiny", beats_on)


class Away(LocalStore):
    """Cannot be written to."""

    puts = 0

    def put(self, key: str, chunks: Any) -> None:
        self.puts += 1
        raise OSError("no answer")


def test_a_store_that_is_away_costs_the_driver_a_warning_per_beat_and_no_exception(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Away(tmp_path)
    with DriverLease(store, every_s=0.01) as held:
        held.hold(1)
        wait_for(lambda: store.puts > 3, 20)
    assert "driver's sign of life: no answer; training goes on" in caplog.text
    [thread] = [thread for thread in threading.enumerate() if thread.name == "driver-lease"] or [None]
    if thread is not None:
        thread.join(20)
        assert not thread.is_alive()


def test_a_second_train_refuses_while_the_first_lives_and_goes_on_at_once_after_its_driver_was_killed(
    train_values: Values, tmp_path: Path, cli: Cli
) -> None:
    values = train_values(images=10**6)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "cluster.cli", "train", str(config)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        store = LocalStore(Path(values["store"]))
        wait_for(lambda: list(store.list("checkpoints/images-000000016/attempt-1/manifest")))
        code, said, _ = cli("train", str(config))
        assert code == 1 and f"expected no other driver, found process {first.pid} on" in said["error"]
        assert [info.key for info in store.list("attempts/")] == ["attempts/00001.json"], "nothing was begun"
        code, said, _ = cli("status", values["store"])
        assert code == 0 and said["driver"]["alive"] and said["driver"]["pid"] == first.pid
        assert said["attempts"][0]["outcome"] == "runs" and said["attempts"][0]["workers"] == 1
    finally:
        first.kill()
        first.wait()
    code, said, _ = cli("stop", values["store"])
    assert code == 1 and "whose driver is gone" in said["error"]
    code, said, _ = cli("status", values["store"])
    assert code == 0 and not said["driver"]["alive"] and said["attempts"][0]["outcome"] == "driver lost"

    code, said, _ = cli("train", str(config), "images=16")
    assert code == 0 and said["attempt"] == 2 and said["images"] >= 16
    code, said, _ = cli("status", values["store"])
    lost, after = said["attempts"]
    assert code == 0 and said["driver"] is None and said["run"] == "tiny"
    assert (lost["outcome"], after["outcome"]) == ("driver lost", "finished")
    assert lost["position"] == after["from_images"] == after["images"]
    assert said["checkpoint"].endswith(f"images-{after['position']:09d}/attempt-1")
