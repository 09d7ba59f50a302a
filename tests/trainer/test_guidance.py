"""Guidance, clipping and editing: by gradients that are known, in their stated order, to the exact pixel."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import (
    SAMPLERS,
    THREE,
    TWO_DIMENSIONS,
    UNCLIPPED,
    Mixture,
    component_probability,
    noise_like,
    randn,
    whole_process,
)
from torch import Tensor, nn

from trainer.diffusion.editing import pinned, sdedit_start
from trainer.diffusion.guidance import classifier_guidance, clip_guidance, guided
from trainer.diffusion.samplers import SamplerName, sample, sample_steps
from trainer.diffusion.steps import Clip, StepOptions, dynamic_threshold

# Guidance


def one_component(component: int) -> Mixture:
    return Mixture(THREE.means_KD[component : component + 1], torch.ones(1).double(), THREE.spread)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "dpm++sde"])
def test_the_gradient_of_a_classifier_turns_the_score_into_the_conditional_one(sampler: SamplerName) -> None:
    process = whole_process()
    x = randn(1, (400, *TWO_DIMENSIONS))
    pull = classifier_guidance(component_probability(process, 2), 1.0)
    shorter, options = process.respaced("40"), StepOptions(clip="none", gradient=pull)
    found = sample(sampler, THREE.denoise(process), shorter, x, noise_like(x), options=options)
    expected = sample(sampler, one_component(2).denoise(process), shorter, x, noise_like(x), options=UNCLIPPED)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


def test_ancestral_sampling_with_a_classifier_draws_its_class_and_a_larger_scale_more_surely() -> None:
    process = whole_process()
    x = randn(2, (500, *TWO_DIMENSIONS))
    surety = []
    for scale in (0.0, 1.0, 3.0):
        pull = classifier_guidance(component_probability(process, 2), scale)
        options = StepOptions(clip="none", gradient=pull)
        found = sample("ancestral", THREE.denoise(process), process.respaced("200"), x, noise_like(x), options=options)
        surety.append(THREE.log_responsibilities(found.double(), 1.0).exp()[:, 2].mean().item())
        if scale == 1.0:
            torch.testing.assert_close(found.flatten(1).mean(dim=0), THREE.means_KD[2].float(), rtol=0, atol=0.05)
            assert found.std(dim=0).mean().item() == pytest.approx(THREE.spread, rel=0.1)
    assert surety[0] == pytest.approx(0.2, abs=0.05)
    assert surety == sorted(surety) and surety[2] > surety[1] + 0.05


class SmallImageEncoder(nn.Module):
    """Features of an image and its timestep; any differentiable function does."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.net(x) + 0.001 * timesteps[:, None]


def test_the_clip_gradient_agrees_with_finite_differences_of_the_scaled_cosine() -> None:
    encoder, text, t = SmallImageEncoder(), randn(3, (4, 5)) * 7, torch.tensor([3, 50, 500, 999])
    x, scale, logit_scale = randn(4, (4, 3, 2, 2)), 2.5, 20.0
    with torch.no_grad():  # as samplers call it
        found = clip_guidance(encoder, text, logit_scale, scale)(x, t)

        def similarity(moved: Tensor) -> Tensor:
            return logit_scale * torch.cosine_similarity(encoder.double()(moved, t), text.double(), dim=-1)

        expected = torch.empty_like(found)
        for place in range(12):
            step = torch.zeros(12, dtype=torch.float64).index_fill(0, torch.tensor(place), 1e-5).view(1, 3, 2, 2)
            slope = (similarity(x.double() + step) - similarity(x.double() - step)) / 2e-5
            expected.view(4, 12)[:, place] = scale * slope.float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not found.requires_grad and all(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize("learned", [True, False])
def test_classifier_free_guidance_moves_the_prediction_and_leaves_a_learned_variance(learned: bool) -> None:
    def model(x: Tensor, t: Tensor, *, level: Tensor) -> Tensor:
        return torch.cat([x * level, x + level], dim=1) if learned else x * level

    x, t = randn(0, (2, 3, 4, 4)), torch.tensor([3, 3])
    high, low = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), 0.5)
    found = guided(model, 3.0, {"level": high}, {"level": low})(x, t)
    torch.testing.assert_close(found[:, :3], x * 0.5 + 3.0 * (x * 2.0 - x * 0.5))
    assert found.shape[1] == (6 if learned else 3)
    if learned:
        torch.testing.assert_close(found[:, 3:], x + 2.0)


# Clipping


@given(size=st.floats(0.01, 50), percentile=st.floats(0.5, 1), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_dynamic_threshold_keeps_what_fits_scales_what_does_not_and_looks_at_one_sample_alone(
    size: float, percentile: float, seed: int
) -> None:
    x = randn(seed, (3, 2, 5, 5))
    x[1] = x[1] / x[1].abs().max() * 0.99
    x[2] *= size
    found = dynamic_threshold(x, percentile)
    assert found.abs().max() <= 1
    assert torch.equal(found[1], x[1])
    assert torch.equal(found[2:], dynamic_threshold(x[2:], percentile))
    threshold = max(1.0, float(np.quantile(x[2].abs().double().numpy(), percentile)))
    expected = x[2].clamp(-threshold, threshold) / threshold
    torch.testing.assert_close(found[2], expected, rtol=1e-4, atol=1e-5)


def test_clipping_is_static_dynamic_or_none_and_acts_in_the_stated_order() -> None:
    process, x = whole_process("cosine").respaced("5"), randn(0, (2, 3, 4, 4))

    def first_image(clip: Clip, **more: Callable[[Tensor], Tensor]) -> Tensor:
        options = StepOptions(clip=clip, percentile=0.9, **more)  # type: ignore[arg-type]
        return next(sample_steps("ddim", lambda x, t: -x, process, x, options=options)).x_start_BCHW

    free = first_image("none")
    assert free.abs().max() > 1
    assert torch.equal(first_image("static"), free.clamp(-1, 1))
    assert torch.equal(first_image("dynamic"), dynamic_threshold(free, 0.9))
    assert torch.equal(first_image("static", process_x_start=lambda x: x + 0.5), (free + 0.5).clamp(-1, 1))
    assert torch.equal(first_image("dynamic", process_x_start=lambda x: x + 0.5), dynamic_threshold(free, 0.9) + 0.5)
    with pytest.raises(ValueError, match="expected static, dynamic or none, found 'hard'"):
        first_image("hard")  # type: ignore[arg-type]


# Editing


@pytest.mark.parametrize("clip", ["static", "dynamic", "none"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pinned_pixels_come_out_exactly_equal(sampler: SamplerName, clip: Clip) -> None:
    process = whole_process().respaced("7")
    x, known = randn(0, (2, 3, 4, 4)), torch.tanh(randn(1, (2, 3, 4, 4)))
    mask = (randn(2, (2, 1, 4, 4)) > 0).float()
    options = StepOptions(clip=clip, process_x_start=pinned(known, mask))
    found = sample(sampler, lambda x, t: -0.5 * x, process, x, noise_like(x), options=options)
    where = mask.bool().expand_as(found)
    assert torch.equal(found[where], known[where])
    assert not torch.isclose(found[~where], known[~where]).any()


def test_a_mask_of_another_size_is_refused() -> None:
    known = torch.zeros(2, 3, 4, 4)
    for shape in ((2, 1, 4, 5), (2, 3, 4, 4), (1, 1, 4, 4)):
        with pytest.raises(ValueError, match="mask: expected"):
            pinned(known, torch.zeros(shape))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_edit_of_strength_0_is_the_image_of_1_the_noise_alone_and_between_it_moves_away(
    sampler: SamplerName,
) -> None:
    process = whole_process("cosine")
    shorter, images = process.respaced("50"), THREE.draw(400, TWO_DIMENSIONS)
    noise = randn(8, tuple(images.shape))

    def edited(strength: float) -> Tensor:
        x, start_index = sdedit_start(shorter, images, strength, noise)
        return sample(
            sampler, THREE.denoise(process), shorter, x, noise_like(x), start_index=start_index, options=UNCLIPPED
        )

    assert torch.equal(edited(0.0), images)
    alone = sample(sampler, THREE.denoise(process), shorter, noise, noise_like(noise), options=UNCLIPPED)
    assert torch.equal(edited(1.0), alone)
    distances = [float((edited(strength) - images).abs().mean()) for strength in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert distances == sorted(distances) and distances[2] < 0.9 * distances[4]


def test_the_strength_of_an_edit_is_a_time_whatever_the_respacing() -> None:
    image, noise = randn(0, (2, 3, 4, 4)), randn(1, (2, 3, 4, 4))
    for spacing, last in (("100", 494), ("fast27", 400), ("ddim50", 480)):
        process = whole_process().respaced(spacing)
        x, index = sdedit_start(process, image, 0.5, noise)
        assert process.timestep_map[index] == last
        bar = process.alphas_cumprod[index]
        torch.testing.assert_close(x, math.sqrt(bar) * image + math.sqrt(1 - bar) * noise)
    for strength in (-0.1, 1.1):
        with pytest.raises(ValueError, match="strength: expected 0"):
            sdedit_start(process, image, strength, noise)
