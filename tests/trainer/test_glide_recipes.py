"""The GLIDE recipes beyond the base model: objectives, loss-aware timesteps, fine-tunes, augmented conditions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.training import train_run
from data_pipeline.draws import Draws
from data_pipeline.errors import UserError
from data_pipeline.loader import read_rows
from data_pipeline.shards import open_dataset
from data_pipeline.storage import LocalStore
from trainer.checkpoint.manifest import committed, read_manifest
from trainer.config import SamplingSettings
from trainer.engine.group import Group
from trainer.evaluation.heldout import heldout_bits_per_dimension
from trainer.models.glide import Glide
from trainer.recipes import make_recipe, parse_train_config
from trainer.recipes.glide import GlideConfig
from trainer.recipes.glide_upsampler import GlideUpsampler
from trainer.recipes.recipe import Batch, Given, Recipe
from trainer.run import make_trainee, prepare_run, train
from trainer.tracking.jsonl import read_curves
from trainer.weights import lineage_of, load_trained, start_of

Values = Callable[..., dict[str, Any]]


def trained(values: dict[str, Any]) -> dict[str, Any]:
    """Train here, on one rank; the result."""
    config = parse_train_config(values, "test")
    events: list[dict[str, Any]] = []
    train(config.model_dump(mode="json"), prepare_run(config), Group(), events.append)
    return events[-1]


def prepared(recipe: Recipe, uri: str, count: int = 6) -> tuple[Batch, Draws]:
    positions = np.arange(count, dtype=np.int64)
    draws = Draws(0, positions)
    rows = read_rows(open_dataset(uri), recipe.columns, np.zeros(count, np.int64), positions)
    return recipe.prepare(rows, draws), draws


def upsampler(values: dict[str, Any], **model: Any) -> dict[str, Any]:
    return {**values["model"], "image_size": 32, "low_resolution": 16, "attention_resolutions": [], **model}


@pytest.mark.parametrize(
    ("prediction", "variance", "objective"),
    [
        (prediction, variance, objective)
        for prediction, (variance, objective) in itertools.product(
            ("eps", "x0", "v"),
            (("learned", "hybrid"), ("learned", "vlb"), ("fixed_small", "simple"), ("fixed_large", "vlb")),
        )
    ],
)
def test_every_prediction_variance_and_objective_trains(
    train_values: Values, prediction: str, variance: str, objective: str
) -> None:
    diffusion = {"prediction": prediction, "variance": variance, "objective": objective, "schedule": "sqrt_linear"}
    values = train_values(diffusion=diffusion, batch=4, images=8)
    values["model"] = values["model"] | {"learned_variance": variance == "learned"}
    trained(values)
    curves = read_curves(Path(values["store"], "tracking"))
    assert len(curves["loss/total"]) == 2 and np.isfinite(list(curves["loss/total"].values())).all()
    assert ("loss/vb" in curves) == (objective != "simple")


def test_captions_are_padded_to_a_context_longer_than_the_dataset_stores(
    train_values: Values, dataset_uri: str
) -> None:
    values = train_values(images=16)
    values["model"] = values["model"] | {"text_context": 160}
    recipe = make_recipe(parse_train_config(values, "test"))
    batch, _ = prepared(recipe, dataset_uri)
    assert batch["tokens"].shape == batch["mask"].shape == (6, 160) and not batch["mask"][:, 128:].any()
    asked = recipe.conditions(["dog " * 149 + "dog"], Given())
    assert asked["mask"].sum() == 150
    trained(values)


def test_settings_that_do_not_go_together_are_refused(train_values: Values) -> None:
    for changes, message in (
        ({"diffusion": {"objective": "simple"}}, "objective simple: expected variance fixed_small or fixed_large"),
        ({"diffusion": {"objective": "simple", "variance": "fixed_small"}}, "learned if model.learned_variance"),
        ({"recipe": "inpaint_base"}, "model.inpaint true for inpaint_base, found False"),
        ({"recipe": "classifier_free_finetune"}, "key parent"),
        ({"samples": {"sampling": {"sampler": "ancestral", "eta": 0.5}}}, "no eta for the sampler ancestral"),
        ({"samples": {"sampling": {"guidance_scale": math.nan}}}, "guidance_scale"),
        ({"samples": {"sampling": {"strength": 0.5}}}, "strength 1: a grid starts from noise"),
        ({"samples": {"sampling": {"low_res_level": 0.5}}}, "low_res_level 0 without model.low_res_level"),
        ({"recipe": "glide_upsampler"}, "model.low_resolution for upsamplers only, found None"),
    ):
        with pytest.raises(UserError, match=message):
            parse_train_config(train_values(**changes), "test")


def test_loss_aware_timesteps_are_merged_over_ranks_and_kept_in_the_checkpoint(train_values: Values) -> None:
    """20 timesteps warm up after some 200 losses; then the draws follow them."""
    diffusion = {"steps": 20, "timesteps": "loss_second_moment", "objective": "vlb"}
    common = {"diffusion": diffusion, "images": 640, "batch": 32, "micro_batch": 8, "dropout": 0.0, "lr": 1e-4}
    common["samples"] = {"sampling": {"spacing": "10"}}
    common["checkpoint"] = {"every_images": 320}
    alone = train_values("alone", **common)
    trained(alone)
    halves = train_values("halves", **common | {"images": 320})
    for images, workers in ((320, 2), (640, 1)):
        train_run(parse_train_config({**halves, "images": images, "launcher": {"workers": workers}}, "test"))
    states, losses = [], []
    for values in (alone, halves):
        store = LocalStore(Path(values["store"]))
        states.append(read_manifest(store, committed(store)[0].manifest_key).recipe_state)
        losses.append(read_curves(Path(values["store"], "tracking"))["loss/total"])
    assert states[0]["law"] == "loss_second_moment" and states[0]["counts"] == states[1]["counts"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    recipe = make_recipe(parse_train_config(alone, "test"))
    state = recipe.state()
    assert state is not None
    state.load(states[0])
    uniforms = torch.linspace(0, 0.999, 1000, dtype=torch.float64)
    _, weights = state.draw(uniforms)  # type: ignore[attr-defined]
    assert weights.min() < 0.8 and weights.max() > 1.25, "some timesteps are drawn more often than others"


def test_the_loss_of_each_timestep_quartile_is_a_curve(train_values: Values) -> None:
    values = train_values(images=32, batch=16)
    trained(values)
    curves = read_curves(Path(values["store"], "tracking"))
    assert {f"loss/q{quartile}" for quartile in range(4)} <= curves.keys()


@pytest.mark.parametrize("recipe", ["inpaint_base", "inpaint_upsampler"])
def test_inpainting_starts_with_its_parents_predictions_whatever_is_shown(
    train_values: Values, dataset_uri: str, recipe: str
) -> None:
    kind = recipe.removeprefix("inpaint_")
    plain = train_values("parent", recipe=f"glide_{kind}", images=16)
    if kind == "upsampler":
        plain["model"] = upsampler(plain)
    trained(plain)
    config = parse_train_config(
        {
            **plain,
            "run": "child",
            "recipe": recipe,
            "parent": plain["store"],
            "model": plain["model"] | {"inpaint": True},
        },
        "test",
    )
    parent = load_trained(plain["store"])
    starts = start_of(config, lineage_of(config))
    names = set(starts[kind])
    (engine,) = make_trainee(config, Group(), starts).engines.values()
    child = engine.module.eval()
    batch, _ = prepared(make_recipe(config.for_evaluation()), dataset_uri)
    assert 0 < float(batch["inpaint_mask"].mean()) < 1
    timesteps = torch.arange(6) * 150
    common = {name: batch[name] for name in ("tokens", "mask", "low_res") if name in batch}
    shown = {name: batch[name] for name in ("inpaint_image", "inpaint_mask")}
    with torch.no_grad():
        (parent_module,) = parent.modules.values()
        expected = parent_module(batch["noise"], timesteps, **common)
        torch.testing.assert_close(child(batch["noise"], timesteps, **common, **shown), expected, rtol=1e-6, atol=1e-6)
    again = {**plain, "run": "again", "recipe": recipe, "store": f"{plain['store']}-2", "model": config.model}
    trained(config.model_dump(mode="json") | {"store": again["store"], "images": 16})
    second = parse_train_config(config.model_dump(mode="json") | {"parent": again["store"]}, "test")
    assert start_of(second, lineage_of(second))[kind].keys() == names, "an inpainting parent needs none"


def test_the_low_resolution_is_blurred_and_noised_as_set_and_its_level_told(
    train_values: Values, dataset_uri: str
) -> None:
    values = train_values(recipe="glide_upsampler")
    values["model"] = upsampler(values)
    plain, _ = prepared(make_recipe(parse_train_config(values, "test")), dataset_uri)
    blurred, _ = prepared(make_recipe(parse_train_config({**values, "low_res": {"blur": 1.0}}, "test")), dataset_uri)
    assert "low_res_level" not in blurred
    assert blurred["low_res"].diff(dim=-1).abs().mean() < 0.95 * plain["low_res"].diff(dim=-1).abs().mean()
    with pytest.raises(UserError, match=r"model.low_res_level true if low_res.noise is above 0"):
        parse_train_config({**values, "low_res": {"noise": 0.5}}, "test")
    told = {**values, "low_res": {"noise": 0.5}, "model": values["model"] | {"low_res_level": True}}
    config = parse_train_config(told, "test")
    noised, _ = prepared(make_recipe(config), dataset_uri)
    angle = noised["low_res_level"] * torch.pi / 2
    rest = noised["low_res"] - angle.cos()[:, None, None, None] * plain["low_res"]
    assert angle.min() >= 0 and angle.max() < torch.pi / 4
    spread = rest.flatten(1).std(dim=1)
    torch.testing.assert_close(spread, angle.sin(), rtol=0.1, atol=1e-3)
    evaluated, _ = prepared(make_recipe(config.for_evaluation()), dataset_uri)
    torch.testing.assert_close(evaluated["low_res"], plain["low_res"])
    recipe = make_recipe(config)
    assert isinstance(recipe, GlideUpsampler)
    drawn = recipe.sample_conditions(dict(plain), Draws(0, np.arange(6)), SamplingSettings(low_res_level=0.25))
    assert drawn["low_res_level"].tolist() == [0.25] * 6 and not torch.equal(drawn["low_res"], plain["low_res"])
    trained(values)
    config = parse_train_config(
        {**told, "run": "told", "store": f"{told['store']}-told", "parent": told["store"]}, "test"
    )
    starts = start_of(config, lineage_of(config))
    assert not any("level" in name for name in starts["upsampler"])
    (child,) = make_trainee(config, Group(), starts).modules.values()
    (parent,) = load_trained(told["store"]).modules.values()
    common = {name: noised[name] for name in ("tokens", "mask", "low_res")}
    times = torch.arange(6) * 150
    with torch.no_grad():  # a parent that was not told goes on as it was
        expected = parent(noised["noise"], times, **common)
        found = child.eval()(noised["noise"], times, **common, low_res_level=noised["low_res_level"])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    trained(config.model_dump(mode="json"))


def test_bits_per_dimension_of_held_out_rows_do_not_depend_on_the_number_of_ranks(
    train_values: Values, dataset_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Group, "sum_", lambda group, tensor: tensor)  # each rank's own share
    values = train_values(diffusion={"steps": 10}, samples={"sampling": {"spacing": "5"}}, images=16)
    values["heldout"] = {"dataset": dataset_uri, "images": 16, "bits_per_dimension": 32}
    result = trained(values)
    bits = result["heldout"]["bits_per_dimension"]
    assert 1 < bits < 50, "an untrained model is worse than the 8 bits of a stored pixel"
    one, dataset = load_trained(values["store"]), open_dataset(dataset_uri)
    shares = [
        heldout_bits_per_dimension(one.config, one.modules, dataset, 32, Group(rank, world_size=3)) for rank in range(3)
    ]
    assert sum(shares) == pytest.approx(bits, rel=1e-5)
    assert min(shares[:2]) > 1 and shares[2] == 0, "two batches: the third rank has none"


def test_a_model_trained_compiled_and_checkpointed_is_loaded_as_neither(
    train_values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling once, from the command line, takes less time than compiling."""
    compiled: list[Glide] = []
    monkeypatch.setattr(Glide, "compile_regions", lambda model: compiled.append(model))
    values = train_values(images=8, compile=True, activation_checkpointing=True)
    trained(values)
    assert len(compiled) == 1
    loaded = load_trained(values["store"])
    assert len(compiled) == 1 and not loaded.modules["base"].activation_checkpointing
    assert isinstance(loaded.config, GlideConfig) and loaded.config.compile


@pytest.mark.drill
def test_a_compiled_model_trains_to_the_same_losses_and_names(train_values: Values) -> None:
    """Compiling takes a C++ compiler on a CPU; the smallest network there is."""
    curves = []
    for compiled in (False, True):
        values = train_values(f"compiled-{compiled}", images=8, batch=4, compile=compiled, dropout=0.0)
        trained(values)
        curves.append(read_curves(Path(values["store"], "tracking"))["loss/total"])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    load_trained(values["store"])
