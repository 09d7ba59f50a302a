"""Retention: which checkpoints of a run stay, and the removal of those that do not.

Always holds: what stays is a pure function of the settings and of what the manifests say. The newest that is whole,
what a kept one refers to, what is protected and what cannot be read always stay. A manifest goes before its parts, so
that a checkpoint is there whole or not at all; what a stop leaves behind is an orphan, which the sweep takes. Called by
the saver after a commit, and by `glidepath checkpoints`.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data_pipeline.config import parse
from data_pipeline.errors import UserError
from data_pipeline.storage import ObjectStore, canonical_json
from trainer.checkpoint.attempts import newest_attempt, read_record, record_key, run_of
from trainer.checkpoint.manifest import (
    CheckpointName,
    Manifest,
    OtherFormat,
    committed,
    name_of_key,
    names_in,
    part_key,
    part_sizes,
    read_manifest,
)
from trainer.checkpoint.parts import CheckpointDamaged
from trainer.checkpoint.sweep import sweep
from trainer.config import CheckpointSettings, KeepBest

log = logging.getLogger(__name__)

PROTECTED = "protected/"
_MARK = re.compile(r"protected/images-(\d{9,})-attempt-(\d+)")
RESTORED = "restored/"
_RESTORED = re.compile(r"restored/(\d{5,})-images-(\d{9,})-attempt-(\d+)")


@dataclass(frozen=True)
class Known:
    """What retention knows of a committed checkpoint. `whole`: its parts are there in their sizes."""

    name: CheckpointName
    readable: bool = True
    whole: bool = True
    figures: Mapping[str, float] = field(default_factory=dict)
    refers_to: AbstractSet[CheckpointName] = frozenset()  # checkpoints in whose folders some of its parts lie


def staying(
    checkpoints: Collection[Known], settings: CheckpointSettings, protected: Collection[CheckpointName]
) -> dict[CheckpointName, str]:
    """The checkpoints that stay, each with the first reason why. Without `keep_newest` all do.

    One that is not whole counts for nothing. It stays while it is newer than the oldest that `keep_newest` keeps: until
    then somebody may still repair it.
    """
    why: dict[CheckpointName, str] = {}
    newest_first = sorted(checkpoints, key=lambda one: one.name, reverse=True)
    whole = [one for one in newest_first if one.whole]
    newest = whole[: settings.keep_newest]
    enough = settings.keep_newest is not None and len(newest) == settings.keep_newest
    for one in newest:
        why[one.name] = "newest"
    for one in newest_first:
        if one.name in protected:
            why.setdefault(one.name, "protected")
        if not one.readable:
            why.setdefault(one.name, "its manifest cannot be read as one of this run")
        elif not one.whole and not (enough and one.name < newest[-1].name):
            why.setdefault(one.name, "damaged, and newer than one that is kept")
    for name in _first_after_each_multiple(whole, settings.keep_every_images):
        why.setdefault(name, f"every {settings.keep_every_images} images")
    for name in _best(whole, settings.keep_best):
        why.setdefault(name, "best")
    _add_referred_to(why, checkpoints)
    return why


def _first_after_each_multiple(whole: Iterable[Known], every_images: int | None) -> list[CheckpointName]:
    """The oldest at or after each multiple that was reached: once kept, a later one never takes its place."""
    if every_images is None:
        return []
    oldest_first = sorted((one.name for one in whole), reverse=False)
    first: dict[int, CheckpointName] = {}
    for name in oldest_first:
        first.setdefault(name.position // every_images, name)
    return [name for multiple, name in first.items() if multiple > 0]


def _best(whole: Iterable[Known], settings: KeepBest | None) -> list[CheckpointName]:
    """Of equal figures the oldest: a new one that is no better takes nobody's place."""
    if settings is None:
        return []
    sign = 1 if settings.better == "smallest" else -1
    ranked = sorted((sign * one.figures[settings.metric], one.name) for one in whole if settings.metric in one.figures)
    return [name for _, name in ranked[: settings.count]]


def _add_referred_to(why: dict[CheckpointName, str], checkpoints: Collection[Known]) -> None:
    by_name = {one.name: one for one in checkpoints}
    open_ = list(why)
    while open_:
        name = open_.pop()
        for referred in by_name[name].refers_to & (by_name.keys() - why.keys()):
            why[referred] = f"{name} has parts in it"
            open_.append(referred)


class Facts(NamedTuple):
    """What is kept in memory of a manifest, which of a thousand ranks would fill it."""

    parts: tuple[tuple[str, int], ...]  # key and bytes
    figures: Mapping[str, float]
    refers_to: frozenset[CheckpointName]


def facts_of(name: CheckpointName, manifest: Manifest) -> Facts:
    parts = tuple((part_key(name, part), part.bytes) for part in manifest.parts)
    folders = {name_of_key(key) for key, _ in parts}
    refers_to = frozenset(other for other in folders if other is not None and other != name)
    return Facts(parts, manifest.figures, refers_to)


def survey(
    store: ObjectStore, run: str | None, sizes: Mapping[str, int], read: dict[CheckpointName, Facts]
) -> list[Known]:
    """What is known of every committed checkpoint of `run`. `sizes`: `part_sizes(store)`; `read`: of the manifests that
    were read before, which never change; it is brought up to date."""
    names, began = names_in(sizes), beginnings(store)
    for gone in read.keys() - set(names):
        del read[gone]
    found = []
    for name in names:
        try:
            facts = read[name] = read.get(name) or facts_of(name, read_manifest(store, name.manifest_key, run))
        except (CheckpointDamaged, OtherFormat):
            found.append(Known(name, readable=False, whole=False))
            continue
        whole = all(sizes.get(key) == size for key, size in facts.parts) and not passed_over(name, began)
        found.append(Known(name, True, whole, facts.figures, facts.refers_to))
    return found


def record_beginning(store: ObjectStore, attempt: int, name: CheckpointName) -> None:
    """Say from which checkpoint `attempt` goes on, for those who ask which ones it passed over."""
    key = f"{RESTORED}{attempt:05d}-images-{name.position:09d}-attempt-{name.attempt}"
    store.put_if_absent(key, canonical_json({"attempt": attempt, "checkpoint": str(name)}))


def beginnings(store: ObjectStore) -> list[tuple[int, CheckpointName]]:
    """(attempt, the checkpoint that it went on from) of each attempt that did."""
    found = (_RESTORED.fullmatch(info.key) for info in store.list(RESTORED))
    return [(int(one[1]), CheckpointName(int(one[2]), int(one[3]))) for one in found if one]


def passed_over(name: CheckpointName, began: Iterable[tuple[int, CheckpointName]]) -> bool:
    """Whether a later attempt went on from an older checkpoint than this one: then it did not verify when it was read,
    whatever its sizes say."""
    return any(name.attempt < attempt and name > restored for attempt, restored in began)


def delete_checkpoint(store: ObjectStore, name: CheckpointName, keys: Iterable[str]) -> bool:
    """Remove the manifest, then whatever of `keys` lies in its folder; unless it was protected meanwhile."""
    if store.exists(_mark(name)):
        return False
    store.delete(name.manifest_key)
    for key in keys:
        if name_of_key(key) == name:
            store.delete(key)
    return True


class Retention:
    """Keeps a run's store as its settings say, behind the training's back. Held by rank 0's saver."""

    def __init__(self, store: ObjectStore, run: str | None, attempt: int, settings: CheckpointSettings) -> None:
        self.store, self.run, self.attempt, self.settings = store, run, attempt, settings
        self.failures = 0  # commits after which not all could be removed that should have been
        self.deleted = 0  # checkpoints
        self._read: dict[CheckpointName, Facts] = {}
        self._half_removed = False
        self._lock = threading.Lock()  # for the next two
        self._due: CheckpointName | None = None  # the newest commit that was not looked at yet
        self._at_work = False
        self._thread: threading.Thread | None = None

    def began_from(self, name: CheckpointName) -> None:
        """`record_beginning` of this attempt. Never raises what a store does: the run goes on all the same."""
        try:
            record_beginning(self.store, self.attempt, name)
        except OSError as error:
            log.warning("not recorded that attempt %d goes on from %s: %s", self.attempt, name, error)

    def begin(self, name: CheckpointName) -> None:
        """`after_commit`, in a thread: neither training nor the next save waits for it."""
        if self.settings.keep_newest is None:
            return
        with self._lock:
            self._due = name
            if self._at_work:
                return  # it comes to this one too
            self._at_work = True
        self._thread = threading.Thread(target=self._work, name="retention", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                name, self._due = self._due, None
                self._at_work = name is not None
            if name is None:
                return
            self.after_commit(name)

    def settle(self, timeout_s: float) -> None:
        """Let the removal that is under way end. What it has not done by then, another attempt's commit does."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def after_commit(self, name: CheckpointName) -> None:
        """Remove what need not stay now that `name` is committed.

        Never raises what a store does: the commit stands, and after the next one it is tried again.
        """
        try:
            if newest_attempt(self.store) > self.attempt:
                return  # the store is that one's now
            self._prune()
            if self._half_removed:
                sweep(self.store, self.attempt, name.position)
                self._half_removed = False
        except OSError as error:
            self.failures += 1
            self._half_removed = True
            log.warning("old checkpoints stay until the next save: %s", error)

    def _prune(self) -> None:
        sizes = part_sizes(self.store)
        checkpoints = survey(self.store, self.run, sizes, self._read)
        stay = staying(checkpoints, self.settings, protected(self.store))
        for name in to_delete(checkpoints, stay):
            if delete_checkpoint(self.store, name, sizes):
                self.deleted += 1
                log.info("checkpoint %s removed, as checkpoint.keep_newest=%s says", name, self.settings.keep_newest)


def to_delete(checkpoints: Collection[Known], stay: Mapping[CheckpointName, str]) -> Sequence[CheckpointName]:
    """Newest first: one that refers to another goes before it, and is never there without its parts."""
    return sorted((one.name for one in checkpoints if one.name not in stay), reverse=True)


def recorded_settings(store: ObjectStore) -> CheckpointSettings:
    """As the newest attempt of the run has them. Raises UserError."""
    key = record_key(newest_attempt(store))
    return parse(CheckpointSettings, read_record(store, key)["config"].get("checkpoint", {}), f"{store.uri}/{key}")


def prune(store: ObjectStore, settings: CheckpointSettings, dry_run: bool) -> list[dict[str, Any]]:
    """Apply `settings` now. [{"uri", "images", "bytes" (in its folder), "kept", "why"}], newest first."""
    sizes = part_sizes(store)
    checkpoints = survey(store, run_of(store), sizes, {})
    stay = staying(checkpoints, settings, protected(store))
    if not dry_run:
        for name in to_delete(checkpoints, stay):
            delete_checkpoint(store, name, sizes)
    return [
        {
            "uri": name.uri(store),
            "images": name.position,
            "bytes": sum(size for key, size in sizes.items() if name_of_key(key) == name),
            "kept": name in stay,
            "why": stay.get(name, "no rule keeps it"),
        }
        for name in names_in(sizes)
    ]


def protected(store: ObjectStore) -> frozenset[CheckpointName]:
    """The checkpoints that somebody protected."""
    marks = (_MARK.fullmatch(info.key) for info in store.list(PROTECTED))
    return frozenset(CheckpointName(int(mark[1]), int(mark[2])) for mark in marks if mark)


def protect(store: ObjectStore, name: CheckpointName) -> None:
    """Have a checkpoint stay whatever the settings say. Raises UserError if it is not committed."""
    _refuse_unknown(store, name)
    store.put_if_absent(_mark(name), canonical_json({"checkpoint": str(name)}))


def unprotect(store: ObjectStore, name: CheckpointName) -> None:
    """The settings decide again. Raises UserError if it was not protected."""
    if name not in protected(store):
        there = ", ".join(map(str, sorted(protected(store)))) or "none"
        raise UserError(f"checkpoint {name}", f"one that is protected: {there}", "another", "correct the name")
    store.delete(_mark(name))


def _refuse_unknown(store: ObjectStore, name: CheckpointName) -> None:
    if name not in committed(store):
        raise UserError(
            f"checkpoint {name}", "a committed one", "none", "glidepath checkpoints list RUN prints what is there"
        )


def _mark(name: CheckpointName) -> str:
    return f"{PROTECTED}images-{name.position:09d}-attempt-{name.attempt}"
