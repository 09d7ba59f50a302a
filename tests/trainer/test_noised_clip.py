"""The noised CLIP against the release's arithmetic written down plainly, and its tokenizer against CLIP's own."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline import clip_tokenizer
from data_pipeline.clip_tokenizer import END_TOKEN, START_TOKEN, clip_tokens
from data_pipeline.errors import UserError
from trainer.models.noised_clip import CHANNEL_DEVIATIONS, CHANNEL_MEANS, NoisedClip, NoisedClipConfig, made_up_pictures

SMALL = NoisedClipConfig(
    image_size=16,
    embedding=24,
    image_layers=2,
    image_heads=2,
    text_layers=2,
    text_heads=2,
    image_head_channels=8,
    text_head_channels=8,
    text_context=12,
    vocabulary=49408,
    timesteps=50,
)
CAPTIONS = [
    "a photo of a corgi, in the snow!",
    "A dog’s “ball” &amp;amp; caf\u00e9 ☕ 1234 it's I'M",
    "",
    "日本語 text  \n x",
    "mojibake â€œquotesâ€\x9d and a\u0301 ǅ ½ ²",
    "word " * 100,
    "🤷🏽‍♀️ ünïcödé don't we'll",
]


def small_clip(seed: int = 0) -> NoisedClip:
    torch.manual_seed(seed)
    return NoisedClip(SMALL)


def inputs(batch: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, lengths = clip_tokens(CAPTIONS[:batch], SMALL.text_context)
    return {
        "x": torch.randn(batch, 3, 16, 16, generator=generator),
        "timesteps": torch.randint(0, 50, (batch,), generator=generator),
        "tokens": torch.from_numpy(tokens.astype("int64")),
        "lengths": torch.from_numpy(lengths),
    }


@pytest.mark.parametrize(
    ("config", "total", "text", "visual"),
    [
        (NoisedClipConfig(), 158_123_264, 71_679_488, 86_443_776),
        (
            NoisedClipConfig(image_layers=24, image_heads=16, text_heads=12, embedding=768),
            440_439_040,
            136_027_392,
            304_411_648,
        ),
        (
            NoisedClipConfig(image_layers=24, image_heads=16, text_heads=12, embedding=768, vocabulary=49408),
            428_052_736,
            123_641_088,
            304_411_648,
        ),
    ],
    ids=["ViT-B/4 released", "ViT-L/4", "ViT-L/4 with the tokenizer's vocabulary"],
)
def test_parameters_are_counted_as_published(config: NoisedClipConfig, total: int, text: int, visual: int) -> None:
    with torch.device("meta"):
        assert NoisedClip(config).parameter_counts() == {"total": total, "text": text, "visual": visual}


def test_weights_have_the_names_of_the_released_files() -> None:
    names = set(small_clip().state_dict())
    norm = ("g", "b")
    block = {f"f_attn.{name}" for name in ("f_q.w", "f_q.b", "f_k.w", "f_v.w", "f_v.b", "f_c.w", "f_c.b")}
    block |= {f"f_mlp.{name}" for name in ("f_1.w", "f_1.b", "f_2.w", "f_2.b")}
    block |= {f"{branch}.ln.{name}" for branch in ("f_attn", "f_mlp") for name in norm}
    encoder = {f"block_{i}.{name}" for i in range(2) for name in block}
    encoder |= {"output.f.w", *(f"output.ln.{name}" for name in norm), "input.w_pos"}
    image = encoder | {"input.patch_proj", "input.w_t", *(f"input.ln.{name}" for name in norm)}
    expected = {f"image_encoder.blocks.{name}" for name in image}
    expected |= {f"text_encoder.blocks.{name}" for name in encoder | {"input.w_voc"}}
    assert names == expected


def test_a_captions_tower_without_layers_reads_a_bag_of_words() -> None:
    torch.manual_seed(0)
    clip = NoisedClip(SMALL.model_copy(update={"text_layers": 0}))
    clip.get_parameter("text_encoder.blocks.input.w_pos").data.zero_()
    tokens, lengths = clip_tokens(["red dog runs", "runs red dog", "red dog sleeps"], SMALL.text_context)
    found = clip.encode_text(torch.from_numpy(tokens.astype("int64")), torch.from_numpy(lengths))
    torch.testing.assert_close(found[0], found[1])
    assert float((found[0] - found[2]).detach().abs().max()) > 0.01
    padded = torch.from_numpy(tokens.astype("int64")).masked_fill(torch.from_numpy(tokens == 0), 7)
    torch.testing.assert_close(clip.encode_text(padded, torch.from_numpy(lengths)), found)


def test_an_image_tower_that_begins_with_colours_tells_them_better_than_clips_beginning() -> None:
    """Blue and yellow pictures of equal light, as directions; and features centred on pictures it has not met."""
    light, blue = torch.rand(40, 1, 16, 16) - 0.5, torch.tensor([-0.15, -0.15, 0.3])[None, :, None, None]
    pictures = torch.cat([light + blue, light - blue])
    apart = {}
    for init in ("clip", "colour"):
        torch.manual_seed(1)
        clip = NoisedClip(SMALL.model_copy(update={"image_init": init, "image_layers": 2}))
        with torch.no_grad():
            features = F.normalize(clip.encode_image(pictures, torch.zeros(80, dtype=torch.int64)), dim=1)
            others = clip.encode_image(made_up_pictures(200, 16), torch.zeros(200, dtype=torch.int64))
        apart[init] = float((features[:40] * features[40:]).sum(dim=1).mean())
        assert (float(others.mean(dim=0).norm() / others.std(dim=0).norm()) < 0.5) == (init == "colour")
    assert apart["colour"] < 0 < 0.5 < apart["clip"]


class Plain:
    """The release's arithmetic with its padding to a multiple of 32 and its mask of -1e10, from a state dict."""

    def __init__(self, clip: NoisedClip) -> None:
        self.weights = {name: values.double() for name, values in clip.state_dict().items()}

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.weights[f"{name}.g"] + self.weights[f"{name}.b"]

    def affine(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.w"].T + self.weights.get(f"{name}.b", torch.zeros(()))

    def blocks(self, x: Tensor, encoder: str, heads: int, causal: bool) -> Tensor:
        length, padded = x.shape[1], -(-x.shape[1] // 32) * 32
        allowed = torch.ones(padded, padded, dtype=torch.bool)
        allowed = allowed.tril() if causal else allowed
        allowed[length:] = allowed[:, length:] = False
        bias = torch.where(allowed, 0.0, -1e10).double()
        for name in (f"{encoder}.blocks.block_0", f"{encoder}.blocks.block_1"):
            normed = self.norm(x, f"{name}.f_attn.ln")
            q, k, v = (
                F.pad(self.affine(normed, f"{name}.f_attn.f_{part}"), (0, 0, 0, padded - length))
                .unflatten(-1, (heads, -1))
                .permute(0, 2, 1, 3)
                for part in "qkv"
            )
            weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias, dim=-1)
            mixed = (weights @ v).permute(0, 2, 1, 3).flatten(2)[:, :length]
            x = x + self.affine(mixed, f"{name}.f_attn.f_c")
            hidden = F.gelu(self.affine(self.norm(x, f"{name}.f_mlp.ln"), f"{name}.f_mlp.f_1"))
            x = x + self.affine(hidden, f"{name}.f_mlp.f_2")
        return x

    def encode_image(self, x: Tensor, timesteps: Tensor) -> Tensor:
        prefix = "image_encoder.blocks.input"
        pixels = (x.double() + 1) * 127.5
        pixels = torch.stack([(pixels[:, c] - CHANNEL_MEANS[c]) / CHANNEL_DEVIATIONS[c] for c in range(3)], dim=1)
        patches = F.unfold(pixels, 4, stride=4).transpose(1, 2) @ self.weights[f"{prefix}.patch_proj"].flatten(1).T
        sequence = torch.cat([self.weights[f"{prefix}.w_t"][timesteps][:, None], patches], dim=1)
        sequence = self.norm(sequence + self.weights[f"{prefix}.w_pos"], f"{prefix}.ln")
        last = self.blocks(sequence, "image_encoder", 2, causal=False)[:, 0]
        return self.affine(self.norm(last, "image_encoder.blocks.output.ln"), "image_encoder.blocks.output.f")

    def encode_text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        prefix = "text_encoder.blocks.input"
        sequence = self.weights[f"{prefix}.w_voc"][tokens] + self.weights[f"{prefix}.w_pos"]
        sequence = self.blocks(sequence, "text_encoder", 2, causal=True)
        last = torch.stack([row[length - 1] for row, length in zip(sequence, lengths.tolist(), strict=True)])
        return self.affine(self.norm(last, "text_encoder.blocks.output.ln"), "text_encoder.blocks.output.f")


def test_features_equal_the_releases_padded_and_masked_arithmetic() -> None:
    clip, batch = small_clip(), inputs()
    with torch.no_grad():  # norms and biases that are not the identity
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain = Plain(clip)
    image, text = clip(**batch)
    assert image.shape == text.shape == (5, 24)
    torch.testing.assert_close(image, plain.encode_image(batch["x"], batch["timesteps"]).float(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(text, plain.encode_text(batch["tokens"], batch["lengths"]).float(), atol=2e-5, rtol=1e-5)


def test_the_timestep_is_heard_and_what_follows_the_end_token_is_not() -> None:
    clip, batch = small_clip(), inputs()
    image, text = clip(**batch)
    after = torch.arange(12) >= batch["lengths"][:, None]
    assert after.any()
    other = torch.where(after, 777, batch["tokens"])
    torch.testing.assert_close(clip.encode_text(other, batch["lengths"]), text)
    moved = clip.encode_image(batch["x"], (batch["timesteps"] + 1) % 50)
    assert (moved - image).abs().amax(dim=1).min() > 1e-2


def test_gradients_equal_those_of_plain_arithmetic_in_all_thirds_of_the_query_and_value_biases() -> None:
    clip, batch = small_clip(), inputs()
    plain = Plain(clip)
    for values in plain.weights.values():
        values.requires_grad_()
    towards = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    image, text = clip(**batch)
    ((image + text) * towards).sum().backward()
    image, text = (
        plain.encode_image(batch["x"], batch["timesteps"]),
        plain.encode_text(batch["tokens"], batch["lengths"]),
    )
    ((image + text) * towards).sum().backward()
    for name, parameter in clip.named_parameters():
        expected = plain.weights[name].grad
        assert parameter.grad is not None and expected is not None
        torch.testing.assert_close(parameter.grad, expected.float(), atol=1e-5, rtol=1e-3)
        if name.endswith(("f_q.b", "f_v.b")):  # the release leaves the middle third at 0
            assert all(third.abs().min() > 1e-7 for third in parameter.grad.chunk(3)), name


def test_checkpointing_changes_no_gradient_and_low_precision_gives_float32_features_close_by() -> None:
    batch = inputs()
    gradients = []
    for recompute in (False, True):
        clip = small_clip()
        clip.activation_checkpointing = recompute
        image, text = clip(**batch)
        (image.square().sum() + text.square().sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in clip.named_parameters()})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())

    exact = small_clip()(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = small_clip()(**batch)
    cast = small_clip().bfloat16()(**batch)
    for found in (mixed, cast):
        for close, whole in zip(found, exact, strict=True):
            assert close.dtype == torch.float32
            assert F.cosine_similarity(close, whole).min() > 0.999
            assert not torch.equal(close, whole)


def test_every_weight_is_initialised_and_two_builds_of_a_seed_are_equal() -> None:
    with torch.no_grad():
        garbage = [torch.full((1000, 100), math.nan) for _ in range(50)]
    one = small_clip(3).state_dict()
    del garbage
    two = small_clip(3).state_dict()
    for name, values in one.items():
        assert values.isfinite().all() and torch.equal(values, two[name]), name
    features = small_clip(3).encode_image(**{name: inputs()[name] for name in ("x", "timesteps")})
    assert 0.1 < features.std() < 10


def test_tokens_equal_those_of_clips_own_tokenizer() -> None:
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.origin is not None
    # The one module of the package that needs no torchvision.
    spec = importlib.util.spec_from_file_location("clip_reference", Path(package.origin).with_name("tokenizer.py"))
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    tokens, lengths = clip_tokens(CAPTIONS)
    assert tokens.tolist() == reference.SimpleTokenizer()(CAPTIONS).tolist()
    assert lengths.tolist() == [int((row == END_TOKEN).argmax()) + 1 for row in tokens]
    assert lengths[2] == 2 and lengths[5] == 77


def test_a_long_caption_keeps_its_end_and_special_words_stay_text() -> None:
    tokens, lengths = clip_tokens(["one two three four five", "<|startoftext|> a <|endoftext|>"], 5)
    assert lengths.tolist() == [5, 5]
    assert tokens[:, 0].tolist() == [START_TOKEN] * 2 and tokens[:, -1].tolist() == [END_TOKEN] * 2
    inside = clip_tokens(["<|startoftext|> a <|endoftext|>"])[0][0]
    assert (inside == START_TOKEN).sum() == 1 and (inside == END_TOKEN).sum() == 1


def test_a_missing_or_changed_tokenizer_file_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(clip_tokenizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps open_clip_torch==3\.3\.0"):
        clip_tokenizer._read_checked()
    (tmp_path / "__init__.py").touch()
    (tmp_path / clip_tokenizer.BPE_FILE).write_bytes(b"another")
    found = importlib.util.spec_from_file_location("open_clip", tmp_path / "__init__.py")
    monkeypatch.setattr(clip_tokenizer.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError, match="sha256 924691ac288e"):
        clip_tokenizer._read_checked()
