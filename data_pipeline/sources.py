"""Sources: the inputs of a corpus as units of work, and the records of each unit.

Always holds: a unit is named by the sha256 of its content, so the same content is the same unit wherever it lies; units
come sorted by that digest; no link is followed. A unit is a tar, a folder, or a slice of the demo corpus. Called by the
corpus builder; to add a kind, add it to KINDS and to the functions with one line per kind.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal

from pydantic import field_serializer

from data_pipeline import demo
from data_pipeline.config import Settings
from data_pipeline.errors import UserError
from data_pipeline.executor import Executor, InlineExecutor
from data_pipeline.records import FILE_LIMIT_BYTES, IMAGE_SUFFIXES, Record, Rejected, text_key
from data_pipeline.remote_tars import RemoteTar, asked, find_remote, is_remote, open_remote, public_uri
from data_pipeline.storage import canonical_json
from data_pipeline.tars import read_tar

Kind = Literal["webdataset", "img2dataset", "folder", "demo"]

READ_BYTES = 2**20
TAR_ENDINGS = (".tar", ".tgz", ".tar.gz")


class Input(Settings):
    """One input of a corpus. `uri`: a tar or folder of tars, here or at s3://…, or an http(s):// address of a tar; a
    folder of pictures; for `demo`, `train` or `heldout`."""

    kind: Kind
    uri: str
    anonymous: bool = False  # s3://… of a public bucket: no credentials are sent

    @field_serializer("uri")
    def _without_signature(self, uri: str) -> str:
        # What is dumped gets into manifests.
        return public_uri(uri)

    def __repr_args__(self) -> Iterator[tuple[str, str]]:
        yield from {"kind": self.kind, "uri": public_uri(self.uri)}.items()


@dataclass(frozen=True)
class Unit:
    """One piece of work. `digest` is the sha256 of its content, `bytes` its size; `part` numbers slices of one uri."""

    kind: Kind
    uri: str
    part: int = 0
    digest: str = ""
    bytes: int = 0
    remote: RemoteTar | None = None  # how to get at it, if it does not lie on this machine


def list_units(inputs: Sequence[Input], executor: Executor | None = None) -> list[Unit]:
    """The units of all inputs, sorted by digest; content that is given twice is one unit.

    Raises UserError for an input that does not exist or has no units.
    """
    found = [unit for entry in inputs for unit in _find(entry)]
    digested = list((executor or InlineExecutor()).map(with_digest, found))
    by_digest = {unit.digest: unit for unit in sorted(digested, key=lambda unit: (unit.digest, unit.uri), reverse=True)}
    if not by_digest:
        raise UserError("corpus", "at least one input", "none", "add inputs=[{kind: …, uri: …}]")
    return sorted(by_digest.values(), key=lambda unit: unit.digest)


def with_digest(unit: Unit) -> Unit:
    """The unit with its digest and size; reads all of its content."""
    if unit.kind == "demo":
        return replace(unit, digest=demo.slice_digest(unit.uri, unit.part))
    if unit.kind == "folder":
        return _folder_with_digest(unit)
    if unit.remote is not None:
        unit = replace(unit, remote=asked(unit.remote))
    with _open_tar(unit) as file:
        return _tar_with_digest(unit, file)


def read_records(unit: Unit) -> Iterator[Record | Rejected]:
    """Every record of the unit, usable or not, in a fixed order."""
    if unit.kind == "demo":
        return demo.read_slice(unit.uri, unit.part)
    if unit.kind == "folder":
        return _read_folder(Path(unit.uri))
    file = _open_tar(unit)
    if unit.remote is not None and _tar_with_digest(unit, file).digest != unit.digest:
        file.close()
        raise UserError(f"unit {unit.uri}", "the content it had before", "another", "run it again")
    return read_tar(file, json_captions=unit.kind == "img2dataset")


def _open_tar(unit: Unit) -> IO[bytes]:
    return open(unit.uri, "rb") if unit.remote is None else open_remote(unit.remote)


def _tar_with_digest(unit: Unit, file: IO[bytes]) -> Unit:
    content, size = hashlib.sha256(), 0
    while piece := file.read(READ_BYTES):
        content.update(piece)
        size += len(piece)
    file.seek(0)
    # The kind counts: the same tar read as another kind can give other captions.
    digest = hashlib.sha256(canonical_json([unit.kind, content.hexdigest()])).hexdigest()
    return replace(unit, digest=digest, bytes=size)


def _find(entry: Input) -> list[Unit]:
    name = f"input {entry.kind} {public_uri(entry.uri)}"
    if entry.kind == "demo":
        if entry.uri not in demo.SLICES:
            raise UserError(name, f"uri {' or '.join(demo.SLICES)}", repr(entry.uri), "correct uri")
        return [Unit("demo", entry.uri, part) for part in range(demo.SLICES[entry.uri])]
    if is_remote(entry.uri) and entry.kind != "folder":
        tars = find_remote(entry.uri, entry.anonymous, TAR_ENDINGS)
        if not tars:
            raise UserError(name, f"objects ending in {', '.join(TAR_ENDINGS)}", "none with that prefix", "correct uri")
        return [Unit(entry.kind, tar.uri, remote=tar) for tar in tars]
    path = Path(public_uri(entry.uri)).absolute()
    if entry.kind == "folder":
        if not path.is_dir():
            raise UserError(name, "a folder", "a file" if path.exists() else "nothing", "correct uri")
        return [Unit("folder", str(path.resolve()))]
    if path.is_dir():
        files = sorted(child for child in path.iterdir() if child.name.endswith(TAR_ENDINGS) and child.is_file())
        if not files:
            raise UserError(name, f"files ending in {', '.join(TAR_ENDINGS)}", "none in that folder", "correct uri")
        return [Unit(entry.kind, str(tar)) for tar in files]
    if not path.is_file():
        raise UserError(name, "a tar or a folder of tars", "nothing", "correct uri")
    return [Unit(entry.kind, str(path))]


def _folder_with_digest(unit: Unit) -> Unit:
    content, size = [], 0
    for name, path in _files(Path(unit.uri)):
        data = _read_file(path)
        content.append([text_key(name), data if isinstance(data, str) else hashlib.sha256(data).hexdigest()])
        size += 0 if isinstance(data, str) else len(data)
    digest = hashlib.sha256(canonical_json(["folder", content])).hexdigest()
    return replace(unit, digest=digest, bytes=size)


def _read_folder(folder: Path) -> Iterator[Record | Rejected]:
    """One record for each picture file, keyed by its path in the folder; the caption is the .txt file beside it."""
    for name, path in _files(folder):
        if path.suffix.lower().lstrip(".") not in IMAGE_SUFFIXES:
            continue
        image, caption = _read_file(path), _read_file(path.with_suffix(".txt"))
        if isinstance(image, str):
            yield Rejected(text_key(name), image, "picture")
        elif isinstance(caption, str):
            reason = "caption_missing" if caption == "missing" else caption
            yield Rejected(text_key(name), reason, f"{path.stem}.txt")
        else:
            yield Record(text_key(name), image, (caption,))


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(relative name, path) of everything that is not a folder, links to folders included, sorted by name."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if Path(parent, name).is_symlink()]
        found += [Path(parent, name) for name in (*files, *links) if not name.startswith(".")]
    return iter(sorted((path.relative_to(folder).as_posix(), path) for path in found))


def _read_file(path: Path) -> bytes | str:
    """The content, or the reason why it is not read. Neither a link nor a pipe is ever opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return "missing"
    except OSError:
        return "not_a_file"
    with open(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            return "not_a_file"
        return "file_too_large" if facts.st_size > FILE_LIMIT_BYTES else file.read()
