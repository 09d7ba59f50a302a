"""The manifest of a checkpoint: its presence is the commit, its own digest proves that it is whole.

Always holds: a manifest is written once, never changed; it is read only in its canonical byte form, so that any changed
bit is found. Layout of a run's store: `attempts/00001.json`, `checkpoints/images-<position>/attempt-<n>/manifest.json`
with its parts beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError

from data_pipeline.config import Settings
from data_pipeline.errors import UserError
from data_pipeline.manifests import NotSealed, seal, unseal
from data_pipeline.storage import ObjectNotFound, ObjectStore
from trainer.checkpoint.parts import CheckpointDamaged, PartInfo

FORMAT = "glidepath-checkpoint-1"
CHECKPOINTS = "checkpoints/"
_FOLDER = re.compile(r"checkpoints/images-(\d{9,})/attempt-(\d+)/")


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

    def __str__(self) -> str:
        return f"images-{self.position:09d}/attempt-{self.attempt}"


def part_file(rank: int, world_size: int) -> str:
    return f"part-{rank:05d}-of-{world_size:05d}.safetensors"


def name_of_key(key: str) -> CheckpointName | None:
    """The checkpoint that an object belongs to, by its key."""
    match = _FOLDER.match(key)
    return CheckpointName(int(match[1]), int(match[2])) if match else None


def committed(store: ObjectStore) -> list[CheckpointName]:
    """Every committed checkpoint (its manifest exists), newest first."""
    names = (name_of_key(info.key) for info in store.list(CHECKPOINTS) if info.key.endswith("/manifest.json"))
    return sorted((name for name in names if name is not None), reverse=True)


def read_manifest(store: ObjectStore, key: str) -> Manifest:
    """The manifest stored under `key`.

    Raises CheckpointDamaged if its bytes are not canonical or its digest is wrong, UserError if the format is of
    another version of Glidepath.
    """
    try:
        document = unseal(store.get(key))
    except ObjectNotFound:
        raise CheckpointDamaged("manifest.json", "a manifest", "none") from None
    except NotSealed as fault:
        raise CheckpointDamaged("manifest.json", fault.expected, fault.found) from None
    del document["sha256"]
    if document.get("format") != FORMAT:
        raise UserError(
            f"{store.uri}/{key}", f"format {FORMAT}", str(document.get("format")), "use that version to read it"
        )
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        raise CheckpointDamaged("manifest.json", "the keys of this format", error.errors()[0]["msg"]) from None


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


def stored_bytes(manifest: Manifest) -> int:
    return sum(part.bytes for part in manifest.parts)


def missing_or_cut(store: ObjectStore, name: CheckpointName, manifest: Manifest) -> list[str]:
    """Files of parts that are absent or of the wrong size; reads no part."""
    sizes = {info.key.removeprefix(name.folder): info.bytes for info in store.list(name.folder)}
    return [part.file for part in manifest.parts if sizes.get(part.file) != part.bytes]
