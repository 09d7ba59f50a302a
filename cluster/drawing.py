"""`glidepath sample`: pictures of prompts as PNG files that hold what is needed to draw them again, and a grid.

Always holds: every setting that decides a picture is in `DrawSettings`; a PNG's text has them as JSON, with the
checkpoints' URIs as they were found, so `draw_to_folder` on them and its prompt draws the same pixels on the same kind
of machine. Called by the command line; the demo takes its models through `load_part`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator

from data_pipeline.config import Settings
from data_pipeline.errors import UsageError, UserError
from trainer.clip_guide import ClipGuide, refuse_other_process
from trainer.config import Positive, SamplingSettings
from trainer.diffusion.respacing import spaced_timesteps
from trainer.pictures import grid, png_bytes, read_mask, read_picture
from trainer.recipes import make_recipe
from trainer.recipes.glide import GlideConfig
from trainer.recipes.recipe import Pixels
from trainer.sampling import (
    BATCH,
    CANDIDATE_STRIDE,
    RELEASED_UPSAMPLING,
    Drawn,
    Edit,
    Pipeline,
    Progress,
    Sampler,
    cut_prompts,
    unwatched,
    upsampling_sampler,
)
from trainer.weights import Trained, WeightsKind, load_trained, open_checkpoint

PARTS = {"base": "a base model", "upsampler": "an upsampler", "clip": "a noised CLIP"}
CLIP_GUIDANCE = 2.0  # GLIDE, appendix C
GRID_PICTURES = 64  # the first ones; a grid of thousands shows nothing


def unwarned(line: str) -> None:
    pass


class DrawSettings(Settings):
    """Everything but the prompts that decides pictures."""

    checkpoint: str
    upsampler: str | None = None
    clip: str | None = None
    weights: WeightsKind = "ema"
    seed: int = 0
    first_number: Annotated[int, Field(ge=0, lt=CANDIDATE_STRIDE // 2)] = 0  # of the first prompt
    base: SamplingSettings = SamplingSettings()
    enlarging: SamplingSettings = RELEASED_UPSAMPLING
    clip_guidance: Annotated[float, Field(allow_inf_nan=False)] = CLIP_GUIDANCE
    best_of: Positive = 1
    image: Path | None = None
    mask: Path | None = None
    batch: Positive = BATCH
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _fit(self) -> DrawSettings:
        if self.best_of > 1 and not self.clip:
            raise ValueError(f"a CLIP that judges the candidates (--clip), found --best-of {self.best_of} without")
        if self.mask and not self.image:
            raise ValueError("a picture that the mask belongs to (--image), found --mask without")
        if self.base.strength < 1 and not self.image:
            raise ValueError(f"a picture to start from (--image), found --strength {self.base.strength} without")
        if self.image and not self.mask and self.base.strength == 1:
            raise ValueError("--mask or --strength below 1 with --image, found neither: nothing of it would be kept")
        return self


def unguidable(settings: DrawSettings, models: Mapping[str, Trained]) -> Iterator[str]:
    """A line for each model that guidance pulls away from an empty caption that it has never seen."""
    for part, option, sampling, otherwise in (
        ("base", "guidance", settings.base, " or fine-tune it with classifier_free_finetune"),
        ("upsampler", "upsampler-guidance", settings.enlarging, ""),
    ):
        config = models[part].config if part in models else None
        if sampling.guidance_scale != 1 and isinstance(config, GlideConfig) and config.caption_dropout == 0:
            yield (
                f"{option} {sampling.guidance_scale:g}: expected {PARTS[part]} trained with empty captions, found "
                f"caption_dropout 0; unless its parent saw some, use --{option} 1{otherwise}"
            )


def draw_to_folder(
    settings: DrawSettings,
    prompts: Sequence[str],
    folder: Path,
    progress: Progress = unwatched,
    warn: Callable[[str], None] = unwarned,
    load: Callable[[DrawSettings], dict[str, Trained]] | None = None,
) -> dict[str, Any]:
    """Draw every prompt into `folder`, files as soon as their batch is done; `warn` gets each of "warnings" first.
    `load`: by default `load_models`; who draws often keeps its models.

    Returns {"checkpoint", "samples": grid path, "images": paths, "warnings"}, with an upsampler also "base_images",
    with a CLIP "scores" [prompts][candidates] and "chosen" [prompts]. Raises UserError for checkpoints that do not fit
    and pictures that are too small.
    """
    # Whatever can be refused is, before weights are read: those of the paper's base model are 14 GB.
    edit = read_edit(settings, read_configs(settings))
    models = (load or load_models)(settings)
    pipeline = make_pipeline(settings, models)
    warnings = [*unguidable(settings, models), *cut_prompts(prompts, settings.first_number, models, pipeline.judge)]
    for line in warnings:
        warn(line)

    folder.mkdir(parents=True, exist_ok=True)
    settings, about = as_found(settings, models), description(settings, models)
    document: dict[str, Any] = {"checkpoint": models["base"].uri, "images": [], "warnings": warnings}
    document |= {"base_images": []} if pipeline.upsampler else {}
    document |= {"scores": [], "chosen": []} if pipeline.judge else {}
    shown: list[Pixels] = []
    for begin in range(0, len(prompts), settings.batch):
        batch = prompts[begin : begin + settings.batch]
        here = settings.model_copy(update={"first_number": settings.first_number + begin})
        share = f"of pictures {begin + 1} to {begin + len(batch)} of {len(prompts)}"
        drawn = pipeline.draw(batch, here.first_number, edit, noted(progress, share))
        document["images"] += write_pictures(drawn.images, drawn, here, batch, folder, about)
        if pipeline.upsampler:
            document["base_images"] += write_pictures(drawn.base, drawn, here, batch, folder, about, "-base")
        if drawn.scores is not None:
            document["scores"] += drawn.scores.tolist()
            document["chosen"] += drawn.chosen.tolist()
        shown.extend(drawn.images[: GRID_PICTURES - len(shown)])
    document["samples"] = str(folder / "grid.png")
    (folder / "grid.png").write_bytes(png_bytes(grid(np.stack(shown), prompts[:GRID_PICTURES]), about))
    return document


def noted(progress: Progress, share: str) -> Progress:
    """Of one batch: the stages' steps, and which pictures they are for."""
    return lambda done, total, stage: progress(done, total, f"{stage} {share}")


def read_configs(settings: DrawSettings) -> dict[str, Any]:
    """By part, the models' configurations, found to fit the settings and each other. Raises UserError."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device", "cpu where torch sees no GPU", "cuda", "correct it")
    configs = {part: part_config(uri, part) for part, uri in model_uris(settings).items()}
    base = configs["base"]
    check_spacing("--spacing", settings.base.spacing, base.diffusion.steps)
    if upsampler := configs.get("upsampler"):
        check_spacing("--upsampler-spacing", settings.enlarging.spacing, upsampler.diffusion.steps)
        drawn, taken = base.model.image_size, upsampler.model.low_resolution
        if drawn < taken:
            name = f"upsampler {settings.upsampler}"
            raise UserError(name, f"one that enlarges the base model's {drawn} px", f"{taken} px", "give another one")
        if (level := settings.enlarging.low_res_level) and not upsampler.model.low_res_level:
            name = "--upsampler-low-res-level"
            raise UsageError(name, "0 for an upsampler that is not told of noise", f"{level}", "leave it out")
    if settings.clip:
        refuse_other_process(settings.clip, configs["clip"], base)
    return configs


def model_uris(settings: DrawSettings) -> dict[str, str]:
    """By part, what the settings name."""
    named = {"base": settings.checkpoint, "upsampler": settings.upsampler, "clip": settings.clip}
    return {part: uri for part, uri in named.items() if uri}


def load_models(settings: DrawSettings) -> dict[str, Trained]:
    """By part, on their device. Raises UserError."""
    models = {part: load_part(uri, part, settings.weights) for part, uri in model_uris(settings).items()}
    for model in models.values():
        for module in model.modules.values():
            module.to(device_of(settings))
    return models


def load_part(uri: str, part: str, weights: WeightsKind = "ema") -> Trained:
    """A trained model that must have a part of that name (PARTS). Raises UserError."""
    part_config(uri, part)
    return load_trained(uri, weights)


def part_config(uri: str, part: str) -> Any:
    """The configuration of a checkpoint whose recipe must have the part. Raises UserError."""
    checkpoint = open_checkpoint(uri)
    if part not in make_recipe(checkpoint.config).parts():
        raise UserError(
            f"checkpoint {checkpoint.uri}",
            PARTS[part],
            f"recipe {checkpoint.config.recipe}",
            f"give a checkpoint of {PARTS[part]}",
        )
    return checkpoint.config


def check_spacing(option: str, spacing: str, steps: int) -> None:
    """Raise UsageError for sampling steps that a process of `steps` timesteps does not have."""
    try:
        spaced_timesteps(steps, spacing)
    except ValueError as error:
        raise UsageError(option, "steps such as 50 or 10,10,3,2,2", str(error), "correct it") from None


def device_of(settings: DrawSettings) -> str:
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


def make_pipeline(settings: DrawSettings, models: Mapping[str, Trained]) -> Pipeline:
    """The models as the settings ask for them. Raises UserError for a CLIP that does not fit the base model."""
    base = models["base"]
    judge = ClipGuide(models["clip"], base) if "clip" in models else None
    guide = partial(judge.gradient, scale=settings.clip_guidance) if judge and settings.clip_guidance else None
    first = Sampler(base.recipe, base.modules, settings.base, settings.seed, settings.batch, guide)
    second = None
    if "upsampler" in models:
        second = upsampling_sampler(models["upsampler"], settings.enlarging, settings.seed, settings.batch)
    return Pipeline(first, second, judge, settings.best_of)


def read_edit(settings: DrawSettings, configs: Mapping[str, Any]) -> Edit | None:
    """The given picture and mask. Raises UserError for what is no picture, does not belong together or is too small."""
    if settings.image is None:
        return None
    picture = read_picture(settings.image)
    known = None if settings.mask is None else read_mask(settings.mask, settings.image)
    # Without a mask the upsampler enlarges what the base model drew, and the picture does not reach it.
    reached = [configs["base"].model.image_size]
    if "upsampler" in configs and known is not None:
        reached.append(configs["upsampler"].model.image_size)
    if len(picture) < max(reached):
        name, found = f"picture {settings.image}", f"{len(picture)} px"
        raise UserError(name, f"a shorter side of at least {max(reached)} px", found, "bring a larger one")
    return Edit(picture, known)


def as_found(settings: DrawSettings, models: Mapping[str, Trained]) -> DrawSettings:
    """The settings with the checkpoints, the files and the device that were meant."""
    uris = {"checkpoint" if part == "base" else part: model.uri for part, model in models.items()}
    files = {name: path.resolve() for name in ("image", "mask") if (path := getattr(settings, name))}
    return settings.model_copy(update={**uris, **files, "device": device_of(settings)})


def description(settings: DrawSettings, models: Mapping[str, Trained]) -> dict[str, str]:
    """Text chunks of every PNG."""
    about = {
        "Software": f"glidepath {metadata.version('glidepath')}",
        "checkpoint": " ".join(model.uri for model in models.values()),
        "seed": str(settings.seed),
        "sampling": settings.base.model_dump_json(),
    }
    for name, path in (("image_sha256", settings.image), ("mask_sha256", settings.mask)):
        if path:
            about[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return about


def write_pictures(
    images: Pixels,
    drawn: Drawn,
    settings: DrawSettings,
    prompts: Sequence[str],
    folder: Path,
    about: Mapping[str, str],
    suffix: str = "",
) -> list[str]:
    """A PNG for each prompt, named by its number; their paths."""
    paths = []
    for row, (pixels, prompt) in enumerate(zip(images, prompts, strict=True)):
        number, candidate = settings.first_number + row, drawn.chosen[row]
        of_picture = {"prompt": prompt, "number": str(number), "candidate": str(candidate)}
        of_picture["drawing"] = settings.model_copy(update={"first_number": number}).model_dump_json()
        if drawn.scores is not None:
            of_picture["clip_score"] = f"{drawn.scores[row, candidate]:.6f}"
        paths.append(folder / f"{number:04d}{suffix}.png")
        paths[-1].write_bytes(png_bytes(Image.fromarray(pixels), {**of_picture, **about}))
    return [str(path) for path in paths]
