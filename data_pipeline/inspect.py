"""Inspect: what a dataset was made from and what was left out of it: counts, histograms, and examples with reasons.

Always holds: everything comes from the tables that the build left (verdicts, quarantine, dropped rows) and from the
dataset; memory is that of one unit's verdicts and of the rows that the judge pass dropped; the same dataset gives the
same examples. Draws nothing. Called by the command line's report.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray

from data_pipeline import manifests
from data_pipeline.draws import mix64
from data_pipeline.errors import UserError
from data_pipeline.filters.language import identify
from data_pipeline.judge_rows import read_checked
from data_pipeline.manifests import Document
from data_pipeline.records import Record
from data_pipeline.score import verdicts_key
from data_pipeline.shards import Dataset, output_of
from data_pipeline.sources import Input, read_records, reopen
from data_pipeline.storage import ObjectStore

KEPT = "kept"
LANGUAGE_CAPTIONS = 4000  # identified in all: one takes about 0.1 ms
NAMED_QUARANTINED = 200

# Lower edges of the bins; a value below the first is in the first, the last bin is open.
SIDE_EDGES = [0, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 4096]
ASPECT_EDGES = [0.0, 0.2, 0.33, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.12, 1.25, 1.43, 1.67, 2.0, 2.5, 3.0, 5.0]
CAPTION_EDGES = [0, 3, 5, 10, 20, 30, 40, 50, 60, 80, 100, 130, 160, 200, 300, 500, 1000]

VERDICT_COLUMNS = ["id", "picture", "key", "caption_raw", "caption", "width", "height", "reason"]


@dataclass
class Histogram:
    """Rows by bin, [n]: all that were measured, and those that the dataset keeps. `labels` names the bins."""

    labels: list[str]
    all: NDArray[np.int64]
    kept: NDArray[np.int64]

    def to_json(self) -> Document:
        return {"labels": self.labels, "all": self.all.tolist(), "kept": self.kept.tolist()}


@dataclass(frozen=True)
class Example:
    """One row that is shown. `reason`: why it was dropped, or KEPT. `unit`: its number in the dataset's manifest.

    `picture`: encoded bytes as the input or the dataset has them, None where there are none or no more. `detail`: what
    was wrong with a broken one. Of a repeat: `lost_to`, the id of the picture that stays, `distance`, the bits by which
    the perceptual hashes differ, `winner`, that picture's stored bytes.
    """

    id: int
    reason: str
    unit: int
    key: str
    caption: str
    width: int | None = None
    height: int | None = None
    picture: bytes | None = None
    detail: str = ""
    lost_to: int | None = None
    distance: int | None = None
    winner: bytes | None = None


@dataclass
class Inspection:
    """What `inspect` found. `passes`: which pass dropped a reason's rows: broken, filtered or judged."""

    funnel: Document
    passes: dict[str, str]
    histograms: dict[str, Histogram]
    examples: dict[str, list[Example]]
    quarantine: list[dict[str, str]] = field(default_factory=list)

    def to_json(self) -> Document:
        """The figures, for scripts."""
        histograms = {name: histogram.to_json() for name, histogram in self.histograms.items()}
        return {"funnel": self.funnel, "passes": self.passes, "histograms": histograms}


def inspect(dataset: Dataset, per_reason: int = 24) -> Inspection:
    """Figures, at most `per_reason` examples of each reason, and twice that of kept rows.

    Raises UserError if a table of the build is gone or is not as it was written.
    """
    store, units = output_of(dataset), dataset.manifest["units"]
    judged = _judged_rows(store, dataset)
    counting = _Counting(len(units))
    examples: dict[str, list[Example]] = {KEPT: _kept_examples(dataset, 2 * per_reason)}
    quarantine: list[dict[str, str]] = []
    passes: dict[str, str] = {}
    for number, unit in enumerate(units):
        about = _unit_manifest(store, f"{unit['folder']}/manifest.json")
        names = ["key", "reason", "detail"]
        broken = _table(store, f"{unit['folder']}/quarantine.parquet", about["quarantine"]["sha256"], names)
        passes.update(dict.fromkeys(broken["reason"].to_pylist(), "broken"))
        details = dict(zip(broken["key"].to_pylist(), broken["detail"].to_pylist(), strict=True))
        for row in broken.slice(0, max(0, NAMED_QUARANTINED - len(quarantine))).to_pylist():
            quarantine.append({"unit": unit["uri"], **row})
        for part, entry in enumerate(about["verdicts"]):
            rows = _table(store, verdicts_key(f"{unit['folder']}/", part), entry["sha256"], VERDICT_COLUMNS)
            verdicts = _with_judged(rows, judged)
            counting.add(verdicts)
            for example in _dropped_examples(verdicts, number, details, examples, per_reason):
                examples.setdefault(example.reason, []).append(example)
    passes |= dict.fromkeys(judged["reason"].unique().to_pylist(), "judged")
    found = {reason: _with_winners(dataset, shown) for reason, shown in examples.items()}
    found = _with_pictures(dataset, found)
    funnel = dataset.manifest["funnel"]
    passes = {reason: passes.get(reason, "filtered") for reason in funnel["dropped"]}
    return Inspection(funnel, passes, counting.histograms(), found, quarantine)


class _Counting:
    """Adds up the histograms, unit by unit."""

    def __init__(self, units: int) -> None:
        self.counts: dict[str, tuple[list[int] | list[float], NDArray[np.int64]]] = {
            "shorter side, px": (SIDE_EDGES, np.zeros((2, len(SIDE_EDGES)), np.int64)),
            "width / height": (ASPECT_EDGES, np.zeros((2, len(ASPECT_EDGES)), np.int64)),
            "caption, characters": (CAPTION_EDGES, np.zeros((2, len(CAPTION_EDGES)), np.int64)),
        }
        self.languages: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self.captions_of_unit = -(-LANGUAGE_CAPTIONS // max(1, units))

    def add(self, verdicts: pa.Table) -> None:
        kept = pa.compute.is_null(verdicts["reason"]).to_numpy(zero_copy_only=False)
        # Rows that were broken before they were measured have no size or no caption.
        width, height = (verdicts[name].to_numpy().astype(np.float64) for name in ("width", "height"))
        length = pa.compute.utf8_length(verdicts["caption"]).to_numpy().astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            measured = (np.minimum(width, height), width / height, length)
        for (edges, counts), values in zip(self.counts.values(), measured, strict=True):
            known = np.isfinite(values)
            bins = np.searchsorted(edges, values[known], side="right") - 1
            counts[0] += np.bincount(bins, minlength=len(edges))
            counts[1] += np.bincount(bins[kept[known]], minlength=len(edges))
        self._add_languages(verdicts, kept)

    def _add_languages(self, verdicts: pa.Table, kept: NDArray[np.bool_]) -> None:
        captions = verdicts["caption"]
        for row in _by_chance(verdicts)[: self.captions_of_unit]:
            if caption := captions[int(row)].as_py():
                language, _ = identify(caption)
                self.languages[0][language] += 1
                self.languages[1][language] += bool(kept[row])

    def histograms(self) -> dict[str, Histogram]:
        made = {}
        for name, (edges, counts) in self.counts.items():
            labels = [f"{low:g}" for low in edges[:-1]] + [f"{edges[-1]:g}+"]
            made[name] = Histogram(labels, counts[0], counts[1])
        common = [language for language, _ in self.languages[0].most_common()]
        every, kept = (np.array([count[name] for name in common], np.int64) for count in self.languages)
        return made | {f"language, of {every.sum()} captions": Histogram(common, every, kept)}


def _judged_rows(store: ObjectStore, dataset: Dataset) -> pa.Table:
    """The rows that the judge pass dropped, sorted by id."""
    columns = ["id", "reason", "distance", "lost_to"]
    about = dataset.manifest["dropped_rows"]
    return _table(store, about["key"], about["sha256"], columns).sort_by("id")


def _with_judged(verdicts: pa.Table, judged: pa.Table) -> pa.Table:
    """The verdicts [n] with the judge's reasons, and its columns `distance` and `lost_to`, in place."""
    ids, wanted = judged["id"].to_numpy(), verdicts["id"].to_numpy()
    places = np.searchsorted(ids, wanted)
    found = np.zeros(len(wanted), bool)
    inside = places < len(ids)
    found[inside] = ids[places[inside]] == wanted[inside]
    # Only rows that the score pass kept reached the judge; a broken row may have the id of a good one (a repeated key).
    found &= pa.compute.is_null(verdicts["reason"]).to_numpy(zero_copy_only=False)
    indices = pa.array(np.where(found, places, 0), mask=~found)
    reason = pa.compute.coalesce(verdicts["reason"], judged["reason"].take(indices))
    table = verdicts.set_column(verdicts.schema.get_field_index("reason"), "reason", reason)
    for name in ("distance", "lost_to"):
        table = table.append_column(name, judged[name].take(indices))
    return table


def _by_chance(table: pa.Table) -> NDArray[np.int64]:
    """Positions of all rows in an order that has nothing to do with the input's and is the same each time."""
    return np.argsort(mix64(table["id"].to_numpy()), kind="stable")


def _dropped_examples(
    verdicts: pa.Table,
    unit: int,
    details: Mapping[str, str],
    examples: Mapping[str, list[Example]],
    per_reason: int,
) -> Iterator[Example]:
    """Examples of the unit for reasons that have too few yet; few units are read again for their pictures that way."""
    reasons = verdicts["reason"].unique().drop_null().to_pylist()
    for reason in sorted(reasons):
        rows = verdicts.filter(pa.compute.equal(verdicts["reason"], reason))
        wanted = per_reason - len(examples.get(reason, ()))
        for row in rows.take(pa.array(_by_chance(rows)[: max(0, wanted)])).to_pylist():
            raw = row["caption_raw"] or b""
            yield Example(
                row["id"],
                reason,
                unit,
                row["key"],
                row["caption"] if row["caption"] is not None else raw.decode("utf-8", "backslashreplace"),
                row["width"],
                row["height"],
                detail=details.get(row["key"], ""),
                lost_to=row["lost_to"],
                distance=row["distance"],
            )


def _kept_examples(dataset: Dataset, count: int) -> list[Example]:
    """The first rows: the dataset is shuffled, so they are a fair sample."""
    examples: list[Example] = []
    for shard in range(len(dataset.shard_rows)):
        base, upsampler = dataset.shard("base", shard), dataset.shard("upsampler", shard)
        for number in range(len(base)):
            texts, pictures = base.batch(number), upsampler.batch(number)
            for row in range(min(texts.num_rows, count - len(examples))):
                identity, caption = texts["id"][row].as_py(), texts["caption"][row].as_py()
                picture = pictures["image256"][row].as_py()
                examples.append(Example(identity, KEPT, -1, "", caption, picture=picture))
            if len(examples) == count:
                return examples
    return examples


def _with_winners(dataset: Dataset, examples: list[Example]) -> list[Example]:
    """The stored pictures of those that repeats lost to; the dataset is looked through once, up to the last of them."""
    wanted = {example.lost_to for example in examples if example.lost_to}
    found: dict[int, bytes] = {}
    for shard in range(len(dataset.shard_rows)):
        if len(found) == len(wanted):
            break
        base, upsampler = dataset.shard("base", shard), dataset.shard("upsampler", shard)
        for number in range(len(base)):
            ids = base.batch(number)["id"].to_numpy()
            for row in np.flatnonzero(np.isin(ids, np.array(sorted(wanted), np.uint64))):
                found[int(ids[row])] = upsampler.batch(number)["image256"][int(row)].as_py()
    return [
        replace(example, winner=found[example.lost_to]) if example.lost_to in found else example for example in examples
    ]


def _with_pictures(dataset: Dataset, examples: Mapping[str, list[Example]]) -> dict[str, list[Example]]:
    """The dropped ones with the bytes of their pictures, read again from the inputs where those are still the same."""
    inputs = [Input(**entry) for entry in dataset.manifest["config"]["inputs"]]
    wanted: dict[int, set[str]] = {}
    for example in (example for shown in examples.values() for example in shown if example.unit >= 0):
        wanted.setdefault(example.unit, set()).add(example.key)
    pictures: dict[tuple[int, str], bytes] = {}
    for number, keys in wanted.items():
        about = dataset.manifest["units"][number]
        unit = reopen(inputs, about["uri"], about["digest"])
        for record in read_records(unit) if unit is not None else ():
            if isinstance(record, Record) and record.key in keys:
                pictures.setdefault((number, record.key), record.image_bytes)
    return {
        reason: [
            replace(example, picture=pictures.get((example.unit, example.key))) if example.unit >= 0 else example
            for example in shown
        ]
        for reason, shown in examples.items()
    }


def _unit_manifest(store: ObjectStore, key: str) -> Document:
    manifest = manifests.read(store, key)
    if manifest is None:
        expected = "what the build left beside the dataset"
        raise UserError(f"manifest {store.uri}/{key}", expected, "nothing", "build the corpus again")
    return manifest


def _table(store: ObjectStore, key: str, sha256: str, columns: list[str]) -> pa.Table:
    return pa.parquet.read_table(io.BytesIO(read_checked(store, key, sha256)), columns=columns)
