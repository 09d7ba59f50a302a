"""`glidepath sample`: pictures of prompts as PNG files with their settings inside, and a grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.errors import UserError
from trainer.config import SamplingSettings
from trainer.sampling import draw_images, grid, png_bytes, two_stage
from trainer.weights import Trained, load_trained

STAGES = ("glide_base", "glide_upsampler")


def draw_to_folder(
    models: Sequence[str], prompts: Sequence[str], settings: SamplingSettings, seed: int, folder: Path
) -> dict[str, Any]:
    """Draw from a base model, or through a base model and an upsampler (`models`: one or two URIs), into `folder`.

    Returns {"checkpoint", "samples": grid path, "images": paths}. Raises UserError when a checkpoint is of another
    recipe.
    """
    base, *upsamplers = [load_recipe(uri, recipe) for uri, recipe in zip(models, STAGES, strict=False)]
    if upsamplers:
        _, images = two_stage(base, upsamplers[0], prompts, settings, seed)
    else:
        images = draw_images(base.recipe, base.modules, prompts, settings, seed)
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "checkpoint": " ".join(model.uri for model in (base, *upsamplers)),
        "seed": str(seed),
        "sampling": settings.model_dump_json(),
    }
    paths = []
    for number, (pixels, prompt) in enumerate(zip(images, prompts, strict=True)):
        paths.append(folder / f"{number:04d}.png")
        paths[-1].write_bytes(png_bytes(Image.fromarray(pixels), {"prompt": prompt, **about}))
    sheet = folder / "grid.png"
    sheet.write_bytes(png_bytes(grid(images, prompts), about))
    return {"checkpoint": base.uri, "samples": str(sheet), "images": [str(path) for path in paths]}


def load_recipe(uri: str, recipe: str) -> Trained:
    """A trained model that must be of `recipe`."""
    trained = load_trained(uri)
    if trained.config.recipe != recipe:
        raise UserError(
            f"checkpoint {uri}", f"recipe {recipe}", trained.config.recipe, "give a checkpoint of that recipe"
        )
    return trained
