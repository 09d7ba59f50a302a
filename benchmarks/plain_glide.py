"""A plain GLIDE: the same arithmetic as `trainer.models.glide`, written the way the public code computes it.

What the benchmarks compare against. Our own writing, not the public text. Always holds: it takes the state dict of a
`Glide` of the same size, and gives the same output; attention is written out with its softmax in float32, projections
are one-dimensional convolutions, norms are computed in float32 and then activated, nothing is laid out channels-last,
the caption is encoded at every call. `PlainTrainer` has AdamW without fused or batched kernels and an EMA by a loop.

Legend: B batch, C channels, H W image, L positions, D width, E embedding, N heads, K channels per head.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.config import GlideModelConfig
from trainer.models.glide import Glide


class PlainGroupNorm(nn.GroupNorm):
    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW.float()).to(x_BCHW.dtype)


class PlainLayerNorm(nn.LayerNorm):
    def forward(self, x_BLD: Tensor) -> Tensor:
        return super().forward(x_BLD.float()).to(x_BLD.dtype)


class PlainAttentionCore(nn.Module):
    """Scores, softmax in float32, mixture: every matrix is made."""

    def forward(self, query_NKL: Tensor, key_NKS: Tensor, value_NKS: Tensor) -> Tensor:
        scale = 1 / math.sqrt(math.sqrt(query_NKL.shape[1]))
        scores_NLS = torch.einsum("nkl,nks->nls", query_NKL * scale, key_NKS * scale)
        weights_NLS = torch.softmax(scores_NLS.float(), dim=-1).to(value_NKS.dtype)
        return torch.einsum("nls,nks->nkl", weights_NLS, value_NKS)


class PlainResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, embedding: int, groups: int, resample: Callable[..., Tensor] | None):
        super().__init__()
        self.resample = resample
        norm, conv = PlainGroupNorm(groups, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.in_layers = nn.ModuleList([norm, nn.Identity(), conv])
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * c_out))
        norm, conv = PlainGroupNorm(groups, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.out_layers = nn.ModuleList([norm, nn.Identity(), nn.Identity(), conv])
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor) -> Tensor:
        h_BCHW = F.silu(self.in_layers[0](x_BCHW))
        if self.resample is not None:
            h_BCHW, x_BCHW = self.resample(h_BCHW), self.resample(x_BCHW)
        h_BCHW = self.in_layers[2](h_BCHW)
        scale_BC, shift_BC = self.emb_layers(embedding_BE).to(h_BCHW.dtype).chunk(2, dim=1)
        h_BCHW = self.out_layers[0](h_BCHW) * (1 + scale_BC[..., None, None]) + shift_BC[..., None, None]
        return self.skip_connection(x_BCHW) + self.out_layers[3](F.silu(h_BCHW))


class PlainAttentionBlock(nn.Module):
    def __init__(self, channels: int, head_channels: int, text_width: int, groups: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.norm = PlainGroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.encoder_kv = nn.Conv1d(text_width, 2 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        self.attention = PlainAttentionCore()

    def forward(self, x_BCHW: Tensor, context_BDS: Tensor) -> Tensor:
        batch, channels, *_ = x_BCHW.shape
        heads = batch * channels // self.head_channels
        qkv = self.qkv(self.norm(x_BCHW).flatten(2)).reshape(heads, 3 * self.head_channels, -1)
        query, key, value = qkv.split(self.head_channels, dim=1)
        caption = self.encoder_kv(context_BDS).reshape(heads, 2 * self.head_channels, -1)
        caption_key, caption_value = caption.split(self.head_channels, dim=1)
        mixed = self.attention(query, torch.cat([caption_key, key], -1), torch.cat([caption_value, value], -1))
        return x_BCHW + self.proj_out(mixed.reshape(batch, channels, -1)).reshape(x_BCHW.shape)


class PlainStage(nn.Sequential):
    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor, context_BDS: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, PlainResBlock):
                x_BCHW = layer(x_BCHW, embedding_BE)
            elif isinstance(layer, PlainAttentionBlock):
                x_BCHW = layer(x_BCHW, context_BDS)
            else:
                x_BCHW = layer(x_BCHW)
        return x_BCHW


class PlainTextAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_qkv, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        batch, length, width = x_BLD.shape
        channels = width // self.heads
        query, key, value = self.c_qkv(x_BLD).view(batch, length, self.heads, -1).split(channels, dim=-1)
        scale = 1 / math.sqrt(math.sqrt(channels))
        scores = torch.einsum("blnk,bsnk->bnls", query * scale, key * scale)
        weights = torch.softmax(scores.float(), dim=-1).to(value.dtype)
        return self.c_proj(torch.einsum("bnls,bsnk->blnk", weights, value).reshape(batch, length, width))


class PlainTextBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = PlainTextAttention(width, heads), PlainLayerNorm(width), PlainLayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attn(self.ln_1(x_BLD))
        return x_BLD + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x_BLD))))


class PlainText(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(PlainTextBlock(width, heads) for _ in range(layers))


class PlainGlide(nn.Module):
    """`plain(glide)` makes one with a Glide's weights."""

    def __init__(self, glide: Glide) -> None:
        super().__init__()
        config: GlideModelConfig = glide.config
        self.config = config
        self.transformer = PlainText(config.text_width, config.text_layers, config.text_heads)
        self.final_ln = PlainLayerNorm(config.text_width)
        self.token_embedding = nn.Embedding(*glide.token_embedding.weight.shape)
        self.positional_embedding = nn.Parameter(torch.empty_like(glide.positional_embedding))
        self.padding_embedding = nn.Parameter(torch.empty_like(glide.padding_embedding))
        self.transformer_proj = nn.Linear(config.text_width, 4 * config.channels)
        channels, embedding = config.channels, 4 * config.channels
        self.time_embed = nn.Sequential(nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self._make_unet(config, embedding)

    def _make_unet(self, config: GlideModelConfig, embedding: int) -> None:
        groups, widths = config.norm_groups, [config.channels * mult for mult in config.channel_mult]

        def res(c_in: int, c_out: int, resample: Callable[..., Tensor] | None = None) -> PlainResBlock:
            return PlainResBlock(c_in, c_out, embedding, groups, resample)

        def attention(level: int) -> list[nn.Module]:
            attends = config.resolutions[level] in config.attention_resolutions
            return [attend(widths[level])] if attends else []

        def attend(width: int) -> nn.Module:
            return PlainAttentionBlock(width, config.head_channels, config.text_width, groups)

        width, skips = widths[0], [widths[0]]
        self.input_blocks = nn.ModuleList([PlainStage(nn.Conv2d(config.in_channels, width, 3, padding=1))])
        for level, level_width in enumerate(widths):
            for _ in range(config.res_blocks):
                self.input_blocks.append(PlainStage(res(width, level_width), *attention(level)))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(PlainStage(res(width, width, halve)))
                skips.append(width)
        self.middle_block = PlainStage(res(width, width), attend(width), res(width, width))
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for block in range(config.res_blocks + 1):
                layers = [res(width + skips.pop(), widths[level]), *attention(level)]
                width = widths[level]
                if level and block == config.res_blocks:
                    layers.append(res(width, width, double))
                self.output_blocks.append(PlainStage(*layers))
        out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        self.out = nn.ModuleList([PlainGroupNorm(groups, width), nn.Identity(), out])

    def forward(
        self, x: Tensor, timesteps: Tensor, *, tokens: Tensor, mask: Tensor, low_res: Tensor | None = None
    ) -> Tensor:
        embedded_BLD = self.token_embedding(tokens.long()) + self.positional_embedding[None]
        h_BLD = torch.where(mask[..., None], embedded_BLD, self.padding_embedding[None])
        for block in self.transformer.resblocks:
            h_BLD = block(h_BLD)
        h_BLD = self.final_ln(h_BLD)
        context_BDS = h_BLD.permute(0, 2, 1)
        embedding_BE = self.time_embed(waves(timesteps, self.config.channels)) + self.transformer_proj(h_BLD[:, -1])
        if low_res is not None:
            enlarged = F.interpolate(low_res, x.shape[-2:], mode="bilinear", align_corners=False)
            x = torch.cat([x, enlarged], dim=1)
        h_BCHW, skips = x, []
        for stage in self.input_blocks:
            h_BCHW = stage(h_BCHW, embedding_BE, context_BDS)
            skips.append(h_BCHW)
        h_BCHW = self.middle_block(h_BCHW, embedding_BE, context_BDS)
        for stage in self.output_blocks:
            h_BCHW = stage(torch.cat([h_BCHW, skips.pop()], dim=1), embedding_BE, context_BDS)
        return self.out[2](F.silu(self.out[0](h_BCHW.float()))).float()


def halve(x_BCHW: Tensor) -> Tensor:
    return F.avg_pool2d(x_BCHW, 2, 2)


def double(x_BCHW: Tensor) -> Tensor:
    return F.interpolate(x_BCHW, scale_factor=2, mode="nearest")


def waves(timesteps_B: Tensor, width: int) -> Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=timesteps_B.device) / (width // 2))
    angles = timesteps_B[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def plain(glide: Glide) -> PlainGlide:
    """A plain network with the weights of `glide`; every key must fit."""
    model = PlainGlide(glide)
    model.load_state_dict(glide.state_dict(), strict=True)
    return model.to(next(glide.parameters()).device)


class PlainTrainer:
    """The rest of a plain training step: AdamW parameter by parameter, EMA in a loop of its own."""

    def __init__(self, model: nn.Module, lr: float, decay: float) -> None:
        self.model, self.decay = model, decay
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.0, foreach=False, fused=False
        )
        self.ema = [parameter.detach().clone() for parameter in model.parameters()]

    def update(self) -> float:
        """Step, average, clear the gradients; the gradients' global norm, which the public code logs as well."""
        squares = [
            parameter.grad.square().sum().item() for parameter in self.model.parameters() if parameter.grad is not None
        ]
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.ema, self.model.parameters(), strict=True):
                average.mul_(self.decay).add_(parameter, alpha=1 - self.decay)
        self.optimizer.zero_grad()
        return math.sqrt(sum(squares))
