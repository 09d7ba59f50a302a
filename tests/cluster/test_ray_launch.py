"""Tasks and worker groups on a real Ray: errors, killed processes, and runs that go on as if nothing had happened.

Each test's driver is a process of its own, as in a job.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from PIL import Image
from support import RUN

from data_pipeline.build import CorpusConfig, build_corpus
from data_pipeline.config import parse
from data_pipeline.storage import LocalStore
from trainer.checkpoint.manifest import committed, read_manifest
from trainer.stop import read_end, request_stop

Values = Callable[..., dict[str, Any]]
Driver = Callable[..., subprocess.Popen[str]]

TASKS = """
import json, os, signal, sys
from pathlib import Path
from cluster.executors import RayExecutor
from cluster.ray_cluster import connected
from data_pipeline.errors import UserError

marks = Path(sys.argv[1])

def square(number):
    assert os.environ["OMP_NUM_THREADS"] == "1"
    return number ** 2, os.getpid()

def refuse(number):
    if number == 7:
        raise UserError(f"item {number}", "another", "this", "give up")
    return number

def die_once(number):
    try:
        (marks / str(number)).touch(exist_ok=False)
    except FileExistsError:
        return number
    os.kill(os.getpid(), signal.SIGKILL)

def die_of_odd(number):
    if number % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    (marks / f"done-{number}").touch()
    return number

def error_of(results):
    try:
        list(results)
    except UserError as error:
        return str(error)

with connected():
    executor = RayExecutor(2)
    taken = []
    results = executor.map(square, (taken.append(number) or number for number in range(40)))
    first, in_flight = next(results), len(taken)
    squares = [first, *results]
    found = {
        "squares": sorted(number for number, _ in squares),
        "elsewhere": os.getpid() not in {pid for _, pid in squares},
        "in_flight": in_flight,
        "refused": error_of(executor.map(refuse, range(100))),
        "retried": sorted(executor.map(die_once, range(3))),
        "hopeless": error_of(executor.map(die_of_odd, range(5))),
        "rest": sorted(path.name for path in marks.glob("done-*")),
        "after": list(executor.map(refuse, [1])),
    }
print("FOUND", json.dumps(found))
"""

# Judges in tasks of 16 rows, so that each step is shared by several.
CORPUS = """
import json, sys
from functools import partial
from cluster.executors import RayExecutor
from cluster.ray_cluster import connected
from data_pipeline import build
from data_pipeline.config import parse

build.judge = partial(build.judge, task_rows=16)
with connected():
    values = json.loads(sys.argv[1])
    print("BUILT", json.dumps(build.build_corpus(parse(build.CorpusConfig, values, "test"), RayExecutor(2))))
"""


def events_of(driver: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert driver.stdout is not None
    for line in driver.stdout:
        if line.startswith("EVENT "):
            yield json.loads(line.removeprefix("EVENT "))


@pytest.fixture
def driver(stack: Any, tmp_path: Path) -> Iterator[Driver]:
    """Start Python code as a driver of the stack's Ray; its stderr goes to `stderr` in the test's folder."""
    gcs = json.loads((stack.home / "stack" / "stack.json").read_text())["ports"]["gcs"]
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, **stack.env, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
        environment.pop("MLFLOW_TRACKING_URI")
        with open(tmp_path / "stderr", "w") as stderr:
            command = [sys.executable, "-c", code, *arguments]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def gone(pids: list[int], seconds: float) -> bool:
    """Whether all end within that time. Polled: they are not our children."""
    until = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def final_digests(store: str, images: int) -> list[str]:
    name = committed(LocalStore(Path(store)))[0]
    assert name.position == images
    return [part.digest for part in read_manifest(LocalStore(Path(store)), name.manifest_key).parts]


def config_file(values: dict[str, Any]) -> str:
    path = Path(f"{values['run']}.yaml").absolute()
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_tasks_keep_what_an_executor_promises_and_a_killed_one_is_tried_again(driver: Driver, tmp_path: Path) -> None:
    stdout, _ = driver(TASKS, str(tmp_path)).communicate(timeout=60)
    stderr = (tmp_path / "stderr").read_text()
    assert "FOUND" in stdout, stderr
    found = json.loads(stdout.rpartition("FOUND ")[2])
    assert found["squares"] == [number**2 for number in range(40)] and found["elsewhere"]
    assert found["in_flight"] <= 3
    assert found["refused"] == "item 7: expected another, found this; give up"
    assert found["retried"] == [0, 1, 2] and found["after"] == [1]
    assert found["hopeless"].startswith("corpus tasks: expected to live through one of 4 tries, found 2 that died each")
    assert "time: 1, 3;" in found["hopeless"] and found["rest"] == ["done-0", "done-2", "done-4"]
    assert "retry: the task of 0 died" in stderr and "poison: the task of 3 died 4 times" in stderr


def test_a_corpus_is_judged_by_many_tasks_as_in_one_process(
    driver: Driver, picture_folder: Path, tmp_path: Path
) -> None:
    originals, copies, held_out = (tmp_path / name for name in ("originals", "copies", "held out"))
    shutil.copytree(picture_folder, originals)
    for folder in (copies, held_out):
        folder.mkdir()
    for path in sorted(originals.glob("*.png"))[::8]:
        picture = Image.open(path)
        picture.resize((picture.width * 2 // 3, picture.height * 2 // 3)).save(copies / path.name)
        shutil.copy(path.with_suffix(".txt"), copies)
    shutil.copy(sorted(originals.glob("*.png"))[1], held_out)
    values = {
        "inputs": [{"kind": "folder", "uri": str(folder)} for folder in (originals, copies)],
        "filters": {"preset": "none", "max_caption_repeats": 3},
        "dedup": {"near": 6},
        "decontaminate": {"sets": [{"kind": "folder", "uri": str(held_out)}]},
        "shard_rows": 32,
    }
    outputs = {name: str(tmp_path / name) for name in ("here", "ray")}
    here = build_corpus(parse(CorpusConfig, values | {"output": outputs["here"]}, "test"))
    stdout, _ = driver(CORPUS, json.dumps(values | {"output": outputs["ray"]})).communicate(timeout=120)
    assert "BUILT" in stdout, (tmp_path / "stderr").read_text()
    there = json.loads(stdout.rpartition("BUILT ")[2])
    assert there["dataset_id"] == here["dataset_id"] and there["funnel"] == here["funnel"]
    assert here["funnel"]["dropped"]["near_duplicate"] >= 6 and here["funnel"]["dropped"]["evaluation_source"] == 1
    assert objects_of(outputs["ray"], "judge/") == objects_of(outputs["here"], "judge/")
    assert objects_of(outputs["ray"], "datasets/") == objects_of(outputs["here"], "datasets/")


def objects_of(output: str, prefix: str) -> dict[str, bytes]:
    store = LocalStore(Path(output))
    return {info.key: store.get(info.key) for info in store.list(prefix)}


def test_a_killed_worker_is_followed_by_an_attempt_that_ends_as_if_nothing_had_happened(
    driver: Driver, train_values: Values, tmp_path: Path
) -> None:
    whole = train_values("whole", images=160, launcher={"workers": 2})
    killed = train_values("killed", images=160, launcher={"kind": "ray", "workers": 2})
    assert list(events_of(driver(RUN, config_file(whole))))[-1]["event"] == "summary"

    events: list[dict[str, Any]] = []
    for event in events_of(driver(RUN, config_file(killed))):
        events.append(event)
        if event["event"] == "progress" and event["images"] == 80 and not os.path.exists("done"):
            Path("done").touch()
            os.kill(events[0]["pids"][1], signal.SIGKILL)
    stderr = (tmp_path / "stderr").read_text()
    started = [event for event in events if event["event"] == "started"]
    assert len(started) == 2, stderr
    assert started[1]["standbys"] == 2, "started at the first step of the first gang"
    assert [event["on_main_thread"] for event in started] == [[True, True]] * len(started)
    assert not set(started[0]["pids"]) & set(started[1]["pids"])
    [restart] = [event for event in events if event["event"] == "restart"]
    assert "worker 1" in restart["reason"] and "restart: attempt 1" in stderr

    summary = events[-1]
    assert summary["images"] == 160 and summary["attempt"] == 2 and not summary["stopped"]
    second = events[events.index(started[1]) :]
    resumed_at = next(event["images"] for event in second if event["event"] == "progress") - 16
    assert resumed_at >= 16 and f"resume: from images-{resumed_at:09d}/attempt-1" in stderr
    assert final_digests(killed["store"], 160) == final_digests(whole["store"], 160)
    ends = [read_end(LocalStore(Path(killed["store"])), attempt) for attempt in (1, 2)]
    assert [end.outcome for end in ends if end] == ["died", "finished"]
    assert gone(started[1]["pids"], 20)


def test_workers_end_when_their_driver_is_killed(driver: Driver, train_values: Values) -> None:
    values = train_values(images=10**6, launcher={"kind": "ray", "workers": 2})
    process = driver(RUN, config_file(values))
    events = events_of(process)
    started = next(events)
    assert any(event["event"] == "progress" for event in events) and len(started["pids"]) == 2
    process.kill()
    assert gone(started["pids"], 30)


def test_a_refusal_of_a_worker_arrives_as_it_was_and_is_not_tried_again(
    driver: Driver, train_values: Values, tmp_path: Path
) -> None:
    values = train_values(images=64, launcher={"kind": "ray", "workers": 2, "standby": False})
    assert list(events_of(driver(RUN, config_file(values | {"launcher": {}}))))[-1]["event"] == "summary"
    for manifest in Path(values["store"]).glob("checkpoints/*/*/manifest.json"):
        manifest.write_bytes(b"{}")
    events = list(events_of(driver(RUN, config_file(values | {"images": 96}))))
    stderr = (tmp_path / "stderr").read_text()
    assert [event["event"] for event in events] == ["started"]
    assert stderr.rstrip().splitlines()[-1].startswith("data_pipeline.errors.UserError: run")
    end = read_end(LocalStore(Path(values["store"])), 2)
    assert end is not None and end.outcome == "failed"


@pytest.mark.drill
def test_standbys_take_the_ranks_of_a_hung_gang_one_that_died_waiting_is_replaced_and_a_dead_mailbox_ends_nothing(
    driver: Driver, train_values: Values, tmp_path: Path
) -> None:
    values = train_values(
        images=10**6, launcher={"kind": "ray", "workers": 2}, watch={"silent_s": 10.0}, checkpoint={"every_images": 32}
    )
    store = LocalStore(Path(values["store"]))
    events = events_of(driver(RUN, config_file(values)))

    def until(kind: str) -> dict[str, Any]:
        found = next((event for event in events if event["event"] == kind), None)
        assert found is not None, (tmp_path / "stderr").read_text()
        return found

    first, warm = until("started"), until("standby")
    assert first["standbys"] == 2 and len(warm["pids"]) == 2 and not set(warm["pids"]) & set(first["pids"])
    os.kill(first["pids"][1], signal.SIGSTOP)
    hung = until("hung")
    assert hung["rank"] == 1 and hung["node"] == first["node_ids"][1]
    second = until("started")
    assert set(second["pids"]) == set(warm["pids"]) and second["standbys"] == 2
    began = until("began")["seconds"]
    assert list(began) == ["placed", "imported", "met", "loaded", "first_step"] and min(began.values()) >= 0
    assert gone(first["pids"], 1)  # before the new gang loads: its memory and GPUs are theirs

    warm = until("standby")
    os.kill(warm["pids"][0], signal.SIGKILL)
    os.kill(second["pids"][0], signal.SIGKILL)
    third = until("started")
    assert third["standbys"] == 1 and warm["pids"][1] in third["pids"] and warm["pids"][0] not in third["pids"]
    until("progress")
    beside = psutil.Process(third["pids"][0]).parent()
    assert beside is not None
    [mailbox] = [process for process in beside.children() if process.cmdline()[0].startswith("ray::Mailbox")]
    mailbox.kill()
    mailbox.wait(20)
    request_stop(store, 3)
    summary = until("summary")
    assert summary["stopped"] and summary["attempt"] == 3
    ends = [read_end(store, attempt) for attempt in (1, 2)]
    assert [(end.cause, end.rank) for end in ends if end] == [("hung", 1), ("killed", 0)]
