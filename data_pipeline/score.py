"""Score: the first pass, over one input unit: read, filter, decode, and stage what survives.

Always holds: every pair of picture and caption that a unit offers has one row in the verdict table, with the reason why
it is dropped, if it is; broken ones (as opposed to filtered ones) are in the quarantine table too. The unit's manifest,
stored last, commits all of it; a committed unit is never scored again with the same settings. Called by the corpus
builder, once per unit.

    units/<unit digest>-<settings digest>/manifest.json  verdicts-00000.parquet …  quarantine.parquet  rows.bin
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from data_pipeline import images, manifests
from data_pipeline.arrow_files import BATCH_ROWS
from data_pipeline.captions import CaptionError, CaptionPolicy, chosen_captions, normalise
from data_pipeline.config import state_folder
from data_pipeline.digests import content_digest
from data_pipeline.errors import UserError
from data_pipeline.families import BASE_SIDE, CODEC_VERSIONS, UPSAMPLER_SIDE
from data_pipeline.filters import Facts, Thresholds, absent_columns, reason_to_drop, reason_to_drop_pixels
from data_pipeline.manifests import Document, digest_of
from data_pipeline.perceptual_hash import HASH_VERSION, perceptual_hashes
from data_pipeline.records import RECORDS_VERSION, Record, Rejected
from data_pipeline.sources import Unit, read_records
from data_pipeline.staging import STAGED_FILE, STAGED_SCHEMA, Survivor, write_staged
from data_pipeline.storage import ObjectStore
from data_pipeline.tokenizer import TOKENIZER_SHA256

FORMAT = "glidepath-unit-4"
# Of a unit's verdict table: what one task of the judge pass holds at least, so that a unit may have any number of rows.
PART_ROWS = 2**18
QUARANTINE = "quarantine.parquet"
# The names of what a unit's manifest commits.
UNIT_FILE = rf"(?:{re.escape(STAGED_FILE)}|verdicts-[0-9]{{5,}}\.parquet|{re.escape(QUARANTINE)})"
NAMED_BAD_RECORDS = 10  # in a unit's manifest and in messages; the quarantine table has all

# Records that are scored together: BATCH_ROWS of them, or as many as have these bytes.
BATCH_BYTES = 4 * 2**20

# A table's rows wait in memory for their row group until they are so many, or take so much; what is packed of them
# waits there up to SPOOL_BYTES, then on the disk.
GROUP_ROWS, GROUP_BYTES, SPOOL_BYTES = 4096, 8 * 2**20, 16 * 2**20
PIECE_BYTES = 2**20
NUMBER_BYTES = 100  # about what a named number takes

# A row of VERDICT_SCHEMA on its way, by column; and `detail`, which is no column, where the record is broken.
Verdict = dict[str, Any]

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
        "row": pa.int64(),  # among the staged rows; null if dropped
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
        """Its rows, size and digest. No row may be added afterwards."""
        self._write_group()
        self._writer.close()
        size, digest = self._file.tell(), hashlib.sha256()
        self._file.seek(0)

        def pieces() -> Iterator[bytes]:
            while piece := self._file.read(PIECE_BYTES):
                digest.update(piece)
                yield piece

        store.put(key, pieces())
        return {"rows": self.rows, "bytes": size, "sha256": digest.hexdigest()}

    def close(self) -> None:
        self._writer.close()
        self._file.close()

    def _write_group(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_pylist(self._waiting, self._schema))
            self._waiting, self._waiting_bytes = [], 0


class Tables:
    """What the pass learns about the unit's records, as rows of the two tables. The verdicts are in parts."""

    def __init__(self) -> None:
        self.verdicts, self.quarantine = [Table(VERDICT_SCHEMA)], Table(QUARANTINE_SCHEMA)
        self.bad: list[dict[str, str]] = []  # the first of the quarantine
        self.dropped: Counter[str] = Counter()
        self.kept = self.pictures = 0
        self.columns: set[str] = set()  # that pictures have, whichever

    def close(self) -> None:
        for table in (*self.verdicts, self.quarantine):
            table.close()

    def add(self, verdict: Verdict) -> None:
        """A pair with a `reason` is dropped; with a `detail` as well it is broken, not filtered. Others are kept."""
        reason, detail = verdict.get("reason"), verdict.get("detail")
        if reason is None:
            verdict["row"] = self.kept
            self.kept += 1
        else:
            self.dropped[reason] += 1
        if detail is not None:
            broken = {"key": verdict["key"], "reason": reason, "detail": detail}
            self.quarantine.append(broken)
            if len(self.bad) < NAMED_BAD_RECORDS:
                self.bad.append(broken)
        if self.verdicts[-1].rows == PART_ROWS:
            self.verdicts.append(Table(VERDICT_SCHEMA))
        self.verdicts[-1].append(verdict)


@dataclass(slots=True)
class _Picture:
    """A record with a sound header, and the verdicts on those of its captions that no filter dropped."""

    record: Record
    header: images.Header
    verdicts: list[Verdict]


@dataclass(slots=True)
class _Made:
    """The same verdicts, and what is stored of the picture. image64 uint8 [64, 64, 3]; image256 is a JPEG."""

    verdicts: list[Verdict]
    image64: images.Pixels
    image256: bytes


def row_id(unit_digest: str, key: str, caption_index: int = 0) -> int:
    """A row's id: the first 8 bytes of sha256(unit digest, member key); of further captions, with their number."""
    named = key.encode() + (b"\0%d" % caption_index if caption_index else b"")
    return int.from_bytes(hashlib.sha256(bytes.fromhex(unit_digest) + named).digest()[:8], "big")


def verdicts_key(prefix: str, part: int) -> str:
    return f"{prefix}verdicts-{part:05d}.parquet"


def _is_whole(store: ObjectStore, prefix: str, committed: Document) -> bool:
    verdicts = (verdicts_key(prefix, part) for part in range(len(committed["verdicts"])))
    return all(map(store.exists, (f"{prefix}{STAGED_FILE}", f"{prefix}{QUARANTINE}", *verdicts)))


def score_unit(
    store: ObjectStore, settings: ScoreSettings, unit: Unit, records: Iterable[Record | Rejected] | None = None
) -> Document:
    """Score and commit one unit; its manifest. A committed unit is only looked up: UserError if it is damaged.

    `records` stand for those of the unit where only some of them are to be tried out, in a store of their own.
    """
    prefix = settings.prefix(unit.digest)
    committed = manifests.read(store, f"{prefix}manifest.json")
    # The data too: a worker that outlived its driver may have committed just what the next build's sweep removed.
    if committed is not None and _is_whole(store, prefix, committed):
        return committed
    with closing(Tables()) as tables:
        rows = write_staged(store, prefix, _survivors(unit, records, settings, tables))
        _refuse_absent_columns(unit, settings.limits, tables)
        parts = enumerate(tables.verdicts)
        verdicts = [table.store(store, verdicts_key(prefix, part)) for part, table in parts]
        quarantine = tables.quarantine.store(store, f"{prefix}{QUARANTINE}")
    document = {
        "format": FORMAT,
        "unit": unit.digest,
        "bytes": unit.bytes,
        "settings": settings.digest(),
        "in": sum(part["rows"] for part in verdicts),
        "out": tables.kept,
        "dropped": dict(tables.dropped),
        "quarantined": tables.quarantine.rows,
        "bad": tables.bad,
        "rows": rows,
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


def _survivors(
    unit: Unit, records: Iterable[Record | Rejected] | None, settings: ScoreSettings, tables: Tables
) -> Iterator[list[Survivor]]:
    for batch in _batches(read_records(unit) if records is None else records):
        yield list(_score(unit, batch, settings, tables))


def _batches(records: Iterable[Record | Rejected]) -> Iterator[list[Record | Rejected]]:
    """At most BATCH_ROWS records at a time, without the last of which they have less than BATCH_BYTES."""
    batch: list[Record | Rejected] = []
    size = 0
    for record in records:
        batch.append(record)
        if isinstance(record, Record):
            size += len(record.image_bytes) + sum(map(len, record.captions))
        if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _score(
    unit: Unit, batch: Sequence[Record | Rejected], settings: ScoreSettings, tables: Tables
) -> Iterator[Survivor]:
    """The survivors of a batch, after a verdict on each pair. The cheap checks come before the decoding.

    Step by step, each for the whole batch: between two decodings the small steps take twice their time, since the
    processor has to fetch their code and data anew for every picture.
    """
    verdicts: list[Verdict] = []
    pictures = [picture for record in batch if (picture := _examined(unit, record, settings, tables, verdicts))]
    made = [stored for picture in pictures if (stored := _made(picture, settings.crop))]
    hashes = perceptual_hashes([stored.image64 for stored in made]).tolist()
    for stored, hash_ in zip(made, hashes, strict=True):
        reason = reason_to_drop_pixels(stored.image64, settings.limits)
        seen = {"pixels_digest": content_digest(stored.image256), "perceptual_hash": hash_, "reason": reason}
        for verdict in stored.verdicts:
            verdict |= seen
    for verdict in verdicts:
        tables.add(verdict)
    for stored in made:
        for verdict in stored.verdicts:
            if verdict["reason"] is None:
                yield Survivor(verdict["id"], verdict["caption"], stored.image64, stored.image256)


def _examined(
    unit: Unit, record: Record | Rejected, settings: ScoreSettings, tables: Tables, verdicts: list[Verdict]
) -> _Picture | None:
    """The picture if it is worth decoding. A verdict on each of its captions is added to `verdicts`."""
    picture = row_id(unit.digest, record.key)
    about_picture: Verdict = {"id": picture, "picture": picture, "key": record.key}
    if isinstance(record, Rejected):
        verdicts.append(about_picture | {"reason": record.reason, "detail": record.detail})
        return None
    tables.pictures += 1
    tables.columns.update(record.columns)
    data = record.image_bytes
    about_picture |= {"file_bytes": len(data), "image_digest": content_digest(data)}
    about_picture["columns"] = list(record.columns.items())
    header = _header_of(data)
    fitting = []
    for index in chosen_captions(settings.captions, picture, len(record.captions)):
        verdict = about_picture | {"caption_index": index, "caption_raw": record.captions[index]}
        verdict["id"] = row_id(unit.digest, record.key, index)
        verdict |= _captioned(record, index, header, settings.limits)
        verdicts.append(verdict)
        if "reason" not in verdict:
            fitting.append(verdict)
    return _Picture(record, header, fitting) if fitting and isinstance(header, images.Header) else None


def _header_of(data: bytes) -> images.Header | images.ImageError:
    """The header, read once for all captions of a picture, or why there is none."""
    try:
        return images.read_header(data)
    except images.ImageError as error:
        # Another one: the frames of its traceback would keep picture after picture in memory.
        return images.ImageError(error.reason, error.detail)


def _captioned(record: Record, index: int, header: images.Header | images.ImageError, limits: Thresholds) -> Verdict:
    """What the caption and the header add to a verdict. Nothing is decoded."""
    try:
        caption = normalise(record.captions[index])
    except CaptionError as error:
        return {"reason": error.reason, "detail": str(error)}
    if isinstance(header, images.ImageError):
        return {"reason": header.reason, "detail": str(header)}
    seen = {"caption": caption, "width": header.width, "height": header.height}
    facts = Facts(header.width, header.height, len(record.image_bytes), caption, record.columns)
    reason = reason_to_drop(facts, limits)
    return seen if reason is None else seen | {"reason": reason}


def _made(picture: _Picture, crop: images.Crop) -> _Made | None:
    """The picture decoded, once for all of its captions; None after their verdicts have said why not."""
    data, id_ = picture.record.image_bytes, picture.verdicts[0]["picture"]
    try:
        image256 = images.decode_square(data, UPSAMPLER_SIDE, crop, id_, picture.header)
    except images.ImageError as error:
        for verdict in picture.verdicts:
            verdict |= {"reason": error.reason, "detail": str(error)}
        return None
    # From the 256 px picture, as the upsampler's condition is. Against reducing the source at once: 0.06 grey levels on
    # average (at most 7) for sources of 640x480, 0.55 (at most 10) for those of 224 px, which are enlarged first.
    image64 = images.area_resize(image256, BASE_SIDE)
    return _Made(picture.verdicts, image64, images.encode_jpeg(image256))
