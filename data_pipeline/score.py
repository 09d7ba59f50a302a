"""Score: the first pass, over one input unit: read, filter, decode, and stage what survives.

Always holds: every pair of picture and caption that a unit offers has one row in the verdict table, with the reason why
it is dropped, if it is; broken ones (as opposed to filtered ones) are in the quarantine table too. The unit's manifest,
stored last, commits all of it; a committed unit is never scored again with the same settings. Called by the corpus
builder, once per unit.

    units/<unit digest>-<settings digest>/manifest.json  verdicts.parquet  quarantine.parquet  rows.arrow
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from data_pipeline import images, manifests
from data_pipeline.arrow_files import BATCH_ROWS, write_arrow
from data_pipeline.captions import CaptionError, CaptionPolicy, chosen_captions, normalise
from data_pipeline.families import BASE_SIDE, CODEC_VERSIONS, UPSAMPLER_SIDE
from data_pipeline.filters import Facts, Thresholds, reason_to_drop, reason_to_drop_pixels
from data_pipeline.manifests import Document, digest_of
from data_pipeline.perceptual_hash import HASH_VERSION, perceptual_hash
from data_pipeline.records import Record, Rejected
from data_pipeline.sources import Unit, read_records
from data_pipeline.staging import STAGED_SCHEMA, Survivor, stage
from data_pipeline.storage import ObjectStore
from data_pipeline.tokenizer import TOKENIZER_SHA256

FORMAT = "glidepath-unit-2"
NAMED_BAD_RECORDS = 10  # in a unit's manifest and in messages; the quarantine table has all

# A JPEG is decoded at no less than twice the larger stored side, so that the area filter still has pixels to average.
ENOUGH_SIDE = 2 * UPSAMPLER_SIDE

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
        "image_sha256": pa.binary(32),  # of the source bytes
        "pixels_sha256": pa.binary(32),  # of the 256 px square, before its JPEG
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
        versions = [FORMAT, TOKENIZER_SHA256, CODEC_VERSIONS, HASH_VERSION, str(STAGED_SCHEMA), str(VERDICT_SCHEMA)]
        return digest_of([*versions, asdict(self)])

    def prefix(self, unit_digest: str) -> str:
        """Where a unit's results lie in the store."""
        return f"units/{unit_digest}-{self.digest()[:16]}/"


@dataclass
class Tables:
    """What the pass learns about the unit's records, as rows of the two tables."""

    verdicts: list[dict[str, Any]] = field(default_factory=list)
    quarantine: list[dict[str, str]] = field(default_factory=list)
    kept: int = 0

    def drop(self, verdict: dict[str, Any], reason: str, detail: str | None = None) -> None:
        """`detail` is given for a broken record, not for a filtered one."""
        self.verdicts.append(verdict | {"reason": reason})
        if detail is not None:
            self.quarantine.append({"key": verdict["key"], "reason": reason, "detail": detail})

    def keep(self, verdict: dict[str, Any]) -> None:
        self.verdicts.append(verdict | {"row": self.kept})
        self.kept += 1


def row_id(unit_digest: str, key: str, caption_index: int = 0) -> int:
    """A row's id: the first 8 bytes of sha256(unit digest, member key); of further captions, with their number."""
    named = key.encode() + (b"\0%d" % caption_index if caption_index else b"")
    return int.from_bytes(hashlib.sha256(bytes.fromhex(unit_digest) + named).digest()[:8], "big")


def score_unit(store: ObjectStore, settings: ScoreSettings, unit: Unit) -> Document:
    """Score and commit one unit; its manifest. A committed unit is only looked up: UserError if it is damaged."""
    prefix = settings.prefix(unit.digest)
    committed = manifests.read(store, f"{prefix}manifest.json")
    if committed is not None:
        return committed
    tables = Tables()
    rows = write_arrow(store, f"{prefix}rows.arrow", STAGED_SCHEMA, _staged(unit, settings, tables), with_sha256=False)
    verdicts = _write_parquet(store, f"{prefix}verdicts.parquet", tables.verdicts, VERDICT_SCHEMA)
    quarantine = _write_parquet(store, f"{prefix}quarantine.parquet", tables.quarantine, QUARANTINE_SCHEMA)
    dropped = Counter(verdict["reason"] for verdict in tables.verdicts if verdict.get("reason"))
    document = {
        "format": FORMAT,
        "unit": unit.digest,
        "bytes": unit.bytes,
        "settings": settings.digest(),
        "in": len(tables.verdicts),
        "out": tables.kept,
        "dropped": dict(dropped),
        "quarantined": len(tables.quarantine),
        "bad": tables.quarantine[:NAMED_BAD_RECORDS],
        "rows": rows.to_json(),
        "verdicts": verdicts,
        "quarantine": quarantine,
    }
    return manifests.commit(store, f"{prefix}manifest.json", document)


def _staged(unit: Unit, settings: ScoreSettings, tables: Tables) -> Iterator[pa.RecordBatch]:
    waiting: list[Survivor] = []
    for record in read_records(unit):
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
    data = record.image_bytes
    verdict |= {"file_bytes": len(data), "image_sha256": hashlib.sha256(data).digest()}
    verdict["columns"] = list(record.columns.items())
    fitting = []
    for index in chosen_captions(settings.captions, picture, len(record.captions)):
        about = {"caption_index": index, "caption_raw": record.captions[index]}
        one = verdict | about | {"id": row_id(unit.digest, record.key, index)}
        if (caption := _captioned(record, index, settings.limits, one, tables)) is not None:
            fitting.append((one, caption))
    if fitting:
        yield from _pictured(record, picture, fitting, settings, tables)


def _captioned(record: Record, index: int, limits: Thresholds, verdict: dict[str, Any], tables: Tables) -> str | None:
    """The caption, or None after its verdict has said why not. Nothing is decoded."""
    try:
        caption = normalise(record.captions[index])
        width, height = images.size_of(record.image_bytes)
    except (CaptionError, images.ImageError) as error:
        tables.drop(verdict, error.reason, str(error))
        return None
    verdict |= {"caption": caption, "width": width, "height": height}
    facts = Facts(width, height, len(record.image_bytes), caption, record.columns)
    if (reason := reason_to_drop(facts, limits)) is not None:
        tables.drop(verdict, reason)
        return None
    return caption


def _pictured(
    record: Record, picture: int, fitting: list[tuple[dict[str, Any], str]], settings: ScoreSettings, tables: Tables
) -> Iterator[Survivor]:
    """Decode the picture once for all of its captions, and judge it by its pixels."""
    try:
        pixels = images.decode(record.image_bytes, ENOUGH_SIDE)
    except images.ImageError as error:
        for verdict, _ in fitting:
            tables.drop(verdict, error.reason, str(error))
        return
    image256 = images.area_resize(images.crop(pixels, settings.crop, picture), UPSAMPLER_SIDE)
    image64 = images.area_resize(images.crop(pixels, settings.crop, picture), BASE_SIDE)
    reason = reason_to_drop_pixels(image64, settings.limits)
    seen = {"pixels_sha256": hashlib.sha256(image256.tobytes()).digest(), "perceptual_hash": perceptual_hash(image64)}
    jpeg = images.encode_jpeg(image256) if reason is None else b""
    for verdict, caption in fitting:
        if reason is not None:
            tables.drop(verdict | seen, reason)
            continue
        tables.keep(verdict | seen)
        yield Survivor(verdict["id"], caption, image64, jpeg)


def _write_parquet(store: ObjectStore, key: str, rows: list[dict[str, Any]], schema: pa.Schema) -> Document:
    sink = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema), sink)
    data = sink.getvalue()
    store.put(key, [data])
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
