"""The caption encoder's transformer: bidirectional, without an attention mask.

Always holds: every position attends to every position, padding included (the release does so; padding has embeddings of
its own). Module names are those of the release. Called by `glide`, which owns the embeddings.

Legend: B batch, L caption positions, D text width, H heads, K channels per head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.layers import LayerNorm32


class TextTransformer(nn.Module):
    """Holds the blocks under the release's name. The caller runs them, and so can recompute each on its own."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))


class TextBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.ln_1 = LayerNorm32(width)
        self.mlp = Mlp(width)
        self.ln_2 = LayerNorm32(width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attn(self.ln_1(x_BLD))
        return x_BLD + self.mlp(self.ln_2(x_BLD))


class SelfAttention(nn.Module):
    """Heads are the slow axis of the projection: H blocks of (query, key, value), each K wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_qkv = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        qkv_BLHxK = self.c_qkv(x_BLD).unflatten(-1, (self.heads, 3, -1))
        q_BHLK, k_BHLK, v_BHLK = (part.transpose(1, 2) for part in qkv_BLHxK.unbind(3))
        mixed_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK)
        return self.c_proj(mixed_BHLK.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x_BLD)))
