"""GLIDE: a caption encoder and the U-Net it conditions, as base model or as upsampler, each also for inpainting.

Always holds: state-dict keys and shapes equal OpenAI's release at the same size; the output is float32 whether the
module is float32, cast to bfloat16, or run under autocast; dropout is the only randomness.
Called by recipes (training, sampling), `plan` (on the meta device) and the importer.

Legend: B batch, C channels, H W image, L caption positions, D text width, E timestep embedding.
Source: Nichol et al. 2021 (arXiv 2112.10741), sections 2 and 4; Dhariwal & Nichol 2021 for the U-Net.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.models.config import IMAGE_CHANNELS, VOCABULARY, GlideModelConfig
from trainer.models.layers import LayerNorm32, expect_shape, timestep_embedding, zeroed
from trainer.models.text import TextTransformer
from trainer.models.unet import Stage, UNetBuilder

TEXT_MODULES = (
    "transformer.",
    "final_ln.",
    "token_embedding.",
    "positional_embedding",
    "padding_embedding",
    "transformer_proj.",
)


class EncodedText(NamedTuple):
    """What the U-Net sees of a caption; the field names are keywords of `Glide.denoise`."""

    projection_BE: Tensor
    context_BLD: Tensor


class Glide(nn.Module):
    """Predicts noise (or what the diffusion process asks for) and variance of a noised image from its caption.

    `dropout` is the probability inside residual blocks, a training setting and therefore not part of the configuration.
    """

    def __init__(self, config: GlideModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        """Recompute each stage and text block in the backward pass instead of keeping its activations."""
        embedding = 4 * config.channels

        self.transformer = TextTransformer(config.text_width, config.text_layers, config.text_heads)
        self.final_ln = LayerNorm32(config.text_width)
        self.token_embedding = nn.Embedding(VOCABULARY, config.text_width)
        self.positional_embedding = nn.Parameter(torch.empty(config.text_context, config.text_width))
        self.padding_embedding = nn.Parameter(torch.empty(config.text_context, config.text_width))
        self.transformer_proj = nn.Linear(config.text_width, embedding)
        # The release leaves these two uninitialised; 0.01 is CLIP's choice for positions. Tokens keep torch's N(0, 1),
        # which is what the release's own constructor gives them.
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.padding_embedding, std=0.01)

        unet = UNetBuilder(config, dropout)
        self.time_embed = nn.Sequential(
            nn.Linear(config.channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        if config.low_res_level:
            # Zero at first: a parent that is not told goes on as it was.
            self.low_res_level_embed = nn.Sequential(
                nn.Linear(config.channels, embedding), nn.SiLU(), zeroed(nn.Linear(embedding, embedding))
            )
        self.input_blocks = nn.ModuleList(unet.input_stages())
        self.middle_block = unet.middle_stage()
        self.output_blocks = nn.ModuleList(unet.output_stages())
        self.out = unet.head()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which activations travel outside autocast."""
        return self.token_embedding.weight.dtype

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        *,
        tokens: Tensor,
        mask: Tensor,
        low_res: Tensor | None = None,
        low_res_level: Tensor | None = None,
        inpaint_image: Tensor | None = None,
        inpaint_mask: Tensor | None = None,
    ) -> Tensor:
        """Prediction (channels 0..2) and, if learned, variance position (3..5) at `x`: [B, 3 or 6, H, W] float32.

        `x` [B, 3, H, W] in [-1, 1] plus noise, H = W = image_size in training; `timesteps` on the original scale
        of training, 0..999, also under a respaced sampler; `tokens` int64 and `mask` bool [B, text_context], True where
        a token counts (an empty caption is all False); captions of another length are the caller's to cut or pad.

        Upsamplers need `low_res` [B, 3, h, w] in [-1, 1], of the proportions of x and no larger; with
        model.low_res_level also its noise level `low_res_level` [B] in [0, 1]. Inpainting models take `inpaint_image`
        [B, 3, H, W] in [-1, 1] and `inpaint_mask` [B, 1, H, W], 1 where the image is known and 0 where
        it is erased; erased pixels do not matter. What is left out of the two is zero, as in the release: without a
        mask nothing is known. Raises ValueError for tensors of another shape, and for conditions that this model does
        not have.
        """
        text = self.encode_text(tokens, mask)
        return self.denoise(
            x,
            timesteps,
            projection_BE=text.projection_BE,
            context_BLD=text.context_BLD,
            low_res=low_res,
            low_res_level=low_res_level,
            inpaint_image=inpaint_image,
            inpaint_mask=inpaint_mask,
        )

    def encode_text(self, tokens: Tensor, mask: Tensor) -> EncodedText:
        """The caption as the U-Net sees it; a sampler computes it once for all its steps.

        Tokens where `mask` is False do not matter: the padding embedding of their position stands in for them. The
        projection reads the last position, for a short caption a padding position, as the release does.
        """
        expect_shape("tokens", tokens, (len(tokens), self.config.text_context))
        expect_shape("mask", mask, tuple(tokens.shape))
        embedded_BLD = self.token_embedding(tokens) + self.positional_embedding
        x_BLD = torch.where(mask[..., None], embedded_BLD, self.padding_embedding)
        for block in self.transformer.resblocks:
            x_BLD = self._run(block, x_BLD)
        context_BLD = self.final_ln(x_BLD)
        return EncodedText(self.transformer_proj(context_BLD[:, -1]), context_BLD)

    def denoise(
        self,
        x: Tensor,
        timesteps: Tensor,
        *,
        projection_BE: Tensor,
        context_BLD: Tensor,
        low_res: Tensor | None = None,
        low_res_level: Tensor | None = None,
        inpaint_image: Tensor | None = None,
        inpaint_mask: Tensor | None = None,
    ) -> Tensor:
        """`forward` for an encoded caption."""
        waves_BC = timestep_embedding(timesteps, self.config.channels)
        embedding_BE = self.time_embed(waves_BC.to(self.dtype)) + projection_BE
        embedding_BE = self._add_level(embedding_BE, low_res_level)
        h_BCHW = self._join(x, low_res, inpaint_image, inpaint_mask).to(self.dtype)
        if h_BCHW.device.type == "cpu":
            # A fifth faster in sampling (attention reads pixels without a copy). On a GPU torch's group norm undoes it.
            h_BCHW = h_BCHW.contiguous(memory_format=torch.channels_last)
        skips: list[Tensor] = []
        for stage in self.input_blocks:
            h_BCHW = self._run(stage, h_BCHW, embedding_BE, context_BLD)
            skips.append(h_BCHW)
        h_BCHW = self._run(self.middle_block, h_BCHW, embedding_BE, context_BLD)
        for stage in self.output_blocks:
            h_BCHW = self._run(stage, torch.cat([h_BCHW, skips.pop()], dim=1), embedding_BE, context_BLD)
        return self.out(h_BCHW)

    def _add_level(self, embedding_BE: Tensor, level_B: Tensor | None) -> Tensor:
        if self.config.low_res_level != (level_B is not None):
            expected, found = (
                ("one", "none") if level_B is None else ("none (model.low_res_level is false)", "a tensor")
            )
            raise ValueError(f"low_res_level: expected {expected}, found {found}")
        if level_B is None:
            return embedding_BE
        waves_BC = timestep_embedding(1000 * level_B, self.config.channels)
        return embedding_BE + self.low_res_level_embed(waves_BC.to(self.dtype))

    def _join(
        self, x: Tensor, low_res: Tensor | None, inpaint_image: Tensor | None, inpaint_mask: Tensor | None
    ) -> Tensor:
        """What the first convolution reads: [x, known pixels, mask, enlarged], each where this model has it."""
        divisor = 2 ** (len(self.config.channel_mult) - 1)
        fits = x.ndim == 4 and x.shape[1] == IMAGE_CHANNELS
        if not fits or x.shape[2] % divisor or x.shape[3] % divisor:
            expected = f"[B, {IMAGE_CHANNELS}, H, W] with sides divisible by {divisor}"
            raise ValueError(f"x: expected shape {expected}, found {list(x.shape)}")
        joined = [x]
        if self.config.inpaint:
            joined += known_pixels(x, inpaint_image, inpaint_mask)
        elif inpaint_image is not None or inpaint_mask is not None:
            raise ValueError("inpaint_image and inpaint_mask: expected none (model.inpaint is false), found a tensor")
        if self.config.low_resolution is not None:
            joined.append(enlarged(x, low_res, self.config.low_resolution))
        elif low_res is not None:
            raise ValueError("low_res: expected none (this is no upsampler), found a tensor")
        return torch.cat(joined, dim=1)

    def _run(self, module: Callable[..., Tensor] | Stage, *inputs: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def compile_regions(self, backend: str = "inductor") -> None:
        """Have torch compile each stage and text block on its own; the state dict's keys stay as they are.

        Regions, not the whole: equal ones share a kernel, and activation checkpointing goes on around them.
        """
        regions = [*self.input_blocks, self.middle_block, *self.output_blocks, *self.transformer.resblocks]
        # Regions of one class count as recompilations of one function; past the limit (8) the rest would stay eager.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 2 * len(regions))
        for region in regions:
            region.compile(backend=backend, dynamic=False)

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        """Made-up keywords of `forward`, of the sizes of training; `glidepath plan` counts with them."""
        size, length, low = self.config.image_size, self.config.text_context, self.config.low_resolution
        inputs = {
            "x": torch.randn(batch, IMAGE_CHANNELS, size, size),
            "timesteps": torch.randint(1000, (batch,)),
            "tokens": torch.randint(VOCABULARY, (batch, length)),
            "mask": torch.arange(length).expand(batch, -1) < length // 2,
        }
        if low is not None:
            inputs["low_res"] = torch.randn(batch, IMAGE_CHANNELS, low, low)
        if self.config.low_res_level:
            inputs["low_res_level"] = torch.rand(batch)
        if self.config.inpaint:
            inputs["inpaint_image"] = torch.randn(batch, IMAGE_CHANNELS, size, size)
            inputs["inpaint_mask"] = torch.ones(batch, 1, size, size)
        return inputs


def known_pixels(x: Tensor, image: Tensor | None, mask: Tensor | None) -> list[Tensor]:
    """[image · mask, mask] for a noised image. The product is taken here, so that erased pixels never matter."""
    batch, _, height, width = x.shape
    if image is None:
        image = torch.zeros_like(x)
    if mask is None:
        mask = torch.zeros_like(x[:, :1])
    expect_shape("inpaint_image", image, (batch, IMAGE_CHANNELS, height, width))
    expect_shape("inpaint_mask", mask, (batch, 1, height, width))
    mask = mask.to(x.dtype)
    return [image * mask, mask]


def enlarged(x: Tensor, low_res: Tensor | None, usual_side: int) -> Tensor:
    """`low_res` at the size of the noised image. The paper says bicubic (section 2.1); the released code and weights
    are bilinear."""
    batch, _, height, width = x.shape
    if low_res is None:
        raise ValueError(f"low_res: expected [{batch}, {IMAGE_CHANNELS}, {usual_side}, {usual_side}], found none")
    fits = low_res.ndim == 4 and low_res.shape[:2] == (batch, IMAGE_CHANNELS)
    if not fits or low_res.shape[2] * width != low_res.shape[3] * height or low_res.shape[3] > width:
        shape = [batch, IMAGE_CHANNELS, usual_side, usual_side]
        raise ValueError(
            f"low_res: expected shape {shape} or another of the proportions of x, {height} x {width}, and no larger, "
            f"found {list(low_res.shape)}"
        )
    return F.interpolate(low_res, (height, width), mode="bilinear", align_corners=False)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters of a `Glide`: `total`, `text` (encoder, embeddings and projection) and `visual` (the U-Net).

    Counts once per parameter; works on the meta device.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    text = sum(size for name, size in sizes.items() if name.startswith(TEXT_MODULES))
    total = sum(sizes.values())
    return {"total": total, "text": text, "visual": total - text}
