"""What the GLIDE recipes share: settings, captions, the diffusion loss, conditions, guided sampling.

Always holds: every random number comes from `draws`, so a sample's loss and picture depend on its position alone (and,
with loss-aware timesteps, on the losses observed before).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.config import Settings
from data_pipeline.draws import Draws
from data_pipeline.errors import UserError
from data_pipeline.images import area_resize
from data_pipeline.loader import Rows
from data_pipeline.tokenizer import encode_batch, mask_of
from trainer.config import SamplingSettings, TrainConfig
from trainer.diffusion.editing import pinned, sdedit_start
from trainer.diffusion.gaussian import Diffusion, Prediction, Variance
from trainer.diffusion.guidance import guided
from trainer.diffusion.likelihood import bits_per_dimension
from trainer.diffusion.losses import Objective, check_objective, diffusion_loss, term_names
from trainer.diffusion.respacing import spaced_timesteps
from trainer.diffusion.samplers import sample
from trainer.diffusion.schedules import BetaSchedule
from trainer.diffusion.steps import Denoise, Gradient, StepOptions
from trainer.diffusion.timesteps import LossSecondMoment, TimestepLaw, losses_by_quartile, timestep_sampler
from trainer.models.config import GlideModelConfig
from trainer.models.glide import Glide
from trainer.recipes.recipe import (
    Batch,
    Given,
    HostState,
    Losses,
    Part,
    Phase,
    Pixels,
    Recipe,
    StateDict,
    Watch,
    on_device,
)

STORED_SIDE = {"base": 64, "upsampler": 256}  # pixels of the dataset's columns, by part


# What shapes do not show, and weights were trained for.
ALIKE = (
    *(f"model.{name}" for name in ("head_channels", "norm_groups", "text_heads")),
    *(f"diffusion.{name}" for name in ("schedule", "steps", "prediction", "variance")),
)


class ProcessSettings(Settings):
    """The noising process."""

    schedule: BetaSchedule = "cosine"
    steps: Annotated[int, Field(gt=1)] = 1000


class DiffusionSettings(ProcessSettings):
    """The process that is trained, what of it the network says, and the loss. The defaults are GLIDE's."""

    prediction: Prediction = "eps"
    variance: Variance = "learned"
    objective: Objective = "hybrid"
    timesteps: TimestepLaw = "uniform"

    @model_validator(mode="after")
    def _fits(self) -> DiffusionSettings:
        check_objective(self.objective, self.variance)
        return self


class GlideConfig(TrainConfig):
    """A GLIDE base model or upsampler, as `model.low_resolution` says."""

    part: ClassVar[Literal["base", "upsampler"]]
    inpaint: ClassVar[bool] = False

    model: GlideModelConfig
    diffusion: DiffusionSettings = DiffusionSettings()
    activation_checkpointing: bool = (
        False  # recompute blocks in the backward pass: less memory, a third more arithmetic
    )
    compile: bool = False  # torch.compile, block by block
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0  # chance of an empty caption; 1: a text-free model

    @model_validator(mode="after")
    def _fits_recipe(self) -> GlideConfig:
        upsampler, largest = self.part == "upsampler", STORED_SIDE[self.part]
        if upsampler != (self.model.low_resolution is not None):
            raise ValueError(f"model.low_resolution for upsamplers only, found {self.model.low_resolution}")
        if self.model.inpaint != self.inpaint:
            raise ValueError(f"model.inpaint {str(self.inpaint).lower()} for {self.recipe}, found {self.model.inpaint}")
        if self.model.image_size > largest:
            raise ValueError(f"model.image_size of at most the stored {largest}, found {self.model.image_size}")
        if self.model.learned_variance != (self.diffusion.variance == "learned"):
            found = f"{self.diffusion.variance} with {str(self.model.learned_variance).lower()}"
            raise ValueError(f"diffusion.variance learned if model.learned_variance, found {found}")
        if self.compile and self.zero.stage == 3:
            raise ValueError(
                "compile with zero.stage 0 to 2, found 3, which moves parameters behind the compiler's back"
            )
        if (upsampler or self.inpaint) and self.samples.prompts:
            raise ValueError("no samples.prompts: this recipe starts from pictures, its grid shows held-out rows")
        if self.samples.sampling.strength < 1:
            raise ValueError("samples.sampling.strength 1: a grid starts from noise, found less")
        if self.samples.sampling.low_res_level and not self.model.low_res_level:
            raise ValueError("samples.sampling.low_res_level 0 without model.low_res_level, found more")
        spaced_timesteps(self.diffusion.steps, self.samples.sampling.spacing)
        return self

    def for_evaluation(self) -> GlideConfig:
        # A text-free model is judged as it was trained: without captions.
        kept = 1.0 if self.caption_dropout == 1.0 else 0.0
        uniform = self.diffusion.model_copy(update={"timesteps": "uniform"})
        training_only = {"dropout": 0.0, "activation_checkpointing": False, "compile": False}
        return self.model_copy(update={**training_only, "caption_dropout": kept, "diffusion": uniform})


def to_model_range(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [b, H, W, 3] -> float32 [b, 3, H, W] in [-1, 1], as the release scales pixels."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0)


def to_pixels(images: Tensor) -> Pixels:
    """float [b, 3, H, W] in [-1, 1] -> uint8 [b, H, W, 3], rounded as in the release's two-stage sampling."""
    scaled = ((images.float() + 1.0) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def reduced(images: Sequence[Pixels] | Pixels, side: int) -> Tensor:
    """Square pictures as float32 [b, 3, side, side] in [-1, 1], by the versioned area filter, which leaves pictures
    of that side as they are. Raises UserError for one that is not square or is smaller."""
    for image in images:
        height, width = image.shape[:2]
        if height != width or height < side:
            raise UserError("picture", f"a square of at least {side} px", f"{width} x {height}", "crop or enlarge it")
    return to_model_range(np.stack([area_resize(image, side) for image in images]))


def reduced_masks(masks: NDArray[np.bool_], images: Pixels, side: int) -> Tensor:
    """Masks bool [b, h, w], True where the picture of the same size is known, as float32 [b, 1, side, side]: a pixel is
    known where all that it is averaged from is. Raises UserError for a mask of another size."""
    if masks.shape != images.shape[:3]:
        expected, found = ("{} x {}".format(*sides.shape[2:0:-1]) for sides in (images, masks))
        raise UserError("mask", f"the picture's size, {expected}", found, "give a mask of the picture's size")
    shares = [cv2.resize(mask.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA) for mask in masks]
    return torch.from_numpy((np.stack(shares) > 1 - 1e-6).astype(np.float32)[:, None])


def caption_tensors(tokens: NDArray[np.uint16], n_tokens: NDArray[np.integer], context: int) -> dict[str, Tensor]:
    """The network's caption keywords from token columns, cut or padded to `context`; what pads is masked."""
    cut = tokens[:, :context].astype(np.int64)
    return {
        "tokens": torch.from_numpy(np.pad(cut, ((0, 0), (0, context - cut.shape[1])))),
        "mask": torch.from_numpy(mask_of(n_tokens, context)),
    }


class GlideRecipe(Recipe):
    """See Recipe. One part, `config.part`. Batch: "images" in [-1, 1], "noise", "uniforms" (for timesteps), and the
    network's keywords by their names."""

    def __init__(self, config: GlideConfig) -> None:
        self.config = config
        settings = config.diffusion
        self.process = Diffusion.from_schedule(
            settings.schedule, settings.steps, settings.prediction, settings.variance
        )
        self.timesteps = timestep_sampler(settings.timesteps, settings.steps)

    def parts(self) -> dict[str, Part]:
        part = Part(
            self._build, start=self.config.parent, adapt=self.adapt, fresh=("low_res_level_embed.",), alike=ALIKE
        )
        return {self.config.part: part}

    def _build(self) -> Glide:
        model = Glide(self.config.model, self.config.dropout)
        model.activation_checkpointing = self.config.activation_checkpointing
        if self.config.compile:
            model.compile_regions()
        return model

    def adapt(self, parent: StateDict) -> StateDict:
        """The parent's weights as this recipe's network takes them."""
        return parent

    def phases(self) -> tuple[Phase, ...]:
        terms = term_names(self.config.diffusion.objective)
        return (Phase(self.config.part, terms, self.loss, ("timesteps", "weights"), self.observe),)

    def state(self) -> HostState | None:
        return self.timesteps if isinstance(self.timesteps, LossSecondMoment) else None

    def prepare(self, rows: Rows, draws: Draws) -> Batch:
        pictures = self.pictures(rows, draws)
        captions = self.captions(rows["tokens"], rows["n_tokens"], draws)
        return {**pictures, **captions, **self.noising(draws), **self.known(pictures["images"], draws)}

    def pictures(self, rows: Rows, draws: Draws) -> dict[str, Tensor]:
        """ "images" [b, 3, H, W], and for an upsampler what it enlarges."""
        raise NotImplementedError

    def known(self, images: Tensor, draws: Draws) -> dict[str, Tensor]:
        """What an inpainting network is shown of the pictures."""
        return {}

    def captions(self, tokens: NDArray[np.uint16], n_tokens: NDArray[np.integer], draws: Draws) -> dict[str, Tensor]:
        """Caption tensors for training: with probability `caption_dropout` a caption is the empty one."""
        dropped = draws.uniform("caption dropout") < self.config.caption_dropout
        return caption_tensors(tokens, np.where(dropped, 0, n_tokens), self.config.model.text_context)

    def noising(self, draws: Draws) -> dict[str, Tensor]:
        """{"uniforms" float64 [b], from which timesteps are drawn; "noise" float32 [b, 3, H, W]}."""
        size = self.config.model.image_size
        return {
            "uniforms": torch.from_numpy(draws.uniform("timestep")),
            "noise": torch.from_numpy(draws.normal("noise", (3, size, size))),
        }

    def loss(self, parts: Mapping[str, nn.Module], batch: Batch, draws: Draws) -> Losses:
        """The objective's terms per sample, weighted for timesteps that are drawn unevenly."""
        # Here and not in `prepare`, which runs ahead of the newest losses.
        timesteps, weights = self.timesteps.draw(batch["uniforms"])
        images, noise = batch["images"], batch["noise"]
        noised = self.process.q_sample(images, timesteps, noise)
        terms = diffusion_loss(
            self.process,
            parts[self.config.part](noised, timesteps, **keywords(batch)),
            objective=self.config.diffusion.objective,
            x_start_BCHW=images,
            x_BCHW=noised,
            noise_BCHW=noise,
            timesteps_B=timesteps,
        )
        weighted = {name: term * weights for name, term in terms.items()}
        return {**weighted, "timesteps": timesteps, "weights": weights}

    def observe(self, values: Mapping[str, Tensor], accepted: bool) -> Mapping[str, float]:
        """The loss by timestep quartile; what loss-aware timesteps learn from."""
        timesteps, losses = values["timesteps"].long(), values["total"] / values["weights"]
        if accepted:
            self.timesteps.observe(timesteps, losses)
        quartiles = losses_by_quartile(timesteps, losses, self.process.steps)
        return {f"loss/{name}": value for name, value in quartiles.items()}

    def bits_per_dimension(self, parts: Mapping[str, nn.Module], batch: Batch, draws: Draws) -> Tensor:
        model = parts[self.config.part]
        assert isinstance(model, Glide)
        images = batch["images"]

        def noise(step: int) -> Tensor:
            return torch.from_numpy(draws.normal(f"bound {step}", tuple(images.shape[1:]))).to(images.device)

        denoise = partial(model.denoise, **self._encoded(model, batch))
        return bits_per_dimension(denoise, self.process, images, noise).total_B

    def conditions(self, prompts: Sequence[str], given: Given) -> Batch:
        side, low = self.config.model.image_size, self.config.model.low_resolution
        context = self.config.model.text_context
        conditions = caption_tensors(*encode_batch(prompts, context), context)
        if low is not None:
            if given.low_res is None:
                raise ValueError("an upsampler needs the pictures to enlarge")
            conditions["low_res"] = reduced(given.low_res, low)
        if given.image is not None:
            conditions["inpaint_image"] = reduced(given.image, side)
            if given.mask is not None:
                conditions["inpaint_mask"] = reduced_masks(given.mask, given.image, side)
        return conditions

    def sample_conditions(self, conditions: Batch, draws: Draws, settings: SamplingSettings) -> Batch:
        """What sampling does to the conditions first, by its settings."""
        return conditions

    def sample(
        self,
        parts: Mapping[str, nn.Module],
        conditions: Batch,
        draws: Draws,
        settings: SamplingSettings,
        gradient: Gradient | None = None,
        watch: Watch | None = None,
    ) -> Pixels:
        """From noise, or from a given picture, to pixels, guided away from the empty caption. Known pixels stay."""
        model = parts[self.config.part]
        assert isinstance(model, Glide)
        process, size = respaced(self.process, settings.spacing), self.config.model.image_size
        device = next(model.parameters()).device
        conditions = on_device(self.sample_conditions(conditions, draws, settings), device)

        def noise(step: int | Literal["start"]) -> Tensor:
            purpose = step if step == "start" else f"step {step}"
            return torch.from_numpy(draws.normal(purpose, (3, size, size))).to(device)

        start, index = noise("start") * settings.noise_temperature, None
        if settings.strength < 1:
            if "inpaint_image" not in conditions:
                raise UserError(
                    "strength", "1 without a picture to start from", f"{settings.strength}", "give a picture"
                )
            start, index = sdedit_start(process, conditions["inpaint_image"], settings.strength, start)
        pin = (
            pinned(conditions["inpaint_image"], known)
            if (known := conditions.get("inpaint_mask")) is not None
            else None
        )
        options = StepOptions(settings.clip, settings.clip_percentile, pin, gradient)
        with torch.no_grad():
            denoise = self._guided(model, conditions, settings.guidance_scale)
            drawn = sample(
                settings.sampler,
                denoise,
                process,
                start,
                noise,
                eta=settings.eta,
                start_index=index,
                options=options,
                watch=watch,
            )
        return to_pixels(pin(drawn) if pin else drawn)

    def _guided(self, model: Glide, conditions: Batch, scale: float) -> Denoise:
        captioned = self._encoded(model, conditions)
        if scale == 1:
            return partial(model.denoise, **captioned)
        empty = self._encoded(model, {**conditions, "mask": torch.zeros_like(conditions["mask"])})
        return guided(model.denoise, scale, captioned, empty)

    def _encoded(self, model: Glide, conditions: Batch) -> dict[str, Tensor]:
        """The conditions with the caption encoded once for all steps; without pictures to start from, which only an
        inpainting network reads."""
        taken = keywords(conditions)
        if not self.config.model.inpaint:
            taken = {name: tensor for name, tensor in taken.items() if not name.startswith("inpaint_")}
        text = model.encode_text(taken.pop("tokens"), taken.pop("mask"))
        return {**taken, **text._asdict()}


def respaced(process: Diffusion, spacing: str) -> Diffusion:
    """The process over fewer timesteps. Raises UserError for a spacing that it does not have."""
    try:
        return process.respaced(spacing)
    except ValueError as error:
        raise UserError("sampling spacing", "steps such as 50 or 10,10,3,2,2", str(error), "correct it") from None


KEYWORDS = ("tokens", "mask", "low_res", "low_res_level", "inpaint_image", "inpaint_mask")


def keywords(batch: Batch) -> dict[str, Any]:
    """What of a batch the network takes."""
    return {name: batch[name] for name in KEYWORDS if name in batch}
