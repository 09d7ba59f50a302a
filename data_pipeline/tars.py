"""Tars: the samples of a webdataset tar, read without trusting it.

Always holds: nothing is written to disk and no link is followed; a sample is reported once, as a Record or as Rejected
with a reason, wherever in the tar its files stand; damage costs the samples it touches, not those before it. Naming is
webdataset's: the key is the path up to the first dot of the file name, the rest is the suffix.

The standard library's tarfile reads the headers first, then the samples. webdataset's own iterator drops links and
everything after a damaged header without a word, splits samples whose files are not adjacent and ends at a repeated
key; a test shows that both read the same from a sound tar. Called by sources.py.
"""

from __future__ import annotations

import gzip
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, cast

from data_pipeline.records import FILE_LIMIT_BYTES, IMAGE_SUFFIXES, Record, Rejected, text_key

SAMPLE_NAME = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)
COMPRESSED_LIMIT_BYTES = 16 * 2**30  # of one gzipped tar once decompressed; a bomb would be unpacked for hours
JSON_LIMIT_BYTES = 2**20
DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)


@dataclass
class Sample:
    """The files of one key: where each suffix stands, what makes the sample unusable, how often its key came again."""

    parts: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    refusal: tuple[str, str] | None = None
    repeats: dict[str, int] = field(default_factory=dict)


class BoundedFile:
    """A file that refuses absurd reads and seeks, which a tar header of a few bytes can ask for."""

    def __init__(self, file: IO[bytes], end_limit_bytes: float) -> None:
        self.file, self.end_limit_bytes = file, end_limit_bytes
        self.tell = file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= FILE_LIMIT_BYTES + tarfile.RECORDSIZE:
            raise tarfile.ReadError(f"a read of {size} bytes was asked for")
        return self.file.read(size)

    def seek(self, position: int, whence: int = 0) -> int:
        if position > self.end_limit_bytes:
            raise tarfile.ReadError(f"more than {self.end_limit_bytes} bytes when decompressed")
        return self.file.seek(position, whence)


def read_tar(plain: IO[bytes], json_captions: bool) -> Iterator[Record | Rejected]:
    """Samples of a plain or gzipped tar in the order of their first file. The file is closed at the end.

    The caption is the `.txt` file; with `json_captions`, else the "caption" of the `.json` file.
    """
    with plain:
        compressed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        source = cast(IO[bytes], gzip.GzipFile(fileobj=plain)) if compressed else plain
        file = BoundedFile(source, COMPRESSED_LIMIT_BYTES if compressed else float("inf"))
        samples, damage = _index(file)
        truncated = False
        for key, sample in samples.items():
            outcome = _read_sample(file, key, sample, json_captions)
            truncated |= isinstance(outcome, Rejected) and outcome.reason == "tar_truncated"
            yield outcome
            yield from (
                Rejected(key, "duplicate_key", "the key came before in this tar; the first is kept")
                for _ in range(max(sample.repeats.values(), default=0))
            )
        if damage and not truncated:
            reason = "tar_truncated" if samples else "tar_unreadable"
            yield Rejected("(rest of the tar)", reason, damage)


def _index(file: BoundedFile) -> tuple[dict[str, Sample], str]:
    """Every sample's members by key, from the headers alone; and what ended the reading early, or ""."""
    samples: dict[str, Sample] = {}
    try:
        with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as tar:
            for member in tar:
                _add(samples, member)
            file.seek(tar.offset)
            # tarfile takes a damaged header for the end. The true end is a block of zeros.
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                return samples, f"no valid header at byte {tar.offset}, and not the end-of-archive mark"
    except DAMAGE as error:
        return samples, str(error) or type(error).__name__
    return samples, ""


def _add(samples: dict[str, Sample], member: tarfile.TarInfo) -> None:
    name = SAMPLE_NAME.match(member.name)
    if member.isdir() or name is None or (member.name.startswith("__") and "/" not in member.name):
        return  # folders, files without a suffix and webdataset's own `__…__` entries belong to no sample
    key, suffix = text_key(name[1]), name[2].lower()
    sample = samples.setdefault(key, Sample())
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\0" in member.name:
        sample.refusal = ("unsafe_name", text_key(member.name))
    elif not member.isreg() or member.sparse is not None:
        sample.refusal = ("not_a_file", f"{text_key(member.name)}: a link, device or sparse file")
    elif member.size > FILE_LIMIT_BYTES:
        sample.refusal = ("file_too_large", f"{suffix}: {member.size} bytes, at most {FILE_LIMIT_BYTES}")
    elif suffix in sample.parts:
        sample.repeats[suffix] = sample.repeats.get(suffix, 0) + 1
    else:
        sample.parts[suffix] = member


def _read_sample(file: BoundedFile, key: str, sample: Sample, json_captions: bool) -> Record | Rejected:
    if sample.refusal:
        return Rejected(key, *sample.refusal)
    image_suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample.parts), None)
    caption_suffix = next((suffix for suffix in ("txt", "json")[: 1 + json_captions] if suffix in sample.parts), None)
    if image_suffix is None:
        return Rejected(key, "image_missing", f"has {', '.join(sorted(sample.parts))}")
    if caption_suffix is None:
        return Rejected(key, "caption_missing", f"has {', '.join(sorted(sample.parts))}")
    try:
        caption = _read_member(file, sample.parts[caption_suffix])
        image = _read_member(file, sample.parts[image_suffix])
    except DAMAGE as error:
        return Rejected(key, "tar_truncated", str(error) or type(error).__name__)
    if caption_suffix == "txt":
        return Record(key, image, (caption,))
    written = _json_caption(caption)
    return Rejected(key, "caption_missing", "no caption in json") if written is None else Record(key, image, (written,))


def _read_member(file: BoundedFile, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        raise tarfile.ReadError(f"{text_key(member.name)}: {len(data)} of {member.size} bytes")
    return data


def _json_caption(data: bytes) -> bytes | None:
    """The "caption" of a JSON object as bytes (a lone surrogate stays undecodable), or None if there is none."""
    if len(data) > JSON_LIMIT_BYTES:
        return None
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    caption = document.get("caption") if isinstance(document, dict) else None
    return caption.encode("utf-8", "surrogatepass") if isinstance(caption, str) else None
