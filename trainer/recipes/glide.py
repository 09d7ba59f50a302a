"""What the GLIDE base model and upsampler share: settings, captions, the hybrid loss, guided sampling.

Always holds: every random number comes from `draws`, so a sample's loss and picture depend on its position alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.config import Settings
from data_pipeline.draws import Draws
from data_pipeline.errors import UsageError
from data_pipeline.tokenizer import encode_batch, mask_of
from trainer.config import SamplingSettings, TrainConfig
from trainer.diffusion.gaussian import Diffusion
from trainer.diffusion.losses import hybrid_loss
from trainer.diffusion.respacing import spaced_timesteps
from trainer.diffusion.samplers import ancestral_sample, ddim_sample, guided
from trainer.models.config import GlideModelConfig
from trainer.models.glide import Glide
from trainer.recipes.recipe import Batch, Losses, Pixels, on_device

STORED_SIDE = {"glide_base": 64, "glide_upsampler": 256}  # pixels of the dataset's columns


class DiffusionSettings(Settings):
    """The noising process that is trained."""

    schedule: Literal["cosine", "linear"] = "cosine"
    steps: Annotated[int, Field(gt=1)] = 1000


class GlideConfig(TrainConfig):
    """A GLIDE base model or upsampler, as `model.low_resolution` says."""

    model: GlideModelConfig
    diffusion: DiffusionSettings = DiffusionSettings()
    activation_checkpointing: bool = (
        False  # recompute blocks in the backward pass: less memory, a third more arithmetic
    )
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0  # chance of an empty caption; 1: a text-free model

    @model_validator(mode="after")
    def _fits_recipe(self) -> GlideConfig:
        upsampler, largest = self.recipe == "glide_upsampler", STORED_SIDE[self.recipe]
        if upsampler != (self.model.low_resolution is not None):
            raise ValueError(f"model.low_resolution for glide_upsampler only, found {self.model.low_resolution}")
        if self.model.image_size > largest:
            raise ValueError(f"model.image_size of at most the stored {largest}, found {self.model.image_size}")
        if upsampler and self.samples.prompts:
            raise ValueError("no samples.prompts: an upsampler starts from pictures, its grid shows held-out rows")
        spaced_timesteps(self.diffusion.steps, self.samples.sampling.spacing)
        return self

    def for_evaluation(self) -> GlideConfig:
        # A text-free model is judged as it was trained: without captions.
        kept = 1.0 if self.caption_dropout == 1.0 else 0.0
        return self.model_copy(update={"dropout": 0.0, "caption_dropout": kept})


def to_model_range(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [b, H, W, 3] -> float32 [b, 3, H, W] in [-1, 1], as the release scales pixels."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0)


def to_pixels(images: Tensor) -> Pixels:
    """float [b, 3, H, W] in [-1, 1] -> uint8 [b, H, W, 3], rounded as in the release's two-stage sampling."""
    scaled = ((images.float() + 1.0) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def caption_tensors(tokens: NDArray[np.uint16], n_tokens: NDArray[np.integer], context: int) -> dict[str, Tensor]:
    """The network's caption keywords from a dataset's token columns; captions longer than `context` are cut."""
    return {
        "tokens": torch.from_numpy(tokens[:, :context].astype(np.int64)),
        "mask": torch.from_numpy(mask_of(n_tokens, context)),
    }


def build_glide(config: GlideConfig) -> Glide:
    """The network of a configuration, with its own initialisation."""
    model = Glide(config.model, config.dropout)
    model.activation_checkpointing = config.activation_checkpointing
    return model


class GlideDiffusion:
    """Captions, noise, loss and sampling of a GLIDE recipe. Batch keys that end in a shape are network keywords."""

    def __init__(self, config: GlideConfig) -> None:
        self.config = config
        self.process = Diffusion.from_schedule(config.diffusion.schedule, config.diffusion.steps)

    def captions(self, tokens: NDArray[np.uint16], n_tokens: NDArray[np.integer], draws: Draws) -> dict[str, Tensor]:
        """Caption tensors for training: with probability `caption_dropout` a caption is the empty one."""
        dropped = draws.uniform("caption dropout") < self.config.caption_dropout
        return caption_tensors(tokens, np.where(dropped, 0, n_tokens), self.config.model.text_context)

    def prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Caption tensors for sampling."""
        return caption_tensors(*encode_batch(prompts), self.config.model.text_context)

    def noising(self, draws: Draws) -> dict[str, Tensor]:
        """{"timesteps" int64 [b], uniform; "noise" float32 [b, 3, H, W]}."""
        size = self.config.model.image_size
        timesteps = (draws.uniform("timestep") * self.process.steps).astype(np.int64)
        return {
            "timesteps": torch.from_numpy(timesteps),
            "noise": torch.from_numpy(draws.normal("noise", (3, size, size))),
        }

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        """Hybrid loss per sample: noise error and variational bound (improved DDPM, equation 16)."""
        timesteps, noise = batch["timesteps"], batch["noise"]
        noised = self.process.q_sample(batch["images"], timesteps, noise)
        return hybrid_loss(
            self.process,
            model(noised, timesteps, **_keywords(batch)),
            x_start_BCHW=batch["images"],
            x_BCHW=noised,
            noise_BCHW=noise,
            timesteps_B=timesteps,
        )

    def sample(self, model: Glide, conditions: Batch, draws: Draws, settings: SamplingSettings) -> Pixels:
        """From noise to pixels, guided away from the empty caption."""
        size = self.config.model.image_size
        try:
            process = self.process.respaced(settings.spacing)
        except ValueError as error:
            raise UsageError("sampling spacing", "steps such as 50 or 10,10,3,2,2", str(error), "correct it") from None
        device = next(model.parameters()).device
        conditions = on_device(conditions, device)

        def noise(step: int | Literal["start"]) -> Tensor:
            purpose = step if step == "start" else f"step {step}"
            return torch.from_numpy(draws.normal(purpose, (3, size, size))).to(device)

        start = noise("start") * settings.noise_temperature

        with torch.no_grad():
            captioned = self._encoded(model, conditions)
            empty = self._encoded(model, {**conditions, "mask": torch.zeros_like(conditions["mask"])})
            denoise = guided(model.denoise, settings.guidance_scale, captioned, empty)
            if settings.sampler == "ddim":
                return to_pixels(ddim_sample(denoise, process, start))
            return to_pixels(ancestral_sample(denoise, process, start, noise))

    def _encoded(self, model: Glide, conditions: Batch) -> dict[str, Tensor]:
        """The conditions with the caption encoded once for all steps."""
        keywords = _keywords(conditions)
        text = model.encode_text(keywords.pop("tokens"), keywords.pop("mask"))
        return {**keywords, **text._asdict()}


def _keywords(batch: Batch) -> dict[str, Tensor]:
    """What of a batch the network takes: captions, and for an upsampler the low resolution."""
    return {name: batch[name] for name in ("tokens", "mask", "low_res") if name in batch}
