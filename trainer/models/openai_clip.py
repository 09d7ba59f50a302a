"""OpenAI's CLIP with a vision transformer (ViT-B/32 and its siblings): a picture and a caption as one direction.

Always holds: state-dict keys and shapes equal those of OpenAI's files, from whose shapes the size is read; features are
float32 and not normalised. Called by evaluation only; nothing trains it. The CLIP that guides sampling is another one
(noised_clip.py).

Source: Radford et al. 2021, section 2.4; QuickGELU, norms first and the end token as released.

Legend: B batch, C channels, H W image, L sequence positions, D width, E features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.layers import expect_shape

HEAD_CHANNELS = 64
CHANNEL_MEANS = (0.48145466, 0.4578275, 0.40821073)
CHANNEL_DEVIATIONS = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipSize:
    """What the shapes of a state dict say."""

    image_size: int
    patch_size: int
    image_width: int
    image_layers: int
    text_context: int
    vocabulary: int
    text_width: int
    text_layers: int
    embedding: int


def size_of(shapes: Mapping[str, torch.Size]) -> ClipSize:
    """Raises KeyError naming a key that is not there: not a CLIP with a vision transformer."""
    patch = shapes["visual.conv1.weight"][-1]
    patches = shapes["visual.positional_embedding"][0] - 1
    return ClipSize(
        image_size=patch * round(patches**0.5),
        patch_size=patch,
        image_width=shapes["visual.conv1.weight"][0],
        image_layers=_layers(shapes, "visual.transformer.resblocks."),
        text_context=shapes["positional_embedding"][0],
        vocabulary=shapes["token_embedding.weight"][0],
        text_width=shapes["ln_final.weight"][0],
        text_layers=_layers(shapes, "transformer.resblocks."),
        embedding=shapes["text_projection"][1],
    )


def _layers(shapes: Mapping[str, torch.Size], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})


class OpenAiClip(nn.Module):
    """Features of pictures and of captions. Parameters are named as in the released files."""

    def __init__(self, size: ClipSize) -> None:
        super().__init__()
        self.size = size
        self.visual = Vision(size)
        self.transformer = Transformer(size.text_width, size.text_layers, causal=True)
        self.token_embedding = nn.Embedding(size.vocabulary, size.text_width)
        self.positional_embedding = nn.Parameter(torch.randn(size.text_context, size.text_width) * 0.01)
        self.ln_final = nn.LayerNorm(size.text_width)
        self.text_projection = nn.Parameter(torch.randn(size.text_width, size.embedding) * size.text_width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(4.6052))  # exp of it: 100

    def encode_image(self, x_BCHW: Tensor) -> Tensor:
        """[B, E] of pictures [B, 3, image_size, image_size] in [0, 1]. Raises ValueError for another shape."""
        side = self.size.image_size
        expect_shape("x", x_BCHW, (len(x_BCHW), 3, side, side))
        means, deviations = (x_BCHW.new_tensor(of)[:, None, None] for of in (CHANNEL_MEANS, CHANNEL_DEVIATIONS))
        return self.visual((x_BCHW - means) / deviations)

    def encode_text(self, tokens_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """[B, E] of captions: tokens int64 [B, text_context] as `clip_tokens` makes them, read at `lengths_B` - 1."""
        expect_shape("tokens", tokens_BL, (len(lengths_B), self.size.text_context))
        x_BLD = self.transformer(self.token_embedding(tokens_BL) + self.positional_embedding)
        rows = torch.arange(len(lengths_B), device=lengths_B.device)
        return self.ln_final(x_BLD[rows, lengths_B - 1]) @ self.text_projection


class Vision(nn.Module):
    """The picture's patches behind a class token, whose place is read."""

    def __init__(self, size: ClipSize) -> None:
        super().__init__()
        width, patches = size.image_width, (size.image_size // size.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, size.patch_size, size.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(patches + 1, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, size.image_layers, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, size.embedding) * width**-0.5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        patches_BLD = self.conv1(x_BCHW).flatten(2).transpose(1, 2)
        class_B1D = self.class_embedding.expand(len(x_BCHW), 1, -1)
        x_BLD = torch.cat([class_B1D, patches_BLD], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x_BLD))[:, 0]) @ self.proj


class Transformer(nn.Module):
    """Blocks under the released names."""

    def __init__(self, width: int, layers: int, causal: bool) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, causal) for _ in range(layers)))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.resblocks(x_BLD)


class Block(nn.Module):
    """Attention and two linear maps, each behind its norm."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.attn = Attention(width, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attn(self.ln_1(x_BLD))
        hidden_BLD = self.mlp["c_fc"](self.ln_2(x_BLD))
        return x_BLD + self.mlp["c_proj"](hidden_BLD * torch.sigmoid(1.702 * hidden_BLD))


class Attention(nn.Module):
    """Self-attention under the parameter names of torch's, which the files have."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        joint_BLD = F.linear(x_BLD, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (each.unflatten(-1, (-1, HEAD_CHANNELS)).transpose(1, 2) for each in joint_BLD.chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))
