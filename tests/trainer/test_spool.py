"""Each point arrives once, whatever dies when: the rule of the spool against a model of kills, outages and resumes."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import trainer.run
import trainer.tracking.background
import trainer.tracking.spool
from data_pipeline.storage import LocalStore
from trainer.checkpoint.manifest import committed, read_manifest
from trainer.config import TrainConfig
from trainer.engine.group import Group
from trainer.recipes import parse_train_config
from trainer.tracking.background import BackgroundTracker
from trainer.tracking.leftovers import UNDELIVERED, keep_undelivered, read_undelivered
from trainer.tracking.spool import BATCH_POINTS, Delivery, Point, ServerFailed, Spool, Superseded, points_of
from trainer.tracking.tracker import Record

BATCH = 16  # images per update
HELDOUT_EVERY = 3  # updates


class FakeServer:
    """Keeps one of equal key, time, step and value, as MLflow does. `answers`: what becomes of each batch sent."""

    def __init__(self) -> None:
        self.points: set[tuple[str, int, int, float]] = set()
        self.events: dict[tuple[int, int, str], str] = {}
        self.pictures: dict[str, bytes] = {}
        self.attempt = 0
        self.under_way: list[Point] = []  # sent by a killed attempt, on its way through the server
        self.answers: Callable[[], str] = lambda: "ok"

    def claim(self, attempt: int) -> int:
        if self.answers() == "dead":
            raise ServerFailed("connection refused")
        self.attempt = max(self.attempt, attempt)
        return self.attempt

    def newest_steps(self) -> dict[str, int]:
        steps: dict[str, int] = {}
        for name, _, images, _ in self.points:
            steps[name] = max(images, steps.get(name, -1))
        self.take(self.under_way)
        self.under_way = []
        return steps

    def send(self, points: list[Point], events: list[Record]) -> None:
        assert len(points) <= BATCH_POINTS or len({point.images for point in points}) == 1
        answer = self.answers()
        if answer in ("ok", "lost reply"):
            self.take(points)
            self.events.update({(e["images"], e["attempt"], e["event"]): e["text"] for e in events})
        if answer == "under way":
            self.under_way = points
        if answer != "ok":
            raise ServerFailed(answer)

    def send_picture(self, images: int, key: str, png: bytes) -> None:
        if self.answers() != "ok":
            raise ServerFailed("no room")
        self.pictures[key] = png

    def take(self, points: list[Point]) -> None:
        self.points.update((point.name, point.ms, point.images, point.value) for point in points)

    def times_each(self, name: str) -> dict[int, int]:
        return dict(Counter(images for key, _, images, _ in self.points if key == name))


class Run:
    """A model of a run: attempts, each with its spool; checkpoints hold what was not delivered."""

    def __init__(self) -> None:
        self.server = FakeServer()
        self.checkpoints: list[tuple[int, list[Record]]] = []
        self.left: list[Record] = []
        self.attempt, self.clock_ms = 0, 0
        self.end = 8 * BATCH
        self.heldout_at = {0}
        self.start(0)

    def start(self, fall_back: int) -> None:
        """The next attempt goes on from a checkpoint: the newest, or an older one past damage."""
        self.attempt += 1
        self.spool = Spool()
        self.delivery = Delivery(self.spool, self.server, self.attempt, lambda seconds: None)
        self.position = 0
        for record in self.left:
            self.spool.put(record)
        if self.checkpoints:
            del self.checkpoints[max(1, len(self.checkpoints) - fall_back) :]
            self.position, undelivered = self.checkpoints[-1]
            for record in undelivered:
                self.spool.put(record)
        if self.position == 0:
            self.evaluate()

    def log(self, names: list[str]) -> None:
        self.clock_ms += 1  # another time and another value whenever the same update is done again
        values = {name: float(self.clock_ms) for name in names}
        self.spool.put({"images": self.position, "ms": self.clock_ms, "values": values})

    def update(self) -> None:
        if self.position < self.end:
            self.position += BATCH
            self.log(["loss", "images_per_s"])
            if self.position % (HELDOUT_EVERY * BATCH) == 0:
                self.evaluate()

    def evaluate(self) -> None:
        self.heldout_at.add(self.position)
        self.log(["heldout/mse"])

    def save(self) -> None:
        self.checkpoints.append((self.position, self.spool.records()))

    def deliver(self, answer: str) -> None:
        self.server.answers = lambda: answer
        with suppress(ServerFailed):
            self.delivery.deliver()

    def finish(self, answer: str) -> None:
        """To the end as the loop does it; what a dead server did not take is left in the store."""
        while self.position < self.end:
            self.update()
        self.save()
        self.evaluate()
        for _ in range(4):
            self.deliver(answer)
        self.left = self.spool.records()


answers = st.sampled_from(["ok", "dead", "refused", "lost reply"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 4)),
        st.tuples(st.just("save"), st.just(0)),
        st.tuples(st.just("deliver"), answers),
        st.tuples(st.just("kill"), st.integers(0, 3)),
        st.tuples(st.just("kill in mid-batch"), st.integers(0, 3)),
        st.tuples(st.just("finish"), answers),
    ),
    max_size=40,
)


@settings(max_examples=400, deadline=None)
@given(steps)
def test_each_update_has_one_point_of_each_metric_whatever_dies_when(steps: list[tuple[str, Any]]) -> None:
    run = Run()
    for kind, value in steps:
        if kind == "update":
            for _ in range(value):
                run.update()
        elif kind == "save":
            run.save()
        elif kind == "deliver":
            run.deliver(value)
        elif kind == "finish":
            run.finish(value)
            run.end += BATCH  # the user trains on: nothing evaluates at the old end again
            run.start(0)
        else:
            if kind == "kill in mid-batch":
                run.deliver("under way")
            run.start(value)
    run.finish("ok")
    updates = dict.fromkeys(range(BATCH, run.end + 1, BATCH), 1)
    assert run.server.times_each("loss") == run.server.times_each("images_per_s") == updates
    assert run.server.times_each("heldout/mse") == dict.fromkeys(run.heldout_at, 1)


def test_a_batch_that_is_sent_again_is_equal_in_everything() -> None:
    server, spool = FakeServer(), Spool()
    delivery = Delivery(spool, server, 1, lambda seconds: None)
    spool.put({"images": 16, "ms": 5, "values": {"loss": 1.0}})
    sent: list[list[Point]] = []
    take = server.send

    def send(points: list[Point], events: list[Record]) -> None:
        sent.append(points)
        take(points, events)

    server.send = send  # type: ignore[method-assign]
    for answer in ("lost reply", "lost reply", "ok"):
        server.answers = iter(["ok", answer]).__next__
        with suppress(ServerFailed):
            delivery.deliver()
    assert len(sent) == 3 and sent[0] == sent[1] == sent[2]
    assert server.times_each("loss") == {16: 1} and spool.empty()


def test_an_attempt_says_nothing_once_a_newer_one_has_spoken() -> None:
    server, spool = FakeServer(), Spool()
    spool.put({"images": 16, "ms": 5, "values": {"loss": 1.0}})
    server.claim(3)
    with pytest.raises(Superseded, match="attempt 3"):
        Delivery(spool, server, 2, lambda seconds: None).deliver()
    assert not server.points


def test_a_full_spool_refuses_the_newest_and_counts_it() -> None:
    spool = Spool(limit=2)
    for images in (16, 32, 48):
        spool.put({"images": images, "ms": 0, "values": {"loss": 1.0}})
    assert [record["images"] for record in spool.records()] == [16, 32] and spool.lost == 1


@pytest.fixture(autouse=True)
def quick_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tracker's thread waits for by the clock alone."""
    monkeypatch.setattr(trainer.tracking.background, "GATHER_S", 0.01)
    monkeypatch.setattr(trainer.tracking.background, "BACKOFF_S", (0.01,))
    monkeypatch.setattr(trainer.tracking.spool, "SETTLE_S", 0.01)


def tracker_on(server: FakeServer, flush_s: float = 30) -> BackgroundTracker:
    return BackgroundTracker(lambda: server, 1, flush_s)


def test_values_that_are_no_numbers_become_events_and_equal_events_keep_apart() -> None:
    server = FakeServer()
    tracker = tracker_on(server)
    tracker.log(16, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    assert tracker.close() == []
    assert {point[0] for point in server.points} == {"lr"}
    assert server.events == {(16, 1, "not-finite"): "grad_norm is inf", (16, 1, "not-finite-2"): "loss is nan"}


def test_a_dead_server_takes_nothing_from_the_caller_and_all_is_left_to_replay() -> None:
    dead, alive = FakeServer(), FakeServer()
    dead.answers = lambda: "dead"
    tracker = tracker_on(dead, flush_s=0.1)
    for images in range(16, 160, 16):
        tracker.log(images, {"loss": 1.0})
    tracker.event(160, "resume", "again")
    left = tracker.close()
    assert (
        [record["images"] for record in left]
        == list(range(16, 176, 16))
        == [r["images"] for r in tracker.undelivered()]
    )
    again = tracker_on(alive)
    again.replay(left)
    assert again.close() == [] and alive.times_each("loss") == dict.fromkeys(range(16, 160, 16), 1)
    assert alive.events == {(160, 1, "resume"): "again"}


def test_an_exception_that_nobody_foresaw_is_an_outage_like_another(caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer()
    faults = iter([KeyError("secret"), RuntimeError("secret")])

    def answer() -> str:
        for fault in faults:
            raise fault
        return "ok"

    server.answers = answer
    tracker = tracker_on(server)
    tracker.log(16, {"loss": 1.0})
    assert tracker.close() == [] and server.times_each("loss") == {16: 1}
    assert "unforeseen KeyError" in caplog.text and "secret" not in caplog.text


def test_a_picture_that_the_server_will_not_take_costs_an_event_and_no_point() -> None:
    server = FakeServer()

    def refuse(images: int, key: str, png: bytes) -> None:
        raise ServerFailed("no room")

    server.send_picture = refuse  # type: ignore[method-assign]
    tracker = tracker_on(server)
    tracker.picture(16, "samples/a.png", b"png")
    tracker.log(16, {"loss": 1.0})
    assert tracker.close() == [] and server.times_each("loss") == {16: 1}
    assert "no room" in server.events[16, 1, "picture-failed"]


def raw_pixels(png: bytes) -> bytes:
    return Image.open(io.BytesIO(png)).tobytes()


@pytest.mark.usefixtures("one_thread")
def test_what_a_dead_server_did_not_take_waits_in_checkpoints_and_store_until_it_does(
    train_values: Callable[..., dict[str, Any]], dataset_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeServer()
    flush_s = 0.1

    def make_tracker(config: TrainConfig, attempt: int, run_id: str | None) -> BackgroundTracker:
        return BackgroundTracker(lambda: server, attempt, flush_s)

    monkeypatch.setattr(trainer.run, "make_tracker", make_tracker)
    heldout = {"dataset": dataset_uri, "images": 16, "every_images": 32}

    def train(images: int) -> LocalStore:
        values = train_values(images=images, heldout=heldout, samples={"weights": "both", "sampling": {"spacing": 2}})
        config = parse_train_config(values, "test")
        trainer.run.train(config.model_dump(mode="json"), trainer.run.prepare_run(config), Group(), lambda event: None)
        return LocalStore(Path(config.store or ""))

    server.answers = lambda: "dead"
    store = train(32)
    manifest = read_manifest(store, committed(store)[0].manifest_key)
    waiting = [point for point in points_of(list(manifest.tracking)) if point.name == "loss/total"]
    assert [point.images for point in waiting] == [16, 32] and store.exists(UNDELIVERED)

    server.answers, flush_s = lambda: "ok", 60.0
    train(48)
    for name in ("loss/total", "lr", "time/save_s"):
        assert server.times_each(name) == dict.fromkeys((16, 32, 48), 1)
    assert server.times_each("heldout/total") == dict.fromkeys((0, 32, 48), 1)
    assert [(images, attempt) for images, attempt, kind in server.events if kind == "resume"] == [(32, 2)]
    assert not store.exists(UNDELIVERED)
    ema, raw = (server.pictures[f"samples/images-000000048-{weights}.png"] for weights in ("ema", "raw"))
    assert store.get("samples/images-000000048-raw.png") == raw and raw_pixels(raw) != raw_pixels(ema)


def test_a_damaged_file_of_what_waited_is_left_out_and_costs_nothing_else(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    records = [{"images": 16, "ms": 5, "values": {"loss": 1.0}}]
    keep_undelivered(store, records)
    assert read_undelivered(store) == records
    path = tmp_path / UNDELIVERED
    path.write_bytes(path.read_bytes().replace(b"16", b"17"))
    assert read_undelivered(store) == []
    keep_undelivered(store, [])
    assert not path.exists()
