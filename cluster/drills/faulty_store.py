"""R4: a run whose store and dataset lie behind a link that fails in every way a network and a busy server do: it never
dies, reads what it should, and each save begun after the store answers again is committed.

Two runs: one has its dataset in the cache, so that it trains through the faults and saves into them; the other has no
cache, so that each of its batches is a read through them, and it begins with a checkpoint.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cluster.drills.scoreboard import Score
from cluster.drills.scratch import (
    BATCH,
    KEPT,
    Scratch,
    build_dataset,
    consumed_ids,
    environment,
    resumes,
    tracking_of,
)
from cluster.drills.servers import S3Server, s3_server
from cluster.faults import FaultyLink, faulty_link
from cluster.launch import Event
from cluster.training import train_run
from data_pipeline.errors import UserError
from data_pipeline.order import SampleOrder
from data_pipeline.shards import open_dataset
from data_pipeline.storage import open_store
from trainer.checkpoint.inspect import verify_checkpoints
from trainer.checkpoint.manifest import committed
from trainer.config import TrainConfig
from trainer.tracking.jsonl import read_events

log = logging.getLogger(__name__)

# Name -> what is set on the link meanwhile, and the count that tells of it.
PHASES: dict[str, tuple[dict[str, Any], str]] = {
    "503": ({"busy_share": 0.3}, "busy"),
    "500": ({"error_share": 0.3}, "errors"),
    "resets": ({"reset_share": 0.2}, "resets"),
    "truncation": ({"cut_share": 0.2, "upload_cut_share": 0.002}, "cuts"),  # an upload has hundreds of chunks
    "latency": ({"latency_s": 2.0}, "requests"),
    "stalls": ({"stall_share": 0.1, "stall_s": 2.0}, "stalls"),
}
OUTAGE = ({"down": True}, "refused")
MIXED = {"busy_share": 0.1, "error_share": 0.1, "reset_share": 0.05, "cut_share": 0.05}
PHASES_PER_OUTAGE = 4  # each phase is as long as this part of the outage, or until it has done something
SAVES_AFTER = 3  # committed once the link is healed, before the run is stopped
PATIENCE_S = 600.0  # for those
POLL_S = 0.5
ENDLESS = 10**6 * BATCH
READ_IMAGES = 20 * BATCH


def run(scratch: Scratch) -> Score:
    with s3_server(scratch.folder / "s3-faulty", scratch.tell) as server, environment(server.environment):
        # Its own, whatever dataset is wished for: only what lies in this server is read through the link.
        dataset = build_dataset(scratch.folder / "corpus-s3", server.uri("dataset"))
        saves = saves_through_faults(scratch, server, dataset)
        reads = reads_through_faults(scratch, server, dataset)
    figures = {"saves": saves.figures, "reads": reads.figures}
    return Score(saves.faults + reads.faults, figures, (*saves.failures, *reads.failures))


def saves_through_faults(scratch: Scratch, server: S3Server, dataset: str) -> Score:
    settings = {"every_images": BATCH, "deadline_s": scratch.wishes.outage_s / 2, "keep_newest": KEPT}
    config = scratch.config(
        "saves",
        store=server.uri("saves"),
        dataset=dataset,
        images=ENDLESS,
        launcher={"workers": 2},
        checkpoint=settings,
    )
    with broken_server(server, scratch.wishes.seed) as link:
        script = Script(scratch, link, server.uri("saves"))
        failures = survive(config, script.on_event, script.over)
        script.end()
    failures += script.failures
    begun = [int(found[1]) for line in lost_saves(config) if (found := re.search(r"images-(\d+)", line["text"]))]
    late = [position for position in begun if position > script.healed_at]
    failures += [f"the save at {position} began after the store was back, and is lost" for position in late]
    done = sorted(name.position for name in committed(open_store(server.uri("saves"))))
    failures += [f"{bad['part']}: found {bad['found']}" for bad in verify_checkpoints(server.uri("saves"))]
    saved_after = sum(position > script.healed_at for position in done)
    if saved_after < SAVES_AFTER:
        failures.append(f"{saved_after} saves committed after the faults, expected at least {SAVES_AFTER}")
    if done[-1:] != [script.position]:
        failures.append(f"the newest checkpoint is at {done[-1:]}, the run ended at {script.position}")
    figures = {
        "deaths": sum(failure.startswith("died") for failure in failures),
        "images": script.position,
        "checkpoints_kept": len(done),
        "of_them_saved_after_the_faults": saved_after,
        "saves_lost_in_the_faults": len(begun) - len(late),
        "saves_lost_after_them": len(late),
        "steps_by_phase": script.steps,
        "faults": faults_of(link),
    }
    return Score(sum(faults_of(link).values()), figures, failures)


def reads_through_faults(scratch: Scratch, server: S3Server, dataset: str) -> Score:
    two = {"workers": 2}
    config = scratch.config("reads", store=server.uri("reads"), dataset=dataset, images=READ_IMAGES, launcher=two)
    scratch.train(config.model_copy(update={"images": 2 * BATCH}))  # so that a checkpoint is read through them too
    with broken_server(server, scratch.wishes.seed) as link, environment({"GLIDEPATH_CACHE_BYTES": "0"}):
        set_link(link, MIXED)
        outages: list[threading.Timer] = []

        def on_event(event: Event) -> None:
            if event["event"] == "progress" and not outages:
                link.down = True
                outages.append(threading.Timer(scratch.wishes.outage_s / 2, setattr, (link, "down", False)))
                outages[0].start()

        failures = survive(config, on_event, threading.Event(), resumed=1)
        for outage in outages:
            outage.join()
    ids, expected = consumed_ids(config), expected_ids(dataset, config)
    wrong = sum(ids.get(position) != batch for position, batch in expected.items())
    if wrong:
        failures.append(f"{wrong} of {len(expected)} batches hold other samples")
    faults = sum(faults_of(link).values())
    if not faults:
        failures.append("no read met a fault")
    scratch.tell(f"read {len(ids)} batches through {faults} faults")
    deaths = sum(failure.startswith("died") for failure in failures)
    figures = {"deaths": deaths, "batches": len(ids), "batches_with_other_samples": wrong, "faults": faults_of(link)}
    return Score(faults, figures, failures)


@contextmanager
def broken_server(server: S3Server, seed: int) -> Iterator[FaultyLink]:
    """The way to the server for this process and what it starts; at the end it is healed, and then gone."""
    with faulty_link(server.url, seed) as link:
        with environment({"AWS_ENDPOINT_URL": link.url}):
            yield link
        link.heal()


def survive(config: TrainConfig, on_event: Any, stop: threading.Event, resumed: int = 0) -> list[str]:
    """Train; a line if it died. `resumed`: how often it goes on from a checkpoint without having died."""
    try:
        train_run(config, on_event, stop)
    except (UserError, OSError) as error:
        return [f"died: {error}"]
    texts = [line["text"] for line in resumes(config)]
    return [] if len(texts) == resumed else [f"died: expected {resumed} resumes, found {texts}"]


class Script:
    """The phases of the link while a run trains: `on_event` begins it, `over` is set when it wants the run to end."""

    def __init__(self, scratch: Scratch, link: FaultyLink, store_uri: str) -> None:
        self._scratch, self._link, self._uri = scratch, link, store_uri
        self._stepped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.over = threading.Event()
        self.position = 0
        self.healed_at = ENDLESS  # until then no save counts as one after the faults
        self.steps: dict[str, int] = {}
        self.failures: list[str] = []

    def on_event(self, event: Event) -> None:
        if event["event"] == "progress":
            self.position = event["images"]
            self._stepped.set()
            if not self._thread.is_alive() and not self.over.is_set():
                self._thread.start()

    def end(self) -> None:
        """The run has ended, as it was told to or not."""
        self.over.set()
        if self._thread.ident:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._play()
        except OSError as error:
            self.failures.append(f"the store does not answer after the faults: {error}")
        except Exception as error:  # else it would end with this thread, unheard
            log.exception("the script of the faults")
            self.failures.append(f"the script of the faults ended by {type(error).__name__}: {error}")
        finally:
            self.over.set()  # nobody else would end the run

    def _play(self) -> None:
        outage_s = self._scratch.wishes.outage_s
        for name, (settings, count) in PHASES.items():
            self._phase(name, settings, count, outage_s / PHASES_PER_OUTAGE)
        self._phase("outage", *OUTAGE, outage_s)
        self._link.heal()
        self._stepped.clear()
        self._stepped.wait(PATIENCE_S)  # a save may have begun in the moment before
        self.healed_at = self.position
        until = time.monotonic() + PATIENCE_S
        while self._commits_since() < SAVES_AFTER and not self.over.wait(POLL_S):
            if time.monotonic() > until:
                self.failures.append(f"{self._commits_since()} saves committed in {PATIENCE_S:.0f} s after the faults")
                break

    def _phase(self, name: str, settings: dict[str, Any], count: str, seconds: float) -> None:
        link, began, counted = self._link, self.position, getattr(self._link, count)
        until = time.monotonic() + PATIENCE_S
        set_link(link, settings)
        self.over.wait(seconds)
        while getattr(link, count) == counted and not self.over.wait(POLL_S):
            if time.monotonic() > until:
                self.failures.append(f"{name}: nothing met it in {PATIENCE_S:.0f} s")
                break
        link.heal()
        self.steps[name] = (self.position - began) // BATCH
        self._scratch.tell(f"{name} for {seconds:.0f} s: {self.steps[name]} steps")

    def _commits_since(self) -> int:
        return sum(name.position > self.healed_at for name in committed(open_store(self._uri)))


def set_link(link: FaultyLink, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(link, name, value)


def faults_of(link: FaultyLink) -> dict[str, int]:
    names = ("busy", "errors", "resets", "cuts", "stalls", "refused")
    return {name: getattr(link, name) for name in names}


def lost_saves(config: TrainConfig) -> list[dict[str, Any]]:
    return read_events(tracking_of(config), "save-failed")


def expected_ids(dataset_uri: str, config: TrainConfig) -> dict[int, list[int]]:
    """position -> ids of the global batch, from the order and the shards themselves."""

    dataset = open_dataset(dataset_uri)
    order = SampleOrder(dataset.id, dataset.shard_rows, config.seed, config.batch)
    ids: dict[int, list[int]] = {}
    for start in range(0, config.images, config.batch):
        shards, rows = order.rows_at(np.arange(start, start + config.batch, dtype=np.int64))
        ids[start] = [id_at(dataset, int(shard), int(row)) for shard, row in zip(shards, rows, strict=True)]
    return ids


def id_at(dataset: Any, shard: int, row: int) -> int:
    reader = dataset.shard("base", shard)
    return int(reader.batch(row // reader.batch_rows).column("id")[row % reader.batch_rows].as_py())
