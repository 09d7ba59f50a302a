"""Recipe `noised_clip`: a CLIP that reads noised images, to guide the diffusion of a base model (GLIDE, section 4.4).

Always holds: each sample's timestep and noise come from `draws`, so a pair's features depend on its position alone; its
loss depends on the whole global batch. The base model's images, captions and schedule; batch 32,768, 390,000 updates,
weight decay 0.0125 at the paper's size (appendix B.1; the learning rate is not published).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.clip_tokenizer import CLIP_VOCABULARY, clip_tokens
from data_pipeline.draws import Draws
from data_pipeline.errors import UserError
from data_pipeline.loader import Column, Rows
from trainer.config import SamplingSettings, TrainConfig
from trainer.diffusion.gaussian import Diffusion
from trainer.diffusion.steps import Gradient
from trainer.diffusion.timesteps import losses_by_quartile
from trainer.models.noised_clip import NoisedClip, NoisedClipConfig
from trainer.recipes.contrastive import TERMS, Contrastive, Directions, pair_losses, unit
from trainer.recipes.glide import STORED_SIDE, ProcessSettings, reduced, to_pixels
from trainer.recipes.recipe import Batch, Given, Losses, Part, Phase, Pixels, Recipe, Watch, on_device

PART = "clip"
ALIKE = (  # what a parent's shapes do not show
    *(f"model.{name}" for name in ("image_heads", "text_heads", "image_head_channels", "text_head_channels")),
    *("diffusion.schedule", "diffusion.steps"),
)
STORED = STORED_SIDE["base"]


class NoisedClipTrainConfig(TrainConfig):
    """A noised CLIP and how it is trained."""

    model: NoisedClipConfig = NoisedClipConfig()
    diffusion: ProcessSettings = ProcessSettings()
    weight_decay: Annotated[float, Field(ge=0)] = 0.0125
    logit_scale: Annotated[float, Field(gt=0)] = 100.0
    """Factor on the cosines, of training and of guidance. Fixed: the release has 100, where CLIP's learned one ends."""
    lock_image: bool = False
    """The image tower keeps the weights it begins with, all but its last projection, and sees no dropout: locked-image
    tuning (LiT, Zhai et al. 2021), against learning few pictures by heart. Weight decay would move them."""
    logit_normal: tuple[float, Annotated[float, Field(gt=0)]] | None = None
    """Mean and deviation of logit(timestep / steps) in training (Esser et al. 2024, section 3.1); a negative mean
    is for little noise. null: all timesteps alike."""
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, more arithmetic

    @model_validator(mode="after")
    def _fits_recipe(self) -> NoisedClipTrainConfig:
        if self.model.image_size > STORED:
            raise ValueError(f"model.image_size of at most the stored {STORED}, found {self.model.image_size}")
        if self.model.vocabulary < CLIP_VOCABULARY:
            raise ValueError(f"model.vocabulary of at least CLIP's {CLIP_VOCABULARY}, found {self.model.vocabulary}")
        if self.model.text_context < 3:
            raise ValueError(f"model.text_context with room for a token, found {self.model.text_context}")
        if self.model.timesteps != self.diffusion.steps:
            raise ValueError(f"model.timesteps of diffusion.steps {self.diffusion.steps}, found {self.model.timesteps}")
        if self.heldout and self.heldout.bits_per_dimension:
            raise ValueError("heldout.bits_per_dimension 0: a CLIP has no likelihood, found more")
        if self.lock_image and self.weight_decay:
            raise ValueError(f"weight_decay 0 with lock_image, found {self.weight_decay}")
        if self.samples.prompts:
            raise ValueError("no samples.prompts: a CLIP draws no pictures, its grid shows held-out rows")
        return self

    def for_evaluation(self) -> NoisedClipTrainConfig:
        return self.model_copy(update={"dropout": 0.0, "logit_normal": None, "activation_checkpointing": False})


class NoisedClipRecipe(Recipe):
    """See Recipe. Batch: "images" in [-1, 1], "noise", "timesteps"; "tokens", "lengths" of CLIP's tokenizer."""

    columns = (Column("base", "image64"), Column("base", "caption"))

    def __init__(self, config: NoisedClipTrainConfig) -> None:
        self.config = config
        self.process = Diffusion.from_schedule(config.diffusion.schedule, config.diffusion.steps)

    def parts(self) -> dict[str, Part]:
        return {PART: Part(self._build, start=self.config.parent, alike=ALIKE)}

    def _build(self) -> NoisedClip:
        model = NoisedClip(self.config.model, self.config.dropout, self.config.lock_image)
        model.activation_checkpointing = self.config.activation_checkpointing
        return model

    def phases(self) -> tuple[Phase, ...]:
        update = Contrastive(self.directions, self.config.logit_scale, self.config.model.embedding)
        return (Phase(PART, TERMS, self._loss, observed=("timesteps",), observe=self._by_quartile, accumulate=update),)

    def prepare(self, rows: Rows, draws: Draws) -> Batch:
        size = self.config.model.image_size
        return {
            "images": reduced(rows["image64"].reshape(-1, STORED, STORED, 3), size),
            "noise": torch.from_numpy(draws.normal("noise", (3, size, size))),
            "timesteps": self._timesteps(draws),
            **self.captions(rows["caption"]),
        }

    def _timesteps(self, draws: Draws) -> Tensor:
        """int64 [b] by the law of the settings."""
        shares_b = draws.uniform("timestep")
        if self.config.logit_normal:
            mean, deviation = self.config.logit_normal
            shares_b = 1 / (1 + np.exp(-mean - deviation * draws.normal("timestep", (1,))[:, 0].astype(np.float64)))
        # Far out in its tail the logistic function rounds to 1, which is no timestep.
        return torch.from_numpy(np.minimum(shares_b * self.process.steps, self.process.steps - 1).astype(np.int64))

    def captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """{"tokens" int64 [b, text_context], "lengths" int64 [b]}, keywords of `NoisedClip.encode_text`."""
        tokens, lengths = clip_tokens(captions, self.config.model.text_context)
        return {"tokens": torch.from_numpy(tokens.astype(np.int64)), "lengths": torch.from_numpy(lengths)}

    def directions(self, parts: Mapping[str, nn.Module], batch: Batch) -> Directions:
        """Of the noised images and of their captions."""
        model = parts[PART]
        assert isinstance(model, NoisedClip)
        noised = self.process.q_sample(batch["images"], batch["timesteps"], batch["noise"])
        images_bE = model.encode_image(noised, batch["timesteps"])
        return unit(images_bE), unit(model.encode_text(batch["tokens"], batch["lengths"]))

    def _loss(self, parts: Mapping[str, nn.Module], batch: Batch, draws: Draws) -> Losses:
        """The loss inside the batch at hand, for evaluation: smaller batches are easier."""
        losses = pair_losses(*self.directions(parts, batch), self.config.logit_scale)
        return {**losses, "timesteps": batch["timesteps"]}

    def _by_quartile(self, values: Mapping[str, Tensor], accepted: bool) -> Mapping[str, float]:
        quartiles = losses_by_quartile(values["timesteps"], values["total"], self.process.steps)
        return {f"loss/{name}": value for name, value in quartiles.items()}

    def conditions(self, prompts: Sequence[str], given: Given) -> Batch:
        if given.image is None:
            raise UserError(
                "a noised CLIP", "a model that draws", "one that compares pictures", "name another checkpoint"
            )
        return {"images": reduced(given.image, self.config.model.image_size), **self.captions(prompts)}

    def sample(
        self,
        parts: Mapping[str, nn.Module],
        conditions: Batch,
        draws: Draws,
        settings: SamplingSettings,
        gradient: Gradient | None = None,
        watch: Watch | None = None,
    ) -> Pixels:
        """For each caption the picture of `conditions` that fits it best, without noise: a grid to look at."""
        batch = dict(on_device(conditions, next(parts[PART].parameters()).device))
        batch |= {"timesteps": torch.zeros_like(batch["lengths"]), "noise": torch.zeros_like(batch["images"])}
        with torch.no_grad():
            images_bE, captions_bE = self.directions(parts, batch)
        return to_pixels(batch["images"][(captions_bE @ images_bE.T).argmax(dim=1)])
