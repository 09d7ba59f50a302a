"""What readers hand to the score pass: one captioned picture, or one that could not be read and why.

Always holds: keys are valid text, those of Records unique within a unit; nothing here has been decoded or judged yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

IMAGE_SUFFIXES = (
    "jpg",
    "jpeg",
    "jfif",
    "png",
    "webp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "apng",
    "avif",
    "jp2",
    "j2k",
    "ppm",
    "tga",
    "mpo",
    # Of these some are in formats that are not read; their records are then counted for that, not passed over.
    "jpe",
    "dib",
    "pbm",
    "pgm",
    "pnm",
    "ico",
    "heic",
    "heif",
    "jxl",
)

# Raise it when the same input content can give other records than before: it stands in the dataset's identity.
RECORDS_VERSION = "records-4"

# Larger than any picture that is decoded afterwards, small enough that a lying header cannot fill the memory.
FILE_LIMIT_BYTES = 128 * 2**20
# Of a caption's file, of a json file and of a line of a jsonl: the captions of a unit are in memory together.
TEXT_LIMIT_BYTES = 2**20


@dataclass(frozen=True)
class Record:
    """One picture as found: undecoded image bytes and undecoded captions, at least one.

    `columns`: the numbers that the input states beside the picture, such as scores; what is absent or null there is
    absent here.
    """

    key: str
    image_bytes: bytes
    captions: tuple[bytes, ...]
    columns: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejected:
    """One record that cannot be used. `reason` is short and counted; `detail` is for people."""

    key: str
    reason: str
    detail: str


def text_key(name: str) -> str:
    """A file name as valid text: bytes that are not UTF-8 (surrogates in Python) become backslash escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
