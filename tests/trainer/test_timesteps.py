"""Laws of timesteps: what they draw, what they remember, and that they leave the expected loss alone."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.errors import UserError
from trainer.diffusion.timesteps import (
    LOSSES_REMEMBERED,
    LossSecondMoment,
    UniformTimesteps,
    losses_by_quartile,
)

STEPS = 20
SCALES = torch.logspace(-2, 2, STEPS, dtype=torch.float64).flip(0)  # the loss of the bound falls by orders with t


def grid(count: int) -> Tensor:
    """Numbers in [0, 1) as even as can be."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def losses_of_every_timestep(rounds: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Timesteps and losses of `rounds` passes over the process, in a scrambled order."""
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.arange(STEPS).repeat(rounds)[torch.randperm(STEPS * rounds, generator=generator)]
    factor = 0.5 + torch.rand(len(timesteps), generator=generator, dtype=torch.float64)
    return timesteps, (SCALES[timesteps] * factor).float()


def warm(rounds: int = LOSSES_REMEMBERED) -> LossSecondMoment:
    sampler = LossSecondMoment(STEPS)
    sampler.observe(*losses_of_every_timestep(rounds))
    return sampler


@given(steps=st.integers(1, 4000), uniform=st.integers(0, 2**53 - 1))
def test_uniform_timesteps_are_the_floor_of_u_times_steps(steps: int, uniform: int) -> None:
    number = np.array([uniform * 2.0**-53])
    for sampler in (UniformTimesteps(steps), LossSecondMoment(steps)):  # the latter as long as it knows too little
        timesteps, weights = sampler.draw(torch.from_numpy(number))
        assert timesteps.tolist() == (number * steps).astype(np.int64).tolist()
        assert timesteps.dtype == torch.int64 and 0 <= timesteps.item() < steps
        assert weights.tolist() == [1.0] and weights.dtype == torch.float32


def test_timesteps_are_drawn_in_proportion_to_the_root_mean_square_of_their_last_losses() -> None:
    timesteps, losses = losses_of_every_timestep(rounds=13)
    sampler = LossSecondMoment(STEPS)
    sampler.observe(timesteps, losses)
    last = torch.stack([losses[timesteps == t][-10:].double() for t in range(STEPS)])
    rms = last.square().mean(dim=1).sqrt()
    expected = 0.999 * rms / rms.sum() + 0.001 / STEPS
    assert sampler.probabilities() == pytest.approx(expected.numpy(), rel=1e-12)

    drawn, weights = sampler.draw(grid(200_000))
    assert (torch.bincount(drawn, minlength=STEPS) / 200_000).numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    torch.testing.assert_close(weights, (1 / (expected[drawn] * STEPS)).float())


@given(losses=st.lists(st.floats(0, 1e6, width=32), min_size=STEPS, max_size=STEPS))
@settings(max_examples=100, deadline=None)
def test_the_least_and_the_greatest_number_draw_the_first_and_the_last_timestep(losses: list[float]) -> None:
    sampler = LossSecondMoment(STEPS)
    sampler.observe(torch.arange(STEPS).repeat(10), torch.tensor(losses).repeat(10))
    ends, weights = sampler.draw(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert ends.tolist() == [0, STEPS - 1]
    assert weights.isfinite().all() and (weights > 0).all()


def test_one_timestep_without_ten_losses_keeps_all_of_them_uniform() -> None:
    timesteps, losses = losses_of_every_timestep(LOSSES_REMEMBERED)
    sampler = LossSecondMoment(STEPS)
    sampler.observe(timesteps[:-1], losses[:-1])
    assert sampler.probabilities() == pytest.approx(np.full(STEPS, 1 / STEPS))
    sampler.observe(timesteps[-1:], losses[-1:])
    assert sampler.probabilities().max() > 5 * sampler.probabilities().min()


def test_importance_weights_leave_the_expected_loss_unbiased_and_lower_its_variance() -> None:
    generator = torch.Generator().manual_seed(3)
    uniforms = torch.rand(400_000, generator=generator, dtype=torch.float64)
    truth = SCALES.mean().item()
    spread = {}
    for name, sampler in (("uniform", UniformTimesteps(STEPS)), ("second moment", warm())):
        timesteps, weights = sampler.draw(uniforms)
        weighted = SCALES[timesteps] * weights
        spread[name] = weighted.std().item()
        assert weighted.mean().item() == pytest.approx(truth, abs=4 * spread[name] / len(uniforms) ** 0.5)
    assert spread["second moment"] < spread["uniform"] / 5


@given(cuts=st.lists(st.integers(0, STEPS * 12), max_size=6), resumed=st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_history_is_the_same_for_any_split_of_the_observations_and_any_resume_between(
    cuts: list[int], resumed: bool
) -> None:
    timesteps, losses = losses_of_every_timestep(rounds=12, seed=1)
    whole = LossSecondMoment(STEPS)
    whole.observe(timesteps, losses)
    parts = LossSecondMoment(STEPS)
    edges = [0, *sorted(cuts), len(losses)]
    for begin, end in pairwise(edges):
        # As a training step hands them over: in float64, in the order of positions.
        parts.observe(timesteps[begin:end].double(), losses[begin:end].double())
        parts.draw(grid(5))
        if resumed:
            document = json.loads(json.dumps(parts.document()))
            parts = warm()  # with a memory of its own, which must not show through
            parts.draw(grid(5))
            parts.load(document)
    assert parts.document() == whole.document()
    for one, other in zip(parts.draw(grid(500)), whole.draw(grid(500)), strict=True):
        assert torch.equal(one, other)


def test_a_timestep_repeated_in_one_batch_is_remembered_in_the_order_of_positions() -> None:
    first, swapped = warm(), warm()
    timesteps = torch.full((11,), 4)
    first.observe(timesteps, torch.arange(11.0))  # the eleventh loss pushes out position 0's
    swapped.observe(timesteps, torch.arange(11.0).flip(0))
    rms = [(np.square(kept).mean()) ** 0.5 for kept in (np.arange(1, 11.0), np.arange(0, 10.0))]
    ratio = [sampler.probabilities()[4] - 0.001 / STEPS for sampler in (first, swapped)]
    others = [sampler.probabilities()[5] - 0.001 / STEPS for sampler in (first, swapped)]
    assert ratio[0] / others[0] / (ratio[1] / others[1]) == pytest.approx(rms[0] / rms[1])


def test_losses_that_are_not_finite_are_left_out_and_losses_of_0_fall_back_to_uniform() -> None:
    sampler = warm()
    before = sampler.document()
    sampler.observe(torch.tensor([3, 3, 3]), torch.tensor([float("nan"), float("inf"), -float("inf")]))
    assert sampler.document() == before
    silent = LossSecondMoment(STEPS)
    silent.observe(torch.arange(STEPS).repeat(10), torch.zeros(10 * STEPS))
    assert silent.probabilities() == pytest.approx(np.full(STEPS, 1 / STEPS))


def test_a_state_of_1000_timesteps_is_small_and_one_of_another_law_or_process_is_refused() -> None:
    sampler, other = LossSecondMoment(1000), LossSecondMoment(999)
    assert len(json.dumps(sampler.document())) < 60_000
    for document in (other.document(), {}, {**sampler.document(), "law": "uniform"}):
        with pytest.raises(UserError, match="state of the timestep sampler"):
            sampler.load(document)
    with pytest.raises(UserError, match="losses: expected 40000 bytes, found 3"):
        sampler.load({**sampler.document(), "losses": "AAAA"})


def test_losses_are_told_apart_by_quarter_of_the_process() -> None:
    timesteps = torch.tensor([0, 249, 250, 750, 999])
    losses = torch.tensor([1.0, 3.0, 5.0, 7.0, 8.0])
    assert losses_by_quartile(timesteps, losses, 1000) == {"q0": 2.0, "q1": 5.0, "q3": 7.5}
    assert losses_by_quartile(timesteps[:0], losses[:0], 1000) == {}
    assert losses_by_quartile(timesteps.double(), losses.double(), 1000) == losses_by_quartile(timesteps, losses, 1000)
