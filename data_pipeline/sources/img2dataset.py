"""img2dataset: the samples of a tar with what its json files and the parquet beside it know of them.

Always holds: every row of the parquet and every sample of the tar is one record; a download that failed is one too, as
`download_failed`. The caption is the `.txt` file's, else the json's, else the parquet's; a list `captions` adds to it.
Numbers of the json and of the parquet become columns; where both state one the parquet counts, since scores are added
there afterwards. Called by units.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO

import pyarrow as pa

from data_pipeline.errors import UserError
from data_pipeline.records import TEXT_LIMIT_BYTES, Record, Rejected
from data_pipeline.sources import fields
from data_pipeline.sources.files import SourceFile
from data_pipeline.sources.parquet import DAMAGE, open_parquet, shown
from data_pipeline.sources.webdataset import Sample, read_samples

KEY, STATUS, ERROR = "key", "status", "error_message"
SUCCESS = b"success"

# Rows are taken out of Arrow so many at a time, and the last blocks kept: a tar is nearly in the parquet's order.
BLOCK_ROWS, BLOCKS = 64, 64

# What is held in memory of the parquet beside a tar: a hundred times that of a usual tar. It is read so few rows at a
# time because one of some KB can have a value of 100 MB in each of its rows.
ROWS_LIMIT, BYTES_LIMIT = 2**20, 256 * 2**20
READ_ROWS = 8


@dataclass(frozen=True)
class Row:
    """What the parquet knows of one key. `failure`: why there is no picture, as img2dataset says it."""

    caption: bytes | None = None
    captions: tuple[bytes, ...] = ()
    columns: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None


def read_records(tar: IO[bytes], beside: SourceFile | None) -> Iterator[Record | Rejected]:
    """Records of the tar in its order, then those that only the parquet names. The tar is closed at the end.

    Raises UserError for a parquet without a column `key`.
    """
    rows: Rows | None = None
    if beside is not None:
        with beside.open() as content:
            try:
                rows = Rows(content, beside.uri)
            except DAMAGE as error:
                yield Rejected("(parquet beside the tar)", "parquet_unreadable", str(error))
    seen = set()
    for sample in read_samples(tar):
        seen.add(sample.key)
        yield _outcome(sample, rows.row(sample.key) if rows is not None else Row())
    if rows is not None:
        yield from rows.without_picture(seen)


def _outcome(sample: Sample | Rejected, row: Row) -> Record | Rejected:
    if isinstance(sample, Rejected):
        failed = sample.reason == "image_missing" and row.failure is not None
        return Rejected(sample.key, "download_failed", f"{row.failure}") if failed else sample
    document = {} if sample.document is None else fields.document_of(sample.document)
    if document is None:
        return Rejected(sample.key, "metadata_damaged", "json: not an object")
    captions = fields.captions_of(document, sample.text, row.caption)
    captions = fields.several(None, (*captions, *row.captions))
    if not captions:
        return Rejected(sample.key, "caption_missing", f"has {sample.suffixes}")
    if (size := max(map(len, captions))) > TEXT_LIMIT_BYTES:
        return Rejected(sample.key, "caption_too_large", f"{size} bytes, at most {TEXT_LIMIT_BYTES}")
    return Record(sample.key, sample.image, captions, {**fields.numbers_of(document), **row.columns})


class Rows:
    """The parquet beside a tar: no pictures, so its columns of interest are held in memory, as Arrow holds them."""

    def __init__(self, content: IO[bytes], uri: str) -> None:
        """Raises DAMAGE, also for what would fill the memory, and UserError for a parquet without keys."""
        parquet = open_parquet(content)
        schema = parquet.schema_arrow
        texts = {field.name for field in schema if fields.is_text(field.type)}
        lists = {field.name for field in schema if fields.is_texts(field.type)}
        if KEY not in texts:
            found, next_step = f"columns {shown(schema.names)}", "move it away if it is not img2dataset's"
            raise UserError(f"parquet {uri}", f"a column {KEY} of text", found, next_step)
        self._numbers = [field.name for field in schema if fields.is_number(field.type)]
        self._caption = next((name for name in fields.CAPTION_NAMES if name in texts), None)
        self._captions = fields.CAPTIONS_NAME if fields.CAPTIONS_NAME in lists else None
        about = [name for name in (STATUS, ERROR) if name in texts]
        captions = [name for name in (self._caption, self._captions) if name]
        self._rows = _read(parquet, [KEY, *about, *captions, *self._numbers])
        names = [name for chunk in self._rows[KEY].chunks for name in fields.bytes_of(chunk)]
        self._keys = [_text(name) or f"(row {place})" for place, name in enumerate(names)]
        self._blocks: dict[int, list[Row]] = {}
        self._places = {key: place for place, key in reversed(list(enumerate(self._keys)))}

    def row(self, key: str) -> Row:
        """What is known of a key, from its first row; an empty Row where there is none."""
        place = self._places.get(key)
        return Row() if place is None else self._row(place)

    def without_picture(self, seen: set[str]) -> Iterator[Rejected]:
        """A record for each row whose key is not in `seen`, and for each whose key came before."""
        for place, key in enumerate(self._keys):
            if self._places[key] != place:
                yield Rejected(key, "duplicate_key", "the key came before in this parquet; the first is kept")
            elif key not in seen:
                failure = self._row(place).failure
                reason = "image_missing" if failure is None else "download_failed"
                yield Rejected(key, reason, failure or "in the parquet, not in the tar")

    def _row(self, place: int) -> Row:
        block, within = divmod(place, BLOCK_ROWS)
        if block not in self._blocks:
            if len(self._blocks) == BLOCKS:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[block] = self._rows_of(block)
        return self._blocks[block][within]

    def _rows_of(self, block: int) -> list[Row]:
        batch = self._rows.slice(block * BLOCK_ROWS, BLOCK_ROWS).combine_chunks().to_batches()[0]
        nothing: list[None] = [None] * batch.num_rows
        caption = fields.bytes_of(batch.column(self._caption)) if self._caption else nothing
        captions = fields.texts_of(batch.column(self._captions)) if self._captions else [()] * batch.num_rows
        columns = fields.numbers_of_columns(batch, self._numbers)
        names = batch.schema.names
        known = [fields.bytes_of(batch.column(name)) if name in names else nothing for name in (STATUS, ERROR)]
        return list(map(Row, caption, captions, columns, map(_failure, *known)))


def _read(parquet: pa.parquet.ParquetFile, columns: list[str]) -> pa.Table:
    if (count := parquet.metadata.num_rows) > ROWS_LIMIT:
        raise ValueError(f"{count} rows, at most {ROWS_LIMIT}")
    batches, size = [], 0
    for batch in parquet.iter_batches(READ_ROWS, columns=columns, use_threads=False):
        batches.append(pa.RecordBatch.from_arrays([_plain(batch.column(name)) for name in columns], columns))
        size += batches[-1].nbytes
        if size > BYTES_LIMIT:
            raise ValueError(f"more than {BYTES_LIMIT} bytes of keys, captions and numbers")
    return pa.Table.from_batches(batches).combine_chunks() if batches else parquet.read(columns)


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _failure(status: bytes | None, error: bytes | None) -> str | None:
    return None if status in (None, SUCCESS) else f"{_text(status)}: {_text(error) or 'no message'}"


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "backslashreplace")
