"""Captions: untrusted bytes to one line of normalised text.

Always holds: the result is valid Unicode in NFKC, one line, single spaces, no control characters, no HTML entities or
tags; normalising it again changes nothing; bytes in no known encoding are refused, never guessed. Called by the score
pass, which keeps the raw bytes beside the result.

HTML: web captions are often escaped ("valentine&amp;#39;s day"), sometimes twice, and prompts never are. Only what
is certain is touched: entities that end in a semicolon ("R&region" stays) and the tags in TAGS ("I <3 you" stays).
"""

from __future__ import annotations

import codecs
import html
import re
import unicodedata
from itertools import groupby
from typing import Literal

import numpy as np

from data_pipeline.draws import key64, mix64

# Raise it when the same bytes can give another caption than before: it stands in the dataset's identity.
CAPTION_VERSION = "nfkc-html-2"

# Control characters separate words (they replaced a line break or a tab); invisible formatting marks do not. The zero
# width joiners (200C, 200D) stay: emoji sequences and several scripts are spelled with them.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]+")
INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]+")

ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_WITHIN_WORDS = "a|abbr|b|bdi|big|code|em|font|i|ins|mark|s|small|span|strike|strong|sub|sup|tt|u"
_BETWEEN_WORDS = "blockquote|br|center|dd|div|dl|dt|figcaption|figure|h[1-6]|hr|img|li|ol|p|section|table|td|th|tr|ul"
TAGS = {
    separator: re.compile(rf"</?(?:{names})(?:\s[^<>]*)?\s?/?>", re.IGNORECASE)
    for separator, names in (("", _WITHIN_WORDS), (" ", _BETWEEN_WORDS))
}
HTML_ROUNDS = 8  # a caption escaped more often than this was made to keep a reader busy
# Longer text has its combining marks sorted here: CPython's own sorting of a row of them takes minutes for 1 MiB.
LONG_CHARACTERS = 4096


# Which of a picture's captions become rows: its first, each, or one that its id decides.
CaptionPolicy = Literal["first", "all", "random"]


class CaptionError(Exception):
    """A caption in no encoding that can be told for certain, or under too many layers of escaping."""

    reason = "caption_encoding"


def chosen_captions(policy: CaptionPolicy, picture: int, count: int) -> range:
    """Which of a picture's `count` captions are used. `picture` is its id."""
    if policy == "all":
        return range(count)
    index = int(mix64(np.array([picture ^ key64("caption", 0)], np.uint64))[0]) % count if policy == "random" else 0
    return range(index, index + 1)


def normalise(raw: bytes) -> str:
    """UTF-8, or UTF-16 with a byte order mark, to normalised text; "" if nothing is left. Raises CaptionError."""
    text = _plain(_decode(raw))
    for _ in range(HTML_ROUNDS):
        found = _plain(_without_html(text)) if "&" in text or "<" in text else text
        if found == text:
            return text
        text = found
    raise CaptionError(f"HTML escaped more than {HTML_ROUNDS} times")


def _plain(text: str) -> str:
    text = INVISIBLE.sub("", CONTROLS.sub(" ", text))
    if len(text) > LONG_CHARACTERS and not text.isascii():
        text = _decomposed(text)
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _decomposed(text: str) -> str:
    """NFKD, whose NFKC is that of `text`, in a time that hardly grows faster than its length."""
    parts = (part for character in text for part in unicodedata.normalize("NFKD", character))
    rows = groupby(parts, lambda part: unicodedata.combining(part) > 0)
    return "".join(part for marks, row in rows for part in (sorted(row, key=unicodedata.combining) if marks else row))


def _without_html(text: str) -> str:
    """One layer less: tags go, entities are resolved. What was an escaped tag is a tag in the next round."""
    for separator, tags in TAGS.items():
        text = tags.sub(separator, text)
    return ENTITY.sub(lambda entity: html.unescape(entity[0]), text)


def _decode(raw: bytes) -> str:
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        # Strict: overlong forms, lone surrogates and truncation are refused. A legacy code page decodes as anything, so
        # guessing one would train the model on mojibake.
        return raw.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptionError(str(error)) from None
