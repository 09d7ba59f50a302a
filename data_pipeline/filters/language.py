"""Language: captions that are surely in another language than those asked for.

Always holds: a caption is dropped by its script when most of its letters are in none that the languages are written in,
and by its words when py3langid finds another language with at least `language_confidence` and the caption has at least
`language_from` characters; in doubt it is kept. The model file is the one that the figures were taken with (its digest
is checked), and is read once per process, at the first caption that needs it.

In doubt kept, because captions are short and full of names: of 1,000 web captions, about 970 of them English, the
likeliest of the model's 140 languages is English for 704, the likeliest of the 57 in CANDIDATES for 830, and 14 are
dropped, 3 of them wrongly. No caption of 2,120 photographs is dropped. Of other languages' names of emoji, those in
another script are dropped at any length, those of 30 characters and more to 65% (Indonesian) to 99.8% (French), those
of 20 to 29 to 45% to 91% (benchmarks/results/filters.json). Not cld3 or fastText, which the published filters used: for
the one there is no wheel for current Pythons, and the other's model is a download of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import unicodedata
from collections import Counter
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.filters.thresholds import Facts, Thresholds

PACKAGE = "py3langid==0.4.0"
MODEL_SHA256 = "f4f4a2c3465ca1f081541037f9cac23021d68151c2f709c55ae5eedfca522963"

# Languages with a real share of the web's pages. The model knows 140; Nigerian Pidgin, Luxembourgish or Latin are what
# it takes English product names for.
CANDIDATES = frozenset(
    code
    for codes in (
        "ar az be bg bn ca cs da de el en es et fa fi fr he hi hr hu hy id is it ja ka kk ko lt lv mk ml mn mr ms nl",
        "no pl pt ro ru sk sl sq sr sv sw ta te th tl tr uk ur uz vi zh",
    )
    for code in codes.split()
)

# The first word of its letters' Unicode names, for languages that are not written in Latin letters alone.
_SCRIPTS = {
    ("CYRILLIC",): "be bg kk mk mn ru uk ba tt",
    ("CYRILLIC", "LATIN"): "sr uz bs tg ky",
    ("ARABIC",): "ar fa ur ps ug ary arz sdh",
    ("ARABIC", "LATIN"): "ku",
    ("HEBREW",): "he hbo",
    ("GREEK",): "el grc",
    ("DEVANAGARI",): "hi mr ne sa gom",
    ("BENGALI",): "bn as",
    ("GURMUKHI",): "pa",
    ("GUJARATI",): "gu",
    ("ORIYA",): "or",
    ("TAMIL",): "ta",
    ("TELUGU",): "te",
    ("KANNADA",): "kn",
    ("MALAYALAM",): "ml",
    ("SINHALA",): "si",
    ("THAI",): "th",
    ("LAO",): "lo",
    ("TIBETAN",): "dz",
    ("MYANMAR",): "my",
    ("KHMER",): "km",
    ("GEORGIAN",): "ka",
    ("ARMENIAN",): "hy",
    ("ETHIOPIC",): "am",
    ("HANGUL", "CJK"): "ko",
    ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"): "ja",
    ("CJK",): "zh wuu yue",
}
_SCRIPTS_OF = {language: scripts for scripts, languages in _SCRIPTS.items() for language in languages.split()}


def language(facts: Facts, limits: Thresholds) -> str | None:
    if limits.languages is None:
        return None
    if _in_other_script(facts.caption, limits.languages):
        return "caption_script"
    if len(facts.caption) < limits.language_from:
        return None
    found, confidence = identify(facts.caption, limits.languages)
    return "caption_language" if found not in limits.languages and confidence >= limits.language_confidence else None


def identify(caption: str, languages: Collection[str] = ()) -> tuple[str, float]:
    """The likeliest of CANDIDATES and `languages`, as its ISO 639 code, and its probability among them.

    Raises UserError when the model is absent or another one.
    """
    code, probability = _identifier(CANDIDATES | frozenset(languages)).classify(caption)
    return code, float(probability)


@lru_cache(maxsize=1)
def known_languages() -> tuple[str, ...]:
    """The codes that may be asked for, sorted. Raises UserError as `identify` does."""
    return tuple(sorted(_load().labels))


def _in_other_script(caption: str, languages: Collection[str]) -> bool:
    if caption.isascii() and "LATIN" in scripts_of(languages):
        return False
    expected = scripts_of(languages)
    found = Counter(_script(letter) in expected for letter in caption if letter.isalpha())
    return found[False] > found[True]


def _script(letter: str) -> str:
    return unicodedata.name(letter, "").split(" ")[0]


def scripts_of(languages: Collection[str]) -> frozenset[str]:
    """The scripts that languages are written in, as the first words of Unicode names."""
    return frozenset(script for code in languages for script in _SCRIPTS_OF.get(code, ("LATIN",)))


@lru_cache(maxsize=4)
def _identifier(languages: frozenset[str]) -> Any:
    identifier = _load()
    identifier.set_languages(languages)
    return identifier


def _load() -> Any:
    advice = f"pip install {PACKAGE}"
    package = importlib.util.find_spec("py3langid")
    if package is None or package.origin is None:
        raise UserError("language model", f"package {PACKAGE}", "not installed", advice)
    path = Path(package.origin).parent / "data" / "model.npz.xz"
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "nothing"
    if found != MODEL_SHA256:
        raise UserError(f"language model {path}", f"sha256 {MODEL_SHA256[:12]}", found[:12], advice)
    from py3langid.langid import LanguageIdentifier

    # Its model is arrays in an xz file, read without pickle.
    return LanguageIdentifier.from_model_file(path, norm_probs=True)
