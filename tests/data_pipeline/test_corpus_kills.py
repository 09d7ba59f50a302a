"""A corpus build under SIGKILL: of its driver, of a task, of a Ray node; into a folder, and into a real S3 server on a
bad link.

Each time it goes on, or is run again, and must give what an undisturbed build gave: the same dataset id, the same bytes
under every key, nothing twice, nothing left over. CI takes one of each kind into a folder, a drill twenty of each, and
four of each into the server.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from support import wait_for

from cluster import processes
from cluster.faults import FaultyLink
from cluster.services import LOOPBACK_RAY
from cluster.training import build_swept
from data_pipeline.build import CorpusConfig, build_corpus, sweep_build
from data_pipeline.config import parse
from data_pipeline.loader import Column, read_rows
from data_pipeline.shards import open_dataset, verify_dataset
from data_pipeline.storage import LocalStore, ObjectStore, open_store

UNITS, PICTURES, REPEATS = 6, 60, 2  # of a unit's pictures, repeats of the first come last
SHARD_ROWS = 64
DEADLINE_S = 180
NODE_DEADLINE_S = 300  # of an overloaded machine; alone it takes 5 s
MARK = "corpus-kills"
# The setting that keeps the stack's Ray on 127.0.0.1 refuses further nodes. Without it Ray replaces that address by the
# machine's own, but leaves others of loopback alone, so each node has one.
SEVERAL_NODES = {
    **LOOPBACK_RAY,
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    "RAY_raylet_start_wait_time_s": "240",
}
HEAD_HOST = "127.0.0.9"
STARTED = "Ray runtime started."  # in the log of `ray start`
DRILL = pytest.mark.drill


@dataclass(frozen=True)
class Corpus:
    """The inputs, and what an undisturbed build of them by one process gives."""

    values: dict[str, Any]
    dataset_id: str
    objects: dict[str, str] = field(repr=False)

    def config(self, output: str, **changes: Any) -> dict[str, Any]:
        return {**self.values, "output": output, **changes}


def digests(store: ObjectStore) -> dict[str, str]:
    """sha256 of every object of an output."""
    return {info.key: hashlib.sha256(store.get(info.key)).hexdigest() for info in store.list()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("in")
    noise = np.random.default_rng(0)
    for unit in range(UNITS):
        pictures = [
            simplejpeg.encode_jpeg(noise.integers(0, 256, (24, 32, 3), np.uint8).repeat(8, 0).repeat(8, 1), 90)
            for _ in range(PICTURES - REPEATS)
        ]
        with tarfile.open(folder / f"{unit}.tar", "w") as tar:
            for number, picture in enumerate(pictures + pictures[:REPEATS]):
                caption = f"picture {number % len(pictures)} of unit {unit}".encode()
                for suffix, data in (("jpg", picture), ("txt", caption)):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    values = {"inputs": [{"kind": "webdataset", "uri": str(folder)}], "shard_rows": SHARD_ROWS}
    output = tmp_path_factory.mktemp("whole")
    built = build_corpus(parse(CorpusConfig, {**values, "output": str(output)}, "test"))
    assert built["rows"] == UNITS * (PICTURES - REPEATS)
    return Corpus(values, built["dataset_id"], digests(LocalStore(output)))


def start_build(values: Mapping[str, Any], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """`glidepath corpus build` as a process of its own."""
    path = folder / f"corpus-{len(list(folder.glob('corpus-*')))}.json"  # JSON is YAML
    path.write_text(json.dumps(values))
    command = [sys.executable, "-m", "cluster.cli", "corpus", "build", str(path), "--json"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )


def finish(build: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        stdout, stderr = build.communicate(timeout=DEADLINE_S)
    finally:
        build.kill()
    return build.returncode, stdout, stderr


def kill_when(
    build: subprocess.Popen[str], due: Callable[[], bool], kill: Callable[[], bool], poll_s: float = 0.01
) -> bool:
    """Once `due`, `kill` until it found something; whether it did before the build ended. Polls, as a killer must."""
    while build.poll() is None:
        if due() and kill():
            return True
        time.sleep(poll_s)
    return False


def check_whole(corpus: Corpus, store: ObjectStore, again: dict[str, Any]) -> None:
    """What the build that was run again left is what an undisturbed build leaves."""
    assert again["dataset_id"] == corpus.dataset_id
    swept = sweep_build(store)
    assert sweep_build(store) == 0
    assert digests(store) == corpus.objects, f"after a sweep of {swept}"
    dataset = open_dataset(f"{store.uri}/datasets/{corpus.dataset_id}")
    assert verify_dataset(dataset) == []
    shards = np.repeat(np.arange(len(dataset.shard_rows)), dataset.shard_rows)
    rows = np.concatenate([np.arange(rows) for rows in dataset.shard_rows])
    ids = read_rows(dataset, [Column("base", "n_tokens")], shards, rows)["id"]
    funnel = dataset.manifest["funnel"]
    assert len(np.unique(ids)) == len(ids) == funnel["out"] == UNITS * (PICTURES - REPEATS)
    assert funnel["in"] == funnel["out"] + sum(funnel["dropped"].values()) == UNITS * PICTURES


# ---------------------------------------------------------------------------------------------------------- Ray nodes


class Nodes:
    """A Ray cluster of this test's own: a head without CPUs, and nodes of one CPU each that can be killed whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        with socket.socket() as probe:
            probe.bind((HEAD_HOST, 0))
            port = probe.getsockname()[1]
        self.address = f"{HEAD_HOST}:{port}"
        self.leaders: dict[str, processes.Identity] = {}
        options = ["--head", "--port", str(port), "--num-cpus", "0", "--include-dashboard", "false"]
        self._start("head", HEAD_HOST, [*options, "--temp-dir", str(folder / "ray")])
        self._wait_for("head")

    def _start(self, name: str, ip: str, options: list[str]) -> None:
        argv = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address", ip]
        argv += ["--min-worker-port", "0", "--max-worker-port", "0", "--object-store-memory", str(100 * 2**20)]
        environment = {**os.environ, **SEVERAL_NODES, "RAY_USAGE_STATS_ENABLED": "0", "SPT_NOENV": "1"}
        environment[processes.MARK] = self._mark(name)
        log = self.folder / f"{name}.log"
        self.leaders[name] = processes.start([*argv, *options], environment, self.folder, log)

    def complete(self) -> None:
        """Have two nodes besides the head. Each has an address of its own: no driver takes it for its own node."""
        while len(self.leaders) < 3:
            self.started += 1
            name = f"node-{self.started}"
            self._start(name, f"127.0.1.{self.started}", ["--address", self.address, "--num-cpus", "1"])
            self._wait_for(name)  # one after the other: two that start together in one session may wait for ever

    def tasks(self) -> list[int]:
        """Processes in which a task runs now."""
        rows = [row for name in self.leaders for row in processes.members(self.leaders[name], self._mark(name))]
        return [row.pid for row in rows if _command(row.pid).startswith("ray::_run")]

    def kill_task(self, chance: random.Random) -> bool:
        """Whether there was one to kill."""
        running = self.tasks()
        return bool(running) and _kill(chance.choice(running))

    def kill_node(self, chance: random.Random) -> bool:
        """What a machine that loses its power does."""
        name = chance.choice([name for name in self.leaders if name != "head"])
        mark = self._mark(name)
        for row in processes.members(self.leaders[name], mark):
            _kill(row.pid)
        processes.end(self.leaders.pop(name), mark, 0)
        return True

    def close(self) -> None:
        for name in reversed(list(self.leaders)):
            processes.end(self.leaders.pop(name), self._mark(name), 5)

    def _mark(self, name: str) -> str:
        return f"{self.folder}/{MARK}/{name}"

    def _wait_for(self, name: str) -> None:
        log = self.folder / f"{name}.log"

        def started() -> bool:
            assert processes.is_alive(self.leaders[name]), log.read_text()[-2000:]
            return STARTED in log.read_text()

        wait_for(started, NODE_DEADLINE_S)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="gpk-", dir="/tmp"))  # short: Ray's sockets lie below it
    nodes = Nodes(folder)
    try:
        yield nodes
    finally:
        nodes.close()
        shutil.rmtree(folder, ignore_errors=True)


def seeds(first: int) -> list[Any]:
    """One seed for CI, and nineteen for the drill."""
    return [first, *(pytest.param(seed, marks=DRILL) for seed in range(first + 1, first + 20))]


def due_at(output: Path, corpus: Corpus, chance: random.Random) -> tuple[int, Callable[[], bool]]:
    """A moment, by how many of the build's objects (whole or half-written) are stored; and whether it has come."""
    objects = chance.randrange(1, len(corpus.objects) * 4 // 5)  # the last ones come after the last task
    return objects, lambda: sum(path.is_file() for path in output.rglob("*")) >= objects


@pytest.mark.parametrize("seed", seeds(0))
def test_a_build_whose_driver_is_killed_is_finished_by_the_next(
    corpus: Corpus, nodes: Nodes, tmp_path: Path, seed: int
) -> None:
    chance, output = random.Random(seed), tmp_path / "out"
    kind = ("inline", "ray")[seed % 2]
    if kind == "ray":
        nodes.complete()
    objects, due = due_at(output, corpus, chance)
    values = corpus.config(str(output), executor={"kind": kind, "workers": 2})
    build = start_build(values, tmp_path, RAY_ADDRESS=nodes.address, **SEVERAL_NODES)
    killed = kill_when(build, due, lambda: _kill(build.pid))
    _, stdout, stderr = finish(build)
    assert killed, f"it ended before it had {objects} objects: {stdout}{stderr}"
    # At once, while tasks of the first may still be at it; by this process alone.
    again = build_swept(parse(CorpusConfig, corpus.config(str(output)), "test"), lambda *now, images=0: None)
    wait_for(lambda: not nodes.tasks())
    check_whole(corpus, LocalStore(output), again)


@pytest.mark.parametrize("seed", seeds(100))
def test_a_build_one_of_whose_tasks_is_killed_goes_on_by_itself(
    corpus: Corpus, nodes: Nodes, tmp_path: Path, seed: int
) -> None:
    chance, output = random.Random(seed), tmp_path / "out"
    nodes.complete()
    _, due = due_at(output, corpus, chance)
    values = corpus.config(str(output), executor={"kind": "ray", "workers": 2})
    build = start_build(values, tmp_path, RAY_ADDRESS=nodes.address, **SEVERAL_NODES)
    killed = kill_when(build, due, lambda: nodes.kill_task(chance))
    code, stdout, stderr = finish(build)
    assert code == 0, stderr
    assert killed  # whether a retry is told depends on whether the task had handed in its result just before
    check_whole(corpus, LocalStore(output), json.loads(stdout))


@pytest.mark.parametrize("seed", seeds(200))
def test_a_build_that_loses_a_node_goes_on_with_the_others(
    corpus: Corpus, nodes: Nodes, tmp_path: Path, seed: int
) -> None:
    chance, output = random.Random(seed), tmp_path / "out"
    nodes.complete()
    objects, due = due_at(output, corpus, chance)
    values = corpus.config(str(output), executor={"kind": "ray", "workers": 2})
    build = start_build(values, tmp_path, RAY_ADDRESS=nodes.address, **SEVERAL_NODES)
    killed = kill_when(build, due, lambda: nodes.kill_node(chance))
    code, stdout, stderr = finish(build)
    assert killed, f"it ended before it had {objects} objects: {stdout}{stderr}"
    assert code == 0, stderr
    check_whole(corpus, LocalStore(output), json.loads(stdout))


# ------------------------------------------------------------------------------------------------------ S3, a bad link


def behind(link: FaultyLink) -> dict[str, str]:
    """The environment of a build that reaches its store by the link alone. Its tasks would have that of their node,
    which knows no store, so it is given to them as Ray gives it to the tasks of a submitted job."""
    store = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    store["AWS_ENDPOINT_URL"] = link.url
    return {**store, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": store}})}


def end_outage(link: FaultyLink, build: subprocess.Popen[str]) -> None:
    """After 4 s, or when somebody has felt it: the tasks of a killed node begin anew later than that."""
    time.sleep(4.0)
    while link.refused == 0 and build.poll() is None:
        time.sleep(0.1)
    link.down = False


@DRILL
@pytest.mark.parametrize("victim", ["driver", "task", "node"])
@pytest.mark.parametrize("seed", range(300, 304))
def test_a_build_into_a_real_s3_server_over_a_bad_link_survives_a_kill_of_any_kind(
    corpus: Corpus,
    nodes: Nodes,
    stack_env: Any,
    swift_uri: str,
    faulty_link: Callable[..., FaultyLink],
    tmp_path: Path,
    seed: int,
    victim: str,
) -> None:
    chance = random.Random(f"{seed} {victim}")
    direct, link = open_store(swift_uri), faulty_link(stack_env.s3)
    link.random, link.cut_share, link.busy_share, link.latency_s = chance, 0.02, 0.1, 0.002
    kind = "inline" if victim == "driver" and seed % 2 else "ray"
    if kind == "ray":
        nodes.complete()
    values = corpus.config(swift_uri, executor={"kind": kind, "workers": 2})

    def start() -> subprocess.Popen[str]:
        return start_build(values, tmp_path, RAY_ADDRESS=nodes.address, **SEVERAL_NODES, **behind(link))

    objects = chance.randrange(1, len(corpus.objects) * 4 // 5)
    build = start()
    kill = {
        "driver": lambda: _kill(build.pid),
        "task": lambda: nodes.kill_task(chance),
        "node": lambda: nodes.kill_node(chance),
    }[victim]
    due = lambda: link.connections > 0 and len(list(direct.list())) >= objects  # noqa: E731
    killed = kill_when(build, due, kill, poll_s=0.2)
    if victim == "driver":
        finish(build)
        wait_for(lambda: not nodes.tasks())  # so that what connects next is the next build
        begun = link.connections
        build = start()
        wait_for(lambda: link.connections > begun + 2)  # past the check of the store, which is meant to give up soon
    link.down = True
    outage = threading.Thread(target=end_outage, args=(link, build))
    outage.start()
    code, stdout, stderr = finish(build)
    outage.join()
    assert code == 0, stderr
    assert killed, f"it ended before it had {objects} objects: {stdout}{stderr}"
    assert link.cuts > 0 and link.refused > 0
    check_whole(corpus, direct, json.loads(stdout))
