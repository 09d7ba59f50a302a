"""The recipes by name. A new recipe is one file here and one line below."""

from __future__ import annotations

from typing import Any

from data_pipeline.config import parse
from data_pipeline.errors import UsageError
from trainer.config import TrainConfig
from trainer.recipes.classifier_free_finetune import ClassifierFreeConfig, ClassifierFreeFinetune
from trainer.recipes.glide_base import GlideBase, GlideBaseConfig
from trainer.recipes.glide_upsampler import GlideUpsampler, GlideUpsamplerConfig
from trainer.recipes.inpaint import InpaintBase, InpaintBaseConfig, InpaintUpsampler, InpaintUpsamplerConfig
from trainer.recipes.noised_clip import NoisedClipRecipe, NoisedClipTrainConfig
from trainer.recipes.recipe import Recipe

# name -> (its configuration, its constructor from that configuration)
RECIPES: dict[str, tuple[type[TrainConfig], Any]] = {
    "glide_base": (GlideBaseConfig, GlideBase),
    "glide_upsampler": (GlideUpsamplerConfig, GlideUpsampler),
    "classifier_free_finetune": (ClassifierFreeConfig, ClassifierFreeFinetune),
    "inpaint_base": (InpaintBaseConfig, InpaintBase),
    "inpaint_upsampler": (InpaintUpsamplerConfig, InpaintUpsampler),
    "noised_clip": (NoisedClipTrainConfig, NoisedClipRecipe),
}


def parse_train_config(values: dict[str, Any], source: str) -> TrainConfig:
    """The configuration of a training run, as the class of its recipe. Raises UsageError."""
    name = values.get("recipe")
    if not isinstance(name, str) or name not in RECIPES:
        raise UsageError(f"{source}: key recipe", f"one of {', '.join(RECIPES)}", repr(name), "correct the value")
    return parse(RECIPES[name][0], values, source)


def make_recipe(config: TrainConfig) -> Recipe:
    """The recipe that a configuration names."""
    return RECIPES[config.recipe][1](config)
