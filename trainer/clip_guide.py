"""A noised CLIP beside a base model: it pulls pictures towards their captions, and says which of several fits best.

Always holds: it sees pictures of the base model's size on the base model's noising process, told the timesteps of
training; a picture's pull and score depend on itself and its caption alone. Called by sampling.

Source: Nichol et al. 2021 (GLIDE), section 2.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.clip_tokenizer import clip_tokens
from data_pipeline.errors import UserError
from trainer.diffusion.guidance import clip_guidance
from trainer.diffusion.steps import Gradient
from trainer.models.noised_clip import NoisedClip
from trainer.recipes.glide import GlideConfig, reduced
from trainer.recipes.noised_clip import PART, NoisedClipRecipe, NoisedClipTrainConfig
from trainer.recipes.recipe import Pixels, on_device
from trainer.weights import Trained


def refuse_other_process(clip_uri: str, clip: NoisedClipTrainConfig, base: GlideConfig) -> None:
    """Raise UserError for a CLIP trained on another noising process or another size of pictures than a base model."""
    for what, expected, found in (
        ("schedule", base.diffusion.schedule, clip.diffusion.schedule),
        ("timesteps", base.diffusion.steps, clip.diffusion.steps),
        ("pixels a side", base.model.image_size, clip.model.image_size),
    ):
        if expected != found:
            name, of_base = f"noised CLIP {clip_uri}: {what}", f"the base model's {expected}"
            raise UserError(name, of_base, f"{found}", "give a CLIP trained for this base model")


class ClipGuide:
    """The noised CLIP of a checkpoint, for one base model. Raises UserError as `refuse_other_process` does."""

    def __init__(self, clip: Trained, base: Trained) -> None:
        assert isinstance(clip.recipe, NoisedClipRecipe) and isinstance(base.config, GlideConfig)
        refuse_other_process(clip.uri, clip.recipe.config, base.config)
        self.recipe, self.modules = clip.recipe, clip.modules

    @cached_property
    def _model(self) -> NoisedClip:
        model = self.modules[PART]
        assert isinstance(model, NoisedClip)
        # Only the picture's gradient is asked for; without this every step would also record what the weights' need.
        return model.requires_grad_(False)

    def gradient(self, prompts: Sequence[str], scale: float) -> Gradient:
        """scale · gradient of logit_scale · cosine of each picture and its prompt, for a batch of len(prompts)."""
        captions = on_device(self.recipe.captions(prompts), next(self._model.parameters()).device)
        with torch.no_grad():
            features_BE = self._model.encode_text(captions["tokens"], captions["lengths"])
        return clip_guidance(self._model.encode_image, features_BE, self.recipe.config.logit_scale, scale)

    def scores(self, images: Pixels, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Cosine of each picture uint8 [b, H, W, 3] and its prompt, float64 [b] in [-1, 1], without noise, told the
        first timestep."""
        return similarities(self.recipe, self._model, images, prompts)

    def tokens_of(self, prompt: str) -> int:
        """How many tokens a prompt has, start and end included, however many the model reads."""
        return int(clip_tokens([prompt], longest_tokens(prompt))[1][0])

    @property
    def context(self) -> int:
        """How many tokens of a prompt the model reads."""
        return self.recipe.config.model.text_context


def similarities(
    recipe: NoisedClipRecipe, model: NoisedClip, images: Pixels, captions: Sequence[str]
) -> NDArray[np.float64]:
    """Cosine of each picture uint8 [b, H, W, 3] and its caption, float64 [b] in [-1, 1], without noise, told the first
    timestep."""
    pictures = reduced(images, recipe.config.model.image_size)
    batch = {
        "images": pictures,
        "noise": torch.zeros_like(pictures),
        "timesteps": torch.zeros(len(pictures), dtype=torch.int64),
        **recipe.captions(captions),
    }
    with torch.no_grad():
        images_BE, captions_BE = recipe.directions({PART: model}, on_device(batch, next(model.parameters()).device))
    return (images_BE * captions_BE).sum(dim=1).double().cpu().numpy()


def longest_tokens(prompt: str) -> int:
    """More tokens than the prompt can have: a byte is a token at least, a letter 4 bytes at most, and repairing or
    lower-casing doubles it at most."""
    return min(8 * len(prompt) + 2, 65_535)
