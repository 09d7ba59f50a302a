"""The training loop of one rank: fetch, step, log, maybe save, sample or evaluate.

Always holds: it knows no recipe, store or tracker by name; what happens when follows from the position alone, so every
rank does it at the same step. Called by `trainer.run`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_pipeline.draws import Draws, key64
from data_pipeline.loader import Column, Loader, MicroBatch, micro_batches
from data_pipeline.order import SampleOrder
from data_pipeline.shards import Dataset
from trainer.checkpoint.load import restore_newest
from trainer.checkpoint.manifest import CheckpointName
from trainer.checkpoint.save import Saver
from trainer.config import TrainConfig
from trainer.evaluation.heldout import first_rows, heldout_bits_per_dimension, heldout_loss
from trainer.guard import GuardHistory
from trainer.metrics import StepTimer, memory
from trainer.pictures import grid, png_bytes
from trainer.recipes import make_recipe
from trainer.recipes.recipe import Pixels
from trainer.sampling import draw_images
from trainer.step import Trainee, train_step
from trainer.stop import StopWatch
from trainer.tracking.jsonl import append_line
from trainer.tracking.tracker import Tracker

log = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]
GRID_PICTURES = 8
CONSUMED = "consumed.jsonl"


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
        self.order = SampleOrder(dataset.id, dataset.shard_rows, self.config.seed, self.config.batch)
        self.timer = StepTimer()
        self.position = 0  # images consumed
        self.saved = -1  # position of the newest save that was begun
        self.heldout_at_0: dict[str, float] = {}  # known to the attempt that began there
        self.stopped = False  # a stop was requested, and all ranks agreed to it
        self.checkpoint: CheckpointName | None = None  # newest that this rank restored or saw committed

    def restore(self) -> None:
        """Continue from the newest checkpoint that verifies, or start at 0."""
        engines = self.trainee.engines
        wanted = [interval for engine in engines.values() for interval in engine.wanted()]
        found = restore_newest(self.store, self.group, wanted, self.saver.identity.parameters, self.order.state(0))
        if found is None:
            return
        name, manifest = found.name, found.manifest
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
        loader = Loader(self.dataset, self.order, self.trainee.recipe.columns, self.trainee.recipe.prepare, cut)
        batches = loader.batches(self.position, config.images)
        self.timer.finish(0)
        with StopWatch(self.store, self.saver.identity.attempt, watching=self.group.rank == 0) as stop:
            while self.position < config.images and not self.stopped:
                with self.timer.section("data"):
                    micro_batches_of_step = next(batches)
                with self.timer.section("update"):
                    figures = train_step(self.trainee, micro_batches_of_step, self.position)
                self.log_consumed(micro_batches_of_step)
                self.position += config.batch
                self.log(figures)
                if self.due(config.samples.every_images):
                    self.sample()
                if config.heldout and self.due(config.heldout.every_images):
                    self.evaluate()
                # Last: a run that goes on from here does not pass this position's grid and figures again.
                if self.due(config.checkpoint.every_images):
                    self.save()
                if self.position < config.images:
                    self.stopped = not self.group.all_agree(not stop.asked)
        self.finish()

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
            append_line(self.consumed, line)

    def save(self) -> None:
        position = self.position
        view = [interval for engine in self.trainee.engines.values() for interval in engine.shard_view()]
        recipe_state = self.trainee.recipe.state()
        with self.timer.section("save"):
            failed = self.saver.save(
                position,
                view,
                {
                    "optimizer_steps": {part: e.optimizer_steps() for part, e in self.trainee.engines.items()},
                    "loss_scale": {part: e.loss_scale() for part, e in self.trainee.engines.items()},
                    "guard": {part: dataclasses.asdict(history) for part, history in self.trainee.guards.items()},
                    "recipe_state": recipe_state.document() if recipe_state else {},
                    "order": dataclasses.asdict(self.order.state(position)),
                    "tracking": self.tracker.undelivered(),
                },
            )
        self.saved = position
        if failed:
            self.say("save-failed", str(failed))

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
        self.tracker.log(self.position, {f"heldout/{name}": value for name, value in losses.items()})
        return losses

    def finish(self) -> None:
        """Final save, grid and figures (a stopped run only saves); fails if the save did not commit."""
        if self.saved != self.position:
            self.save()
        samples = None if self.stopped else self.sample()
        heldout = {} if self.stopped else self.evaluate(last=True)
        self.saver.wait()
        self.checkpoint = self.saver.committed or self.checkpoint
        if self.stopped:
            self.say("stop", f"saved {self.checkpoint} and ended, as asked")
        if self.group.rank == 0:
            uri = f"{self.store.uri}/{self.checkpoint.folder.rstrip('/')}" if self.checkpoint else None
            result = {"images": self.position, "samples": samples, "heldout": heldout, "checkpoint": uri}
            result |= {"stopped": self.stopped, "heldout_at_0": self.heldout_at_0}
            self.report({"event": "result", "failed_saves": self.saver.failures, **result})

    def say(self, kind: str, text: str) -> None:
        if self.group.rank == 0:
            log.info("%s: %s", kind, text)
            self.tracker.event(self.position, kind, text)
