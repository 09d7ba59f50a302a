"""Folders: pictures with a caption file beside each, or with captions in a jsonl.

Always holds: no link is followed and nothing outside the folder is read; every picture, every `.txt` file and every
line of a jsonl is one record, together or each alone; files of other endings are none. A picture's captions are those
of the line that names it, else the `.txt` file beside it. A line (Hugging Face's `metadata.jsonl`, and any other
`*.jsonl`) has `file_name`, relative to the jsonl's folder, and `text`, `caption` or `captions`; its numbers become
columns. Lines are read again when their picture is, so that memory holds names and places alone. Called by units.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data_pipeline.digests import ContentHash, content_digest
from data_pipeline.records import IMAGE_SUFFIXES, TEXT_LIMIT_BYTES, Record, Rejected, text_key
from data_pipeline.sources import fields
from data_pipeline.sources.files import Unusable, is_safe, names_beneath, open_beneath, read_beneath
from data_pipeline.storage import canonical_json

LIST_ENDING = ".jsonl"
CAPTION_ENDING = ".txt"
FILE_NAME = "file_name"


class Line(NamedTuple):
    """Where a picture's line stands: the jsonl's name in the folder, and bytes."""

    jsonl: str
    offset: int
    size: int


@dataclass
class Lines:
    """The lines of all jsonl files by the picture that they name, and those of no use."""

    by_picture: dict[str, Line] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)


def digest_of(folder: Path) -> tuple[str, int]:
    """A digest of all that the folder holds, and its size in bytes; reads all of it."""
    content, size = [], 0
    for name in names_beneath(folder):
        if name.endswith(LIST_ENDING):
            digest, bytes_ = _list_digest(folder, name)
        else:
            digest, bytes_ = _file_digest(folder, name)
        content.append([text_key(name), digest])
        size += bytes_
    return hashlib.sha256(canonical_json(["folder", content])).hexdigest(), size


def read_records(folder: Path) -> Iterator[Record | Rejected]:
    """One record for each picture, by its path in the folder; then the lines and the `.txt` files without a picture."""
    names = names_beneath(folder)
    lines = _lines(folder, [name for name in names if name.endswith(LIST_ENDING)])
    pictures = {name for name in names if name.lower().rpartition(".")[2] in IMAGE_SUFFIXES}
    there = set(names)
    pictures |= lines.by_picture.keys() & there
    # Of `a.TXT` and `a.txt` the latter, which sorts last.
    captions = {_caption_of(name): name for name in names if name.lower().endswith(CAPTION_ENDING)}
    for name in sorted(pictures):
        yield _record(folder, name, lines.by_picture.get(name), captions.get(_caption_of(name)))
    for name in sorted(lines.by_picture.keys() - there):
        yield Rejected(text_key(name), "image_missing", f"named in {text_key(lines.by_picture[name].jsonl)}")
    beside = {_caption_of(name) for name in pictures}
    for name in names:
        if name.lower().endswith(CAPTION_ENDING) and name not in pictures and _caption_of(name) not in beside:
            yield Rejected(text_key(name), "image_missing", "no picture of its name beside it")
    yield from lines.rejected


def _record(folder: Path, name: str, line: Line | None, caption: str | None) -> Record | Rejected:
    key = text_key(name)
    try:
        image = read_beneath(folder, name)
        if line is None:
            return Record(key, image, (_caption_beside(folder, caption or _caption_of(name)),))
        document = fields.document_of(_read_line(folder, line)) or {}
    except Unusable as unusable:
        return Rejected(key, unusable.reason, unusable.detail)
    captions = fields.captions_of(document)
    if not captions:
        return Rejected(key, "caption_missing", f"none in {text_key(line.jsonl)}")
    return Record(key, image, captions, fields.numbers_of(document))


def _caption_beside(folder: Path, caption: str) -> bytes:
    try:
        return read_beneath(folder, caption, TEXT_LIMIT_BYTES)
    except Unusable as unusable:
        reason = "caption_missing" if unusable.reason == "missing" else unusable.reason
        raise Unusable(reason, text_key(PurePosixPath(caption).name)) from None


def _caption_of(name: str) -> str:
    """How the caption file beside a picture, or a caption file itself, is usually spelt."""
    return str(PurePosixPath(name).with_suffix(CAPTION_ENDING))


def _lines(folder: Path, jsonls: list[str]) -> Lines:
    lines = Lines()
    for jsonl in jsonls:
        try:
            for number, line, data in _lines_of(folder, jsonl):
                _add(lines, f"{text_key(jsonl)}:{number}", line, data)
        except Unusable as unusable:
            lines.rejected.append(Rejected(text_key(jsonl), unusable.reason, unusable.detail))
    return lines


def _add(lines: Lines, key: str, line: Line, data: bytes) -> None:
    if len(data) == line.size and not data.strip():
        return
    document = fields.document_of(data)
    named = document.get(FILE_NAME) if document is not None else None
    if not isinstance(named, str):
        detail = "not an object" if document is None else f"no {FILE_NAME}"
        lines.rejected.append(Rejected(key, "metadata_damaged", detail))
        return
    named = fields.valid_text(named)
    picture = str(PurePosixPath(line.jsonl).parent / named)
    if not is_safe(named):
        lines.rejected.append(Rejected(key, "unsafe_name", named))
    elif picture in lines.by_picture:
        lines.rejected.append(Rejected(key, "duplicate_key", f"{named} was named before; the first line is kept"))
    else:
        lines.by_picture[picture] = line


def _lines_of(folder: Path, jsonl: str) -> Iterator[tuple[int, Line, bytes]]:
    """(number from 1, place, content) of each line; of one over the limit only so much that it is no JSON."""
    with open_beneath(folder, jsonl) as file:
        offset = number = size = 0
        while data := file.readline(TEXT_LIMIT_BYTES + 1):
            size, begun = len(data), data
            while not data.endswith(b"\n") and (data := file.readline(TEXT_LIMIT_BYTES)):
                size += len(data)
            number += 1
            yield number, Line(jsonl, offset, size), begun
            offset += size


def _read_line(folder: Path, line: Line) -> bytes:
    with open_beneath(folder, line.jsonl) as file:
        file.seek(line.offset)
        return file.read(line.size)


def _file_digest(folder: Path, name: str) -> tuple[str, int]:
    try:
        data = read_beneath(folder, name)
    except Unusable as unusable:
        return unusable.reason, 0
    return content_digest(data).hex(), len(data)


def _list_digest(folder: Path, name: str) -> tuple[str, int]:
    content, size = ContentHash(), 0
    try:
        with open_beneath(folder, name) as file:
            while piece := file.read(2**20):
                content.update(piece)
                size += len(piece)
    except Unusable as unusable:
        return unusable.reason, 0
    return content.hexdigest(), size
