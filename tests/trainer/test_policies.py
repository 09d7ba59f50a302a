"""Small pure policies: learning rate, EMA decay, what a resume may change, and the presets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from data_pipeline.config import PRESETS, read_values
from data_pipeline.errors import UsageError
from trainer.config import lr_at, refuse_changed_keys
from trainer.ema import ema_decay_at
from trainer.recipes import parse_train_config


def test_the_learning_rate_rises_linearly_then_stays() -> None:
    rates = [lr_at(images, 1e-4, 1000) for images in (0, 499, 999, 1000, 10**9)]
    assert rates == pytest.approx([1e-7, 5e-5, 1e-4, 1e-4, 1e-4])
    assert lr_at(0, 1e-4, 0) == 1e-4


def test_the_ema_decay_rises_to_its_setting() -> None:
    decays = [ema_decay_at(updates, 0.9999) for updates in (0, 90, 10**6)]
    assert decays == pytest.approx([0.1, 0.91, 0.9999])


@pytest.mark.parametrize(
    "change",
    [
        {"images": 640},
        {"launcher": {"kind": "local", "workers": 5}},
        {"checkpoint": {"every_images": 32}},
        {"tracking": {"uri": "elsewhere"}},
        {"store": "where/the/run/was/moved"},
    ],
)
def test_a_resume_may_change_how_far_and_on_what(
    train_values: Callable[..., dict[str, Any]], change: dict[str, Any]
) -> None:
    began = parse_train_config(train_values(), "test")
    refuse_changed_keys(began, parse_train_config(train_values(**change), "test"))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"lr": 2e-3}, "lr"),
        ({"batch": 32}, "batch"),
        ({"seed": 1}, "seed"),
        ({"ema": 0.5}, "ema"),
        ({"caption_dropout": 0.5}, "caption_dropout"),
        ({"diffusion": {"schedule": "linear"}}, "diffusion.schedule"),
        ({"micro_batch": 8}, "micro_batch"),
    ],
)
def test_any_other_change_on_resume_is_refused_by_name(
    train_values: Callable[..., dict[str, Any]], change: dict[str, Any], key: str
) -> None:
    began = parse_train_config(train_values(), "test")
    with pytest.raises(UsageError, match=rf"run tiny: key {key}: expected .* as the run began"):
        refuse_changed_keys(began, parse_train_config(train_values(**change), "test"))


def test_steps_may_be_written_as_a_number(train_values: Callable[..., dict[str, Any]]) -> None:
    config = parse_train_config(train_values(samples={"sampling": {"spacing": 27}}), "test")
    assert config.samples.sampling.spacing == "27"


def test_an_unknown_recipe_is_refused_with_those_that_exist(train_values: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match=r"key recipe: expected one of .*noised_clip, found 'glide'"):
        parse_train_config(train_values(recipe="glide"), "test")


@pytest.mark.parametrize("path", sorted((PRESETS / "train").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_training_preset_is_valid(path: Any) -> None:
    assert parse_train_config(read_values(path), path.stem).run == path.stem
