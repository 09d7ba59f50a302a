"""Sampling for people: a trained model from its checkpoint, pictures from prompts, grids as PNG.

Always holds: picture number i depends on (seed, i) and its prompt, not on how many are drawn together. Called by the
command line, the demo and the training run for its grids.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import nn

from data_pipeline.draws import Draws
from trainer.config import SamplingSettings
from trainer.recipes.recipe import Pixels, Recipe
from trainer.weights import Trained

BATCH = 16


def draw_images(
    recipe: Recipe,
    modules: Mapping[str, nn.Module],
    prompts: Sequence[str],
    settings: SamplingSettings,
    seed: int,
    images: Pixels | None = None,
) -> Pixels:
    """uint8 [n, H, W, 3] for n prompts; `images` uint8 [n, h, w, 3] for a recipe that starts from pictures."""
    drawn = []
    for begin in range(0, len(prompts), BATCH):
        end = min(begin + BATCH, len(prompts))
        conditions = recipe.conditions(prompts[begin:end], None if images is None else images[begin:end])
        draws = Draws(seed, np.arange(begin, end, dtype=np.int64))
        drawn.append(recipe.sample(modules, conditions, draws, settings))
    return np.concatenate(drawn)


def two_stage(
    base: Trained, upsampler: Trained, prompts: Sequence[str], settings: SamplingSettings, seed: int
) -> tuple[Pixels, Pixels]:
    """(base pictures, upsampled pictures). Between the stages they are 8-bit, as the upsampler saw them in training.

    The upsampler runs unguided, by DDIM in 27 steps, from noise at temperature 0.997, as in the release's notebook.
    """
    small = draw_images(base.recipe, base.modules, prompts, settings, seed)
    unguided = SamplingSettings(guidance_scale=1.0, spacing="fast27", sampler="ddim", noise_temperature=0.997)
    return small, draw_images(upsampler.recipe, upsampler.modules, prompts, unguided, seed, small)


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
