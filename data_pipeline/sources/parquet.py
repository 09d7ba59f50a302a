"""Parquet: rows of a picture, as bytes or as the name of a file or object, with captions and numbers.

Always holds: rows are read a few at a time, so that memory follows the file's pages and not its size; a column that is
asked for and absent is a UserError that names those there are; a row group that is damaged is one Rejected, and the
others are read. Called by units.py; img2dataset.py opens the parquet beside a tar with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import IO, Literal

import pyarrow as pa
import pyarrow.parquet

from data_pipeline.errors import UserError
from data_pipeline.records import FILE_LIMIT_BYTES, TEXT_LIMIT_BYTES, Record, Rejected
from data_pipeline.sources import fields
from data_pipeline.sources.files import SourceFile, Unusable
from data_pipeline.sources.named import Pictures
from data_pipeline.storage import canonical_json

PARQUET_ENDINGS = (".parquet",)

# Where the pictures are looked for, unless the input says: columns of bytes, then columns of names.
BYTES_NAMES = ("image", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "img")
NAME_NAMES = ("url", "URL", "path", "file_name", "image_path", "image")
STRUCT_FIELD = "bytes"  # of Hugging Face's {bytes, path}

# At once in memory. A value of a dictionary, of which a parquet of 4 KB can have one of 100 MB in each of its rows,
# counts every time.
ROWS, NAMED_ROWS = 2, 64
PAGE_BUFFER_BYTES = 2**20
SHOWN_COLUMNS = 30
STATUS, SUCCESS = "status", b"success"  # of img2dataset's parquet output, whose failed rows have no picture

DAMAGE = (pa.ArrowException, OSError, ValueError)


@dataclass(frozen=True)
class Columns:
    """Which columns are read. `holds`: whether the picture column holds bytes, {bytes, …} or names."""

    picture: str
    holds: Literal["bytes", "struct", "names"]
    captions: tuple[str, ...]
    numbers: tuple[str, ...]
    status: str | None

    def all(self) -> list[str]:
        picture = f"{self.picture}.{STRUCT_FIELD}" if self.holds == "struct" else self.picture
        return [*dict.fromkeys([picture, *self.captions, *self.numbers, *([self.status] if self.status else [])])]


def open_parquet(content: IO[bytes]) -> pa.parquet.ParquetFile:
    """Raises DAMAGE, for columns of one name as well."""
    # With a buffer a column is read page by page; without one, whole row groups at a time.
    file = pa.parquet.ParquetFile(
        content, buffer_size=PAGE_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
    )
    names = file.schema_arrow.names
    if len(set(names)) < len(names):
        raise ValueError(f"several columns of one name among {', '.join(names)}")
    return file


def columns_of(file: SourceFile, image: str | None, caption: str | None) -> Columns | None:
    """The columns to read, of names given or found; None for a file that is no parquet.

    Raises UserError for one that is not there or holds something else.
    """
    with file.open() as content:
        try:
            schema = open_parquet(content).schema_arrow
        except DAMAGE:
            return None
    by_name = {field.name: field.type for field in schema}
    picture = image or next(iter(_suitable(by_name)), None)
    holds = None if picture is None or picture not in by_name else _holds(by_name[picture])
    if picture is None or holds is None:
        raise _no_column(file, "pictures, as bytes or names", "image", image, by_name)
    texts = {name for name, kind in by_name.items() if fields.is_text(kind) or fields.is_texts(kind)}
    if caption is not None:
        captions = [caption] if caption in texts else []
    else:
        main = [name for name in fields.CAPTION_NAMES if name in texts][:1]
        captions = main + [name for name in (fields.CAPTIONS_NAME,) if name in texts]
    if not captions:
        raise _no_column(file, "captions", "caption", caption, by_name)
    numbers = tuple(name for name, kind in by_name.items() if fields.is_number(kind))
    status = STATUS if STATUS in by_name and fields.is_text(by_name[STATUS]) else None
    return Columns(picture, holds, tuple(captions), numbers, status)


def _suitable(by_name: dict[str, pa.DataType]) -> Iterator[str]:
    for names, held in ((BYTES_NAMES, ("bytes", "struct")), (NAME_NAMES, ("names",))):
        yield from (name for name in names if name in by_name and _holds(by_name[name]) in held)


def _holds(kind: pa.DataType) -> Literal["bytes", "struct", "names"] | None:
    if pa.types.is_struct(kind):
        index = kind.get_field_index(STRUCT_FIELD)
        return "struct" if index >= 0 and fields.is_bytes(kind.field(index).type) else None
    if fields.is_bytes(kind):
        return "bytes"
    return "names" if fields.is_text(kind) else None


def _no_column(
    file: SourceFile, of: str, setting: str, named: str | None, by_name: dict[str, pa.DataType]
) -> UserError:
    there = shown(f"{name} ({kind})" for name, kind in by_name.items())
    expected = f"a column of {of}" + (f" named {named}" if named else "")
    return UserError(f"parquet {file.uri}", expected, f"columns {there}", f"set the input's {setting} to one of them")


def digest_of_rows(file: SourceFile, columns: Columns | None, anonymous: bool) -> tuple[str, int]:
    """What besides the file's own content its records depend on, and the size of the pictures that it names.

    Raises UserError for names that are links to the web.
    """
    if columns is None:
        return "unreadable", 0
    asked = [columns.picture, columns.holds, *columns.captions]
    if columns.holds != "names":
        return hashlib.sha256(canonical_json(asked)).hexdigest(), 0
    digest, size = hashlib.sha256(canonical_json(asked)), 0
    with file.open() as content, Pictures(file.uri, anonymous) as pictures:
        for _, batch in _batches(content, [columns.picture], NAMED_ROWS):
            names = fields.bytes_of(batch.column(0)) if isinstance(batch, pa.RecordBatch) else []
            for version, bytes_ in pictures.versions(names):
                digest.update(version.encode() + b"\0")
                size += bytes_
    return digest.hexdigest(), size


def read_records(file: SourceFile, columns: Columns | None, anonymous: bool) -> Iterator[Record | Rejected]:
    """The rows in their order, keyed by their number; `columns` as `columns_of` gave them."""
    names = columns.all() if columns is not None else []
    with file.open() as content, Pictures(file.uri, anonymous) as pictures:
        for first, batch in _batches(content, names, ROWS):
            if isinstance(batch, Rejected):
                yield batch
            elif columns is None:
                raise UserError(f"unit {file.uri}", "the content it had before", "another", "run it again")
            else:
                yield from _records(first, batch, columns, pictures)


def _batches(content: IO[bytes], names: list[str], rows: int) -> Iterator[tuple[int, pa.RecordBatch | Rejected]]:
    """(number of the first row, rows), and Rejected for what cannot be read."""
    try:
        file = open_parquet(content)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except DAMAGE as error:
        yield 0, Rejected("(parquet)", "parquet_unreadable", _line(error))
        return
    for group, first in zip(range(len(sizes)), accumulate(sizes, initial=0), strict=False):
        try:
            batches = file.iter_batches(rows, row_groups=[group], columns=names, use_threads=False)
            while (batch := next(batches, None)) is not None:
                yield first, batch
                first += batch.num_rows
        except DAMAGE as error:
            yield first, Rejected(f"(rows from {first})", "parquet_damaged", _line(error))


def _records(first: int, batch: pa.RecordBatch, columns: Columns, pictures: Pictures) -> Iterator[Record | Rejected]:
    column = batch.column(columns.picture)
    cells = fields.bytes_of(column.flatten()[0] if columns.holds == "struct" else column)
    images: Sequence[bytes | Unusable | None] = pictures.read(cells) if columns.holds == "names" else cells
    texts = zip(*(fields.texts_of(batch.column(name)) for name in columns.captions), strict=True)
    numbers = fields.numbers_of_columns(batch, columns.numbers)
    states = fields.bytes_of(batch.column(columns.status)) if columns.status else [None] * batch.num_rows
    for row, (image, found, known, status) in enumerate(zip(images, texts, numbers, states, strict=True), first):
        key, captions = f"{row:09d}", fields.several(None, [caption for group in found for caption in group])
        if isinstance(image, Unusable):
            yield Rejected(key, image.reason, image.detail)
        elif image is None and status not in (None, SUCCESS):
            yield Rejected(key, "download_failed", status.decode("utf-8", "backslashreplace"))
        elif image is None:
            yield Rejected(key, "image_missing", f"{columns.picture} is null")
        elif len(image) > FILE_LIMIT_BYTES:
            yield Rejected(key, "file_too_large", f"{len(image)} bytes, at most {FILE_LIMIT_BYTES}")
        elif not captions:
            yield Rejected(key, "caption_missing", f"{', '.join(columns.captions)}: null or empty")
        elif (size := max(map(len, captions))) > TEXT_LIMIT_BYTES:
            yield Rejected(key, "caption_too_large", f"{size} bytes, at most {TEXT_LIMIT_BYTES}")
        else:
            yield Record(key, image, captions, known)


def shown(names: Iterable[str]) -> str:
    """Names out of a file, for a message of one line."""
    known = [" ".join(name.split()) for name in names]
    return ", ".join(known[:SHOWN_COLUMNS]) + (f" and {len(known) - SHOWN_COLUMNS} more" * (len(known) > SHOWN_COLUMNS))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
