"""How the demo judges its pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.demo import border_colour, grounds_followed, preset, report
from data_pipeline.demo import GROUNDS
from data_pipeline.errors import UserError


@pytest.mark.parametrize("ground", GROUNDS)
def test_a_ground_is_recognised_from_the_border_whatever_stands_on_it(ground: str) -> None:
    noise = np.random.default_rng(0).normal(0, 25, (64, 64, 3))
    picture = np.clip(np.array(GROUNDS[ground]) + noise, 0, 255).astype(np.uint8)
    picture[10:54, 10:54] = 0
    assert border_colour(picture) == ground


def test_only_the_ground_that_the_prompt_names_counts() -> None:
    red, blue = (np.full((64, 64, 3), GROUNDS[name], np.uint8) for name in ("red", "blue"))
    prompts = ["red apple on a blue ground", "red apple on a blue ground"]
    assert grounds_followed(np.stack([red, blue]), prompts) == 1


def test_the_prompts_of_the_demo_name_each_of_the_eight_grounds_once() -> None:
    prompts = preset("demo-base").samples.prompts
    assert sorted(prompt.split()[-2] for prompt in prompts) == sorted(GROUNDS)


def test_a_check_that_fails_fails_the_demo_and_names_itself(tmp_path: Path) -> None:
    good, bad = {"better": (0.1, "<=", 0.2)}, {"worse": (0.3, "<=", 0.2)}
    report({}, {}, good, tmp_path)
    with pytest.raises(UserError, match="failed: worse"):
        report({}, {}, good | bad, tmp_path)
