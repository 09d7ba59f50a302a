"""The GLIDE network on its own: sizes, start, conditioning, precision, refusals. `parity/` compares releases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.models.config import VOCABULARY, GlideModelConfig
from trainer.models.glide import Glide, parameter_counts
from trainer.models.layers import GroupNorm32
from trainer.models.unet import AttentionBlock, ResBlock

TINY: dict[str, Any] = {
    "image_size": 16,
    "channels": 32,
    "res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (8,),
    "head_channels": 16,
    "text_context": 6,
    "text_width": 24,
    "text_layers": 2,
    "text_heads": 3,
}
BASE: dict[str, Any] = {
    "image_size": 64,
    "res_blocks": 3,
    "channel_mult": (1, 2, 3, 4),
    "attention_resolutions": (32, 16, 8),
}
UPSAMPLER: dict[str, Any] = {
    "image_size": 256,
    "res_blocks": 2,
    "channel_mult": (1, 1, 2, 2, 4, 4),
    "attention_resolutions": (32, 16, 8),
    "low_resolution": 64,
}


def text(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"text_width": width, "text_layers": layers, "text_heads": heads}


def tiny(seed: int = 0, dropout: float = 0.0, **changes: Any) -> Glide:
    """A tiny network whose zero-initialised layers are filled, so that every path shows in the output."""
    torch.manual_seed(seed)
    model = Glide(GlideModelConfig(**{**TINY, **changes}), dropout)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


def inputs(batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x_BCHW": torch.randn(batch, 3, 16, 16, generator=generator),
        "timesteps_B": torch.randint(0, 1000, (batch,), generator=generator),
        "tokens": torch.randint(0, VOCABULARY, (batch, 6), generator=generator),
        "mask": torch.arange(6) < torch.arange(batch)[:, None] * 3,
    }


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({**BASE, "channels": 512, **text(2048, 24, 32)}, (3_554_414_086, 1_316_249_600, 2_238_164_486)),
        ({**UPSAMPLER, "channels": 384, **text(1024, 16, 16)}, (1_540_932_998, 254_841_344, 1_286_091_654)),
        ({**UPSAMPLER, "channels": 384, **text(1024, 24, 16)}, (1_641_702_790, 355_611_136, 1_286_091_654)),
        ({**BASE, "channels": 192, **text(512, 16, 8)}, (385_030_726, 76_695_808, 308_334_918)),
        ({**UPSAMPLER, "channels": 192, **text(512, 16, 8)}, (398_361_286, 76_695_808, 321_665_478)),
    ],
    ids=["base-3.5b", "upsampler-1.5b", "upsampler-1.6b", "base-released", "upsampler-released"],
)
def test_parameter_counts_are_those_of_the_published_sizes(
    sizes: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    with torch.device("meta"):
        counts = parameter_counts(Glide(GlideModelConfig(**sizes)))
    assert counts == dict(zip(("total", "text", "visual"), expected, strict=True))


def test_flops_can_be_counted_without_memory() -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = Glide(GlideModelConfig(**BASE, channels=192, **text(512, 16, 8)))
        mask = torch.empty(1, 128, dtype=torch.bool)
        output = model(torch.empty(1, 3, 64, 64), torch.empty(1), tokens=mask.long(), mask=mask)
    assert output.shape == (1, 6, 64, 64)
    assert round(counter.get_total_flops() / 1e9) == 238


def test_a_fresh_network_predicts_zero() -> None:
    model = Glide(GlideModelConfig(**TINY))
    output = model(**inputs())
    assert output.shape == (2, 6, 16, 16)
    assert not output.any()


def test_fresh_embeddings_have_the_chosen_spreads() -> None:
    model = Glide(GlideModelConfig(**{**TINY, "text_context": 128}))
    assert model.positional_embedding.std().item() == pytest.approx(0.01, rel=0.1)
    assert model.padding_embedding.std().item() == pytest.approx(0.01, rel=0.1)
    assert model.token_embedding.weight.std().item() == pytest.approx(1.0, rel=0.1)


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.booleans(), min_size=6, max_size=6), seed=st.integers(0, 2**16))
def test_tokens_matter_exactly_where_the_mask_is_true(counts: list[bool], seed: int) -> None:
    model = tiny()
    mask = torch.tensor([counts])
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY - 1, (1, 6), generator=generator)
    same = model.encode_text(torch.where(mask, tokens, tokens + 1), mask)
    other = model.encode_text(torch.where(mask, tokens + 1, tokens), mask)
    encoded = model.encode_text(tokens, mask)
    assert torch.equal(encoded.context_BLD, same.context_BLD)
    assert torch.equal(encoded.context_BLD, other.context_BLD) == (not any(counts))


def test_the_projection_reads_the_last_position() -> None:
    model = tiny()
    conditions = {key: value for key, value in inputs().items() if key in ("tokens", "mask")}
    encoded = model.encode_text(**conditions)
    assert torch.equal(encoded.projection_BE, model.transformer_proj(encoded.context_BLD[:, -1]))


def test_an_encoded_caption_gives_the_output_of_the_caption() -> None:
    model, given_inputs = tiny(), inputs()
    encoded = model.encode_text(given_inputs["tokens"], given_inputs["mask"])
    output = model.denoise(given_inputs["x_BCHW"], given_inputs["timesteps_B"], **encoded._asdict())
    assert torch.equal(output, model(**given_inputs))


def gradients(model: nn.Module) -> dict[str, Any]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_every_parameter_receives_a_gradient() -> None:
    model = tiny()
    model(**inputs()).square().mean().backward()
    untouched = [name for name, gradient in gradients(model).items() if gradient is None or not gradient.any()]
    assert untouched == []


def test_activation_checkpointing_changes_no_gradient() -> None:
    kept, recomputed = tiny(dropout=0.1), tiny(dropout=0.1)
    recomputed.activation_checkpointing = True
    for model in (kept, recomputed):
        torch.manual_seed(5)
        model(**inputs()).square().mean().backward()
    for name, gradient in gradients(kept).items():
        assert torch.equal(gradient, gradients(recomputed)[name]), name


def test_attention_is_a_softmax_over_caption_then_pixels_with_heads_as_the_slow_axis() -> None:
    torch.manual_seed(0)
    block = AttentionBlock(channels=32, head_channels=8, text_width=24, norm_groups=32)
    nn.init.normal_(block.proj_out.weight)
    x_BCHW, context_BSD = torch.randn(2, 32, 4, 4), torch.randn(2, 5, 24)

    q, k, v = (
        nn.functional.conv1d(block.norm(x_BCHW).flatten(2), block.qkv.weight, block.qkv.bias)
        .reshape(2 * 4, 24, 16)
        .split(8, dim=1)
    )
    context_k, context_v = (
        nn.functional.conv1d(context_BSD.transpose(1, 2), block.encoder_kv.weight, block.encoder_kv.bias)
        .reshape(2 * 4, 16, 5)
        .split(8, dim=1)
    )
    k, v = torch.cat([context_k, k], dim=-1), torch.cat([context_v, v], dim=-1)
    weights = (q.transpose(1, 2) @ k / math.sqrt(8)).softmax(-1)
    mixed = (v @ weights.transpose(1, 2)).reshape(2, 32, 16)
    expected = x_BCHW + nn.functional.conv1d(mixed, block.proj_out.weight, block.proj_out.bias).view_as(x_BCHW)
    torch.testing.assert_close(block(x_BCHW, context_BSD), expected, rtol=1e-5, atol=1e-5)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_norms_keep_the_dtype_and_their_gradients_are_those_of_float32() -> None:
    norm = GroupNorm32(32, 64).bfloat16()
    x_BCHW = (torch.randn(2, 64, 8, 8) + 100.2).bfloat16()  # bfloat16 would round the mean by up to a quarter
    weights_BCHW = torch.randn(2, 64, 8, 8).bfloat16()
    low, high = x_BCHW.clone().requires_grad_(), x_BCHW.double().requires_grad_()

    found, expected = norm(low), nn.functional.group_norm(high, 32)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.double(), expected) < 0.01
    (found_gradient,) = torch.autograd.grad(found, low, weights_BCHW)
    (expected_gradient,) = torch.autograd.grad(expected, high, weights_BCHW.double())
    assert relative_error(found_gradient.double(), expected_gradient) < 0.01


def test_autocast_to_bfloat16_stays_close_to_float32() -> None:
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs())
    assert output.dtype == torch.float32
    assert relative_error(output, model(**inputs())) < 0.03


def test_a_network_cast_to_bfloat16_stays_close_to_float32_and_can_be_trained() -> None:
    expected = tiny()(**inputs())
    model = tiny().bfloat16()
    output = model(**inputs())
    output.square().mean().backward()
    assert output.dtype == torch.float32
    assert relative_error(output, expected) < 0.05
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients(model).values())


def test_channels_last_changes_the_layout_only() -> None:
    model = tiny()
    expected = model(**inputs())
    found = model.to(memory_format=torch.channels_last)(**inputs())  # type: ignore[call-overload]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    model = tiny(dropout=0.5)
    assert not torch.equal(model(**inputs()), model(**inputs()))
    model.eval()
    assert torch.equal(model(**inputs()), model(**inputs()))
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert dropouts == [0.5] * sum(isinstance(module, ResBlock) for module in model.modules())


def test_an_upsampler_sees_its_low_resolution_image_and_demands_one_of_its_size() -> None:
    model = tiny(low_resolution=8)
    dark, light = (model(**inputs(), low_res=torch.full((2, 3, 8, 8), level)) for level in (-1.0, 1.0))
    assert not torch.allclose(dark, light)
    with pytest.raises(AssertionError, match="they need it"):
        model(**inputs())
    with pytest.raises(AssertionError, match="condition of 8 px expected"):
        model(**inputs(), low_res=torch.zeros(2, 3, 4, 4))
    with pytest.raises(AssertionError, match="for upsamplers"):
        tiny()(**inputs(), low_res=torch.zeros(2, 3, 8, 8))


def test_captions_of_another_length_are_refused() -> None:
    wrong = {**inputs(), "tokens": torch.zeros(2, 7, dtype=torch.int64), "mask": torch.ones(2, 7) > 0}
    with pytest.raises(AssertionError, match="captions of 6 tokens expected, found 7"):
        tiny()(**wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 48}, "channels divisible by norm_groups 32"),
        ({"head_channels": 48}, "head_channels that divides the width"),
        ({"text_heads": 5}, "text_width divisible by text_heads 5, found 24"),
        ({"image_size": 15}, "image_size divisible by 2"),
        ({"attention_resolutions": (4,)}, "attention_resolutions among the levels"),
        ({"low_resolution": 16}, "low_resolution below image_size"),
        ({"channel_mult": ()}, "at least 1 item"),
        ({"res_blocks": 0}, "greater than 0"),
        ({"dropout": 0.1}, "Extra inputs"),
    ],
)
def test_impossible_sizes_are_refused_with_the_reason(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GlideModelConfig(**{**TINY, **change})
