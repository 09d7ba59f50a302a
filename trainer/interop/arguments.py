"""The release's constructor arguments, and the networks of ours that they mean.

Always holds: both directions are pure; an argument that would make another computation than ours is refused by name,
never ignored. Called by `openai` (reading) and `export` (writing).

The names are those of the public code's `create_model` (glide-text2im, model_creation.py) and of its CLIP's
config.yaml; the defaults are those with which the released files were made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import field_validator, model_validator

from data_pipeline.config import Settings, parse
from data_pipeline.errors import UsageError
from trainer.models.config import GlideModelConfig
from trainer.models.noised_clip import NoisedClipConfig

Kind = Literal["base", "upsample", "base-inpaint", "upsample-inpaint", "clip"]
KINDS: tuple[Kind, ...] = get_args(Kind)

UPSCALING = 4  # the release's upsamplers enlarge by it; the network itself takes any smaller image
USUAL_CHANNEL_MULT = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}  # by image_size
SCHEDULES: dict[str, Literal["cosine", "linear"]] = {"squaredcos_cap_v2": "cosine", "linear": "linear"}
# The public code computes in one way only where ours has a choice.
PUBLIC_NORM_GROUPS = 32
PUBLIC_LOGIT_SCALE = 100.0


class GlideArguments(Settings):
    """What builds a U-Net of the release, with the defaults of its base model."""

    image_size: int = 64
    num_channels: int = 192
    num_res_blocks: int = 3
    channel_mult: tuple[int, ...] = ()  # empty: the usual one of that image size
    num_heads: int = 1  # without effect beside num_head_channels
    num_head_channels: int = 64
    num_heads_upsample: int = -1  # without effect in the release
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    dropout: float = 0.1
    text_ctx: int = 128
    xf_width: int = 512
    xf_layers: int = 16
    xf_heads: int = 8
    xf_final_ln: Literal[True] = True
    xf_padding: Literal[True] = True
    xf_ar: Literal[0] = 0
    share_unemb: Literal[False] = False
    use_scale_shift_norm: Literal[True] = True
    resblock_updown: Literal[True] = True
    use_checkpoint: bool = False  # accepted and never read in the release
    use_fp16: bool = True  # how the release computes; weights become float32 here
    cache_text_emb: bool = False  # how the release samples; ours always encodes a caption once
    inpaint: bool = False
    super_res: bool = False
    diffusion_steps: int = 1000
    noise_schedule: Literal["squaredcos_cap_v2", "linear"] = "squaredcos_cap_v2"
    timestep_respacing: str = ""  # of the release's sampler; ours has settings of its own

    @field_validator("channel_mult", "attention_resolutions", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> GlideArguments:
        if not self.channel_mult and self.image_size not in USUAL_CHANNEL_MULT:
            raise ValueError(f"channel_mult (image_size is none of {list(USUAL_CHANNEL_MULT)}), found none")
        if self.num_head_channels < 1:
            raise ValueError(f"num_head_channels above 0 (the released form), found {self.num_head_channels}")
        if any(resolution < 1 for resolution in self.attention_resolutions):
            raise ValueError(f"attention_resolutions above 0, found {list(self.attention_resolutions)}")
        return self

    def model(self) -> GlideModelConfig:
        """Our configuration of the same network."""
        channel_mult = self.channel_mult or USUAL_CHANNEL_MULT[self.image_size]
        # As the release reads them: as halvings of the image; one that no level has is without effect.
        halvings = {self.image_size // resolution for resolution in self.attention_resolutions}
        levels = [2**level for level in range(len(channel_mult))]
        values = {
            "image_size": self.image_size,
            "channels": self.num_channels,
            "res_blocks": self.num_res_blocks,
            "channel_mult": channel_mult,
            "attention_resolutions": [self.image_size // halving for halving in levels if halving in halvings],
            "head_channels": self.num_head_channels,
            "text_context": self.text_ctx,
            "text_width": self.xf_width,
            "text_layers": self.xf_layers,
            "text_heads": self.xf_heads,
            "low_resolution": max(1, self.image_size // UPSCALING) if self.super_res else None,
            "inpaint": self.inpaint,
        }
        return parse(GlideModelConfig, values, "release arguments, as our model")


class ClipArguments(Settings):
    """What builds the release's noised CLIP, with its values."""

    logit_scale: float = PUBLIC_LOGIT_SCALE
    beta_schedule: Literal["squaredcos_cap_v2", "linear"] = "squaredcos_cap_v2"
    n_timesteps: int = 1000
    image_size: int = 64
    patch_size: int = 4
    n_vocab: int = 65536
    max_text_len: int = 77
    n_embd: int = 512
    n_head_state_text: int = 64
    n_head_text: int = 8
    n_xf_blocks_text: int = 12
    n_head_state_image: int = 64
    n_head_image: int = 12
    n_xf_blocks_image: int = 12

    def model(self) -> NoisedClipConfig:
        """Our configuration of the same network."""
        values = {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "embedding": self.n_embd,
            "image_layers": self.n_xf_blocks_image,
            "image_heads": self.n_head_image,
            "image_head_channels": self.n_head_state_image,
            "text_layers": self.n_xf_blocks_text,
            "text_heads": self.n_head_text,
            "text_head_channels": self.n_head_state_text,
            "text_context": self.max_text_len,
            "vocabulary": self.n_vocab,
            "timesteps": self.n_timesteps,
        }
        return parse(NoisedClipConfig, values, "release arguments, as our model")


def known_kind(kind: str) -> Kind:
    """`kind`, if the release has it. Raises UsageError."""
    for known in KINDS:
        if kind == known:
            return known
    raise UsageError("kind", f"one of {', '.join(KINDS)}", repr(kind), "correct it")


def read_arguments(kind: str, arguments: Mapping[str, Any]) -> GlideArguments | ClipArguments:
    """The arguments of a release; those left out are the released file's of that kind.

    Raises UsageError naming the first that is unknown, impossible or of another computation, and for `inpaint` or
    `super_res` that say another kind.
    """
    kind = known_kind(kind)
    source = f"release arguments of {kind}"
    if kind == "clip":
        return parse(ClipArguments, dict(arguments), source)
    flags = {"inpaint": kind.endswith("-inpaint"), "super_res": kind.startswith("upsample")}
    for name, expected in flags.items():
        if arguments.get(name, expected) is not expected:
            raise UsageError(f"{source}: {name}", str(expected), repr(arguments[name]), "correct it, or the kind")
    upsampling = {"image_size": 256, "num_res_blocks": 2, "noise_schedule": "linear"} if flags["super_res"] else {}
    return parse(GlideArguments, {**upsampling, **flags, **arguments}, source)


def kind_of(model: GlideModelConfig | NoisedClipConfig) -> Kind:
    """The release's name for a network of this kind."""
    if isinstance(model, NoisedClipConfig):
        return "clip"
    upsampler = model.low_resolution is not None
    if model.inpaint:
        return "upsample-inpaint" if upsampler else "base-inpaint"
    return "upsample" if upsampler else "base"


def glide_arguments(model: GlideModelConfig, dropout: float, schedule: str, steps: int) -> dict[str, Any]:
    """The public code's arguments for one of our U-Nets, all of them, in its own form.

    Raises ValueError saying why, for a network that the public code cannot compute.
    """
    for name, ours, theirs in (
        ("norm_groups", model.norm_groups, PUBLIC_NORM_GROUPS),
        ("learned_variance", model.learned_variance, True),
        ("low_res_level", model.low_res_level, False),
    ):
        if ours != theirs:
            raise ValueError(f"model.{name} is {ours}, and the public code has {theirs} always")
    usual = USUAL_CHANNEL_MULT.get(model.image_size) == model.channel_mult
    if not usual and 2 ** (len(model.channel_mult) + 2) != model.image_size:
        raise ValueError(
            f"model.image_size is {model.image_size} with {len(model.channel_mult)} levels, and the public code takes "
            "only as many levels as lead to 8 px"
        )
    theirs_of = {ours: theirs for theirs, ours in SCHEDULES.items()}
    if schedule not in theirs_of:
        raise ValueError(f"diffusion.schedule is {schedule}, and the public code has only {', '.join(theirs_of)}")
    return {
        "image_size": model.image_size,
        "num_channels": model.channels,
        "num_res_blocks": model.res_blocks,
        "channel_mult": "" if usual else ",".join(map(str, model.channel_mult)),
        "num_heads": 1,
        "num_head_channels": model.head_channels,
        "num_heads_upsample": -1,
        # Its parser takes no empty list; a resolution that no level has stands for none.
        "attention_resolutions": ",".join(map(str, model.attention_resolutions)) or str(2 * model.image_size),
        "dropout": dropout,
        "text_ctx": model.text_context,
        "xf_width": model.text_width,
        "xf_layers": model.text_layers,
        "xf_heads": model.text_heads,
        "xf_final_ln": True,
        "xf_padding": True,
        "diffusion_steps": steps,
        "noise_schedule": theirs_of[schedule],
        "timestep_respacing": "",
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "use_fp16": False,
        "cache_text_emb": False,
        "inpaint": model.inpaint,
        "super_res": model.low_resolution is not None,
    }


def clip_arguments(model: NoisedClipConfig, logit_scale: float, schedule: str) -> dict[str, Any]:
    """The public code's config.yaml for one of our noised CLIPs. Raises ValueError for what it has not."""
    theirs_of = {ours: theirs for theirs, ours in SCHEDULES.items()}
    if schedule not in theirs_of:
        raise ValueError(f"diffusion.schedule is {schedule}, and the public code has only {', '.join(theirs_of)}")
    if model.text_layers == 0:
        raise ValueError("model.text_layers is 0, and the public code reads captions with a transformer")
    return {
        "logit_scale": logit_scale,
        "beta_schedule": theirs_of[schedule],
        "n_timesteps": model.timesteps,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "n_vocab": model.vocabulary,
        "max_text_len": model.text_context,
        "n_embd": model.embedding,
        "n_head_state_text": model.text_head_channels,
        "n_head_text": model.text_heads,
        "n_xf_blocks_text": model.text_layers,
        "n_head_state_image": model.image_head_channels,
        "n_head_image": model.image_heads,
        "n_xf_blocks_image": model.image_layers,
    }
