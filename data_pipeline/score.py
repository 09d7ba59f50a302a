"""Score: the first pass, over one input unit: read, filter, decode, and stage what survives.

Always holds: every record of the unit has one row in the verdict table, with the reason if it is dropped; broken ones
(as opposed to filtered ones) are in the quarantine table too. The unit's manifest, stored last, commits all of it; a
committed unit is never scored again with the same settings. Called by the corpus builder, once per unit.

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
from data_pipeline.captions import CaptionError, normalise
from data_pipeline.families import BASE_SIDE, CODEC_VERSIONS, UPSAMPLER_SIDE
from data_pipeline.filters import Facts, Thresholds, reason_to_drop
from data_pipeline.manifests import Document, digest_of
from data_pipeline.records import Record, Rejected
from data_pipeline.sources import Unit, read_records
from data_pipeline.staging import STAGED_SCHEMA, Survivor, stage
from data_pipeline.storage import ObjectStore
from data_pipeline.tokenizer import TOKENIZER_SHA256

FORMAT = "glidepath-unit-1"
NAMED_BAD_RECORDS = 10  # in a unit's manifest and in messages; the quarantine table has all

# A JPEG is decoded at no less than twice the larger stored side, so that the area filter still has pixels to average.
ENOUGH_SIDE = 2 * UPSAMPLER_SIDE

VERDICT_SCHEMA = pa.schema(
    {
        "id": pa.uint64(),
        "key": pa.utf8(),
        "caption_raw": pa.binary(),
        "caption": pa.utf8(),
        "width": pa.int64(),  # pixels, as the header states them
        "height": pa.int64(),
        "image_sha256": pa.binary(32),  # of the source bytes
        "reason": pa.utf8(),  # null: kept by this pass
        "row": pa.int64(),  # in rows.arrow; null if dropped
    }
)
QUARANTINE_SCHEMA = pa.schema({"key": pa.utf8(), "reason": pa.utf8(), "detail": pa.utf8()})


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


def settings_digest(limits: Thresholds) -> str:
    """Of everything besides the unit that its staged rows depend on."""
    return digest_of([FORMAT, asdict(limits), TOKENIZER_SHA256, CODEC_VERSIONS, str(STAGED_SCHEMA)])


def unit_prefix(unit_digest: str, limits: Thresholds) -> str:
    return f"units/{unit_digest}-{settings_digest(limits)[:16]}/"


def row_id(unit_digest: str, key: str) -> int:
    """A row's id: the first 8 bytes of sha256(unit digest, member key)."""
    return int.from_bytes(hashlib.sha256(bytes.fromhex(unit_digest) + key.encode()).digest()[:8], "big")


def score_unit(store: ObjectStore, limits: Thresholds, unit: Unit) -> Document:
    """Score and commit one unit; its manifest. A committed unit is only looked up: UserError if it is damaged."""
    prefix = unit_prefix(unit.digest, limits)
    committed = manifests.read(store, f"{prefix}manifest.json")
    if committed is not None:
        return committed
    tables = Tables()
    rows = write_arrow(store, f"{prefix}rows.arrow", STAGED_SCHEMA, _staged(unit, limits, tables), with_sha256=False)
    verdicts = _write_parquet(store, f"{prefix}verdicts.parquet", tables.verdicts, VERDICT_SCHEMA)
    quarantine = _write_parquet(store, f"{prefix}quarantine.parquet", tables.quarantine, QUARANTINE_SCHEMA)
    dropped = Counter(verdict["reason"] for verdict in tables.verdicts if verdict.get("reason"))
    document = {
        "format": FORMAT,
        "unit": unit.digest,
        "bytes": unit.bytes,
        "settings": settings_digest(limits),
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


def _staged(unit: Unit, limits: Thresholds, tables: Tables) -> Iterator[pa.RecordBatch]:
    waiting: list[Survivor] = []
    for record in read_records(unit):
        survivor = _score(unit, record, limits, tables)
        if survivor is not None:
            waiting.append(survivor)
        if len(waiting) == BATCH_ROWS:
            yield stage(waiting)
            waiting.clear()
    if waiting:
        yield stage(waiting)


def _score(unit: Unit, record: Record | Rejected, limits: Thresholds, tables: Tables) -> Survivor | None:
    """The survivor, or None after its verdict has said why not. The cheap checks come before the decoding."""
    verdict: dict[str, Any] = {"id": row_id(unit.digest, record.key), "key": record.key}
    if isinstance(record, Rejected):
        tables.drop(verdict, record.reason, record.detail)
        return None
    verdict |= {"caption_raw": record.caption, "image_sha256": hashlib.sha256(record.image_bytes).digest()}
    try:
        caption = normalise(record.caption)
        width, height = images.size_of(record.image_bytes)
        verdict |= {"caption": caption, "width": width, "height": height}
        reason = reason_to_drop(Facts(width, height, caption), limits)
        if reason is not None:
            tables.drop(verdict, reason)
            return None
        square = images.centre_crop(images.decode(record.image_bytes, ENOUGH_SIDE))
        image256 = images.encode_jpeg(images.area_resize(square, UPSAMPLER_SIDE))
        survivor = Survivor(verdict["id"], caption, images.area_resize(square, BASE_SIDE), image256)
    except (CaptionError, images.ImageError) as error:
        tables.drop(verdict, error.reason, str(error))
        return None
    tables.keep(verdict)
    return survivor


def _write_parquet(store: ObjectStore, key: str, rows: list[dict[str, Any]], schema: pa.Schema) -> Document:
    sink = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema), sink)
    data = sink.getvalue()
    store.put(key, [data])
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
