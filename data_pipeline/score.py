"""Score: the first pass, over one input unit: read, filter, decode, and stage what survives.

Always holds: every pair of picture and caption that a unit offers has one row in the verdict table, with the reason why
it is dropped, if it is; broken ones (as opposed to filtered ones) are in the quarantine table too. The unit's manifest,
stored last, commits all of it; a committed unit is never scored again with the same settings. Called by the corpus
builder, once per unit.

    units/<unit digest>-<settings digest>/manifest.json  verdicts.parquet  quarantine.parquet  rows.arrow
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from data_pipeline import images, manifests
from data_pipeline.arrow_files import BATCH_ROWS, write_arrow
from data_pipeline.captions import CaptionError, CaptionPolicy, chosen_captions, normalise
from data_pipeline.config import state_folder
from data_pipeline.digests import content_digest
from data_pipeline.errors import UserError
from data_pipeline.families import BASE_SIDE, CODEC_VERSIONS, UPSAMPLER_SIDE
from data_pipeline.filters import Facts, Thresholds, absent_columns, reason_to_drop, reason_to_drop_pixels
from data_pipeline.manifests import Document, digest_of
from data_pipeline.perceptual_hash import HASH_VERSION, perceptual_hash
from data_pipeline.records import RECORDS_VERSION, Record, Rejected
from data_pipeline.sources import Unit, read_records
from data_pipeline.staging import STAGED_SCHEMA, Survivor, stage
from data_pipeline.storage import ObjectStore
from data_pipeline.tokenizer import TOKENIZER_SHA256

FORMAT = "glidepath-unit-3"
UNIT_FILES = ("rows.arrow", "verdicts.parquet", "quarantine.parquet")  # that a unit's manifest commits
NAMED_BAD_RECORDS = 10  # in a unit's manifest and in messages; the quarantine table has all

# A table's rows wait in memory for their row group until they are so many, or take so much; what is packed of them
# waits there up to SPOOL_BYTES, then on the disk.
GROUP_ROWS, GROUP_BYTES, SPOOL_BYTES = 4096, 8 * 2**20, 16 * 2**20
PIECE_BYTES = 2**20
NUMBER_BYTES = 100  # about what a named number takes

VERDICT_SCHEMA = pa.schema(
    {
        "id": pa.uint64(),
        "picture": pa.uint64(),  # the same for all captions of one picture
        "key": pa.utf8(),
        "caption_index": pa.int32(),  # among the picture's captions
        "caption_raw": pa.binary(),
        "caption": pa.utf8(),
        "width": pa.int64(),  # pixels, as the header states them
        "height": pa.int64(),
        "file_bytes": pa.int64(),
        "columns": pa.map_(pa.utf8(), pa.float64()),  # the input's own numbers
        "image_digest": pa.binary(32),  # of the source bytes
        "pixels_digest": pa.binary(32),  # of the 256 px picture as it is stored
        "perceptual_hash": pa.uint64(),
        "reason": pa.utf8(),  # null: kept by this pass
        "row": pa.int64(),  # in rows.arrow; null if dropped
    }
)
QUARANTINE_SCHEMA = pa.schema({"key": pa.utf8(), "reason": pa.utf8(), "detail": pa.utf8()})


@dataclass(frozen=True)
class ScoreSettings:
    """All of a corpus configuration that the staged rows of a unit depend on."""

    limits: Thresholds
    captions: CaptionPolicy = "first"
    crop: images.Crop = "centre"

    def digest(self) -> str:
        """Of everything besides the unit that its staged rows depend on."""
        versions = [FORMAT, RECORDS_VERSION, TOKENIZER_SHA256, CODEC_VERSIONS, HASH_VERSION]
        return digest_of([*versions, str(STAGED_SCHEMA), str(VERDICT_SCHEMA), asdict(self)])

    def prefix(self, unit_digest: str) -> str:
        """Where a unit's results lie in the store."""
        return f"units/{unit_digest}-{self.digest()[:16]}/"


class _Spool(tempfile.SpooledTemporaryFile[bytes]):
    def rollover(self) -> None:
        state_folder().mkdir(parents=True, exist_ok=True)
        super().rollover()


class Table:
    """A parquet that grows by rows, of which a group is in memory at a time, and is stored when it is whole."""

    def __init__(self, schema: pa.Schema) -> None:
        # Not the system's temporary folder, which may be memory.
        self._file = _Spool(SPOOL_BYTES, dir=str(state_folder()))
        self._writer = pa.parquet.ParquetWriter(self._file, schema)
        self._schema, self._waiting, self._waiting_bytes = schema, list[dict[str, Any]](), 0
        self.rows = 0

    def append(self, row: dict[str, Any]) -> None:
        self.rows += 1
        self._waiting.append(row)
        self._waiting_bytes += sum(len(value) for value in row.values() if isinstance(value, bytes | str))
        self._waiting_bytes += NUMBER_BYTES * len(row.get("columns", ()))
        if len(self._waiting) >= GROUP_ROWS or self._waiting_bytes >= GROUP_BYTES:
            self._write_group()

    def store(self, store: ObjectStore, key: str) -> Document:
        """Its size and digest. No row may be added afterwards."""
        self._write_group()
        self._writer.close()
        size, digest = self._file.tell(), hashlib.sha256()
        self._file.seek(0)

        def pieces() -> Iterator[bytes]:
            while piece := self._file.read(PIECE_BYTES):
                digest.update(piece)
                yield piece

        store.put(key, pieces())
        return {"bytes": size, "sha256": digest.hexdigest()}

    def close(self) -> None:
        self._writer.close()
        self._file.close()

    def _write_group(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_pylist(self._waiting, self._schema))
            self._waiting, self._waiting_bytes = [], 0


class Tables:
    """What the pass learns about the unit's records, as rows of the two tables."""

    def __init__(self) -> None:
        self.verdicts, self.quarantine = Table(VERDICT_SCHEMA), Table(QUARANTINE_SCHEMA)
        self.bad: list[dict[str, str]] = []  # the first of the quarantine
        self.dropped: Counter[str] = Counter()
        self.kept = self.pictures = 0
        self.columns: set[str] = set()  # that pictures have, whichever

    def close(self) -> None:
        self.verdicts.close()
        self.quarantine.close()

    def drop(self, verdict: dict[str, Any], reason: str, detail: str | None = None) -> None:
        """`detail` is given for a broken record, not for a filtered one."""
        self.verdicts.append(verdict | {"reason": reason})
        self.dropped[reason] += 1
        if detail is not None:
            broken = {"key": verdict["key"], "reason": reason, "detail": detail}
            self.quarantine.append(broken)
            if len(self.bad) < NAMED_BAD_RECORDS:
                self.bad.append(broken)

    def keep(self, verdict: dict[str, Any]) -> None:
        self.verdicts.append(verdict | {"row": self.kept})
        self.kept += 1


def row_id(unit_digest: str, key: str, caption_index: int = 0) -> int:
    """A row's id: the first 8 bytes of sha256(unit digest, member key); of further captions, with their number."""
    named = key.encode() + (b"\0%d" % caption_index if caption_index else b"")
    return int.from_bytes(hashlib.sha256(bytes.fromhex(unit_digest) + named).digest()[:8], "big")


def score_unit(
    store: ObjectStore, settings: ScoreSettings, unit: Unit, records: Iterable[Record | Rejected] | None = None
) -> Document:
    """Score and commit one unit; its manifest. A committed unit is only looked up: UserError if it is damaged.

    `records` stand for those of the unit where only some of them are to be tried out, in a store of their own.
    """
    prefix = settings.prefix(unit.digest)
    committed = manifests.read(store, f"{prefix}manifest.json")
    # The data too: a worker that outlived its driver may have committed just what the next build's sweep removed.
    if committed is not None and all(store.exists(f"{prefix}{name}") for name in UNIT_FILES):
        return committed
    with closing(Tables()) as tables:
        batches = _staged(unit, records, settings, tables)
        rows = write_arrow(store, f"{prefix}rows.arrow", STAGED_SCHEMA, batches, with_digest=False)
        _refuse_absent_columns(unit, settings.limits, tables)
        verdicts = tables.verdicts.store(store, f"{prefix}verdicts.parquet")
        quarantine = tables.quarantine.store(store, f"{prefix}quarantine.parquet")
    document = {
        "format": FORMAT,
        "unit": unit.digest,
        "bytes": unit.bytes,
        "settings": settings.digest(),
        "in": tables.verdicts.rows,
        "out": tables.kept,
        "dropped": dict(tables.dropped),
        "quarantined": tables.quarantine.rows,
        "bad": tables.bad,
        "rows": rows.to_json(),
        "verdicts": verdicts,
        "quarantine": quarantine,
    }
    return manifests.commit(store, f"{prefix}manifest.json", document)


def _refuse_absent_columns(unit: Unit, limits: Thresholds, tables: Tables) -> None:
    """Raise UserError for a threshold on a column that no record of a unit has; a unit without records has none."""
    absent = absent_columns(tables.columns, limits)
    if absent and tables.pictures:
        there = ", ".join(sorted(tables.columns)) or "no numbers at all"
        name, expected = f"unit {unit.uri}: column {absent[0]}", "in some record, for filters.columns asks for it"
        raise UserError(name, expected, f"in none; there are: {there}", "name another column, or leave that input out")


def _staged(
    unit: Unit, records: Iterable[Record | Rejected] | None, settings: ScoreSettings, tables: Tables
) -> Iterator[pa.RecordBatch]:
    waiting: list[Survivor] = []
    for record in read_records(unit) if records is None else records:
        for survivor in _score(unit, record, settings, tables):
            waiting.append(survivor)
            if len(waiting) == BATCH_ROWS:
                yield stage(waiting)
                waiting.clear()
    if waiting:
        yield stage(waiting)


def _score(unit: Unit, record: Record | Rejected, settings: ScoreSettings, tables: Tables) -> Iterator[Survivor]:
    """The survivors among a record's captions, after a verdict on each. The cheap checks come before the decoding."""
    picture = row_id(unit.digest, record.key)
    verdict: dict[str, Any] = {"id": picture, "picture": picture, "key": record.key}
    if isinstance(record, Rejected):
        tables.drop(verdict, record.reason, record.detail)
        return
    tables.pictures += 1
    data = record.image_bytes
    verdict |= {"file_bytes": len(data), "image_digest": content_digest(data)}
    verdict["columns"] = list(record.columns.items())
    tables.columns.update(record.columns)
    header = _header_of(data)
    fitting = []
    for index in chosen_captions(settings.captions, picture, len(record.captions)):
        about = {"caption_index": index, "caption_raw": record.captions[index]}
        one = verdict | about | {"id": row_id(unit.digest, record.key, index)}
        if (caption := _captioned(record, index, header, settings.limits, one, tables)) is not None:
            fitting.append((one, caption))
    if fitting and isinstance(header, images.Header):
        yield from _pictured(record, header, fitting, settings, tables)


def _header_of(data: bytes) -> images.Header | images.ImageError:
    """The header, read once for all captions of a picture, or why there is none."""
    try:
        return images.read_header(data)
    except images.ImageError as error:
        # Another one: the frames of its traceback would keep picture after picture in memory.
        return images.ImageError(error.reason, error.detail)


def _captioned(
    record: Record,
    index: int,
    header: images.Header | images.ImageError,
    limits: Thresholds,
    verdict: dict[str, Any],
    tables: Tables,
) -> str | None:
    """The caption, or None after its verdict has said why not. Nothing is decoded."""
    try:
        caption = normalise(record.captions[index])
    except CaptionError as error:
        tables.drop(verdict, error.reason, str(error))
        return None
    if isinstance(header, images.ImageError):
        tables.drop(verdict, header.reason, str(header))
        return None
    verdict |= {"caption": caption, "width": header.width, "height": header.height}
    facts = Facts(header.width, header.height, len(record.image_bytes), caption, record.columns)
    if (reason := reason_to_drop(facts, limits)) is not None:
        tables.drop(verdict, reason)
        return None
    return caption


def _pictured(
    record: Record,
    header: images.Header,
    fitting: list[tuple[dict[str, Any], str]],
    settings: ScoreSettings,
    tables: Tables,
) -> Iterator[Survivor]:
    """Decode the picture once for all of its captions, and judge it by its pixels."""
    picture = fitting[0][0]["picture"]
    try:
        image256 = images.decode_square(record.image_bytes, UPSAMPLER_SIDE, settings.crop, picture, header)
    except images.ImageError as error:
        for verdict, _ in fitting:
            tables.drop(verdict, error.reason, str(error))
        return
    # From the 256 px picture, as the upsampler's condition is. Against reducing the source at once: 0.06 grey levels on
    # average (at most 7) for sources of 640x480, 0.55 (at most 10) for those of 224 px, which are enlarged first.
    image64 = images.area_resize(image256, BASE_SIDE)
    reason = reason_to_drop_pixels(image64, settings.limits)
    jpeg = images.encode_jpeg(image256)
    seen = {"pixels_digest": content_digest(jpeg), "perceptual_hash": perceptual_hash(image64)}
    for verdict, caption in fitting:
        if reason is not None:
            tables.drop(verdict | seen, reason)
            continue
        tables.keep(verdict | seen)
        yield Survivor(verdict["id"], caption, image64, jpeg)
