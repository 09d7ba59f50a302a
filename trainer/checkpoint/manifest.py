"""The manifest of a checkpoint: its presence is the commit, its own digest proves that it is whole.

Always holds: a manifest is written once, never changed; it is read only in its canonical byte form, so that any changed
bit is found. Layout of a run's store: `attempts/00001.json`, `checkpoints/images-<position>/attempt-<n>/manifest.json`
with its parts beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError

from data_pipeline.config import Settings
from data_pipeline.errors import UsageError, UserError
from data_pipeline.manifests import NotSealed, seal, unseal
from data_pipeline.storage import ObjectNotFound, ObjectStore
from trainer.checkpoint.parts import CheckpointDamaged, PartInfo

FORMAT = "glidepath-checkpoint-3"
# 1 had neither `figures` nor parts in another checkpoint's folder; 2 had no rollbacks in the guard's history, and no
# `quarantined` in the order. Versions that read 2 at most would go on without either.
READABLE = ("glidepath-checkpoint-1", "glidepath-checkpoint-2", FORMAT)
CHECKPOINTS = "checkpoints/"
_FOLDER = re.compile(r"checkpoints/images-(\d{9,})/attempt-(\d+)/")


class OtherFormat(UserError):
    """A whole manifest of a format that this version does not read."""


class Manifest(Settings):
    """All that resuming, sampling and comparing need to know besides the parts' bytes."""

    format: str = FORMAT
    run: str
    attempt: int
    position: int  # images consumed
    world_size: int
    zero_stage: int
    parameters: dict[str, int]  # part/parameter -> elements
    parts: tuple[PartInfo, ...]
    optimizer_steps: dict[str, int]  # by part
    loss_scale: dict[str, dict[str, float]] = Field(default_factory=dict)  # by part: state of fp16's loss scale
    guard: dict[str, Any]  # by phase: GuardHistory
    order: dict[str, Any]  # OrderState, with the dataset id
    recipe_state: dict[str, Any] = Field(default_factory=dict)  # HostState of the recipe; empty where it has none
    lineage: dict[str, dict[str, Any]] = Field(default_factory=dict)  # by part: the checkpoint it started from
    tracking: tuple[dict[str, Any], ...] = ()  # records of the tracker that had not arrived by then
    figures: dict[str, float] = Field(default_factory=dict)  # held-out, of these weights; empty where none were taken
    config: dict[str, Any]  # resolved
    code_version: str
    committed_at: str  # UTC, ISO 8601

    def encode(self) -> bytes:
        """The sealed document: canonical JSON with the sha256 of the rest of itself."""
        return seal(self.model_dump(mode="json"))


@dataclass(frozen=True, order=True)
class CheckpointName:
    """A checkpoint of a run. Ordered: the newest is the highest position, then the highest attempt."""

    position: int
    attempt: int

    @property
    def folder(self) -> str:
        return f"{CHECKPOINTS}images-{self.position:09d}/attempt-{self.attempt}/"

    @property
    def manifest_key(self) -> str:
        return f"{self.folder}manifest.json"

    def uri(self, store: ObjectStore) -> str:
        return f"{store.uri}/{self.folder.rstrip('/')}"

    def __str__(self) -> str:
        return f"images-{self.position:09d}/attempt-{self.attempt}"


def part_file(rank: int, world_size: int) -> str:
    return f"part-{rank:05d}-of-{world_size:05d}.safetensors"


def part_key(name: CheckpointName, part: PartInfo) -> str:
    """Where a part of checkpoint `name` lies: beside its manifest, or in the folder of the checkpoint it refers to."""
    return (part.folder or name.folder) + part.file


def name_of_key(key: str) -> CheckpointName | None:
    """The checkpoint that an object belongs to, by its key."""
    match = _FOLDER.match(key)
    return CheckpointName(int(match[1]), int(match[2])) if match else None


def committed(store: ObjectStore) -> list[CheckpointName]:
    """Every committed checkpoint (its manifest exists), newest first."""
    return names_in(info.key for info in store.list(CHECKPOINTS))


def newest_committed(store: ObjectStore) -> CheckpointName | None:
    return next(iter(committed(store)), None)


def names_in(keys: Iterable[str]) -> list[CheckpointName]:
    """The checkpoints whose manifests are among the keys, newest first."""
    names = (name_of_key(key) for key in keys if key.endswith("/manifest.json"))
    return sorted((name for name in names if name is not None), reverse=True)


def read_manifest(store: ObjectStore, key: str, run: str | None = None) -> Manifest:
    """The manifest stored under `key`. `run`: the name of the run whose store it is, where that is known.

    Raises CheckpointDamaged if its bytes are not canonical, its digest is wrong, it has keys that its format does not
    have, or it is another checkpoint's or another run's; OtherFormat if the format is of another version of Glidepath.
    """
    try:
        document = unseal(store.get(key))
    except ObjectNotFound:
        raise CheckpointDamaged("manifest.json", "a manifest", "none") from None
    except NotSealed as fault:
        raise CheckpointDamaged("manifest.json", fault.expected, fault.found) from None
    del document["sha256"]
    if document.get("format") not in READABLE:
        expected, found = f"format {' or '.join(READABLE)}", str(document.get("format"))
        raise OtherFormat(f"{store.uri}/{key}", expected, found, "use the version of Glidepath that wrote it")
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        raise _unlike_its_format(document["format"], error) from None
    there, own = name_of_key(key), CheckpointName(manifest.position, manifest.attempt)
    if there != own:
        raise CheckpointDamaged("manifest.json", f"that of {there}", f"that of {own}")
    if run is not None and manifest.run != run:
        raise CheckpointDamaged("manifest.json", f"one of run {run}", f"one of run {manifest.run}")
    return manifest


def _unlike_its_format(format_: str, error: ValidationError) -> CheckpointDamaged:
    """All unknown keys by name; without any, the first value that is wrong."""
    faults = error.errors()
    unknown = [".".join(map(str, fault["loc"])) for fault in faults if fault["type"] == "extra_forbidden"]
    if unknown:
        return CheckpointDamaged("manifest.json", f"the keys of {format_}", f"unknown key {', '.join(unknown)}")
    where = ".".join(map(str, faults[0]["loc"]))
    return CheckpointDamaged("manifest.json", f"the keys of {format_}", f"{where}: {faults[0]['msg']}")


def is_checkpoint_uri(uri: str) -> bool:
    """Whether it is meant as a checkpoint's, not as a run's."""
    return f"{CHECKPOINTS}images-" in uri


def split_checkpoint_uri(uri: str) -> tuple[str, CheckpointName]:
    """(store URI of the run, checkpoint) of a checkpoint's URI. Raises UserError if it does not end like one."""
    match = re.fullmatch(r"(.+?)/?checkpoints/images-(\d+)/attempt-(\d+)/?", uri)
    if not match:
        raise UserError(
            f"checkpoint {uri}",
            "…/checkpoints/images-<position>/attempt-<n>",
            "another form",
            "glidepath checkpoints list RUN prints the URIs",
        )
    return match[1], CheckpointName(int(match[2]), int(match[3]))


def parse_name(text: str) -> CheckpointName:
    """The checkpoint that `images-000000064/attempt-1`, or a URI that ends so, names. Raises UsageError."""
    match = re.fullmatch(r"(?:.*/)?images-(\d+)/attempt-(\d+)/?", text)
    if not match:
        expected = "images-<position>/attempt-<n>, or a URI that ends so"
        raise UsageError(f"checkpoint {text}", expected, "another form", "glidepath checkpoints list RUN prints them")
    return CheckpointName(int(match[1]), int(match[2]))


def stored_bytes(manifest: Manifest) -> int:
    return sum(part.bytes for part in manifest.parts)


def part_sizes(store: ObjectStore) -> dict[str, int]:
    """Bytes of every object of the run's checkpoints, by key."""
    return {info.key: info.bytes for info in store.list(CHECKPOINTS)}


def missing_or_cut(name: CheckpointName, parts: Iterable[PartInfo], sizes: Mapping[str, int]) -> list[str]:
    """Files of parts that are absent or of the wrong size; reads no part. `sizes`: of all objects there, by key."""
    return [part.file for part in parts if sizes.get(part_key(name, part)) != part.bytes]
