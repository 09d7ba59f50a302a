"""Tars: the samples of a webdataset tar, read without trusting it.

Always holds: no member is written to disk under a name and no link is followed; a sample is reported once, whole or as
Rejected with a reason, wherever in the tar its files stand; damage costs the samples it touches, not those before it;
what is in memory is one sample, and of each member its place. Naming is webdataset's: the key is the path up to the
first dot of the file name, the rest is the suffix, and a member `….gz` is packed.

The standard library's tarfile reads the headers first, then the samples. webdataset's own iterator drops links and
everything after a damaged header without a word, splits samples whose files are not adjacent and ends at a repeated
key; a test shows that both read the same from a sound tar. Called by units.py and img2dataset.py.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import IO, NamedTuple, cast

from data_pipeline.errors import UserError
from data_pipeline.records import FILE_LIMIT_BYTES, IMAGE_SUFFIXES, TEXT_LIMIT_BYTES, Record, Rejected, text_key
from data_pipeline.sources import compression
from data_pipeline.sources.files import is_safe

TAR_ENDINGS = (".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz", ".tzst", ".tar.zst")

SAMPLE_NAME = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)
PACKED_ENDING = ".gz"
LIMITS_BYTES = {"txt": TEXT_LIMIT_BYTES, "json": TEXT_LIMIT_BYTES}  # of a member by its suffix, else FILE_LIMIT_BYTES
KEY_LIMIT_CHARACTERS = 4096  # the longest path of common systems

# tarfile searches an extended header for numbers in time that grows with the square of a row of digits (CVE-2024-6232).
HEADER_LIMIT_BYTES = 64 * 2**10
MANY_DIGITS = re.compile(rb"[0-9]{256}")

DAMAGE = (tarfile.TarError, *compression.DAMAGE)


class Part(NamedTuple):
    """Where a member's content lies in the tar, in bytes."""

    offset: int
    size: int
    packed: bool


@dataclass(slots=True)
class Found:
    """The members of one key: where each suffix lies, what makes the sample unusable, how often its key came again."""

    parts: dict[str, Part] = field(default_factory=dict)
    refusal: tuple[str, str] | None = None
    repeats: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A picture's undecoded bytes, and those of its `.txt` and `.json` members where it has them."""

    key: str
    image: bytes
    text: bytes | None
    document: bytes | None
    suffixes: str  # of its members, for people


class HeaderFile:
    """A tar as tarfile may see it while it looks for headers: no absurd reads and seeks, which a few bytes can ask
    for."""

    def __init__(self, file: IO[bytes] | compression.Unpacked, end_bytes: float) -> None:
        self.file, self.end_bytes = file, end_bytes
        self.tell = file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= HEADER_LIMIT_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        data = self.file.read(size)
        if size > tarfile.BLOCKSIZE and MANY_DIGITS.search(data):
            raise tarfile.ReadError("a header with an absurd number")
        return data

    def seek(self, position: int, whence: int = 0) -> int:
        if not 0 <= position <= self.end_bytes:
            raise tarfile.ReadError(f"a member that ends at byte {position}")
        return self.file.seek(position)


def read_records(plain: IO[bytes]) -> Iterator[Record | Rejected]:
    """A picture and its `.txt` file each. The file is closed at the end."""
    for sample in read_samples(plain):
        if isinstance(sample, Rejected):
            yield sample
        elif sample.text is None:
            yield Rejected(sample.key, "caption_missing", f"has {sample.suffixes}")
        else:
            yield Record(sample.key, sample.image, (sample.text,))


def read_samples(plain: IO[bytes]) -> Iterator[Sample | Rejected]:
    """Samples of a plain or packed tar in the order of their first file. The file is closed at the end."""
    with plain, closing(compression.opened(plain)) as file:
        samples, damage = _index(file, float("inf") if file is not plain else plain.seek(0, io.SEEK_END))
        truncated = False
        for key, found in samples.items():
            outcome = _read_sample(file, key, found)
            truncated |= isinstance(outcome, Rejected) and outcome.reason == "tar_truncated"
            yield outcome
            yield from (
                Rejected(key, "duplicate_key", "the key came before in this tar; the first is kept")
                for _ in range(max(found.repeats.values(), default=0))
            )
        if damage and not truncated:
            reason = "tar_truncated" if samples else "tar_unreadable"
            yield Rejected("(rest of the tar)", reason, damage)


def _index(file: IO[bytes] | compression.Unpacked, size_bytes: float) -> tuple[dict[str, Found], str]:
    """Every sample's members by key, from the headers alone; and what ended the reading early, or ""."""
    samples: dict[str, Found] = {}
    file.seek(0)
    headers = HeaderFile(file, size_bytes)
    try:
        with tarfile.open(fileobj=cast(IO[bytes], headers), mode="r:") as tar:
            end = -1
            while (member := _plain_member(headers, tar) or tar.next()) is not None:
                if tar.offset <= end:  # a negative size (CVE-2025-8194): the same headers again and again
                    raise tarfile.ReadError(f"a member that ends before it begins, at byte {end}")
                end = tar.offset
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all that it has seen
                _add(samples, member)
            headers.seek(tar.offset)
            # tarfile takes a damaged header for the end. The true end is a block of zeros.
            if headers.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                return samples, f"no valid header at byte {tar.offset}, and not the end-of-archive mark"
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  (tarfile raises anything on hostile headers; only tarfile runs in here)
        return samples, str(error) or type(error).__name__
    return samples, ""


def _plain_member(headers: HeaderFile, tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member where its header is the usual one of a regular file; None where tarfile is to look.

    tarfile spends most of its time on a header for owners, times and devices (about 0.1 ms in a profile).
    """
    if tar.firstmember is not None or tar.pax_headers or tar.offset > headers.end_bytes:  # type: ignore[attr-defined]
        return None
    headers.seek(tar.offset)
    header = headers.read(tarfile.BLOCKSIZE)
    size, checksum = header[124:135], header[148:154]
    ended = header[135:136] in b"\0 " and header[154:156] == b"\0 "
    regular = header[156:157] == tarfile.REGTYPE and header[257:262] == b"ustar"
    plain = regular and not header[345:500].strip(tarfile.NUL)  # no continued name, no times of GNU's
    if not (plain and size.isdigit() and checksum.isdigit() and ended and len(header) == tarfile.BLOCKSIZE):
        return None
    try:
        if int(checksum, 8) != sum(header[:148]) + 8 * 32 + sum(header[156:]):
            return None
        member = tarfile.TarInfo(header[:100].partition(tarfile.NUL)[0].decode("utf-8", "surrogateescape"))
        member.size = int(size, 8)
    except ValueError:
        return None
    member.offset, member.offset_data = tar.offset, tar.offset + tarfile.BLOCKSIZE
    tar.offset = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return member


def _add(samples: dict[str, Found], member: tarfile.TarInfo) -> None:
    name = SAMPLE_NAME.match(member.name)
    if member.isdir() or name is None or (member.name.startswith("__") and "/" not in member.name):
        return  # folders, files without a suffix and webdataset's own `__…__` entries belong to no sample
    packed = name[2].lower().endswith(PACKED_ENDING)
    key, suffix = text_key(name[1]), name[2].lower().removesuffix(PACKED_ENDING)
    if len(member.name) > KEY_LIMIT_CHARACTERS:
        key = f"{key[:200]}…{hashlib.sha256(key.encode()).hexdigest()}"
    found = samples.setdefault(key, Found())
    limit_bytes = LIMITS_BYTES.get(suffix, FILE_LIMIT_BYTES)
    if not is_safe(member.name) or len(member.name) > KEY_LIMIT_CHARACTERS:
        found.refusal = ("unsafe_name", text_key(member.name[:KEY_LIMIT_CHARACTERS]))
    elif not member.isreg() or member.sparse is not None:
        found.refusal = ("not_a_file", f"{text_key(member.name)}: a link, device or sparse file")
    elif member.size > limit_bytes:
        found.refusal = ("file_too_large", f"{suffix}: {member.size} bytes, at most {limit_bytes}")
    elif suffix in found.parts:
        found.repeats[suffix] = found.repeats.get(suffix, 0) + 1
    else:
        found.parts[suffix] = Part(member.offset_data, member.size, packed)


def _read_sample(file: IO[bytes] | compression.Unpacked, key: str, found: Found) -> Sample | Rejected:
    if found.refusal:
        return Rejected(key, *found.refusal)
    suffixes = ", ".join(sorted(found.parts))
    image_suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in found.parts), None)
    if image_suffix is None:
        return Rejected(key, "image_missing", f"has {suffixes}")
    data: dict[str, bytes] = {}
    for suffix in (image_suffix, "txt", "json"):
        if (part := found.parts.get(suffix)) is None:
            continue
        try:
            data[suffix] = _read_part(file, part)
        except DAMAGE as error:
            return Rejected(key, "tar_truncated", f"{suffix}: {str(error) or type(error).__name__}")
        if not part.packed:
            continue
        limit_bytes = LIMITS_BYTES.get(suffix, FILE_LIMIT_BYTES)
        try:
            data[suffix] = compression.unpack(data[suffix], limit_bytes)
        except compression.TooLarge as error:
            return Rejected(key, "file_too_large", f"{suffix}: {error}")
        except compression.DAMAGE as error:
            return Rejected(key, "file_damaged", f"{suffix}: {str(error) or type(error).__name__}")
    return Sample(key, data[image_suffix], data.get("txt"), data.get("json"), suffixes)


def _read_part(file: IO[bytes] | compression.Unpacked, part: Part) -> bytes:
    file.seek(part.offset)
    data = file.read(part.size)
    if len(data) < part.size:
        raise tarfile.ReadError(f"{len(data)} of {part.size} bytes")
    return data
