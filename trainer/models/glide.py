"""GLIDE: a caption encoder and the U-Net it conditions, as base model or as upsampler.

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

from trainer.models.config import VOCABULARY, GlideModelConfig
from trainer.models.layers import LayerNorm32, timestep_embedding
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
    """Predicts noise and variance of a noised image from its caption.

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
        x_BCHW: Tensor,
        timesteps_B: Tensor,
        *,
        tokens: Tensor,
        mask: Tensor,
        low_res: Tensor | None = None,
    ) -> Tensor:
        """Noise (channels 0..2) and variance position (channels 3..5) at `x_BCHW`: [B, 6, H, W] float32.

        `x_BCHW` [B, 3, image_size, image_size] in [-1, 1] plus noise; `timesteps_B` on the original scale of training,
        0..999, also under a respaced sampler; `tokens` int64 and `mask` bool [B, text_context], True where a
        token counts (an empty caption is all False); `low_res` [B, 3, low_resolution, low_resolution] in [-1, 1],
        for upsamplers. Captions of another length are the caller's to cut or pad.
        """
        text = self.encode_text(tokens, mask)
        return self.denoise(x_BCHW, timesteps_B, low_res=low_res, **text._asdict())

    def encode_text(self, tokens: Tensor, mask: Tensor) -> EncodedText:
        """The caption as the U-Net sees it; a sampler computes it once for all its steps.

        Tokens where `mask` is False do not matter: the padding embedding of their position stands in for them. The
        projection reads the last position, for a short caption a padding position, as the release does.
        """
        length = self.config.text_context
        assert tokens.shape[1] == length, f"captions of {length} tokens expected, found {tokens.shape[1]}"
        embedded_BLD = self.token_embedding(tokens) + self.positional_embedding
        x_BLD = torch.where(mask[..., None], embedded_BLD, self.padding_embedding)
        for block in self.transformer.resblocks:
            x_BLD = self._run(block, x_BLD)
        context_BLD = self.final_ln(x_BLD)
        return EncodedText(self.transformer_proj(context_BLD[:, -1]), context_BLD)

    def denoise(
        self,
        x_BCHW: Tensor,
        timesteps_B: Tensor,
        *,
        projection_BE: Tensor,
        context_BLD: Tensor,
        low_res: Tensor | None = None,
    ) -> Tensor:
        """`forward` for an encoded caption."""
        waves_BC = timestep_embedding(timesteps_B, self.config.channels)
        embedding_BE = self.time_embed(waves_BC.to(self.dtype)) + projection_BE
        h_BCHW = self._join_low_res(x_BCHW, low_res).to(self.dtype)
        skips: list[Tensor] = []
        for stage in self.input_blocks:
            h_BCHW = self._run(stage, h_BCHW, embedding_BE, context_BLD)
            skips.append(h_BCHW)
        h_BCHW = self._run(self.middle_block, h_BCHW, embedding_BE, context_BLD)
        for stage in self.output_blocks:
            h_BCHW = self._run(stage, torch.cat([h_BCHW, skips.pop()], dim=1), embedding_BE, context_BLD)
        return self.out(h_BCHW)

    def _join_low_res(self, x_BCHW: Tensor, low_res: Tensor | None) -> Tensor:
        size = self.config.low_resolution
        assert (low_res is not None) == (size is not None), "low_res is for upsamplers, and they need it"
        if low_res is None:
            return x_BCHW
        assert low_res.shape[-2:] == (size, size), f"condition of {size} px expected, found {low_res.shape}"
        # The paper says bicubic (section 2.1); the released code and weights are bilinear.
        enlarged_BCHW = F.interpolate(low_res, x_BCHW.shape[-2:], mode="bilinear", align_corners=False)
        return torch.cat([x_BCHW, enlarged_BCHW], dim=1)

    def _run(self, module: Callable[..., Tensor] | Stage, *inputs: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters of a `Glide`: `total`, `text` (encoder, embeddings and projection) and `visual` (the U-Net).

    Counts once per parameter; works on the meta device.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    text = sum(size for name, size in sizes.items() if name.startswith(TEXT_MODULES))
    total = sum(sizes.values())
    return {"total": total, "text": text, "visual": total - text}
