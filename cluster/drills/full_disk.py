"""R6: the disk under the store, the cache or the builder is full: training goes on and the next save with room commits;
batches come from the store itself; a build says so in one line, and the same command ends with the same dataset.

Each case runs in a process of its own that alone sees the small disk (`python -m cluster.drills.full_disk CASE …`), so
that no root is needed; what runs there is in `CASES`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cluster.drills.faulty_store import expected_ids
from cluster.drills.scoreboard import CannotRun, Score
from cluster.drills.scratch import (
    BATCH,
    Scratch,
    Wishes,
    build_dataset,
    consumed_ids,
    corpus_config,
    environment,
    resumes,
    tracking_of,
    write_corpus,
)
from cluster.drills.servers import s3_server
from cluster.faults import fill_disk, make_room, on_small_disk, why_no_small_disk
from cluster.launch import Event
from cluster.training import train_run
from data_pipeline.errors import UserError
from data_pipeline.shards import dataset_ids, open_dataset
from data_pipeline.storage import open_store
from trainer.checkpoint.inspect import verify_checkpoints
from trainer.checkpoint.manifest import committed
from trainer.tracking.jsonl import read_events

DISK_BYTES = 256 * 2**20  # room for several checkpoints
DEADLINE_S = 5.0  # of a save, so that those that meet the full disk are given up while it is full
SAVES = 2  # that fail for want of room, and then that commit
MOST_IMAGES = 5000 * BATCH

Result = tuple[dict[str, Any], list[str]]  # figures, broken promises


def run(scratch: Scratch) -> Score:
    mount = scratch.folder / "small-disk"
    mount.mkdir()
    if reason := why_no_small_disk(mount):
        raise CannotRun(reason)
    figures: dict[str, Any] = {}
    failures: list[str] = []
    for case in CASES:
        with ExitStack() as stack:
            try:
                figures[case], broken = on_the_disk(case, scratch, mount, dataset_of(case, scratch, stack))
            except CannotRun as missing:
                figures[case], broken = {}, [f"cannot run here: {missing}"]
        failures += [f"{case}: {line}" for line in broken]
        scratch.tell(f"full disk under the {case}: {len(broken)} broken promises")
    return Score(len(CASES), figures, failures)


def dataset_of(case: str, scratch: Scratch, stack: ExitStack) -> str:
    """The case's dataset: for the cache one in a bucket, whose server runs until `stack` is closed."""
    if case == "store":
        return scratch.dataset
    if case == "cache":
        server = stack.enter_context(s3_server(scratch.folder / "s3-cache", scratch.tell))
        stack.enter_context(environment(server.environment))
        return build_dataset(scratch.folder / "corpus-cache", server.uri("dataset"))
    return ""  # the builder makes its own


def on_the_disk(case: str, scratch: Scratch, mount: Path, dataset: str) -> Result:
    """What the case in `CASES` returns, run where the disk is."""
    about = {"folder": str(scratch.folder / "cases" / case), "seed": scratch.wishes.seed, "dataset": dataset}
    argv = [sys.executable, "-m", "cluster.drills.full_disk", case, str(mount), json.dumps(about)]
    done = subprocess.run(on_small_disk(mount, DISK_BYTES, argv), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {}, [f"died with exit code {done.returncode}"]
    figures, failures = json.loads(done.stdout.splitlines()[-1])
    return figures, failures


# ---------------------------------------------------------------------------------------- inside, where the disk is


def store_case(scratch: Scratch, mount: Path) -> Result:
    """The store on the disk, which is full from the first steps until saves have failed; the run ends once others have
    committed."""
    config = scratch.config(
        "full",
        store=str(mount / "run"),
        images=MOST_IMAGES,
        launcher={"workers": 2},
        checkpoint={"every_images": BATCH, "deadline_s": DEADLINE_S, "keep_newest": 2},
    )
    store, stop = open_store(str(mount / "run")), threading.Event()
    filled: list[int] = []  # positions
    room: list[int] = []

    def on_event(event: Event) -> None:
        if event["event"] != "progress":
            return
        if not filled and committed(store):
            fill_disk(mount)
            filled.append(event["images"])
        elif filled and not room and len(read_events(tracking_of(config), "save-failed")) >= SAVES:
            make_room(mount)
            room.append(event["images"])
        elif room and sum(name.position > room[0] for name in committed(store)) >= SAVES:
            stop.set()

    try:
        result = train_run(config, on_event, stop)
    except (UserError, OSError) as error:
        return {"deaths": 1}, [f"died: {error}"]
    kept = sorted(name.position for name in committed(store))
    failures = [f"{bad['part']}: found {bad['found']}" for bad in verify_checkpoints(store.uri)]
    if not stop.is_set() or kept[-1] != result["images"]:
        failures.append(f"filled at {filled}, room at {room}, checkpoints at {kept}, ended at {result['images']}")
    figures = {"deaths": 0, "full_from": filled, "room_from": room, "failed_saves": result["failed_saves"]}
    return figures | {"newest_checkpoint": kept[-1], "ended_at": result["images"]}, failures


def cache_case(scratch: Scratch, mount: Path) -> Result:
    """The cache on the disk, which is full from the start; the dataset is in a bucket."""
    config = scratch.config("uncached", images=12 * BATCH, launcher={"workers": 2})
    (mount / "cache").mkdir()
    fill_disk(mount)
    with environment({"GLIDEPATH_HOME": str(mount)}):
        try:
            scratch.train(config)
        except (UserError, OSError) as error:
            return {"deaths": 1}, [f"died: {error}"]
    expected = expected_ids(scratch.dataset, config)
    wrong = sum(consumed_ids(config).get(position) != batch for position, batch in expected.items())
    failures = [f"{wrong} batches hold other samples"] if wrong else []
    failures += [f"died and went on: {line['text']}" for line in resumes(config)]
    if cached := files_in(mount / "cache"):
        failures.append(f"the full disk holds {cached}")
    make_room(mount)
    with environment({"GLIDEPATH_HOME": str(mount)}):  # with room a shard comes to lie here, so this is the cache
        name = open_dataset(scratch.dataset).fetch("base", 0)
    if (cached := files_in(mount / "cache")) != [name]:
        failures.append(f"with room the cache holds {cached} instead of {name}")
    return {"deaths": 0, "batches": len(expected), "batches_with_other_samples": wrong}, failures


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def builder_case(scratch: Scratch, mount: Path) -> Result:
    """Staging, shards and temporary files on the disk; the same command, before and after there is room."""
    tar = write_corpus(scratch.folder / "pictures.tar")
    elsewhere = scratch.folder / "elsewhere"
    config = scratch.folder / "corpus.yaml"
    output = mount / "dataset"
    config.write_text(json.dumps(corpus_config(tar, str(elsewhere)).model_dump(mode="json")))
    (mount / "temporary").mkdir()

    def build(to: Path) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "cluster.cli", "corpus", "build", str(config), f"output={to}", "--json"]
        inside = os.environ | {"TMPDIR": str(mount / "temporary")}
        return subprocess.run(argv, env=inside, capture_output=True, text=True, check=False)

    expected = json.loads(build(elsewhere).stdout)["dataset_id"]
    fill_disk(mount, leave_bytes=2**20)  # room for the beginning of it
    full = build(output)
    error = json.loads(full.stdout or "{}").get("error", "")
    failures = []
    if full.returncode != 1 or "No space left" not in error or "\n" in error or "Traceback" in full.stderr:
        failures.append(f"exit code {full.returncode}, {error!r} instead of one line that names the disk")
    if dataset_ids(open_store(str(output))):
        failures.append("a dataset is visible that was never finished")
    make_room(mount)
    again = build(output)
    found = json.loads(again.stdout or "{}").get("dataset_id")
    if found != expected:
        failures.append(f"with room: exit code {again.returncode}, dataset {found} instead of {expected}")
    return {"error": error, "dataset_id": found}, failures


CASES: Mapping[str, Callable[[Scratch, Path], Result]] = {
    "store": store_case,
    "cache": cache_case,
    "builder": builder_case,
}


def main() -> None:
    case, mount, about = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    scratch = Scratch(Path(about["folder"]), Wishes(seed=about["seed"], dataset=about["dataset"]), print)
    scratch.folder.mkdir(parents=True)
    print(json.dumps(CASES[case](scratch, mount)))


if __name__ == "__main__":
    main()
