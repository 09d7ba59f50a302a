"""Fields: captions and numbers out of JSON objects and Arrow columns.

Always holds: a caption stays bytes, so that what is no text in any known encoding is judged where captions are; a
number is finite; what is null, not a number or not finite is absent. Called by the readers of img2dataset, parquet and
folders.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute

from data_pipeline.records import TEXT_LIMIT_BYTES

Document = dict[str, Any]

# A caption, in the order in which it is looked for, and a list of them.
CAPTION_NAMES = ("caption", "TEXT", "text")
CAPTIONS_NAME = "captions"


def several(main: bytes | None, others: Iterable[bytes]) -> tuple[bytes, ...]:
    """All captions of a picture: `main` first, the others in their order, none twice."""
    return tuple(dict.fromkeys([*(() if main is None else (main,)), *others]))


def document_of(data: bytes) -> Document | None:
    """A JSON object, or None where the bytes are no such thing."""
    if len(data) > TEXT_LIMIT_BYTES:
        return None
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def captions_of(document: Document, before: bytes | None = None, behind: bytes | None = None) -> tuple[bytes, ...]:
    """The captions of a picture: `before`, else the one that a JSON object states, else `behind`; then its list."""
    stated = (_encoded(value) for name in CAPTION_NAMES if isinstance(value := document.get(name), str))
    main = before if before is not None else next(stated, behind)
    values = document.get(CAPTIONS_NAME)
    listed = values if isinstance(values, list) else [values]
    return several(main, [_encoded(value) for value in listed if isinstance(value, str)])


def numbers_of(document: Document) -> dict[str, float]:
    """The numbers that a JSON object states, by name; true and false are 1 and 0."""
    return {valid_text(name): number for name, value in document.items() if (number := _number(value)) is not None}


def valid_text(value: str) -> str:
    """JSON can spell half of a surrogate pair, which no other text can hold; it becomes a backslash escape."""
    return value.encode("utf-8", "backslashreplace").decode()


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds one text, or bytes, per row."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return is_bytes(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return is_bytes(kind.value_type)
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return binary or pa.types.is_fixed_size_binary(kind)


def is_texts(kind: pa.DataType) -> bool:
    """Whether a column of this type holds several texts per row."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and is_text(kind.value_type)


def is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def bytes_of(column: pa.Array) -> list[bytes | None]:
    """Each row's bytes of a column for which `is_text` holds; text is not checked to be UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not is_bytes(column.type):  # of pictures a cast would be one more copy
        column = pa.compute.cast(column, pa.large_binary())
    return list(column.to_pylist())


def texts_of(column: pa.Array) -> list[tuple[bytes, ...]]:
    """Each row's captions, of a column for which `is_text` or `is_texts` holds; null gives none."""
    if is_text(column.type):
        return [() if value is None else (value,) for value in bytes_of(column)]
    rows = [bytes_of(scalar.values) if scalar.is_valid else [] for scalar in column]
    return [tuple(value for value in row if value is not None) for row in rows]


def numbers_of_columns(batch: pa.RecordBatch, names: Iterable[str]) -> list[dict[str, float]]:
    """Each row's numbers, by the names of the columns."""
    rows: list[dict[str, float]] = [{} for _ in range(batch.num_rows)]
    for name in names:
        for row, value in zip(rows, batch.column(name).to_pylist(), strict=True):
            if (number := _number(value)) is not None:
                row[name] = number
    return rows


def _encoded(value: str) -> bytes:
    return value.encode("utf-8", "surrogatepass")  # a lone surrogate stays undecodable


def _number(value: Any) -> float | None:
    if not isinstance(value, bool | int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
