"""Random numbers as a function of seed, position and purpose."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.draws import Draws


def draws_at(*positions: int, seed: int = 0) -> Draws:
    return Draws(seed, np.array(positions, np.int64))


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=9), st.integers(0, 2**31))
def test_a_sample_draws_the_same_alone_as_in_any_batch(positions: list[int], seed: int) -> None:
    together = draws_at(*positions, seed=seed)
    for number, position in enumerate(positions):
        alone = draws_at(position, seed=seed)
        assert alone.uniform("timestep")[0] == together.uniform("timestep")[number]
        np.testing.assert_array_equal(alone.normal("noise", (3,))[0], together.normal("noise", (3,))[number])


def test_positions_purposes_and_seeds_draw_apart() -> None:
    values = [
        draws_at(0).uniform("a")[0],
        draws_at(1).uniform("a")[0],
        draws_at(0).uniform("b")[0],
        draws_at(0, seed=1).uniform("a")[0],
    ]
    assert len(set(values)) == 4


def test_uniform_and_normal_have_their_moments() -> None:
    many = draws_at(*range(20_000))
    uniform, normal = many.uniform("u"), many.normal("n", (4,))
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.var() - 1 / 12) < 0.002
    assert abs(normal.mean()) < 0.015 and abs(normal.std() - 1) < 0.01
    neighbours = np.corrcoef(uniform[:-1], uniform[1:])[0, 1]
    assert abs(neighbours) < 0.03


def test_the_draws_never_change_between_versions() -> None:
    """Resumes of runs begun by an older Glidepath depend on them."""
    assert draws_at(12345, seed=7).uniform("timestep")[0] == UNIFORM
    np.testing.assert_allclose(draws_at(12345, seed=7).normal("noise", (3,))[0], NORMAL, rtol=1e-6)


UNIFORM = 0.34600572630410054
NORMAL = [-1.1151961088180542, 1.4225958585739136, -0.06999307125806808]
