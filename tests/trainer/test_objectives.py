"""What a network's output may mean, and the losses on it, against closed forms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.diffusion.gaussian import Diffusion, Prediction, Variance
from trainer.diffusion.likelihood import BitsPerDimension, bits_per_dimension, prior_bits_per_dimension
from trainer.diffusion.losses import (
    Objective,
    check_objective,
    diffusion_loss,
    discretized_log_likelihood,
    gaussian_kl,
    term_names,
)

SHAPE = (2, 3, 4, 4)
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
VARIANCES: tuple[Variance, ...] = get_args(Variance)
ALLOWED: list[tuple[Objective, Variance]] = [("hybrid", "learned"), ("vlb", "learned")]
ALLOWED += [(objective, variance) for objective in ("simple", "vlb") for variance in VARIANCES[1:]]  # type: ignore[misc]


def randn(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """8-bit values on [-1, 1]."""
    return (randn(seed, shape).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1


def output_for(process: Diffusion, prediction: Tensor, position: float | Tensor = 0.0) -> Tensor:
    """A network's output: the prediction, and where the process learns its variance, a position."""
    if process.variance != "learned":
        return prediction
    return torch.cat([prediction, torch.as_tensor(position).expand_as(prediction)], dim=1)


def loss_terms(
    process: Diffusion,
    output: Tensor,
    t: Tensor,
    objective: Objective = "hybrid",
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Tensor]:
    """The loss of an output on one image and noise; `change` is done to all images that go in."""
    x_start, noise = image(0), randn(1)
    x = process.q_sample(x_start, t, noise)
    return diffusion_loss(
        process,
        output,
        objective=objective,
        x_start_BCHW=change(x_start),
        x_BCHW=change(x),
        noise_BCHW=change(noise),
        timesteps_B=t,
    )


# What the output means


@given(prediction=st.sampled_from(PREDICTIONS), t=st.integers(0, 999), x0=st.floats(-1, 1), eps=st.floats(-4, 4))
@settings(max_examples=150, deadline=None)
def test_the_image_is_found_again_from_the_training_target(
    prediction: Prediction, t: int, x0: float, eps: float
) -> None:
    process = Diffusion.from_schedule("linear", prediction=prediction)
    x_start, noise, t_B = torch.full((1, 1, 1, 1), x0), torch.full((1, 1, 1, 1), eps), torch.tensor([t])
    x = process.q_sample(x_start, t_B, noise)
    target = process.training_target(x_start, t_B, noise)
    # The image is a small part of x near the end: from the noise it is known to float32's precision of x only.
    precision = 1e-6 * (1 + 5 / float(process.sqrt_alphas_cumprod[t]) if prediction == "eps" else 1 + abs(eps))
    assert process.predict_xstart(target, x, t_B).item() == pytest.approx(x0, abs=precision)
    abar = float(process.alphas_cumprod[t])
    by_hand = {"eps": eps, "x0": x0, "v": math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0}
    assert target.item() == pytest.approx(by_hand[prediction], abs=1e-5)


@pytest.mark.parametrize("spacing", [None, "25"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_a_reverse_step_does_not_depend_on_how_its_image_was_predicted(variance: Variance, spacing: str | None) -> None:
    seen, steps = image(0), {}
    for prediction in PREDICTIONS:
        process = Diffusion.from_schedule("sqrt_linear", prediction=prediction, variance=variance)
        process = process.respaced(spacing) if spacing else process
        assert (process.prediction, process.variance) == (prediction, variance)
        t = torch.tensor([0, process.steps // 2])
        x = process.q_sample(seen, t, randn(1))
        output = output_for(process, process.training_target(seen, t, process.eps_from_xstart(x, t, seen)), 0.3)
        steps[prediction] = process.p_mean_variance(output, x, t)
        assert {part.shape for part in steps[prediction]} == {SHAPE}
    for prediction, part in itertools.product(("x0", "v"), steps["eps"]._fields):
        torch.testing.assert_close(getattr(steps[prediction], part), getattr(steps["eps"], part), rtol=1e-4, atol=1e-5)


def test_fixed_variances_are_the_ends_of_the_learned_one_but_for_the_first_timestep() -> None:
    t, x = torch.tensor([0, 600]), randn(0)
    processes = {variance: Diffusion.from_schedule("cosine", variance=variance) for variance in VARIANCES}
    step = {name: process.p_mean_variance(output_for(process, randn(1)), x, t) for name, process in processes.items()}
    process = processes["learned"]
    small, large = (process.p_mean_variance(output_for(process, randn(1), end), x, t) for end in (-1.0, 1.0))
    torch.testing.assert_close(step["fixed_small"].log_variance, small.log_variance)
    torch.testing.assert_close(step["fixed_small"].variance[1], small.variance[1])
    assert not step["fixed_small"].variance[0].any()
    torch.testing.assert_close(step["fixed_large"].log_variance[1], large.log_variance[1])
    torch.testing.assert_close(step["fixed_large"].log_variance[0], small.log_variance[0])
    torch.testing.assert_close(step["fixed_large"].variance, step["fixed_large"].log_variance.exp())
    # A process of one timestep has no second one to borrow the variance from.
    lone = Diffusion.from_schedule("linear", 1, variance="fixed_large")
    assert lone.large_variance.tolist() == lone.betas.tolist()


def test_an_output_or_a_setting_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction: expected one of eps, x0, v, found 'noise'"):
        Diffusion.from_schedule("linear", prediction="noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="variance: expected one of learned, fixed_small, fixed_large, found 'big'"):
        Diffusion.from_schedule("linear", variance="big")  # type: ignore[arg-type]
    t = torch.tensor([0, 1])
    for variance, channels, expected in (("learned", 3, 6), ("fixed_small", 6, 3)):
        process = Diffusion.from_schedule("linear", variance=variance)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"expected {expected} channels .* variance {variance}, found {channels}"):
            process.p_mean_variance(randn(0, (2, channels, 4, 4)), randn(0), t)


# The objectives


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("objective", "variance"), ALLOWED)
def test_the_right_prediction_and_the_posterior_variance_cost_nothing_after_the_first_timestep(
    objective: Objective, variance: Variance, prediction: Prediction
) -> None:
    process, t = Diffusion.from_schedule("cosine", prediction=prediction, variance=variance), torch.tensor([1, 500])
    terms = loss_terms(process, output_for(process, process.training_target(image(0), t, randn(1)), -1.0), t, objective)
    assert tuple(terms) == term_names(objective)
    assert all(term.shape == (2,) and term.dtype == torch.float32 for term in terms.values())
    assert terms["mse"].tolist() == [0, 0]
    if "vb" in terms:
        # Beta instead of the posterior's variance costs what the KL of two variances says.
        ratio = process.betas[[1, 500]] / process.posterior_variance[[1, 500]]
        expected = 0.5 * (torch.from_numpy(ratio).log() - 1 + torch.from_numpy(1 / ratio)) / math.log(2)
        expected = expected.float() if variance == "fixed_large" else torch.zeros(2)
        torch.testing.assert_close(terms["vb"], expected, rtol=1e-3, atol=1e-4)


def test_simple_is_the_error_of_what_is_predicted() -> None:
    t, output = torch.tensor([3, 700]), randn(4)
    for prediction in PREDICTIONS:
        process = Diffusion.from_schedule("linear", prediction=prediction, variance="fixed_large")
        terms = loss_terms(process, output, t, "simple")
        target = process.training_target(image(0), t, randn(1))
        expected = [torch.nn.functional.mse_loss(output[row], target[row]) for row in range(2)]
        torch.testing.assert_close(terms["total"], torch.stack(expected))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_bound_moves_the_mean_in_vlb_and_the_variance_alone_in_hybrid(prediction: Prediction) -> None:
    process, t = Diffusion.from_schedule("linear", prediction=prediction), torch.tensor([0, 500])
    output = (randn(3, (2, 6, 4, 4)) * 0.1).requires_grad_()
    hybrid, vlb = (loss_terms(process, output, t, objective) for objective in ("hybrid", "vlb"))
    (of_hybrid,) = torch.autograd.grad(hybrid["vb"].sum(), output)
    (of_vlb,) = torch.autograd.grad(vlb["total"].sum(), output)
    assert not of_hybrid[:, :3].any() and of_hybrid[:, 3:].any(dim=1).any()
    assert of_vlb[:, :3].abs().amax(dim=(1, 2, 3)).gt(0).all()
    torch.testing.assert_close(of_vlb[:, 3:], of_hybrid[:, 3:] * process.steps)
    assert not vlb["mse"].requires_grad
    torch.testing.assert_close(vlb["vb"], hybrid["vb"])


@pytest.mark.parametrize("steps", [100, 1000])
def test_the_bound_is_weighted_by_steps_over_1000_in_hybrid_and_by_steps_in_vlb(steps: int) -> None:
    process, output, t = Diffusion.from_schedule("cosine", steps), randn(3, (2, 6, 4, 4)), torch.tensor([0, 50])
    hybrid, vlb = (loss_terms(process, output, t, objective) for objective in ("hybrid", "vlb"))
    torch.testing.assert_close(hybrid["total"], hybrid["mse"] + hybrid["vb"] * steps / 1000)
    torch.testing.assert_close(vlb["total"], vlb["vb"] * steps)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("objective", "variance"), ALLOWED)
def test_losses_and_steps_of_low_precision_inputs_are_computed_in_float32(
    objective: Objective, variance: Variance, kind: torch.dtype
) -> None:
    for prediction in PREDICTIONS:
        process, t = Diffusion.from_schedule("cosine", prediction=prediction, variance=variance), torch.tensor([0, 999])
        output = output_for(process, randn(3), 0.1).to(kind)
        high = loss_terms(process, output.float(), t, objective, lambda tensor: tensor.to(kind).float())
        low = loss_terms(process, output, t, objective, lambda tensor: tensor.to(kind))
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss_terms(process, output, t, objective, lambda tensor: tensor.to(kind))
        for name in high:
            assert torch.equal(low[name], high[name]) and torch.equal(inside[name], high[name])
            assert low[name].dtype == torch.float32
        steps = [process.p_mean_variance(given, randn(0).to(kind), t) for given in (output, output.float())]
        assert all(torch.equal(*parts) and parts[0].dtype == torch.float32 for parts in zip(*steps, strict=True))


def test_objective_and_variance_must_go_together() -> None:
    for objective, variance in ALLOWED:
        check_objective(objective, variance)
    with pytest.raises(ValueError, match="objective hybrid: expected variance learned, found fixed_small; choose"):
        loss_terms(Diffusion.from_schedule("linear", variance="fixed_small"), randn(0), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="objective simple: expected variance fixed_small or fixed_large, found"):
        check_objective("simple", "learned")
    with pytest.raises(ValueError, match="objective: expected one of simple, hybrid, vlb, found 'l2'"):
        check_objective("l2", "learned")  # type: ignore[arg-type]


@given(st.floats(-2, 2), st.floats(-3, 3), st.floats(-2, 2), st.floats(-3, 3))
def test_gaussian_kl_agrees_with_torch(mean_p: float, log_p: float, mean_q: float, log_q: float) -> None:
    p = torch.distributions.Normal(torch.tensor(mean_p), math.exp(log_p / 2))
    q = torch.distributions.Normal(torch.tensor(mean_q), math.exp(log_q / 2))
    ours = gaussian_kl(*(torch.tensor(value) for value in (mean_p, log_p, mean_q, log_q)))
    torch.testing.assert_close(ours, torch.distributions.kl_divergence(p, q), rtol=1e-4, atol=1e-5)


@given(mean=st.floats(-1.2, 1.2), log_scale=st.floats(-3, 1))
def test_the_probabilities_of_all_8_bit_values_add_up_to_1(mean: float, log_scale: float) -> None:
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_likelihood = discretized_log_likelihood(values, torch.tensor(mean), torch.tensor(log_scale))
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-5)


# Bits per dimension, of 8-bit images whose pixels are independent and normal: all that a network could know


MEAN, DEVIATION = 0.1, 0.25
PICTURES = (48, 3, 8, 8)
ENTROPY = 0.5 * math.log2(2 * math.pi * math.e * DEVIATION**2) + math.log2(127.5)  # of the rounded values, in bits


class AllKnowing:
    """The best possible network for these images: E[x_0 | x_t], and the variance of q(x_{t-1} | x_t) where learned."""

    def __init__(self, process: Diffusion) -> None:
        self.process = process

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        process = self.process
        abar = process.at("alphas_cumprod", t)
        spread = abar * DEVIATION**2 + 1 - abar
        x_start = MEAN + abar.sqrt() * DEVIATION**2 / spread * (x - abar.sqrt() * MEAN)
        prediction = process.training_target(x_start, t, process.eps_from_xstart(x, t, x_start))
        unknown = DEVIATION**2 * (1 - abar) / spread
        variance = process.at("posterior_variance", t) + process.at("posterior_mean_coef1", t).square() * unknown
        small, large = process.at("posterior_log_variance_clipped", t), process.at("log_betas", t)
        # At t = 0 both ends may be the same; then the position says nothing.
        position = 2 * (variance.log() - small) / (large - small).clamp(min=1e-6) - 1
        return output_for(process, prediction, position)


def normal_pictures() -> Tensor:
    pixels = MEAN + DEVIATION * randn(1000, PICTURES)  # no timestep, whose noise is another
    return (pixels.clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1


def bits(prediction: Prediction, variance: Variance) -> BitsPerDimension:
    process = Diffusion.from_schedule("linear", 200, prediction=prediction, variance=variance)
    return bits_per_dimension(
        AllKnowing(process), process, normal_pictures(), lambda t: randn(t, PICTURES), clip_denoised=False
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_bits_per_dimension_of_a_perfect_model_are_the_entropy_of_the_images(prediction: Prediction) -> None:
    found = bits(prediction, "learned")
    assert found.total_B.mean().item() == pytest.approx(ENTROPY, abs=0.02)
    torch.testing.assert_close(found.total_B, found.vb_BT.sum(dim=1) + found.prior_B)
    assert found.vb_BT.shape == found.noise_mse_BT.shape == found.x_start_mse_BT.shape == (48, 200)
    # At the end x_t tells nothing: the image's error is its variance, the noise is known.
    assert found.x_start_mse_BT[:, -1].mean().item() == pytest.approx(DEVIATION**2, rel=0.05)
    assert found.noise_mse_BT[:, -1].max() < 1e-3


def test_a_fixed_variance_bounds_the_entropy_from_above() -> None:
    small, large, learned = (bits("v", variance).total_B.mean().item() for variance in VARIANCES[1:] + VARIANCES[:1])
    assert learned < small < ENTROPY + 2 and learned < large < ENTROPY + 2


def test_the_mean_of_vlb_over_all_timesteps_is_the_bound_without_its_prior_term() -> None:
    process = Diffusion(np.full(50, 0.02))
    denoise, x_start = AllKnowing(process), image(0)
    found = bits_per_dimension(denoise, process, x_start, randn, clip_denoised=False)
    totals = []
    for t in range(50):
        t_B = torch.full((2,), t)
        x = process.q_sample(x_start, t_B, randn(t))
        terms = diffusion_loss(
            process,
            denoise(x, t_B),
            objective="vlb",
            x_start_BCHW=x_start,
            x_BCHW=x,
            noise_BCHW=randn(t),
            timesteps_B=t_B,
        )
        totals.append(terms["total"])
    torch.testing.assert_close(torch.stack(totals).mean(dim=0), found.total_B - found.prior_B)


def test_bits_per_dimension_tell_original_timesteps_clip_if_asked_and_record_no_gradient() -> None:
    process = Diffusion.from_schedule("cosine", prediction="x0", variance="fixed_small").respaced("4")
    told: list[int] = []
    weight = torch.full(SHAPE, 5.0, requires_grad=True)

    def denoise(x: Tensor, original: Tensor) -> Tensor:
        told.append(int(original[0]))
        return weight * 1

    clipped = bits_per_dimension(denoise, process, image(0), randn)
    assert told == [999, 666, 333, 0]
    assert not clipped.total_B.requires_grad
    torch.testing.assert_close(clipped.x_start_mse_BT[:, 0], (1 - image(0)).square().mean(dim=(1, 2, 3)))


def test_the_prior_term_is_the_kl_of_what_is_left_of_the_image_at_the_end() -> None:
    process, x_start = Diffusion(np.full(10, 0.05)), image(0)
    left = float(process.alphas_cumprod[-1])
    last = torch.distributions.Normal(math.sqrt(left) * x_start.double(), math.sqrt(1 - left))
    kl = torch.distributions.kl_divergence(last, torch.distributions.Normal(0.0, 1.0)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(
        prior_bits_per_dimension(process, x_start), (kl / math.log(2)).float(), rtol=1e-4, atol=0
    )
