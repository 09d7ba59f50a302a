"""The U-Net of ADM with GLIDE's text conditioning: its blocks, and their arrangement into levels.

Always holds: module names, and the order of channels inside every weight, are those of the release; every residual
branch starts at zero. Called by `glide`.

Legend: B batch, C channels, H W feature map, P = H·W pixels, E timestep embedding, S caption positions, D text width,
N heads, K channels per head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.config import GlideModelConfig
from trainer.models.layers import Conv2dFloat32, GroupNorm32, Pointwise, zeroed


class Down(nn.Module):
    """Halve the sides by averaging."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.avg_pool2d(x_BCHW, 2)


class Up(nn.Module):
    """Double the sides by repetition."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.interpolate(x_BCHW, scale_factor=2, mode="nearest")


class ResBlock(nn.Module):
    """Two convolutions around adaptive group normalisation (AdaGN), h = norm(h) · (1 + scale) + shift.

    With `resample`, the main path is resampled after its first activation and before its convolution, the skip path
    directly. Source: Dhariwal & Nichol 2021, section 3 and table 3 (BigGAN up/downsampling, AdaGN).
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        embedding: int,
        dropout: float,
        norm_groups: int,
        resample: Down | Up | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        # Identities hold the places that the activation has in the release, so that the indices agree.
        self.in_layers = nn.Sequential(
            GroupNorm32(norm_groups, channels_in, silu=True),
            nn.Identity(),
            nn.Conv2d(channels_in, channels_out, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * channels_out))
        self.out_layers = nn.Sequential(
            GroupNorm32(norm_groups, channels_out),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(channels_out, channels_out, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor) -> Tensor:
        norm_in, _, conv_in = self.in_layers
        h_BCHW = norm_in(x_BCHW)
        if self.resample is not None:
            h_BCHW, x_BCHW = self.resample(h_BCHW), self.resample(x_BCHW)
        h_BCHW = conv_in(h_BCHW)

        norm_out, activation, dropout, conv_out = self.out_layers
        modulation_BC11 = self.emb_layers(embedding_BE).to(h_BCHW.dtype)[:, :, None, None]
        scale_BC11, shift_BC11 = modulation_BC11.chunk(2, dim=1)
        h_BCHW = torch.addcmul(shift_BC11, norm_out(h_BCHW), 1 + scale_BC11)
        h_BCHW = conv_out(dropout(activation(h_BCHW)))
        return self.skip_connection(x_BCHW) + h_BCHW


class AttentionBlock(nn.Module):
    """Pixels attend to the caption and to each other.

    Heads are the slow axis of both projections ("legacy" order); keys and values of the caption come before those of
    the pixels. Source: Nichol et al. 2021, section 4.1, where each attention layer projects the caption's features to
    its own width and appends them to its context.
    """

    def __init__(self, channels: int, head_channels: int, text_width: int, norm_groups: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = GroupNorm32(norm_groups, channels)
        self.qkv = Pointwise(channels, 3 * channels)
        self.encoder_kv = Pointwise(text_width, 2 * channels)
        self.proj_out = zeroed(Pointwise(channels, channels))

    def forward(self, x_BCHW: Tensor, context_BSD: Tensor) -> Tensor:
        normed_BPC = self.norm(x_BCHW).flatten(2).transpose(1, 2)
        qkv_BPNxK = self.qkv(normed_BPC).unflatten(-1, (self.heads, 3, -1))
        context_kv_BSNxK = self.encoder_kv(context_BSD).unflatten(-1, (self.heads, 2, -1))
        kv_BLNxK = torch.cat([context_kv_BSNxK, qkv_BPNxK[:, :, :, 1:]], dim=1)
        k_BNLK, v_BNLK = (part.transpose(1, 2) for part in kv_BLNxK.unbind(3))
        q_BNPK = qkv_BPNxK[:, :, :, 0].transpose(1, 2)
        mixed_BNPK = F.scaled_dot_product_attention(q_BNPK, k_BNLK, v_BNLK)
        projected_BPC = self.proj_out(mixed_BNPK.transpose(1, 2).flatten(2))
        return x_BCHW + projected_BPC.transpose(1, 2).reshape(x_BCHW.shape)


class Stage(nn.Sequential):
    """Layers run in order, each with the condition it takes. Skips join stages; checkpointing recomputes them."""

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor, context_BSD: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x_BCHW = layer(x_BCHW, embedding_BE)
            elif isinstance(layer, AttentionBlock):
                x_BCHW = layer(x_BCHW, context_BSD)
            else:
                x_BCHW = layer(x_BCHW)
        return x_BCHW


class UNetBuilder:
    """Lays out the stages of one configuration. `skips` are the widths of the input stages, in order."""

    def __init__(self, config: GlideModelConfig, dropout: float) -> None:
        self.config = config
        self.dropout = dropout
        self.embedding = 4 * config.channels
        self.widths = [config.channels * mult for mult in config.channel_mult]
        self.skips: list[int] = []

    def input_stages(self) -> Iterator[Stage]:
        """Highest resolution first; between levels, a stage that halves the sides."""
        width = self.widths[0]
        yield self._skip(width, nn.Conv2d(self.config.in_channels, width, 3, padding=1))
        for level, level_width in enumerate(self.widths):
            for _ in range(self.config.res_blocks):
                yield self._skip(level_width, self._res(width, level_width), *self._attention(level))
                width = level_width
            if level != len(self.widths) - 1:
                yield self._skip(width, self._res(width, width, Down()))

    def middle_stage(self) -> Stage:
        width = self.widths[-1]
        return Stage(self._res(width, width), self._attend(width), self._res(width, width))

    def output_stages(self) -> Iterator[Stage]:
        """Lowest resolution first; each joins one skip, and a level's last stage doubles the sides."""
        skips = list(self.skips)
        width = self.widths[-1]
        for level in reversed(range(len(self.widths))):
            for block in range(self.config.res_blocks + 1):
                layers: list[nn.Module] = [self._res(width + skips.pop(), self.widths[level]), *self._attention(level)]
                width = self.widths[level]
                if level and block == self.config.res_blocks:
                    layers.append(self._res(width, width, Up()))
                yield Stage(*layers)

    def head(self) -> nn.Sequential:
        """Norm, activation and the last convolution, which starts at zero and always runs in float32."""
        width = self.widths[0]
        return nn.Sequential(
            GroupNorm32(self.config.norm_groups, width, silu=True),
            nn.Identity(),
            zeroed(Conv2dFloat32(width, self.config.out_channels, 3, padding=1)),
        )

    def _skip(self, width: int, *layers: nn.Module) -> Stage:
        self.skips.append(width)
        return Stage(*layers)

    def _res(self, channels_in: int, channels_out: int, resample: Down | Up | None = None) -> ResBlock:
        return ResBlock(channels_in, channels_out, self.embedding, self.dropout, self.config.norm_groups, resample)

    def _attention(self, level: int) -> list[AttentionBlock]:
        attends = self.config.resolutions[level] in self.config.attention_resolutions
        return [self._attend(self.widths[level])] if attends else []

    def _attend(self, width: int) -> AttentionBlock:
        return AttentionBlock(width, self.config.head_channels, self.config.text_width, self.config.norm_groups)
