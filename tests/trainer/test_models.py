"""The GLIDE network on its own: sizes, start, conditioning, precision, refusals. `parity/` compares releases."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.config import find_config, read_values
from trainer.models.config import VOCABULARY, GlideModelConfig
from trainer.models.glide import Glide, parameter_counts
from trainer.models.layers import GroupNorm32
from trainer.models.noised_clip import NoisedClip, NoisedClipConfig
from trainer.models.surgery import FIRST_CONVOLUTION, inpaint_surgery
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
TINY_CLIP = NoisedClipConfig(
    image_size=16, embedding=8, image_layers=1, image_heads=1, text_layers=1, text_heads=1, vocabulary=49408
)


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
        "x": torch.randn(batch, 3, 16, 16, generator=generator),
        "timesteps": torch.randint(0, 1000, (batch,), generator=generator),
        "tokens": torch.randint(0, VOCABULARY, (batch, 6), generator=generator),
        "mask": torch.arange(6) < torch.arange(batch)[:, None] * 3,
    }


def preset(name: str, *overrides: str) -> dict[str, Any]:
    """The model of a training preset."""
    return dict(read_values(find_config("train", name), overrides)["model"])


def counts_of(sizes: dict[str, Any]) -> tuple[int, int, int]:
    with torch.device("meta"):
        counts = parameter_counts(Glide(GlideModelConfig(**sizes)))
    return counts["total"], counts["text"], counts["visual"]


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("glide-base-3.5b", (), (3_554_414_086, 1_316_249_600, 2_238_164_486)),
        ("glide-base-3.5b", ("model.text_context=256",), (3_554_938_374, 1_316_773_888, 2_238_164_486)),
        ("glide-base-inpaint-3.5b", (), (3_554_432_518, 1_316_249_600, 2_238_182_918)),
        ("glide-upsampler-1.5b", (), (1_540_932_998, 254_841_344, 1_286_091_654)),
        ("glide-upsampler-1.5b", ("model.text_layers=24",), (1_641_702_790, 355_611_136, 1_286_091_654)),
        ("glide-upsampler-inpaint-1.5b", (), (1_540_946_822, 254_841_344, 1_286_105_478)),
        ("glide-upsampler-inpaint-1.5b", ("model.text_layers=24",), (1_641_716_614, 355_611_136, 1_286_105_478)),
        ("glide-base-released", (), (385_030_726, 76_695_808, 308_334_918)),
        ("glide-base-inpaint-released", (), (385_037_638, 76_695_808, 308_341_830)),
        ("glide-upsampler-released", (), (398_361_286, 76_695_808, 321_665_478)),
        ("glide-upsampler-inpaint-released", (), (398_368_198, 76_695_808, 321_672_390)),
    ],
)
def test_presets_have_the_published_parameter_counts(
    name: str, overrides: tuple[str, ...], expected: tuple[int, int, int]
) -> None:
    assert counts_of(preset(name, *overrides)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("noised-clip-b4", (158_123_264, 71_679_488, 86_443_776)),
        ("noised-clip-l4", (440_439_040, 136_027_392, 304_411_648)),
    ],
)
def test_noised_clip_presets_have_the_published_parameter_counts(name: str, expected: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        counts = NoisedClip(NoisedClipConfig(**preset(name))).parameter_counts()
    assert (counts["total"], counts["text"], counts["visual"]) == expected


def visual_parameters(config: GlideModelConfig) -> int:
    """The U-Net's parameters by arithmetic, from the description of ADM's and GLIDE's blocks."""
    embedding, text = 4 * config.channels, config.text_width

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    def residual(inputs: int, outputs: int) -> int:
        skip = 0 if inputs == outputs else linear(inputs, outputs)
        convolutions = 9 * inputs * outputs + 9 * outputs**2 + 2 * outputs
        return 2 * inputs + 2 * outputs + convolutions + linear(embedding, 2 * outputs) + skip

    def attention(width: int) -> int:
        return 2 * width + linear(width, 3 * width) + linear(text, 2 * width) + linear(width, width)

    widths = [config.channels * mult for mult in config.channel_mult]
    attends = [side in config.attention_resolutions for side in config.resolutions]
    total = linear(config.channels, embedding) + linear(embedding, embedding)
    total += 9 * config.in_channels * widths[0] + widths[0]  # the first convolution
    total += 2 * widths[0] + 9 * widths[0] * config.out_channels + config.out_channels  # the head
    skips, width = [widths[0]], widths[0]
    for level, wide in enumerate(widths):
        for _ in range(config.res_blocks):
            total += residual(width, wide) + attends[level] * attention(wide)
            width = wide
            skips.append(width)
        if level < len(widths) - 1:
            total += residual(width, width)
            skips.append(width)
    total += 2 * residual(width, width) + attention(width)
    for level, wide in reversed(list(enumerate(widths))):
        for _ in range(config.res_blocks + 1):
            total += residual(width + skips.pop(), wide) + attends[level] * attention(wide)
            width = wide
        if level:
            total += residual(width, width)
    assert not skips
    return total


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("glide-base-3.5b", {}),
        ("glide-base-3.5b", {"channels": 320}),
        ("glide-upsampler-inpaint-1.5b", {"channels": 320, "learned_variance": False}),
        ("glide-upsampler-1.5b", {"channel_mult": (1, 2, 3, 4), "attention_resolutions": (64,), "res_blocks": 4}),
        ("small-base-inpaint", {}),
        ("small-upsampler", {"text_width": 96}),
    ],
)
def test_sizes_that_stand_in_no_table_are_counted_as_by_hand(name: str, change: dict[str, Any]) -> None:
    sizes = preset(name) | change
    config = GlideModelConfig(**sizes)
    width, layers = config.text_width, config.text_layers
    blocks = layers * (12 * width**2 + 13 * width)
    text_parameters = blocks + 2 * width + (VOCABULARY + 2 * config.text_context) * width
    text_parameters += width * 4 * config.channels + 4 * config.channels
    visual = visual_parameters(config)
    assert counts_of(sizes) == (text_parameters + visual, text_parameters, visual)


def test_flops_can_be_counted_without_memory() -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = Glide(GlideModelConfig(**preset("glide-base-released")))
        mask = torch.empty(1, 128, dtype=torch.bool)
        output = model(torch.empty(1, 3, 64, 64), torch.empty(1), tokens=mask.long(), mask=mask)
    assert output.shape == (1, 6, 64, 64)
    assert round(counter.get_total_flops() / 1e9) == 238


def test_a_fresh_network_predicts_zero() -> None:
    model = Glide(GlideModelConfig(**TINY))
    output = model(**inputs())
    assert output.shape == (2, 6, 16, 16)
    assert not output.any()


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """torch.empty gives NaN, so that a parameter which nobody initialises shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize("kind", ["base", "upsampler", "inpainting", "clip"])
def test_every_parameter_is_initialised_and_from_the_seed_alone(kind: str) -> None:
    def build() -> dict[str, Tensor]:
        torch.manual_seed(7)
        changes = {"upsampler": {"low_resolution": 8}, "inpainting": {"inpaint": True}}.get(kind, {})
        model = NoisedClip(TINY_CLIP) if kind == "clip" else Glide(GlideModelConfig(**{**TINY, **changes}))
        return dict(model.named_parameters())

    first, second = build(), build()
    assert [name for name, values in first.items() if not values.isfinite().all()] == []
    assert all(torch.equal(values, second[name]) for name, values in first.items())


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
    output = model.denoise(given_inputs["x"], given_inputs["timesteps"], **encoded._asdict())
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


def test_a_model_with_fixed_variance_predicts_three_channels() -> None:
    fixed = tiny(learned_variance=False)
    assert fixed(**inputs()).shape == (2, 3, 16, 16)


def test_an_upsampler_sees_its_low_resolution_image_whatever_its_size() -> None:
    model = tiny(low_resolution=8)
    dark, light = (model(**inputs(), low_res=torch.full((2, 3, 8, 8), level)) for level in (-1.0, 1.0))
    assert not torch.allclose(dark, light)
    # A plane is the same at every size; the network only sees the enlarged image.
    torch.testing.assert_close(model(**inputs(), low_res=torch.ones(2, 3, 4, 4)), light)


def first_input(model: Glide, **conditions: Any) -> Tensor:
    """What the first convolution reads."""
    seen: list[Tensor] = []
    with model.input_blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        model(**inputs(), **conditions)
    return seen[0]


def test_the_inputs_are_noised_image_known_pixels_mask_and_enlarged_image() -> None:
    image, low_res = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 8, 8)
    mask = (torch.rand(2, 1, 16, 16) < 0.5).float()
    x, known = inputs()["x"], image * mask
    enlarged = nn.functional.interpolate(low_res, (16, 16), mode="bilinear", align_corners=False)
    painting = {"inpaint_image": image, "inpaint_mask": mask}

    assert torch.equal(first_input(tiny()), x)
    assert torch.equal(first_input(tiny(low_resolution=8), low_res=low_res), torch.cat([x, enlarged], 1))
    assert torch.equal(first_input(tiny(inpaint=True), **painting), torch.cat([x, known, mask], 1))
    both = first_input(tiny(inpaint=True, low_resolution=8), low_res=low_res, **painting)
    assert torch.equal(both, torch.cat([x, known, mask, enlarged], 1))


def test_what_inpainting_is_not_given_is_zero() -> None:
    model, image, mask = tiny(inpaint=True), torch.rand(2, 3, 16, 16), torch.ones(2, 1, 16, 16)
    nothing = first_input(model)
    assert not nothing[:, 3:].any()
    assert torch.equal(first_input(model, inpaint_image=image), nothing)  # without a mask nothing is known
    assert torch.equal(first_input(model, inpaint_mask=mask)[:, 3:6], torch.zeros(2, 3, 16, 16))
    erased = first_input(model, inpaint_image=image, inpaint_mask=torch.zeros_like(mask))
    assert torch.equal(erased, nothing)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**16), known=st.floats(0, 1))
@pytest.mark.parametrize("kind", ["base", "upsampler"])
def test_channel_surgery_leaves_the_output_as_it_was_for_any_image_and_mask(
    kind: Literal["base", "upsampler"], seed: int, known: float
) -> None:
    parent, child = parent_and_child(kind)
    child.load_state_dict(inpaint_surgery(parent.state_dict(), kind))
    given_inputs, conditions, painting = surgery_inputs(kind, seed, known)
    expected = parent(**given_inputs, **conditions)
    torch.testing.assert_close(child(**given_inputs, **conditions, **painting), expected, rtol=0, atol=1e-6)


def test_zeros_behind_an_upsamplers_channels_would_change_its_output() -> None:
    parent, child = parent_and_child("upsampler")
    state = parent.state_dict()
    weight = state[FIRST_CONVOLUTION]
    appended = torch.cat([weight, weight.new_zeros(len(weight), 4, 3, 3)], dim=1)
    child.load_state_dict({**state, FIRST_CONVOLUTION: appended})
    given_inputs, conditions, painting = surgery_inputs("upsampler", seed=0, known=0.5)
    difference = child(**given_inputs, **conditions, **painting) - parent(**given_inputs, **conditions)
    assert difference.abs().max() > 0.1


@functools.cache
def parent_and_child(kind: str) -> tuple[Glide, Glide]:
    upsampling = {"low_resolution": 8} if kind == "upsampler" else {}
    return tiny(**upsampling), tiny(seed=1, inpaint=True, **upsampling)


def surgery_inputs(
    kind: str, seed: int, known: float
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    conditions = {"low_res": torch.rand(2, 3, 8, 8, generator=generator)} if kind == "upsampler" else {}
    image = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    mask = (torch.rand(2, 1, 16, 16, generator=generator) < known).float()
    return inputs(seed=seed), conditions, {"inpaint_image": image, "inpaint_mask": mask}


def test_surgery_needs_a_parent_of_that_kind_and_works_without_values() -> None:
    with torch.device("meta"):
        state = Glide(GlideModelConfig(**TINY)).state_dict()
        child = Glide(GlideModelConfig(**TINY, inpaint=True)).state_dict()
    operated = inpaint_surgery(state, "base")
    assert {key: value.shape for key, value in operated.items()} == {key: value.shape for key, value in child.items()}
    with pytest.raises(ValueError, match=r"upsampler parent: expected 6 input channels, found shape \[32, 3, 3, 3\]"):
        inpaint_surgery(state, "upsampler")
    with pytest.raises(ValueError, match=r"expected 3 input channels, found shape \[32, 7, 3, 3\]"):
        inpaint_surgery(operated, "base")
    with pytest.raises(ValueError, match="expected 3 input channels, found none"):
        inpaint_surgery({}, "base")


@pytest.mark.parametrize(
    ("sizes", "change", "message"),
    [
        ({}, {"tokens": torch.zeros(2, 7).long()}, r"tokens: expected shape \[2, 6\], found \[2, 7\]"),
        ({}, {"mask": torch.ones(2, 5) > 0}, r"mask: expected shape \[2, 6\], found \[2, 5\]"),
        (
            {},
            {"x": torch.zeros(2, 3, 15, 16)},
            r"x: expected shape .* sides divisible by 2, found \[2, 3, 15, 16\]",
        ),
        ({}, {"x": torch.zeros(2, 6, 16, 16)}, r"x: expected shape \[B, 3, H, W\]"),
        ({}, {"low_res": torch.zeros(2, 3, 8, 8)}, "low_res: expected none"),
        ({}, {"inpaint_mask": torch.zeros(2, 1, 16, 16)}, "expected none .model.inpaint is false., found a tensor"),
        ({"low_resolution": 8}, {}, r"low_res: expected \[2, 3, 8, 8\], found none"),
        ({"low_resolution": 8}, {"low_res": torch.zeros(2, 3, 32, 32)}, "and no larger, found .2, 3, 32, 32."),
        ({"low_resolution": 8}, {"low_res": torch.zeros(2, 3, 8, 4)}, "of the proportions of x"),
        ({"low_resolution": 8}, {"low_res": torch.zeros(1, 3, 8, 8)}, "found .1, 3, 8, 8."),
        ({"low_resolution": 8}, {"low_res": torch.zeros(3, 8, 8)}, "found .3, 8, 8."),
        (
            {"inpaint": True},
            {"inpaint_mask": torch.zeros(2, 3, 16, 16)},
            r"inpaint_mask: expected shape \[2, 1, 16, 16\], found \[2, 3, 16, 16\]",
        ),
        ({"inpaint": True}, {"inpaint_image": torch.zeros(2, 3, 8, 8)}, "inpaint_image: expected shape"),
    ],
)
def test_conditions_of_another_shape_are_refused_in_one_line(
    sizes: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        tiny(**sizes)(**{**inputs(), **change})
    assert "\n" not in str(refusal.value)


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
