"""Samplers on mixtures of Gaussians: accuracy, statistics, the way back, and what holds for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from mixtures import (
    ONE,
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
from torch import Tensor

from trainer.diffusion.dpm_solver import dpm_solver_steps
from trainer.diffusion.gaussian import Diffusion
from trainer.diffusion.guidance import classifier_guidance
from trainer.diffusion.samplers import SamplerName, ancestral_steps, ddim_inversion, sample, sample_steps
from trainer.diffusion.schedules import BetaSchedule
from trainer.diffusion.steps import Clip, StepOptions

# Accuracy


def probability_flow(mixture: Mixture, process: Diffusion, x: Tensor, index: int, *, steps: int = 500) -> Tensor:
    """x / alpha along d(x / alpha) = eps d(sigma / alpha), by Runge-Kutta of order 4 from `index` to the image."""
    sigmas = [math.sqrt(1 / float(process.alphas_cumprod[at]) - 1) for at in (index, 0)]
    start, length = math.log(sigmas[0]), math.log(sigmas[1] / sigmas[0]) / steps

    def slope(point: Tensor, log_sigma: float) -> Tensor:
        sigma = math.exp(log_sigma)
        bar = 1 / (1 + sigma**2)
        return sigma * mixture.eps(math.sqrt(bar) * point, bar)

    point = x.double() * math.sqrt(1 + sigmas[0] ** 2)
    for step in range(steps):
        at = start + step * length
        first = slope(point, at)
        second = slope(point + first * (length / 2), at + length / 2)
        third = slope(point + second * (length / 2), at + length / 2)
        fourth = slope(point + third * length, at + length)
        point = point + (first + 2 * second + 2 * third + fourth) * (length / 6)
    return point - sigmas[1] * mixture.eps(
        point * math.sqrt(float(process.alphas_cumprod[0])), process.alphas_cumprod[0]
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_dpm_solver_is_of_second_order_where_ddim_is_of_first(schedule: BetaSchedule) -> None:
    process = whole_process(schedule, 20_000)
    x, start, counts = randn(0, (64, *TWO_DIMENSIONS)), 16_000, [20, 40, 80, 160]
    truth = probability_flow(THREE, process, x, start)

    def error(sampler: SamplerName, count: int) -> float:
        shorter = process.respaced(f"ddim{count}")
        first = int(np.searchsorted(shorter.timestep_map, start))
        assert shorter.timestep_map[first] == start
        found = sample(sampler, THREE.denoise(process), shorter, x, start_index=first, options=UNCLIPPED)
        return float((found - truth).square().mean().sqrt())

    def order(errors: list[float]) -> float:
        return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])

    solver, ddim = ([error(sampler, count) for count in counts] for sampler in ("dpm++", "ddim"))
    assert order(solver) >= 1.8
    assert 0.8 < order(ddim) < 1.2
    assert all(fine < 0.6 * coarse for fine, coarse in zip(solver, ddim, strict=True))


@pytest.mark.parametrize("spacing", ["20", "fast27", "50"])
def test_dpm_solver_is_nearer_to_the_truth_than_ddim_and_steady_where_the_network_errs(spacing: str) -> None:
    process = whole_process()
    shorter, x = process.respaced(spacing), randn(0, (256, *TWO_DIMENSIONS))
    truth = probability_flow(THREE, process, x, int(shorter.timestep_map[-1]), steps=300)
    exact = THREE.denoise(process)

    def error(sampler: SamplerName, level: float) -> float:
        noise = iter(range(1, 100))
        found = sample(
            sampler,
            lambda x, t: exact(x, t) + level * randn(next(noise), tuple(x.shape)),
            shorter,
            x,
            options=UNCLIPPED,
        )
        return float((found - truth).abs().mean())

    assert error("dpm++", 0.0) < 0.5 * error("ddim", 0.0)
    assert error("dpm++", 0.02) < 1.3 * error("ddim", 0.02)


@pytest.mark.parametrize(
    ("sampler", "eta", "spacing"), [("dpm++sde", 0.0, "100"), ("ddim", 0.5, "200"), ("dpm++", 0.0, "100")]
)
def test_samplers_reproduce_the_mean_and_the_variance_of_a_gaussian(
    sampler: SamplerName, eta: float, spacing: str
) -> None:
    process, target = whole_process(), ONE
    x = randn(5, (5000, 1, 1, 1))
    found = sample(
        sampler, target.denoise(process), process.respaced(spacing), x, noise_like(x), eta=eta, options=UNCLIPPED
    )
    assert found.mean().item() == pytest.approx(0.3, abs=0.01)
    assert found.std().item() == pytest.approx(0.2, rel=0.04)


def test_ancestral_sampling_with_the_right_learned_variance_needs_few_steps_for_the_variance_of_a_gaussian() -> None:
    whole = Diffusion.from_schedule("linear")
    process, exact = whole.respaced("50"), ONE.denoise(whole)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        """The noise, and where between posterior (-1) and beta (1) the true reverse variance lies."""
        index = int(np.searchsorted(process.timestep_map, int(t[0])))
        bar = process.alphas_cumprod[index]
        left = ONE.spread**2 * (1 - bar) / ONE.variance(bar)
        true = process.posterior_variance[index] + process.posterior_mean_coef1[index] ** 2 * left
        low, high = process.posterior_log_variance_clipped[index], process.log_betas[index]
        return torch.cat([exact(x, t), torch.full_like(x, 2 * (math.log(true) - low) / (high - low) - 1)], dim=1)

    x = randn(5, (20_000, 1, 1, 1))
    found = sample("ancestral", denoise, process, x, noise_like(x), options=UNCLIPPED)
    assert found.mean().item() == pytest.approx(0.3, abs=0.006)
    assert found.std().item() == pytest.approx(0.2, rel=0.03)


def test_the_sde_solver_matches_the_mixture_and_its_noise_matters() -> None:
    process = whole_process("cosine")
    x = randn(6, (4000, *TWO_DIMENSIONS))
    draws = [
        sample("dpm++sde", THREE.denoise(process), process.respaced("60"), x, noise_like(x, seed), options=UNCLIPPED)
        for seed in (1, 2)
    ]
    for found in draws:
        shares = THREE.log_responsibilities(found.double(), 1.0).exp().mean(dim=0)
        torch.testing.assert_close(shares, THREE.weights_K, rtol=0, atol=0.025)
    # The noise replaces the start altogether: DDIM's images of equal starts would be equal.
    correlation = torch.corrcoef(torch.stack([draw.flatten() for draw in draws]))[0, 1]
    assert abs(correlation) < 0.5


def test_a_coarse_process_never_turns_ddim_into_nan() -> None:
    process = whole_process("cosine").respaced("2")
    x = randn(0, (64, *TWO_DIMENSIONS))
    found = sample("ddim", lambda x, t: x, process, x, noise_like(x), eta=1.0)
    assert found.isfinite().all()


# The way back


def test_an_image_inverted_by_ddim_returns_the_more_exactly_the_more_steps_are_taken() -> None:
    process = whole_process("cosine")
    images = THREE.draw(2000, TWO_DIMENSIONS)
    denoise, errors = THREE.denoise(process), []
    for spacing in ("10", "40", "160"):
        shorter = process.respaced(spacing)
        noise = ddim_inversion(denoise, shorter, images, options=UNCLIPPED)
        back = sample("ddim", denoise, shorter, noise, options=UNCLIPPED)
        errors.append(float((back - images).abs().mean()))
    assert all(fine < 0.4 * coarse for coarse, fine in pairwise(errors))
    assert errors[-1] < 0.01
    assert noise.mean().abs() < 0.05 and noise.std().item() == pytest.approx(1, abs=0.05)


def test_an_inversion_can_stop_half_way_and_be_taken_up_there() -> None:
    process = whole_process()
    shorter, denoise, images = process.respaced("100"), THREE.denoise(process), THREE.draw(500, TWO_DIMENSIONS)
    assert torch.equal(ddim_inversion(denoise, shorter, images, end_index=-1), images)
    half = ddim_inversion(denoise, shorter, images, end_index=40, options=UNCLIPPED)
    back = sample("ddim", denoise, shorter, half, start_index=40, options=UNCLIPPED)
    assert (half - images).abs().mean() > 0.1
    assert (back - images).abs().mean() < 0.02


# What holds for every sampler


@pytest.mark.parametrize("clip", ["static", "dynamic"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_is_the_same_alone_and_in_a_batch(sampler: SamplerName, clip: Clip) -> None:
    process, count = whole_process("cosine"), 5
    pull = classifier_guidance(component_probability(process, 1), 2.0)

    def drawn(samples: list[int]) -> Tensor:
        def noise(index: int) -> Tensor:
            return torch.cat([randn(100 * index + sample, (1, *TWO_DIMENSIONS)) for sample in samples])

        # Six times the noise, so that samples reach beyond [-1, 1] and each has its own threshold.
        options = StepOptions(clip=clip, percentile=0.9, gradient=pull)
        eta = 0.5 if sampler == "ddim" else 0.0
        return sample(
            sampler, THREE.denoise(process), process.respaced("12"), 6 * noise(99), noise, eta=eta, options=options
        )

    together = drawn(list(range(count)))
    alone = torch.cat([drawn([one]) for one in range(count)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_started_in_the_middle_takes_the_steps_that_remain(sampler: SamplerName) -> None:
    process, told = whole_process().respaced("10"), []
    x = randn(0, (2, 3, 4, 4))
    asked = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        told.append(int(t[0]))
        return torch.zeros_like(x)

    def noise(index: int) -> Tensor:
        asked.append(index)
        return torch.zeros_like(x)

    steps = list(sample_steps(sampler, denoise, process, x, noise, start_index=4))
    assert [step.step_index for step in steps] == [4, 3, 2, 1, 0]
    assert told == process.timestep_map[4::-1].tolist()
    assert asked == ([] if sampler in ("ddim", "dpm++") else [4, 3, 2, 1])
    assert torch.equal(sample(sampler, denoise, process, x, noise, start_index=-1), x)
    for index in (-2, 10):
        with pytest.raises(ValueError, match="start index: expected -1 to 9"):
            sample(sampler, denoise, process, x, noise, start_index=index)


def test_what_a_sampler_cannot_do_is_refused() -> None:
    process, x = whole_process().respaced("3"), randn(0, (2, 3, 4, 4))

    def draw(sampler: SamplerName, eta: float = 0.0, source: Callable[[int], Tensor] | None = None) -> Tensor:
        return sample(sampler, lambda x, t: x, process, x, source, eta=eta)

    with pytest.raises(ValueError, match=r"sampler: expected ancestral, ddim, dpm\+\+ or dpm\+\+sde, found 'euler'"):
        draw("euler")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"eta: expected 0, as ancestral fixes its own noise, found 0\.5"):
        draw("ancestral", 0.5, noise_like(x))
    with pytest.raises(ValueError, match="expected an eta from 0 to 1, found 2"):
        draw("ddim", 2.0, noise_like(x))
    with pytest.raises(ValueError, match="source of noise"):
        draw("dpm++sde")
    with pytest.raises(ValueError, match="source of noise"):
        next(ancestral_steps(lambda x, t: x, process, x, None))
    with pytest.raises(ValueError, match="expected 0 to 1"):
        next(dpm_solver_steps(lambda x, t: x, process, x, noise_like(x), eta=1.5))
