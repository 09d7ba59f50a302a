"""The training loop of one rank: fetch, step, log, maybe save, sample or evaluate.

Always holds: it knows no recipe, store or tracker by name; what happens when follows from the position alone, so every
rank does it at the same step. Called by `trainer.run`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_pipeline.draws import Draws, key64
from data_pipeline.loader import Column, Loader, MicroBatch, micro_batches
from data_pipeline.shards import Dataset
from trainer.checkpoint.load import restore_newest
from trainer.checkpoint.manifest import CheckpointName
from trainer.checkpoint.save import Saver
from trainer.config import TrainConfig
from trainer.engine.engine import Interval
from trainer.evaluation.heldout import first_rows, heldout_bits_per_dimension, heldout_loss
from trainer.guard import GuardHistory
from trainer.metrics import StepTimer, memory
from trainer.pictures import grid, png_bytes
from trainer.recipes import make_recipe
from trainer.recipes.recipe import Pixels, pinned
from trainer.sampling import draw_images
from trainer.step import Trainee, train_step
from trainer.stop import StopWatch
from trainer.tracking.jsonl import append_line
from trainer.tracking.tracker import Tracker

log = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]
GRID_PICTURES = 8
CONSUMED = "consumed.jsonl"
REMOVAL_PATIENCE_S = 60.0  # at the end of a run, for checkpoints that need not stay


def newest_loss(figures: Mapping[str, float]) -> float:
    """The loss that a run is summed up by: the total of its first phase."""
    return next(value for name, value in figures.items() if name.endswith("loss/total"))


@contextmanager
def ema_modules(trainee: Trainee) -> Iterator[Mapping[str, nn.Module]]:
    """The parts with their EMA weights, in evaluation mode. A collective call."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(engine.weights("ema")) for name, engine in trainee.engines.items()}


class TrainingLoop:
    """One rank of one attempt. `restore`, then `train`."""

    def __init__(
        self,
        trainee: Trainee,
        dataset: Dataset,
        heldout: Dataset | None,
        saver: Saver,
        tracker: Tracker,
        consumed: Path | None,
        report: Report,
    ) -> None:
        """`consumed`: the file that lists the ids of every global batch; `report` gets rank 0's progress and result."""
        self.trainee, self.dataset, self.heldout, self.saver = trainee, dataset, heldout, saver
        self.tracker, self.consumed, self.report = tracker, consumed, report
        self.config: TrainConfig = trainee.config
        self.group, self.store = trainee.group, saver.store
        self.order = dataset.order(self.config.seed, self.config.batch)
        self.timer = StepTimer()
        self.position = 0  # images consumed
        self.saved = -1  # position of the newest save that was begun
        self.save_owed = False  # one is due and has not begun
        self.delayed_saves = 0  # that could not begin when they were due, for the one before was under way
        self.save_begun_s = time.monotonic()  # rank 0's counts
        self.heldout_at_0: dict[str, float] = {}  # known to the attempt that began there
        self.evaluated: tuple[int, dict[str, float]] = (-1, {})  # where held-out figures were last taken, and which
        self.substituted_rows = 0  # that took the place of damaged ones, in this attempt
        self.damaged: set[tuple[int, int]] = set()  # the places that rank 0 has told of
        self.stopped = False  # a stop was requested, and all ranks agreed to it
        self.checkpoint: CheckpointName | None = None  # newest that this rank restored or saw committed

    def restore(self) -> None:
        """Continue from the newest checkpoint that verifies, or start at 0."""
        engines = self.trainee.engines
        wanted = [interval for engine in engines.values() for interval in engine.wanted()]
        identity = self.saver.identity
        found = restore_newest(self.store, self.group, wanted, identity.parameters, self.order.state(0), identity.run)
        if found is None:
            return
        name, manifest = found.name, found.manifest
        if self.saver.retention is not None:
            self.saver.retention.began_from(name)
        for part, engine in engines.items():
            engine.loaded(manifest.optimizer_steps[part], manifest.loss_scale.get(part, {}))
        if state := self.trainee.recipe.state():
            state.load(manifest.recipe_state)
        self.trainee.guards = {part: GuardHistory.from_document(document) for part, document in manifest.guard.items()}
        self.checkpoint, self.position, self.saved = name, name.position, name.position
        self.tracker.replay(manifest.tracking)
        for damage in found.passed_over:
            self.say("fallback", damage)
        self.say("resume", f"from {name}, world size {manifest.world_size} then, {self.group.world_size} now")

    def train(self) -> None:
        config = self.config
        if self.position == 0:
            self.heldout_at_0 = self.evaluate()
        cut = micro_batches(config.batch, self.group.rank, self.group.world_size, config.micro_batch_size())
        recipe, ranks_here = self.trainee.recipe, self.group.ranks_here()
        device = self.group.device
        prepare = pinned(recipe.prepare, device) if device.type == "cuda" else recipe.prepare
        loader = Loader(self.dataset, self.order, recipe.columns, prepare, cut, config.loader, ranks_here)
        batches = loader.batches(self.position, config.images)
        self.saver.memory.reserve(self.shard_view())
        self.save_begun_s = time.monotonic()
        self.timer.finish(0)
        with StopWatch(self.store, self.saver.identity.attempt, watching=self.group.rank == 0) as stop:
            while self.position < config.images and not self.stopped:
                with self.timer.section("data"):
                    micro_batches_of_step = next(batches)
                with self.timer.section("update"):
                    figures = train_step(self.trainee, micro_batches_of_step, self.position)
                if config.loader.on_damage == "substitute":
                    figures["substituted_rows"] = self.count_substituted(micro_batches_of_step)
                self.log_consumed(micro_batches_of_step)
                self.position += config.batch
                self.log(figures)
                if self.due(config.samples.every_images):
                    self.sample()
                if config.heldout and self.due(config.heldout.every_images):
                    self.evaluate()
                # Last: a run that goes on from here does not pass this position's grid and figures again.
                self.save_or_stop(stop.asked)
        self.finish()

    def save_or_stop(self, stop_asked: bool) -> None:
        """Decided by all ranks in one collective call. A due save that meets the one before it, still under way on some
        rank, waits for its end and keeps nobody from training; what ends the run has a save of its own."""
        if failed := self.saver.poll():
            self.say("save-failed", str(failed))
        mine = torch.tensor([stop_asked, self.due_by_clock(), self.saver.busy], dtype=torch.int64)
        stopped, by_clock, busy = map(bool, self.group.sum_(mine).tolist())
        due = by_clock or self.due(self.config.checkpoint.every_images)
        if self.position >= self.config.images or stopped:
            self.stopped = stopped and self.position < self.config.images
        elif not busy and (due or self.save_owed):
            self.save()
        elif due and not self.save_owed:
            self.save_owed = True
            self.delayed_saves += 1
            self.say("save-delayed", f"due at {self.position} images; it begins when the one before it has ended")

    def due_by_clock(self) -> bool:
        """Rank 0's clock decides: others tell another time."""
        minutes = self.config.checkpoint.every_minutes
        return self.group.rank == 0 and minutes is not None and time.monotonic() - self.save_begun_s >= 60 * minutes

    def due(self, every_images: int) -> bool:
        """Whether the last step reached a multiple of `every_images`; the end has its own save and figures."""
        reached = self.position // every_images > (self.position - self.config.batch) // every_images
        return reached and self.position < self.config.images

    def log(self, figures: dict[str, float | str]) -> None:
        position = self.position
        for name, reason in figures.items():
            if isinstance(reason, str):
                self.say("skip", f"{name.removesuffix('skipped')} {reason}".strip())
        values = {name: value for name, value in figures.items() if not isinstance(value, str)}
        values.update(self.timer.finish(self.config.batch) | memory())
        self.tracker.log(position, values)
        if self.group.rank == 0:
            self.report({"event": "progress", "images": position, "loss": newest_loss(values)} | values)

    def count_substituted(self, micro_batches_of_step: list[MicroBatch]) -> int:
        """Rows of the global batch that took the place of damaged ones. A collective call: every rank brings its own
        count, and the place of the first; rank 0 tells of each place once."""
        places = [place for micro in micro_batches_of_step for place in micro.replaced]
        found = torch.zeros(self.group.world_size, 3, dtype=torch.int64)
        if places:
            shard, batch = places[0]
            found[self.group.rank] = torch.tensor([len(places), shard, -1 if batch is None else batch])
        found = self.group.sum_(found)
        for rows, shard, batch in found.tolist():
            if rows and (shard, batch) not in self.damaged:
                self.damaged.add((shard, batch))
                where = f"shard {shard}, all of it" if batch < 0 else f"shard {shard} batch {batch}"
                self.say("substituted", f"{where} is damaged; other rows take its place, from image {self.position} on")
        self.substituted_rows += int(found[:, 0].sum())
        return int(found[:, 0].sum())

    def log_consumed(self, micro_batches_of_step: list[MicroBatch]) -> None:
        """The ids of the global batch, in order, as one line; every rank brings its own."""
        if self.consumed is None:
            return
        start = self.position
        ids = torch.zeros(self.config.batch, dtype=torch.int64)
        for micro in micro_batches_of_step:
            ids[torch.from_numpy(micro.positions - start)] = torch.from_numpy(micro.ids.view("int64"))
        ids = self.group.sum_(ids)
        if self.group.rank == 0:
            ids_in_order = ids.numpy().view("uint64").tolist()
            line = {"attempt": self.saver.identity.attempt, "position": start, "ids": ids_in_order}
            try:
                append_line(self.consumed, line)
            except OSError as error:  # a full disk must not end the training
                self.say("ids-lost", f"of the batch at {start}: {error}")

    def save(self) -> None:
        position = self.position
        with self.timer.section("save"):
            recipe_state = self.trainee.recipe.state()
            self.saver.save(
                position,
                self.shard_view(),
                {
                    "optimizer_steps": {part: e.optimizer_steps() for part, e in self.trainee.engines.items()},
                    "loss_scale": {part: e.loss_scale() for part, e in self.trainee.engines.items()},
                    "guard": {part: dataclasses.asdict(history) for part, history in self.trainee.guards.items()},
                    "recipe_state": recipe_state.document() if recipe_state else {},
                    "order": dataclasses.asdict(self.order.state(position)),
                    "tracking": self.tracker.undelivered(),
                    "figures": self.figures_here(),
                },
            )
        self.saved, self.save_owed, self.save_begun_s = position, False, time.monotonic()

    def figures_here(self) -> dict[str, float]:
        """Held-out figures of the weights as they are, for retention: finite ones, which JSON can hold."""
        position, figures = self.evaluated
        return {name: value for name, value in figures.items() if position == self.position and math.isfinite(value)}

    def shard_view(self) -> Iterator[Interval]:
        for engine in self.trainee.engines.values():
            yield from engine.shard_view()

    def sample(self) -> str | None:
        """A grid of EMA samples in the store; its key. A collective call; rank 0 draws."""
        key = None
        if not (self.config.samples.prompts or self.heldout):
            return None
        with ema_modules(self.trainee) as modules:
            if self.group.rank == 0:
                drawn, prompts = self.draw(modules)
                key = f"samples/images-{self.position:09d}-ema.png"
                about = {"run": self.config.run, "images": str(self.position)}
                png = png_bytes(grid(drawn, prompts), about)
                try:
                    self.store.put(key, [png])
                except OSError as error:
                    self.say("samples-failed", f"{key}: {error}")
                    return None
                self.say("samples", key)
                self.tracker.picture(self.position, key, png)
        return key

    def draw(self, modules: Mapping[str, nn.Module]) -> tuple[Pixels, list[str]]:
        """The grid's pictures and captions: of the configured prompts, or of held-out rows prepared as in training."""
        settings, seed = self.config.samples, key64("grid", self.config.seed)
        if settings.prompts:
            prompts = list(settings.prompts)
            return draw_images(self.trainee.recipe, modules, prompts, settings.sampling, seed), prompts
        assert self.heldout is not None
        recipe = make_recipe(self.config.for_evaluation())
        rows = first_rows(self.heldout, (*recipe.columns, Column("base", "caption")), GRID_PICTURES)
        draws = Draws(seed, np.arange(len(rows["caption"]), dtype=np.int64))
        return recipe.sample(modules, recipe.prepare(rows, draws), draws, settings.sampling), rows["caption"]

    def evaluate(self, last: bool = False) -> dict[str, float]:
        """Held-out loss of the EMA weights, logged; `last`, also their bits per dimension. A collective call."""
        config, dataset = self.config, self.heldout
        if dataset is None or config.heldout is None:
            return {}
        with ema_modules(self.trainee) as modules:
            losses = heldout_loss(config, modules, dataset, config.heldout, self.group)
            if last and (rows := config.heldout.bits_per_dimension):
                bits = heldout_bits_per_dimension(config, modules, dataset, rows, self.group)
                losses["bits_per_dimension"] = bits
        figures = {f"heldout/{name}": value for name, value in losses.items()}
        self.evaluated = self.position, figures
        best = config.checkpoint.keep_best
        if best is not None and best.metric not in figures:
            self.say("keep-best", f"no figure {best.metric}; there are {', '.join(figures)}")
        self.tracker.log(self.position, figures)
        return losses

    def finish(self) -> None:
        """Final figures, save and grid (a stopped run only saves); fails if the save did not commit."""
        heldout = {} if self.stopped else self.evaluate(last=True)  # before the save, which carries them
        if self.saved != self.position:
            if failed := self.saver.settle():
                self.say("save-failed", str(failed))
            self.saver.let_end()
            self.save()
        samples = None if self.stopped else self.sample()
        self.saver.wait()
        self.checkpoint = self.saver.committed or self.checkpoint
        if self.stopped:
            self.say("stop", f"saved {self.checkpoint} and ended, as asked")
        if self.group.rank == 0:
            uri = f"{self.store.uri}/{self.checkpoint.folder.rstrip('/')}" if self.checkpoint else None
            result = {"images": self.position, "samples": samples, "heldout": heldout, "checkpoint": uri}
            result |= {"stopped": self.stopped, "heldout_at_0": self.heldout_at_0}
            result |= {"substituted_rows": self.substituted_rows}
            saves = {"failed_saves": self.saver.failures, "delayed_saves": self.delayed_saves}
            saves["snapshot_bytes"] = self.saver.memory.bytes
            self.report({"event": "result", **saves, **self.removals(), **result})

    def removals(self) -> dict[str, int]:
        """What retention did, once it has ended; a run that was asked to stop has no time for it."""
        retention = self.saver.retention
        if retention is None:
            return {}
        if not self.stopped:
            retention.settle(REMOVAL_PATIENCE_S)
        return {"removed_checkpoints": retention.deleted, "failed_removals": retention.failures}

    def say(self, kind: str, text: str) -> None:
        if self.group.rank == 0:
            log.info("%s: %s", kind, text)
            self.tracker.event(self.position, kind, text)
