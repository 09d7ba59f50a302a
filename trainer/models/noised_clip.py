"""The noised CLIP: two transformers that give a noised image and a caption the same direction (GLIDE, section 2.4).

Always holds: state-dict keys and shapes equal OpenAI's release (clip_image_enc.pt under `image_encoder.`,
clip_text_enc.pt under `text_encoder.`); features are float32 and not normalised, whether the module is float32, cast to
bfloat16 or run under autocast; layer norms are float32. Called by the recipe `noised_clip`, `plan`, samplers (CLIP
guidance, reranking) and the importer.

Where the release differs in form only: it pads both sequences to a multiple of 32 and masks the padding, which gives no
position a weight it has not here. Where it differs in substance: its backward pass zeroes the middle third of the
gradient of the query and value biases, meant for a joint bias of all three; here they have their true gradient.

Legend: B batch, C channels, H W image, N patches, L sequence positions, D width, K channels per head, E features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.clip_tokenizer import CLIP_CONTEXT_TOKENS
from data_pipeline.config import Settings
from trainer.models.layers import expect_shape

# CLIP's statistics of its training images, on the scale 0..255.
CHANNEL_MEANS = (122.77093945, 116.74601272, 104.09373519)
CHANNEL_DEVIATIONS = (68.50053285, 66.63215831, 70.32316309)

# Light, red against blue, green against both: about the principal components of the colours of natural pictures
# (Buchsbaum & Gottschalk 1983), here each with a factor that gives it about the deviation of the first. Without it the
# two that hold the colour hardly show in what is drawn at random.
OPPONENT_COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
OPPONENT_GAINS = (0.5, 2.0, 4.0)
MADE_UP = 256  # pictures


class NoisedClipConfig(Settings):
    """The size of a noised CLIP. The defaults are the release's ViT-B/4."""

    image_size: PositiveInt = 64
    patch_size: PositiveInt = 4
    embedding: PositiveInt = 512
    """Width of the features that image and caption share."""
    image_layers: PositiveInt = 12
    image_heads: PositiveInt = 12
    text_layers: NonNegativeInt = 12
    """Blocks of the caption's transformer. 0: none, the feature is read at the mean of its tokens: a bag of words."""
    text_heads: PositiveInt = 8
    image_head_channels: PositiveInt = 64
    text_head_channels: PositiveInt = 64
    text_context: PositiveInt = CLIP_CONTEXT_TOKENS
    """Caption length in tokens, start, end and padding included."""
    vocabulary: PositiveInt = 65536
    """Rows of the token embedding: the release has 65536, of which the tokenizer uses the first 49408."""
    timesteps: PositiveInt = 1000
    """Timesteps of the diffusion process; each has a class token of its own."""
    image_init: Literal["clip", "colour"] = "clip"
    """How the image tower begins. colour: as random features that tell colours, for one that stays locked: patches in
    opponent colours of like size, positions and timesteps all alike, each feature of mean 0 and deviation 1."""

    @property
    def image_width(self) -> int:
        return self.image_heads * self.image_head_channels

    @property
    def text_width(self) -> int:
        return self.text_heads * self.text_head_channels

    @model_validator(mode="after")
    def _check(self) -> NoisedClipConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size divisible by patch_size {self.patch_size}, found {self.image_size}")
        return self


class NoisedClip(nn.Module):
    """Features of noised images and of captions; their cosine says how well they fit.

    `dropout` is the probability on every residual branch, a training setting and therefore not part of the size; the
    release has none. `lock_image`: in training no gradient reaches the image encoder but its last projection.
    """

    def __init__(self, config: NoisedClipConfig, dropout: float = 0.0, lock_image: bool = False) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config, 0.0 if lock_image else dropout, lock_image)
        self.text_encoder = TextEncoder(config, dropout)

    @property
    def activation_checkpointing(self) -> bool:
        """Recompute each transformer block in the backward pass instead of keeping its activations."""
        return self.image_encoder.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: bool) -> None:
        self.image_encoder.activation_checkpointing = self.text_encoder.activation_checkpointing = value

    def forward(self, x: Tensor, timesteps: Tensor, *, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(`encode_image`, `encode_text`) of as many images and captions."""
        return self.encode_image(x, timesteps), self.encode_text(tokens, lengths)

    def encode_image(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Features [B, embedding] float32, not normalised.

        `x` [B, 3, image_size, image_size]: images in [-1, 1] plus noise; `timesteps` int64 [B] on the scale of the
        process trained on, 0..timesteps-1, also under a respaced sampler. Raises ValueError for another shape.
        """
        size = self.config.image_size
        expect_shape("x", x, (len(x), 3, size, size))
        return self.image_encoder(x, timesteps)

    def encode_text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Features [B, embedding] float32, not normalised.

        `tokens` int64 [B, text_context] as `clip_tokens` makes them; `lengths` int64 [B]: the feature is read at
        `lengths - 1`, the end token, and what comes after it does not matter (attention is causal).
        """
        expect_shape("tokens", tokens, (len(lengths), self.config.text_context))
        return self.text_encoder(tokens, lengths)

    def parameter_counts(self) -> dict[str, int]:
        """{"total", "text", "visual"}: parameters of the module and of its two encoders. Works on the meta device."""
        text = sum(parameter.numel() for parameter in self.text_encoder.parameters())
        visual = sum(parameter.numel() for parameter in self.image_encoder.parameters())
        return {"total": text + visual, "text": text, "visual": visual}

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        """Made-up keywords of `forward`, of the sizes of training; `glidepath plan` counts with them."""
        size, length = self.config.image_size, self.config.text_context
        return {
            "x": torch.randn(batch, 3, size, size),
            "timesteps": torch.randint(self.config.timesteps, (batch,)),
            "tokens": torch.randint(self.config.vocabulary, (batch, length)),
            "lengths": torch.full((batch,), length),
        }


class LayerNorm(nn.Module):
    """Layer normalisation in float32 under the release's parameter names; returns the input's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        normed = F.layer_norm(x_BLD.float(), self.g.shape, self.g.float(), self.b.float(), eps=1e-5)
        return normed.to(x_BLD.dtype)


class Affine(nn.Module):
    """A linear map under the release's parameter names.

    The release declares a deviation for each of its weights but leaves them unfilled (it never trains); here they are
    drawn with it. They are CLIP's: residual branches shrink with depth, so that their sum does not grow.
    """

    def __init__(self, width_in: int, width_out: int, std: float, bias: bool = True) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(width_out, width_in))
        self.b = nn.Parameter(torch.zeros(width_out)) if bias else None
        nn.init.normal_(self.w, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.b)


class Attention(nn.Module):
    """Self-attention with its norm, as a residual branch."""

    def __init__(self, width: int, heads: int, layers: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.ln = LayerNorm(width)
        self.f_q = Affine(width, width, std=width**-0.5)
        self.f_k = Affine(width, width, std=width**-0.5, bias=False)
        self.f_v = Affine(width, width, std=width**-0.5)
        self.f_c = Affine(width, width, std=width**-0.5 / (2 * layers))

    def forward(self, x_BLD: Tensor) -> Tensor:
        normed_BLD = self.ln(x_BLD)
        q_BHLK, k_BHLK, v_BHLK = (
            project(normed_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.f_q, self.f_k, self.f_v)
        )
        mixed_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, is_causal=self.causal)
        return self.f_c(mixed_BHLK.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear maps around a GELU, with their norm, as a residual branch."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.ln = LayerNorm(width)
        self.f_1 = Affine(width, 4 * width, std=(2 * width) ** -0.5)
        self.f_2 = Affine(4 * width, width, std=width**-0.5 / (2 * layers))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.f_2(F.gelu(self.f_1(self.ln(x_BLD))))


class Block(nn.Module):
    """One transformer block."""

    def __init__(self, width: int, heads: int, layers: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.f_attn = Attention(width, heads, layers, causal)
        self.f_mlp = Mlp(width, layers)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.dropout(self.f_attn(x_BLD))
        return x_BLD + self.dropout(self.f_mlp(x_BLD))


class ImageEmbedding(nn.Module):
    """Patches as a sequence, behind a class token that is the embedding of the timestep."""

    def __init__(self, config: NoisedClipConfig) -> None:
        super().__init__()
        self.patch_size, width = config.patch_size, config.image_width
        patches = (config.image_size // config.patch_size) ** 2
        self.patch_proj = nn.Parameter(torch.empty(width, 3, config.patch_size, config.patch_size))
        self.w_pos = nn.Parameter(torch.empty(1 + patches, width))
        self.w_t = nn.Parameter(torch.empty(config.timesteps, width))
        self.ln = LayerNorm(width)
        nn.init.normal_(self.patch_proj, std=math.sqrt(2 / width) / config.patch_size)
        nn.init.normal_(self.w_pos, std=width**-0.5)
        nn.init.normal_(self.w_t, std=width**-0.5)
        if config.image_init == "colour":
            self._begin_with_colours()

    @torch.no_grad()
    def _begin_with_colours(self) -> None:
        opponents_33 = F.normalize(self.patch_proj.new_tensor(OPPONENT_COLOURS), dim=1)
        gains_31 = self.patch_proj.new_tensor(OPPONENT_GAINS)[:, None]
        self.patch_proj.copy_(torch.einsum("dcij,ce->deij", self.patch_proj, gains_31 * opponents_33))
        self.w_pos[1:] = self.w_pos[1].clone()
        self.w_t[:] = self.w_t[0].clone()

    def forward(self, x_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        # Channel by channel with numbers: a tensor of them would be copied to the device in every pass.
        channels = zip(x_BCHW.float().unbind(1), CHANNEL_MEANS, CHANNEL_DEVIATIONS, strict=True)
        x_BCHW = torch.stack([((x_BHW + 1) * 127.5 - mean) / deviation for x_BHW, mean, deviation in channels], dim=1)
        patches_BDHW = F.conv2d(x_BCHW.to(self.patch_proj.dtype), self.patch_proj, stride=self.patch_size)
        patches_BND = patches_BDHW.flatten(2).transpose(1, 2)
        class_B1D = F.embedding(timesteps_B, self.w_t)[:, None]
        return self.ln(torch.cat([class_B1D, patches_BND.to(class_B1D.dtype)], dim=1) + self.w_pos)


class TextEmbedding(nn.Module):
    """Tokens with their positions."""

    def __init__(self, config: NoisedClipConfig) -> None:
        super().__init__()
        self.w_voc = nn.Parameter(torch.empty(config.vocabulary, config.text_width))
        self.w_pos = nn.Parameter(torch.empty(config.text_context, config.text_width))
        nn.init.normal_(self.w_voc, std=0.02)
        nn.init.normal_(self.w_pos, std=0.01)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return F.embedding(tokens_BL, self.w_voc) + self.w_pos


class FeatureExtractor(nn.Module):
    """One position of the sequence as features, float32."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.ln = LayerNorm(width)
        self.f = Affine(width, embedding, std=math.sqrt(2 / (width + embedding)), bias=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.f(self.ln(x_BD)).float()


def made_up_pictures(count: int, size: int) -> Tensor:
    """Random pictures [count, 3, size, size] in [-1, 1] with a natural one's spectrum (amplitude ~ 1/frequency: Field
    1987) and colours."""
    octaves = [torch.randn(count, 3, side, side) for side in (1, 2, 4, 8, 16, 32) if side <= size]
    sums_BCHW = torch.stack([F.interpolate(octave, (size, size), mode="bilinear") for octave in octaves]).sum(dim=0)
    colours_33 = F.normalize(torch.tensor(OPPONENT_COLOURS), dim=1) / torch.tensor(OPPONENT_GAINS)[:, None]
    return torch.einsum("bchw,cd->bdhw", sums_BCHW, 0.175 * colours_33).clamp(-1, 1)


class ImageEncoder(nn.Module):
    """Every patch attends to every other; the feature is read at the class token."""

    def __init__(self, config: NoisedClipConfig, dropout: float, locked: bool = False) -> None:
        super().__init__()
        self.locked = locked
        width, layers = config.image_width, config.image_layers
        self.activation_checkpointing = False
        self.blocks = _blocks(
            ImageEmbedding(config),
            [Block(width, config.image_heads, layers, causal=False, dropout=dropout) for _ in range(layers)],
            FeatureExtractor(width, config.embedding),
        )
        if config.image_init == "colour":
            self._standardise(made_up_pictures(MADE_UP, config.image_size))

    @torch.no_grad()
    def _standardise(self, pictures_BCHW: Tensor) -> None:
        """Let each feature begin with mean 0 and deviation 1 over pictures (Krähenbühl et al. 2016): what all pictures
        have in common would otherwise be most of it, and be unlearned slowly."""
        timesteps_B = torch.zeros(len(pictures_BCHW), dtype=torch.int64)
        extractor = self.blocks["output"]
        assert isinstance(extractor, FeatureExtractor)
        norm = extractor.ln
        features_BD = norm(_run(self, self.blocks["input"](pictures_BCHW, timesteps_B))[:, 0])
        norm.g.div_(features_BD.std(dim=0))
        norm.b.sub_(features_BD.mean(dim=0) * norm.g)

    def forward(self, x_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        # In training only: guidance asks a trained one for the gradient of its picture.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not (self.locked and self.training)):
            x_BD = _run(self, self.blocks["input"](x_BCHW, timesteps_B))[:, 0]
        return self.blocks["output"](x_BD)


class TextEncoder(nn.Module):
    """A token attends to those before it; the feature is read at the end token. Without layers: at their mean."""

    def __init__(self, config: NoisedClipConfig, dropout: float) -> None:
        super().__init__()
        width, layers = config.text_width, config.text_layers
        self.activation_checkpointing = False
        self.blocks = _blocks(
            TextEmbedding(config),
            [Block(width, config.text_heads, layers, causal=True, dropout=dropout) for _ in range(layers)],
            FeatureExtractor(width, config.embedding),
        )

    def forward(self, tokens_BL: Tensor, lengths_B: Tensor) -> Tensor:
        x_BLD = _run(self, self.blocks["input"](tokens_BL))
        if len(self.blocks) == 2:  # no transformer blocks
            inside_BL1 = (torch.arange(x_BLD.shape[1], device=x_BLD.device) < lengths_B[:, None])[:, :, None]
            return self.blocks["output"]((x_BLD * inside_BL1).sum(dim=1) / lengths_B[:, None])
        rows = torch.arange(len(lengths_B), device=lengths_B.device)
        return self.blocks["output"](x_BLD[rows, lengths_B - 1])


def _blocks(embedding: nn.Module, blocks: list[Block], extractor: nn.Module) -> nn.ModuleDict:
    """Under the release's names."""
    return nn.ModuleDict(
        {"input": embedding, **{f"block_{i}": block for i, block in enumerate(blocks)}, "output": extractor}
    )


def _run(encoder: ImageEncoder | TextEncoder, x_BLD: Tensor) -> Tensor:
    """The transformer blocks, each recomputed in the backward pass when the encoder says so."""
    recompute = encoder.activation_checkpointing and torch.is_grad_enabled()
    for name, block in encoder.blocks.items():
        if name.startswith("block_"):
            run: Callable[..., Tensor] = block
            x_BLD = checkpoint(run, x_BLD, use_reentrant=False) if recompute else run(x_BLD)
    return x_BLD
