"""The diffusion process and its samplers against closed forms and brute force."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.diffusion.gaussian import Diffusion
from trainer.diffusion.guidance import guided
from trainer.diffusion.respacing import spaced_timesteps
from trainer.diffusion.samplers import ancestral_steps, ddim_steps, sample
from trainer.diffusion.schedules import BetaSchedule, betas
from trainer.diffusion.steps import StepOptions

SCHEDULES: tuple[BetaSchedule, ...] = ("cosine", "linear", "sqrt_linear")
FAST27 = [0, 22, 44, 66, 88, 111, 133, 155, 177, 199, 200, 222, 244, 266, 288, 311, 333, 355, 377, 399]
FAST27 += [400, 500, 599, 600, 799, 800, 997]
SHAPE = (2, 3, 4, 4)


def randn(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(seed: int) -> Tensor:
    """8-bit values on [-1, 1]."""
    return (randn(seed).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1


def oracle(process: Diffusion, x_start: Tensor, variance: float = 0.0):  # type: ignore[no-untyped-def]
    """A network that always finds the noise between its input and `x_start`."""

    def denoise(x: Tensor, original: Tensor) -> Tensor:
        index = torch.from_numpy(np.searchsorted(process.timestep_map, original.numpy()))
        return torch.cat([process.eps_from_xstart(x, index, x_start), torch.full_like(x, variance)], dim=1)

    return denoise


# Schedules and respacing


@given(schedule=st.sampled_from(SCHEDULES), steps=st.integers(1, 2000))
@settings(max_examples=60, deadline=None)
def test_betas_lie_between_0_and_1_and_all_tables_are_finite_for_any_number_of_steps(
    schedule: BetaSchedule, steps: int
) -> None:
    process = Diffusion.from_schedule(schedule, steps)
    assert process.steps == len(process.betas) == steps
    assert ((process.betas > 0) & (process.betas < 1)).all()
    tables = [value for value in vars(process).values() if isinstance(value, np.ndarray)]
    assert len(tables) > 10
    assert all(np.isfinite(table).all() for table in tables)


def test_an_unknown_schedule_or_an_empty_process_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of cosine, linear, sqrt_linear, found 'sigmoid'"):
        betas("sigmoid", 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected at least 1, found 0"):
        betas("linear", 0)


def test_the_square_roots_of_sqrt_linear_are_evenly_spaced_between_the_published_ends() -> None:
    published = betas("sqrt_linear", 1000)
    assert published[[0, -1]] == pytest.approx([0.00085, 0.012], rel=1e-12)
    assert np.diff(np.sqrt(published)) == pytest.approx(np.full(999, np.diff(np.sqrt(published)).mean()))
    assert betas("sqrt_linear", 250).sum() == pytest.approx(published.sum(), rel=0.01)


@given(steps=st.integers(1, 1200), counts=st.lists(st.integers(1, 40), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_sections_keep_exactly_the_timesteps_asked_of_them_in_ascending_order(steps: int, counts: list[int]) -> None:
    spacing = ",".join(map(str, counts))
    sizes = [len(part) for part in np.array_split(np.arange(steps), len(counts))]
    if any(count > size for count, size in zip(counts, sizes, strict=True)):
        with pytest.raises(ValueError, match="asked of it"):
            spaced_timesteps(steps, spacing)
        return
    kept = spaced_timesteps(steps, spacing)
    assert (np.diff(kept) > 0).all() and kept[0] == 0 and kept[-1] < steps
    edges = np.cumsum([0, *sizes])
    assert [int(((kept >= low) & (kept < high)).sum()) for low, high in pairwise(edges)] == counts
    if counts[-1] > 1:
        assert kept[-1] == steps - 1


@given(steps=st.integers(1, 1000), stride=st.integers(1, 1000))
def test_ddim_spacing_is_an_integer_stride_from_0(steps: int, stride: int) -> None:
    count = len(range(0, steps, stride))
    kept = spaced_timesteps(steps, f"ddim{count}")
    assert len(kept) == count and kept[0] == 0
    assert len(set(np.diff(kept).tolist())) <= 1


def test_fast27_takes_the_last_timestep_two_earlier() -> None:
    assert spaced_timesteps(1000, "fast27").tolist() == FAST27
    assert spaced_timesteps(1000, "10,10,3,2,2").tolist() == [*FAST27[:-1], 999]


@pytest.mark.parametrize("spacing", ["", "0", "-3", "ten", "10,,3", "ddim", "ddim10,10", "fast", "1001", "ddim999"])
def test_a_spacing_that_cannot_be_is_refused(spacing: str) -> None:
    with pytest.raises(ValueError, match="respacing"):
        spaced_timesteps(1000, spacing)


@pytest.mark.parametrize("spacing", ["fast27", "50", "ddim25", "1"])
def test_a_respaced_process_has_the_marginals_of_the_original_at_its_timesteps(spacing: str) -> None:
    original = Diffusion.from_schedule("cosine")
    shorter = original.respaced(spacing)
    kept = spaced_timesteps(1000, spacing)
    np.testing.assert_allclose(shorter.alphas_cumprod, original.alphas_cumprod[kept], rtol=1e-9)
    indices = torch.arange(shorter.steps)
    assert shorter.original_timesteps(indices).tolist() == kept.tolist()


def test_respacing_twice_still_tells_the_timesteps_of_the_original() -> None:
    twice = Diffusion.from_schedule("linear").respaced("ddim100").respaced("ddim10")
    assert twice.timestep_map.tolist() == list(range(0, 1000, 100))


# The process


@given(schedule=st.sampled_from(SCHEDULES), t=st.integers(1, 998), x0=st.floats(-1, 1), x_t=st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_the_posterior_is_the_product_of_its_two_gaussians(
    schedule: BetaSchedule, t: int, x0: float, x_t: float
) -> None:
    process = Diffusion.from_schedule(schedule)
    beta, before = process.betas[t], process.alphas_cumprod_prev[t]
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = (math.sqrt(1 - beta) * x_t / beta + math.sqrt(before) * x0 / (1 - before)) / precision
    ones = torch.ones(1, 1, 1, 1)
    posterior = process.q_posterior_mean_variance(x0 * ones, x_t * ones, torch.tensor([t]))
    assert posterior.variance.item() == pytest.approx(1 / precision, rel=1e-5)
    assert posterior.log_variance.item() == pytest.approx(-math.log(precision), rel=1e-5)
    assert posterior.mean.item() == pytest.approx(mean, rel=1e-4, abs=1e-5)


def test_noise_and_image_are_recovered_from_each_other() -> None:
    process = Diffusion.from_schedule("linear")
    t, x_start, noise = torch.tensor([3, 700]), image(0), randn(1)
    noised = process.q_sample(x_start, t, noise)
    torch.testing.assert_close(process.predict_xstart_from_eps(noised, t, noise), x_start, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(process.eps_from_xstart(noised, t, x_start), noise, rtol=1e-3, atol=1e-3)


def test_the_predicted_variance_runs_from_the_posterior_to_beta() -> None:
    process = Diffusion.from_schedule("cosine")
    t, x = torch.tensor([0, 600]), randn(0)
    for position, table in ((-1.0, "posterior_log_variance_clipped"), (1.0, "log_betas")):
        output = torch.cat([randn(1), torch.full(SHAPE, position)], dim=1)
        step = process.p_mean_variance(output, x, t)
        torch.testing.assert_close(step.log_variance, process.at(table, t).expand(SHAPE))
        torch.testing.assert_close(step.variance, step.log_variance.exp())


def test_a_predicted_image_is_processed_before_it_is_clipped() -> None:
    process = Diffusion.from_schedule("cosine")
    t, output = torch.tensor([999, 500]), torch.cat([randn(1), randn(2)], dim=1)
    free = process.p_mean_variance(output, randn(0), t, clip_denoised=False)
    clipped = process.p_mean_variance(output, randn(0), t)
    pinned = process.p_mean_variance(output, randn(0), t, process_x_start=lambda x: torch.full_like(x, 5.0))
    assert free.x_start.abs().max() > 1
    assert torch.equal(clipped.x_start, free.x_start.clamp(-1, 1))
    assert torch.equal(pinned.x_start, torch.ones(SHAPE))


# Samplers


@given(spacing=st.sampled_from(["1", "4", "ddim10", "fast27"]), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_ddim_without_eta_ends_at_the_image_that_the_network_sees(spacing: str, seed: int) -> None:
    process = Diffusion.from_schedule("linear").respaced(spacing)
    found = sample("ddim", oracle(process, image(seed)), process, randn(seed + 1))
    torch.testing.assert_close(found, image(seed), rtol=1e-3, atol=1e-3)


def test_a_ddim_step_without_eta_is_deterministic_and_follows_its_equation() -> None:
    process = Diffusion.from_schedule("cosine").respaced("10")
    x, output = randn(0), randn(1, (2, 6, 4, 4))

    def refuse(step_index: int) -> Tensor:
        raise AssertionError(f"noise asked for at step {step_index}")

    first, again = (next(ddim_steps(lambda x, t: output, process, x, noise=refuse)) for _ in range(2))
    assert torch.equal(first.x_BCHW, again.x_BCHW)
    t = torch.full((2,), 9)
    x_start = process.predict_xstart_from_eps(x, t, output[:, :3]).clamp(-1, 1)
    before = process.alphas_cumprod_prev[9]
    expected = math.sqrt(before) * x_start + math.sqrt(1 - before) * process.eps_from_xstart(x, t, x_start)
    assert first.step_index == 9
    torch.testing.assert_close(first.x_BCHW, expected)


def test_ddim_with_eta_1_and_ancestral_sampling_with_the_posterior_variance_are_one_sampler() -> None:
    process = Diffusion.from_schedule("linear").respaced("20")
    denoise = oracle(process, image(0), variance=-1.0)
    ddim = sample("ddim", denoise, process, randn(7), eta=1.0, noise=lambda index: randn(100 + index))
    ancestral = sample("ancestral", denoise, process, randn(7), lambda index: randn(100 + index))
    torch.testing.assert_close(ddim, ancestral, rtol=1e-3, atol=1e-3)


def test_ddim_with_eta_refuses_to_run_without_noise() -> None:
    process = Diffusion.from_schedule("linear").respaced("3")
    with pytest.raises(ValueError, match="expected a source of noise"):
        sample("ddim", oracle(process, image(0)), process, randn(0), eta=0.5)


def test_the_network_is_told_original_timesteps_and_noise_is_asked_for_once_per_step_but_the_last() -> None:
    process = Diffusion.from_schedule("cosine").respaced("fast27")
    told: list[int] = []
    asked: list[int] = []

    def denoise(x: Tensor, original: Tensor) -> Tensor:
        told.append(int(original[0]))
        return torch.zeros(2, 6, 4, 4)

    def noise(step_index: int) -> Tensor:
        asked.append(step_index)
        return randn(step_index)

    steps = list(ancestral_steps(denoise, process, randn(0), noise))
    assert told == FAST27[::-1]
    assert asked == list(range(26, 0, -1))
    assert [step.step_index for step in steps] == list(range(26, -1, -1))


def test_sampling_touches_no_global_generator_and_records_no_gradient() -> None:
    process = Diffusion.from_schedule("linear").respaced("3")
    weight = torch.zeros(2, 6, 4, 4, requires_grad=True)
    before = torch.get_rng_state()
    found = sample("ancestral", lambda x, t: weight * 1, process, randn(0), randn)
    assert torch.equal(torch.get_rng_state(), before)
    assert not found.requires_grad


def test_a_gradient_shifts_the_ancestral_mean_by_the_variance_and_the_ddim_noise_by_its_scale() -> None:
    process = Diffusion.from_schedule("linear").respaced("5")
    x, pull, t = randn(0), randn(2), torch.full((2,), 4)
    output = torch.cat([randn(1), randn(3)], dim=1)
    options = StepOptions(clip="none", gradient=lambda x, original: pull)
    plain = process.p_mean_variance(output, x, t, clip_denoised=False)

    still = torch.zeros(SHAPE)
    ancestral = next(ancestral_steps(lambda x, t: output, process, x, lambda index: still, options=options))
    torch.testing.assert_close(ancestral.x_BCHW, plain.mean + plain.variance * pull)

    pulled = torch.cat([output[:, :3] - math.sqrt(1 - process.alphas_cumprod[4]) * pull, output[:, 3:]], dim=1)
    unclipped = StepOptions(clip="none")
    expected = next(ddim_steps(lambda x, t: pulled, process, x, options=unclipped))
    found = next(ddim_steps(lambda x, t: output, process, x, options=options))
    torch.testing.assert_close(found.x_BCHW, expected.x_BCHW, rtol=1e-3, atol=1e-4)


def test_guidance_runs_the_model_once_with_the_conditional_half_first() -> None:
    batches: list[list[float]] = []

    def model(x: Tensor, t: Tensor, *, level: Tensor) -> Tensor:
        batches.append(level.flatten().tolist())
        return torch.cat([x, x], dim=1)

    guided(model, 3.0, {"level": torch.ones(2)}, {"level": torch.zeros(2)})(randn(0), torch.tensor([0, 0]))
    assert batches == [[1, 1, 0, 0]]
    with pytest.raises(ValueError, match="expected equal keywords"):
        guided(model, 3.0, {"level": torch.ones(2)}, {"depth": torch.ones(2)})
