"""Captions: untrusted bytes to one line of normalised text.

Always holds: the result is valid Unicode in NFKC, one line, single spaces, no control characters; normalising it again
changes nothing; bytes in no known encoding are refused, never guessed. Called by the score pass.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from typing import Literal

import numpy as np

from data_pipeline.draws import key64, mix64

# Raise it when the same bytes can give another caption than before: it stands in the dataset's identity.
CAPTION_VERSION = "nfkc-1"

# Control characters separate words (they replaced a line break or a tab); invisible formatting marks do not. The zero
# width joiners (200C, 200D) stay: emoji sequences and several scripts are spelled with them.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]+")
INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]+")


# Which of a picture's captions become rows: its first, each, or one that its id decides.
CaptionPolicy = Literal["first", "all", "random"]


class CaptionError(Exception):
    """A caption in no encoding that can be told for certain."""

    reason = "caption_encoding"


def chosen_captions(policy: CaptionPolicy, picture: int, count: int) -> range:
    """Which of a picture's `count` captions are used. `picture` is its id."""
    if policy == "all":
        return range(count)
    index = int(mix64(np.array([picture ^ key64("caption", 0)], np.uint64))[0]) % count if policy == "random" else 0
    return range(index, index + 1)


def normalise(raw: bytes) -> str:
    """UTF-8, or UTF-16 with a byte order mark, to normalised text; "" if nothing is left. Raises CaptionError."""
    text = INVISIBLE.sub("", CONTROLS.sub(" ", _decode(raw)))
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _decode(raw: bytes) -> str:
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        # Strict: overlong forms, lone surrogates and truncation are refused. A legacy code page decodes as anything, so
        # guessing one would train the model on mojibake.
        return raw.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptionError(str(error)) from None
