"""The training loop of one rank: fetch, step, log, maybe save, sample or evaluate.

Always holds: it knows no recipe, store or tracker by name; what happens when follows from the position alone, so every
rank does it at the same step. Called by `trainer.run`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from data_pipeline.draws import Draws, key64
from data_pipeline.loader import Column, Loader, MicroBatch, micro_batches
from data_pipeline.shards import Dataset
from trainer.checkpoint.load import Restored, restore_newest
from trainer.checkpoint.manifest import CheckpointName
from trainer.checkpoint.save import Saver
from trainer.config import TrainConfig
from trainer.engine.engine import Interval
from trainer.evaluation.heldout import first_rows, heldout_bits_per_dimension, heldout_loss
from trainer.guard import doubted_since
from trainer.metrics import memory, step_figures
from trainer.pictures import grid, png_bytes
from trainer.quarantine import SkipList, Skipped, shards_to_blame
from trainer.recipes import make_recipe
from trainer.recipes.recipe import Pixels, pinned
from trainer.rollback import adopt, go_back
from trainer.sampling import draw_images
from trainer.step import Trainee, train_step
from trainer.stop import StopAsked, StopWatch
from trainer.tracking.jsonl import append_line
from trainer.tracking.runs import WORKERS
from trainer.tracking.tracker import Tracker
from trainer.weights import WeightsKind

log = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]
GRID_PICTURES = 8
GRIDS: dict[Literal["ema", "raw"], WeightsKind] = {"ema": "ema", "raw": "master"}
CONSUMED = "consumed.jsonl"
REMOVAL_PATIENCE_S = 60.0  # at the end of a run, for checkpoints that need not stay


def newest_loss(figures: Mapping[str, float]) -> float:
    """The loss that a run is summed up by: the total of its first phase."""
    return next(value for name, value in figures.items() if name.endswith("loss/total"))


@contextmanager
def weights_of(trainee: Trainee, kind: WeightsKind = "ema") -> Iterator[Mapping[str, nn.Module]]:
    """The parts with these weights, in evaluation mode. A collective call."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(engine.weights(kind)) for name, engine in trainee.engines.items()}


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
        self.watch = trainee.group.watch
        self.position = 0  # images consumed
        self.saved = 0  # position of the newest save that was begun; at 0 there is nothing to save
        self.save_owed = False  # one is due and has not begun
        self.delayed_saves = 0  # that could not begin when they were due, for the one before was under way
        self.save_begun_s = time.monotonic()  # rank 0's counts
        self.heldout_at_0: dict[str, float] = {}  # known to the attempt that began there
        self.evaluated: tuple[int, dict[str, float]] = (-1, {})  # where held-out figures were last taken, and which
        self.substituted_rows = 0  # that took the place of damaged ones, in this attempt
        self.damaged: set[tuple[int, int]] = set()  # places that were told of: shard, batch or -1
        self.quarantined: frozenset[int] = frozenset()  # shards in whose place other rows are read
        self.skips = SkipList(self.store)
        saver.before_commit = self.skips.write
        self.stop = StopWatch(self.store, saver.identity.attempt, watching=self.group.rank == 0)
        self.stopped = False  # a stop was requested, and all ranks agreed to it
        self.checkpoint: CheckpointName | None = None  # newest that this rank restored or saw committed

    def restore(self) -> None:
        """Continue from the newest checkpoint that verifies, or start at 0."""
        wanted = [interval for engine in self.trainee.engines.values() for interval in engine.wanted()]
        identity = self.saver.identity
        found = restore_newest(self.store, self.group, wanted, identity.parameters, self.order.state(0), identity.run)
        if found is None:
            return
        name, manifest = found.name, found.manifest
        if self.saver.retention is not None:
            self.saver.retention.began_from(name)
        adopt(self.trainee, manifest)
        self.quarantined = frozenset(manifest.order.get("quarantined", ()))
        self.checkpoint, self.position, self.saved = name, name.position, name.position
        self.tracker.replay(manifest.tracking)
        for damage in found.passed_over:
            self.say("fallback", damage)
        self.say("resume", f"from {name}, world size {manifest.world_size} then, {self.group.world_size} now")

    def train(self) -> None:
        config = self.config
        self.ranks_here = self.group.ranks_here()
        self.loader, self.batches = self.read_on()
        self.saver.memory.reserve(self.shard_view())
        self.save_begun_s = time.monotonic()
        with self.stop:
            if self.position == 0:
                self.heldout_at_0 = self.evaluate()
            self.stopped = self.stop_agreed()
            self.watch.begin_steps()
            while self.position < config.images and not self.stopped:
                with self.watch.section("data"):
                    micro_batches_of_step = next(self.batches)
                figures = train_step(self.trainee, micro_batches_of_step, self.position)
                if config.loader.on_damage == "substitute" or self.quarantined:
                    figures["substituted_rows"] = self.count_substituted(micro_batches_of_step)
                self.log_consumed(micro_batches_of_step)
                self.position += config.batch
                self.log(figures)
                if reason := next((str(why) for name, why in figures.items() if name.endswith("rollback")), None):
                    self.roll_back(reason)
                if self.due(config.samples.every_images):
                    self.sample()
                if config.heldout and self.due(config.heldout.every_images):
                    self.evaluate()
                # Last: a run that goes on from here does not pass this position's grid and figures again.
                self.save_or_stop()
            self.finish()

    def read_on(self) -> tuple[Loader, Generator[list[MicroBatch], None, None]]:
        """Batches from this position on, without rows of shards that are quarantined by now."""
        config, recipe, device = self.config, self.trainee.recipe, self.group.device
        cut = micro_batches(config.batch, self.group.rank, self.group.world_size, config.micro_batch_size())
        prepare = pinned(recipe.prepare, device) if device.type == "cuda" else recipe.prepare
        loader = Loader(
            self.dataset, self.order, recipe.columns, prepare, cut, config.loader, self.ranks_here, self.quarantined
        )
        return loader, loader.batches(self.position, config.images)

    def roll_back(self, reason: str) -> None:
        """All parts go back to before the first bad observation, the data do not; what is to blame for it is
        quarantined; and that is committed before the next step, if the store lets it. A collective call."""
        since = doubted_since(self.trainee.guards.values())
        assert since is not None
        with self.watch.section("commit"):
            if failed := self.saver.settle():
                self.say("save-failed", str(failed))
            self.saver.let_end()
        with self.watch.section("restore"):
            found = go_back(self.trainee, self.store, self.saver.identity, self.order.state(0), since)
        for damage in found.passed_over if found else ():
            self.say("fallback", damage)
        begin, to = (found.name.position, str(found.name)) if found else (0, "the start")
        self.say("rollback", f"{reason}; back to {to}, on from {self.position} images")
        if self.group.rank == 0:
            undone = {"images": self.position, "to": to, "to_images": begin}
            self.report({"event": "rollback", **undone, "reason": reason})
        self.list_skipped(Skipped("rollback", begin, self.position, reason, self.saver.identity.attempt))
        self.quarantine(since, shards_to_blame(self.trainee, self.loader, since, self.position))
        self.commit_rollback(found)
        self.watch.begin_steps()  # the next one did not take all that time

    def quarantine(self, since: int, to_blame: Mapping[int, str]) -> None:
        """From here on other rows take the place of those of these shards. Found in the images from `since`."""
        quarantined = self.quarantined | to_blame.keys()
        if not to_blame or len(quarantined) == len(self.dataset.shard_rows):
            self.say("quarantine", f"no shard alone is to blame for images {since} to {self.position}; none is")
            return
        for shard, reason in to_blame.items():
            dataset, name = self.dataset.shard_label(shard)
            self.say("quarantine", f"{name} of dataset {dataset[:12]}: {reason}; other rows take its place")
            attempt = self.saver.identity.attempt
            self.list_skipped(Skipped("quarantine", since, self.position, reason, attempt, dataset=dataset, shard=name))
        self.quarantined = quarantined
        self.batches.close()  # what was read ahead has such rows
        self.loader, self.batches = self.read_on()

    def commit_rollback(self, found: Restored | None) -> None:
        """A checkpoint of this position, in the parts of the one that was gone back to where there is one. Where the
        store fails it, a save is owed; a resume from before would come to the same rollback."""
        if found is None:
            self.save()
        failed = None
        with self.watch.section("commit"):
            if found is None:
                failed = self.saver.settle()
            elif self.group.rank == 0:
                failed = self.saver.refer(self.position, found, self.state_beside_the_parts())
            committed = self.group.all_agree(failed is None)
        if failed:
            self.say("save-failed", str(failed))
        self.checkpoint = self.saver.committed or self.checkpoint
        self.saved, self.save_owed = self.position if committed else 0, not committed
        self.save_begun_s = time.monotonic()

    def stop_agreed(self) -> bool:
        """Whether rank 0 knows of a request. A collective call."""
        return bool(self.group.sum_(torch.tensor(int(self.stop.asked))))

    def save_or_stop(self) -> None:
        """Decided by all ranks in one collective call. A due save that meets the one before it, still under way on some
        rank, waits for its end and keeps nobody from training; what ends the run has a save of its own."""
        if failed := self.saver.poll():
            self.say("save-failed", str(failed))
        mine = torch.tensor([self.stop.asked, self.due_by_clock(), self.saver.busy], dtype=torch.int64)
        stopped, by_clock, busy = map(bool, self.group.sum_(mine).tolist())
        due = self.saved < self.position and (by_clock or self.due(self.config.checkpoint.every_images))
        # What the guard has doubts about is not saved: a rollback wants a checkpoint that is older.
        doubted = doubted_since(self.trainee.guards.values()) is not None
        if self.position >= self.config.images or stopped:
            self.stopped = stopped and self.position < self.config.images
        elif not busy and not doubted and (due or self.save_owed):
            self.save()
        elif due and not self.save_owed:
            self.save_owed = True
            self.delayed_saves += 1
            until = "the guard has no doubts left" if doubted else "the one before it has ended"
            self.say("save-delayed", f"due at {self.position} images; it begins when {until}")

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
            if isinstance(reason, str) and name.endswith("skipped"):
                part = name.removesuffix("skipped").rstrip("/")
                self.say("skip", f"{part} {reason}".strip())
                begin, attempt = position - self.config.batch, self.saver.identity.attempt
                self.list_skipped(Skipped("skip", begin, position, reason, attempt, part))
        values = {name: value for name, value in figures.items() if not isinstance(value, str)}
        values.update(step_figures(self.watch.end_step(), self.config.batch) | memory())
        values[WORKERS] = float(self.group.world_size)
        self.tracker.log(position, values)
        if self.group.rank == 0:
            self.report({"event": "progress", "images": position, "loss": newest_loss(values)} | values)

    def count_substituted(self, micro_batches_of_step: list[MicroBatch]) -> int:
        """Rows of the global batch that took the place of damaged or quarantined ones. A collective call: every rank
        brings its own count, and a damaged place that was not told of yet; rank 0 tells of it."""
        places = [(s, -1 if b is None else b) for micro in micro_batches_of_step for s, b in micro.replaced]
        new = (place for place in places if place[0] not in self.quarantined and place not in self.damaged)
        found = torch.zeros(self.group.world_size, 3, dtype=torch.int64)
        found[self.group.rank] = torch.tensor([len(places), *next(new, (-1, -1))])
        found = self.group.sum_(found)
        for rows, shard, batch in found.tolist():
            if rows and shard >= 0 and (shard, batch) not in self.damaged:
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
        with self.watch.section("save"):
            self.saver.save(self.position, self.shard_view(), self.state_beside_the_parts())
        self.saved, self.save_owed, self.save_begun_s = self.position, False, time.monotonic()

    def state_beside_the_parts(self) -> dict[str, Any]:
        """Of a manifest at this position."""
        recipe_state = self.trainee.recipe.state()
        quarantined = {"quarantined": sorted(self.quarantined)} if self.quarantined else {}
        return {
            "optimizer_steps": {part: e.optimizer_steps() for part, e in self.trainee.engines.items()},
            "loss_scale": {part: e.loss_scale() for part, e in self.trainee.engines.items()},
            "guard": {part: dataclasses.asdict(history) for part, history in self.trainee.guards.items()},
            "recipe_state": recipe_state.document() if recipe_state else {},
            "order": dataclasses.asdict(self.order.state(self.position)) | quarantined,
            "tracking": self.tracker.undelivered(),
            "figures": self.figures_here(),
        }

    def figures_here(self) -> dict[str, float]:
        """Held-out figures of the weights as they are, for retention: finite ones, which JSON can hold."""
        position, figures = self.evaluated
        return {name: value for name, value in figures.items() if position == self.position and math.isfinite(value)}

    def shard_view(self) -> Iterator[Interval]:
        for engine in self.trainee.engines.values():
            yield from engine.shard_view()

    def sample(self) -> str | None:
        """A grid of samples for each of the wanted weights, of equal noise; the key of the first that is in the store.
        A collective call; rank 0 draws."""
        settings = self.config.samples
        if not (settings.prompts or self.heldout):
            return None
        keys = [self.sample_with(name) for name in GRIDS if settings.weights in (name, "both")]
        return next((key for key in keys if key), None)

    def sample_with(self, name: Literal["ema", "raw"]) -> str | None:
        """One grid in the store; its key, None if a stop came first. A collective call; rank 0 draws."""
        key = f"samples/images-{self.position:09d}-{name}.png"
        with self.watch.section("sample"), weights_of(self.trainee, GRIDS[name]) as modules:
            if self.group.rank != 0:
                return None
            try:
                drawn, prompts = self.draw(modules)
            except StopAsked:
                self.say("samples-left", "a stop was asked for")
                return None
            about = {"run": self.config.run, "images": str(self.position), "weights": name}
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
            drawn = draw_images(
                self.trainee.recipe, modules, prompts, settings.sampling, seed, lambda *_: self.stop.leave()
            )
            return drawn, prompts
        assert self.heldout is not None
        recipe = make_recipe(self.config.for_evaluation())
        rows = first_rows(self.heldout, (*recipe.columns, Column("base", "caption")), GRID_PICTURES)
        draws = Draws(seed, np.arange(len(rows["caption"]), dtype=np.int64))
        batch, leave = recipe.prepare(rows, draws), lambda _: self.stop.leave()
        return recipe.sample(modules, batch, draws, settings.sampling, watch=leave), rows["caption"]

    def evaluate(self, last: bool = False) -> dict[str, float]:
        """Held-out loss of the EMA weights, logged; `last`, also their bits per dimension; nothing if a stop comes
        first. A collective call."""
        config, dataset = self.config, self.heldout
        if dataset is None or config.heldout is None:
            return {}

        def asked() -> bool:
            return self.stop.asked

        try:
            with self.watch.section("evaluate"), weights_of(self.trainee) as modules:
                losses = heldout_loss(config, modules, dataset, config.heldout, self.group, stop_asked=asked)
                if last and (rows := config.heldout.bits_per_dimension):
                    bits = heldout_bits_per_dimension(config, modules, dataset, rows, self.group, asked)
                    losses["bits_per_dimension"] = bits
        except StopAsked:
            self.stopped = True  # all ranks know, for all left
            self.say("evaluation-left", "a stop was asked for")
            return {}
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
            with self.watch.section("commit"):
                if failed := self.saver.settle():
                    self.say("save-failed", str(failed))
                self.saver.let_end()
            self.save()
        samples = None if self.stopped else self.sample()
        with self.watch.section("commit"):
            self.saver.wait()
        self.checkpoint = self.saver.committed or self.checkpoint
        if self.stopped:
            self.say("stop", f"saved {self.checkpoint or 'nothing, before the first step,'} and ended, as asked")
        if self.group.rank == 0:
            uri = self.checkpoint.uri(self.store) if self.checkpoint else None
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

    def list_what_is_left(self) -> None:
        """At the end of a run that has no save any more. Never raises what a store does: why it ends is to be told."""
        try:
            self.skips.write()
        except OSError as error:
            log.warning("what was skipped since the newest checkpoint is not listed: %s", error)

    def list_skipped(self, skipped: Skipped) -> None:
        if self.group.rank == 0:
            self.skips.add(skipped)

    def say(self, kind: str, text: str) -> None:
        if self.group.rank == 0:
            log.info("%s: %s", kind, text)
            self.tracker.event(self.position, kind, text)
