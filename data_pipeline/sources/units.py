"""Units: what the inputs of a corpus are, the pieces of work that they fall into, and the records of each.

Always holds: a unit is named by a digest of its content, so the same content is the same unit wherever it lies; units
come sorted by it. A unit is a tar, a parquet, a folder, or a slice of the demo corpus. What an input gives that
is damaged becomes Rejected records; an input that is not there or cannot be opened is a UserError. Called by the corpus
builder; to add a kind, add it to Kind and to the three functions with one line per kind.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import field_serializer, field_validator, model_validator

from data_pipeline import demo
from data_pipeline.config import Settings
from data_pipeline.errors import UserError
from data_pipeline.executor import Executor, InlineExecutor
from data_pipeline.records import Record, Rejected, text_key
from data_pipeline.sources import folder, img2dataset, parquet, webdataset
from data_pipeline.sources.files import SourceFile, find_files
from data_pipeline.sources.remote import is_remote, public_uri
from data_pipeline.storage import canonical_json

log = logging.getLogger(__name__)

Kind = Literal["webdataset", "img2dataset", "parquet", "folder", "demo"]
ENDINGS = {
    "webdataset": webdataset.TAR_ENDINGS,
    "img2dataset": webdataset.TAR_ENDINGS,
    "parquet": parquet.PARQUET_ENDINGS,
}

SHOWN_REPEATS = 10  # of the units that are left out, in the log


class Input(Settings):
    """One input of a corpus. `uri`: a file of its kind or a folder with such at any depth, here or at s3://…, or an
    http(s):// address of a file; a folder of pictures on this machine; for `demo`, `train` or `heldout`."""

    kind: Kind
    uri: str
    anonymous: bool = False  # s3://… of a public bucket: no credentials are sent
    image: str | None = None  # parquet: the column of pictures, as bytes or names; null: found by its usual names
    caption: str | None = None  # parquet: the column of captions

    @field_validator("uri")
    @classmethod
    def _is_well_formed(cls, uri: str) -> str:
        try:
            public_uri(uri)
        except ValueError as error:
            raise ValueError(f"a path or an address, found one that is neither: {error}") from None
        return uri

    @model_validator(mode="after")
    def _columns_are_of_a_parquet(self) -> Input:
        if self.kind != "parquet" and (self.image or self.caption):
            raise ValueError("image and caption with kind parquet alone, found them with kind " + self.kind)
        return self

    @field_serializer("uri")
    def _without_signature(self, uri: str) -> str:
        # What is dumped gets into manifests.
        return text_key(public_uri(uri))

    def __repr_args__(self) -> Iterator[tuple[str, str]]:
        yield from {"kind": self.kind, "uri": public_uri(self.uri)}.items()


@dataclass(frozen=True)
class Unit:
    """One piece of work of an input. `digest` stands for its content, `bytes` its size; `part` numbers slices of
    one uri. What stands behind them is known by `with_digest`."""

    kind: Kind
    uri: str
    part: int = 0
    digest: str = ""
    bytes: int = 0
    entry: Input | None = None
    file: SourceFile | None = None
    beside: SourceFile | None = None
    columns: parquet.Columns | None = None

    @property
    def name(self) -> str:
        """For people; nothing secret is in it."""
        return f"{self.kind} {self.uri}" + (f" part {self.part}" if self.part else "")


def list_units(
    inputs: Sequence[Input],
    executor: Executor | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Unit]:
    """The units of all inputs, sorted by digest; content that is given twice is one unit, and the others are named in
    the log. All of it is read for that.

    Raises UserError for an input that does not exist, cannot be opened or has no units.
    """
    found, digested = find_units(inputs), []
    progress(0, len(found))
    for unit in (executor or InlineExecutor()).map(with_digest, found):
        digested.append(unit)
        progress(len(digested), len(found))
    if not digested:
        raise UserError("corpus", "at least one input", "none", "add inputs=[{kind: …, uri: …}]")
    units: list[Unit] = []
    repeats: list[str] = []
    for unit in sorted(digested, key=lambda unit: (unit.digest, unit.uri)):
        if units and unit.digest == units[-1].digest:
            repeats.append(f"{unit.name} as {units[-1].name}")
        else:
            units.append(unit)
    if repeats:
        shown = "; ".join(repeats[:SHOWN_REPEATS]) + ("; …" if len(repeats) > SHOWN_REPEATS else "")
        log.warning("%d of %d units hold what another does and are left out: %s", len(repeats), len(digested), shown)
    return units


def find_units(inputs: Sequence[Input]) -> list[Unit]:
    """The units of all inputs, of which nothing is read yet. Raises UserError for an input that does not exist."""
    return [unit for entry in inputs for unit in _find(entry)]


def with_digest(unit: Unit) -> Unit:
    """The unit with its digest and size; reads all of its content."""
    kind = unit.kind
    if kind == "demo":
        return replace(unit, digest=demo.slice_digest(unit.uri, unit.part))
    if kind == "folder":
        digest, size = folder.digest_of(Path(unit.uri))
        return replace(unit, digest=digest, bytes=size)
    assert unit.file is not None and unit.entry is not None
    entry, file = unit.entry, unit.file.with_content()
    unit = replace(unit, file=file, bytes=file.size_bytes)
    # The kind counts: the same tar read as another kind can give other captions.
    if kind == "parquet":
        columns = parquet.columns_of(file, entry.image, entry.caption)
        rows, size = parquet.digest_of_rows(file, columns, entry.anonymous)
        return replace(unit, columns=columns, digest=_digest(kind, file.digest, rows), bytes=file.size_bytes + size)
    if kind == "img2dataset" and (beside := file.beside(ENDINGS[kind], ".parquet")) is not None:
        beside = beside.with_content()
        digest = _digest(kind, file.digest, beside.digest)
        return replace(unit, beside=beside, digest=digest, bytes=file.size_bytes + beside.size_bytes)
    return replace(unit, digest=_digest(kind, file.digest))


def reopen(inputs: Sequence[Input], uri: str, digest: str) -> Unit | None:
    """The unit of that content and address, the latter as text, or None if it is gone. Reads all of it."""
    for entry in inputs:
        try:
            found = [with_digest(unit) for unit in _find(entry) if text_key(unit.uri) == uri]
        except (UserError, OSError):  # gone, or not to be had without a signature that nobody kept
            continue
        for unit in found:
            if unit.digest == digest:
                return unit
    return None


def read_records(unit: Unit) -> Iterator[Record | Rejected]:
    """Every record of the unit, usable or not, in a fixed order."""
    kind = unit.kind
    if kind == "demo":
        return demo.read_slice(unit.uri, unit.part)
    if kind == "folder":
        return folder.read_records(Path(unit.uri))
    assert unit.file is not None and unit.entry is not None
    if kind == "parquet":
        return parquet.read_records(unit.file, unit.columns, unit.entry.anonymous)
    if kind == "img2dataset":
        return img2dataset.read_records(unit.file.open(), unit.beside)
    return webdataset.read_records(unit.file.open())


def _find(entry: Input) -> list[Unit]:
    name = f"input {entry.kind} {public_uri(entry.uri)}"
    if entry.kind == "demo":
        if entry.uri not in demo.SLICES:
            raise UserError(name, f"uri {' or '.join(demo.SLICES)}", repr(entry.uri), "correct uri")
        return [Unit("demo", entry.uri, part) for part in range(demo.SLICES[entry.uri])]
    if entry.kind == "folder":
        path = Path(public_uri(entry.uri)).absolute()
        if is_remote(entry.uri):
            next_step = "pack the pictures into tars, or name them in a parquet"
            raise UserError(name, "a folder on this machine", "an address", next_step)
        if not path.is_dir():
            raise UserError(name, "a folder", "a file" if path.exists() else "nothing", "correct uri")
        return [Unit("folder", str(path.resolve()))]
    files = find_files(entry.uri, entry.anonymous, ENDINGS[entry.kind], name)
    return [Unit(entry.kind, file.uri, file=file, entry=entry) for file in files]


def _digest(*content: str) -> str:
    return hashlib.sha256(canonical_json(content)).hexdigest()
