"""Decontamination: records that an evaluation set holds too, so that a score on it is of pictures never trained on.

Always holds: what is removed depends on the content of the evaluation sets and the rules, never on paths. A record goes
if the source bytes of its picture are in a set, if its perceptual hash is near one of a set, or if its caption repeats
one. Called by the corpus builder, which reads the sets once, and by the judge pass, for every record.

Captions are compared in words (runs of letters and digits, in lower case). A caption of at least `words` words goes if
at least `share` of its runs of that many words occur in captions of the sets (Brown et al. 2020, appendix C, asks for
one run of 13; image captions are shorter). A shorter one goes if a set has the same words; below SHORTEST words it
never goes for its words: "a red bus" names a subject, not an item.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data_pipeline import images
from data_pipeline.captions import CaptionError, normalise
from data_pipeline.config import Settings
from data_pipeline.dedup import LARGEST_DISTANCE, near_join
from data_pipeline.digests import content_digest
from data_pipeline.errors import UserError
from data_pipeline.executor import Executor
from data_pipeline.families import BASE_SIDE
from data_pipeline.perceptual_hash import HASH_VERSION, perceptual_hash, perceptual_hashes
from data_pipeline.records import Record, Rejected
from data_pipeline.shards import Dataset, open_dataset
from data_pipeline.sources import Input, Unit, list_units, read_records
from data_pipeline.sources.files import Unusable, read_beneath
from data_pipeline.sources.units import public_uri

log = logging.getLogger(__name__)

VERSION = "evaluation-1"  # raise it when the same sets and rules can remove other records than before
REASONS = ("evaluation_source", "evaluation_near", "evaluation_caption")
SHORTEST = 4
WORD = re.compile(r"[^\W_]+")

Words = NDArray[np.uint64]


class DecontaminateSettings(Settings):
    """Evaluation sets, and what counts as the same. `sets`: inputs, whose pictures need no captions where they are a
    folder, and URIs of datasets, of which only stored pictures and captions are known.
    """

    sets: tuple[Input | str, ...] = ()
    near: int | None = Field(default=4, ge=0, le=LARGEST_DISTANCE)  # most bits that may differ; null: bytes alone
    words: int = Field(default=8, ge=SHORTEST)
    share: float = Field(default=0.5, gt=0, le=1)


@dataclass(frozen=True)
class Rules:
    """All that the outcome depends on, for the dataset's identity. `sets`: digests of their content."""

    sets: tuple[str, ...]
    near: int | None
    words: int
    share: float
    version: str = f"{VERSION} {HASH_VERSION}"


@dataclass(frozen=True)
class Evaluation:
    """The pictures and captions of all sets, each sorted and once.

    `sources` uint64 [n, 2]: digests of source bytes; `hashes`: perceptual; `runs`: digests of runs of words; `short`:
    of whole captions that are shorter than a run.
    """

    rules: Rules
    sources: Words
    hashes: Words
    runs: Words
    short: Words

    def to_bytes(self) -> bytes:
        sink = io.BytesIO()
        np.savez(sink, **{name: getattr(self, name) for name in ("sources", "hashes", "runs", "short")})
        return sink.getvalue()

    @staticmethod
    def from_bytes(rules: Rules, data: bytes) -> Evaluation:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return Evaluation(rules, **{name: arrays[name] for name in arrays.files})

    def judge(self, sources: Words, hashes: Words, captions: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
        """The number in REASONS why each record [n] goes, -1 for those that stay; and the bits that differ, or -1."""
        by_caption = np.fromiter((self._repeats(caption) for caption in captions), np.bool_, len(captions))
        reason = np.where(by_caption, 2, -1)
        distance = np.full(len(hashes), -1)
        if self.rules.near is not None:
            distance = near_join(hashes, self.hashes, self.rules.near)
            distance[hashes == 0] = -1
            reason[distance >= 0] = 1
        known = np.isin(_joined(sources), _joined(self.sources))
        reason[known] = 0
        distance[known] = -1
        return reason, distance

    def _repeats(self, caption: str) -> bool:
        words = words_of(caption)
        if len(words) < SHORTEST:
            return False
        if len(words) < self.rules.words:
            return bool(_contains(self.short, digest_runs(words, len(words)))[0])
        found = _contains(self.runs, digest_runs(words, self.rules.words))
        return bool(found.mean() >= self.rules.share)


@dataclass(frozen=True)
class Part:
    """One task of reading a set: a unit of an input, or a shard of a dataset."""

    unit: Unit | None = None
    dataset: str = ""
    shard: int = 0

    @property
    def name(self) -> str:
        return f"evaluation {self.unit.name if self.unit else f'{self.dataset} shard {self.shard}'}"


@dataclass(frozen=True)
class Found:
    """What one part holds; `unusable`: records without a readable picture, by reason."""

    name: str
    sources: list[bytes]
    hashes: list[int]
    captions: list[str]
    unusable: Counter[str]


def read_evaluation(settings: DecontaminateSettings, executor: Executor) -> Evaluation | None:
    """The evaluation sets, or None if there are none. Raises UserError for a set that is absent or has no picture."""
    if not settings.sets:
        return None
    parts: list[Part] = []
    digests: set[str] = set()
    for entry in settings.sets:
        if isinstance(entry, str):
            dataset = open_dataset(entry)
            digests.add(dataset.id)
            # Not as it is written: a relative path means another folder to a process elsewhere.
            parts += [Part(dataset=dataset.uri, shard=shard) for shard in range(len(dataset.shard_rows))]
        else:
            units = list_units([entry], executor)
            digests |= {unit.digest for unit in units}
            parts += [Part(unit) for unit in units]
    found = list(executor.map(read_part, parts))
    for part in found:
        if part.unusable:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(part.unusable.items()))
            log.warning("%s: records that cannot be looked for: %s", part.name, reasons)
    if not any(part.hashes for part in found):
        names = ", ".join(str(entry) if isinstance(entry, str) else public_uri(entry.uri) for entry in settings.sets)
        raise UserError(f"decontaminate.sets {names}", "pictures", "none that can be read", "correct the sets")
    rules = Rules(tuple(sorted(digests)), settings.near, settings.words, settings.share)
    return _merged(rules, found)


def read_part(part: Part) -> Found:
    """All pictures and captions of one part."""
    found = Found(part.name, [], [], [], Counter())
    if part.unit is None:
        _read_shard(open_dataset(part.dataset), part.shard, found)
    else:
        for record in read_records(part.unit):
            _read_record(part.unit, record, found)
    return found


def _read_shard(dataset: Dataset, shard: int, found: Found) -> None:
    reader = dataset.shard("base", shard)
    for number in range(len(reader)):
        batch = reader.batch(number)
        pictures = batch["image64"].flatten().to_numpy().reshape(-1, BASE_SIDE, BASE_SIDE, 3)
        found.hashes.extend(perceptual_hashes(pictures).tolist())
        found.captions.extend(batch["caption"].to_pylist())


def _read_record(unit: Unit, record: Record | Rejected, found: Found) -> None:
    try:
        data = _picture_of(unit, record)
        pixels = images.decode(data, 2 * BASE_SIDE)
    except (Unusable, images.ImageError) as error:
        found.unusable[error.reason] += 1
        return
    found.sources.append(content_digest(data)[:16])
    found.hashes.append(perceptual_hash(images.area_resize(images.centre_crop(pixels), BASE_SIDE)))
    for raw in record.captions if isinstance(record, Record) else ():
        try:
            found.captions.append(normalise(raw))
        except CaptionError as error:
            found.unusable[error.reason] += 1


def _picture_of(unit: Unit, record: Record | Rejected) -> bytes:
    if isinstance(record, Record):
        return record.image_bytes
    if unit.kind == "folder" and record.reason == "caption_missing":
        return read_beneath(Path(unit.uri), record.key)
    raise Unusable(record.reason, record.detail)


def _merged(rules: Rules, found: Iterable[Found]) -> Evaluation:
    parts = list(found)
    sources = np.frombuffer(b"".join(sorted({data for part in parts for data in part.sources})), "<u8").reshape(-1, 2)
    hashes = np.unique(np.array([hash_ for part in parts for hash_ in part.hashes if hash_], np.uint64))
    captions = {tuple(words_of(caption)) for part in parts for caption in part.captions}
    runs = [digest_runs(words, rules.words) for words in captions if len(words) >= rules.words]
    short = [digest_runs(words, len(words)) for words in captions if SHORTEST <= len(words) < rules.words]
    return Evaluation(rules, sources, hashes, *(np.unique(np.concatenate([_NONE, *some])) for some in (runs, short)))


_NONE = np.empty(0, np.uint64)


def words_of(caption: str) -> list[str]:
    return WORD.findall(caption.lower())


def digest_runs(words: Sequence[str], length: int) -> Words:
    """64 bits of each run of `length` words: [len(words) - length + 1]."""

    def texts() -> Iterator[bytes]:
        for start in range(len(words) - length + 1):
            yield " ".join(words[start : start + length]).encode()

    return np.frombuffer(b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts()), "<u8")


def _contains(sorted_words: Words, words: Words) -> NDArray[np.bool_]:
    """Which of `words` [n] are there."""
    if not len(sorted_words):
        return np.zeros(len(words), np.bool_)
    places = np.minimum(np.searchsorted(sorted_words, words), len(sorted_words) - 1)
    there: NDArray[np.bool_] = sorted_words[places] == words
    return there


def _joined(words: Words) -> NDArray[Any]:
    """[n, 2] as [n] of one comparable value each."""
    return np.ascontiguousarray(words).view([("a", "<u8"), ("b", "<u8")]).reshape(-1)
