"""Picture files: PNGs that say how they were made, grids, and the pictures and masks that people bring.

Always holds: pictures are RGB uint8 [H, W, 3], upright; files from outside are checked before they are decoded. Called
by sampling, the command line, the demo and the training run for its grids.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from data_pipeline.errors import UserError
from data_pipeline.images import ImageError, centre_crop, decode
from trainer.recipes.recipe import Pixels

ERASED_FROM = (
    128  # mask value, 0 black to 255 white: half-way, so that the soft rim of a brush falls to the nearer side
)
MASK_RULE = "white or transparent where the picture is to be drawn anew, black where it stays"


def grid(images: Pixels, captions: Sequence[str], columns: int = 4, cell: int = 160) -> Image.Image:
    """Pictures in rows, each with its caption under it."""
    text_height, margin = 28, 6
    rows = -(-len(images) // columns)
    size = (columns * (cell + margin) + margin, rows * (cell + text_height + margin) + margin)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for number, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x = margin + number % columns * (cell + margin)
        y = margin + number // columns * (cell + text_height + margin)
        picture = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y))
        pen.multiline_text((x, y + cell + 1), _two_lines(caption, font, cell), fill="black", font=font, spacing=1)
    return sheet


def _two_lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    lines, words = [""], text.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines[:2])


def png_bytes(image: Image.Image, metadata: Mapping[str, str]) -> bytes:
    """A PNG with text chunks that say how it was made."""
    info = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_picture(path: Path) -> Pixels:
    """The largest centred square of a picture file: uint8 [s, s, 3]. Raises UserError for what is no picture."""
    return centre_crop(_decoded(path, "picture"))


def read_mask(path: Path, picture: Path) -> NDArray[np.bool_]:
    """Where the picture is known, bool [s, s] of the same square as `read_picture`'s; see MASK_RULE.

    Raises UserError for what is no picture, for another size than the picture's, and for a mask that erases nothing.
    """
    mask, of = _decoded(path, "mask"), _decoded(picture, "picture")
    if mask.shape != of.shape:
        expected, found = ("{1} x {0}".format(*pixels.shape) for pixels in (of, mask))
        raise UserError(
            f"mask {path}",
            f"the size of {picture}, {expected} px",
            f"{found} px",
            f"bring one of its size: {MASK_RULE}",
        )
    known = centre_crop(mask).mean(axis=2) < ERASED_FROM
    if known.all():
        raise UserError(f"mask {path}", "something to draw anew", "none in the centred square", f"paint: {MASK_RULE}")
    return known


def _decoded(path: Path, what: str) -> Pixels:
    try:
        return decode(path.read_bytes())
    except ImageError as error:
        raise UserError(f"{what} {path}", "a picture file", str(error), "give another file") from None
