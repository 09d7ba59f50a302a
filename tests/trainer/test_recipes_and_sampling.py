"""The GLIDE recipes on real rows, and pictures that depend on seed, number and prompt alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.draws import Draws
from data_pipeline.images import area_resize, decode_stored
from data_pipeline.loader import read_rows
from data_pipeline.shards import open_dataset
from data_pipeline.tokenizer import encode
from trainer.config import SamplingSettings
from trainer.evaluation.heldout import shuffled_captions
from trainer.pictures import grid, png_bytes
from trainer.recipes import make_recipe, parse_train_config
from trainer.recipes.recipe import Given, Recipe
from trainer.sampling import draw_images

Values = Callable[..., dict[str, Any]]


def rows_of(recipe: Recipe, dataset_uri: str, count: int) -> Any:
    rows = np.arange(count, dtype=np.int64)
    return read_rows(open_dataset(dataset_uri), recipe.columns, np.zeros(count, np.int64), rows)


def draws_of(count: int) -> Draws:
    return Draws(0, np.arange(count, dtype=np.int64))


def test_the_base_recipe_prepares_pixels_captions_noise_and_timesteps(train_values: Values, dataset_uri: str) -> None:
    config = parse_train_config(train_values(caption_dropout=0.0), "test")
    recipe = make_recipe(config)
    rows = rows_of(recipe, dataset_uri, 8)
    batch = recipe.prepare(rows, draws_of(8))
    assert batch["images"].shape == (8, 3, 16, 16) and batch["images"].dtype == torch.float32
    expected = area_resize(rows["image64"][3].reshape(64, 64, 3), 16).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(batch["images"][3].permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert batch["mask"].sum(dim=1).tolist() == np.minimum(rows["n_tokens"], 8).tolist()
    assert ((batch["uniforms"] >= 0) & (batch["uniforms"] < 1)).all() and len(set(batch["uniforms"].tolist())) == 8


def test_the_upsampler_is_conditioned_on_the_area_reduction_of_the_picture_it_learns(
    train_values: Values, dataset_uri: str
) -> None:
    model = {**train_values()["model"], "image_size": 256, "low_resolution": 64, "attention_resolutions": []}
    recipe = make_recipe(parse_train_config(train_values(recipe="glide_upsampler", model=model), "test"))
    rows = rows_of(recipe, dataset_uri, 2)
    batch = recipe.prepare(rows, draws_of(2))
    picture = decode_stored(rows["image256"][1])
    low = area_resize(picture, 64).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(batch["low_res"][1].permute(1, 2, 0).numpy(), low, atol=1e-6)
    assert batch["images"].shape == (2, 3, 256, 256)


@pytest.mark.parametrize(("dropout", "kept"), [(0.0, 96), (1.0, 0)])
def test_caption_dropout_empties_the_mask(train_values: Values, dataset_uri: str, dropout: float, kept: int) -> None:
    recipe = make_recipe(parse_train_config(train_values(caption_dropout=dropout), "test"))
    batch = recipe.prepare(rows_of(recipe, dataset_uri, 32), draws_of(32))
    assert bool(batch["mask"].any()) == (kept > 0)


def test_evaluation_never_drops_captions_except_for_a_text_free_model(train_values: Values) -> None:
    kept = [
        parse_train_config(train_values(caption_dropout=dropout), "test").for_evaluation().caption_dropout  # type: ignore[attr-defined]
        for dropout in (0.2, 1.0)
    ]
    assert kept == [0.0, 1.0]


def test_a_prompt_is_tokenized_as_the_corpus_was(train_values: Values) -> None:
    recipe = make_recipe(parse_train_config(train_values(), "test"))
    tokens, n_tokens = encode("A Red Apple")
    conditions = recipe.conditions(["A Red Apple"], Given())
    assert conditions["tokens"][0].tolist() == tokens[:8].tolist()
    assert int(conditions["mask"].sum()) == n_tokens


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(train_values: Values, sampler: str) -> None:
    recipe = make_recipe(parse_train_config(train_values(dropout=0.0), "test"))
    torch.manual_seed(0)
    model = recipe.parts()["base"].build().eval()
    for parameter in model.parameters():  # the zero-initialised output would hide everything
        torch.nn.init.normal_(parameter, std=0.05)
    settings = SamplingSettings(spacing="4", sampler=sampler, guidance_scale=2.0)
    prompts = [f"picture {number}" for number in range(19)]  # more than one batch
    together = draw_images(recipe, {"base": model}, prompts, settings, seed=5)
    assert together.shape == (19, 16, 16, 3) and together.dtype == np.uint8
    few = draw_images(recipe, {"base": model}, prompts[:3], settings, seed=5)
    assert np.abs(few.astype(int) - together[:3].astype(int)).max() <= 1
    other = draw_images(recipe, {"base": model}, prompts[:3], settings, seed=6)
    assert np.abs(few.astype(int) - other.astype(int)).max() > 20


def test_shuffling_gives_every_row_another_caption_and_keeps_the_pictures() -> None:
    rows = {"tokens": np.arange(6).reshape(3, 2), "n_tokens": np.array([1, 2, 2]), "image64": np.arange(3)}
    shuffled = shuffled_captions(rows)
    assert shuffled["tokens"].tolist() == [[4, 5], [0, 1], [2, 3]]
    assert shuffled["n_tokens"].tolist() == [2, 1, 2]
    assert shuffled["image64"].tolist() == [0, 1, 2]


def test_a_grid_shows_every_picture_and_a_png_says_how_it_was_made(tmp_path: Path) -> None:
    pictures = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 60, 120, 180, 240)])
    sheet = grid(pictures, [f"caption number {n} that is rather long for its cell" for n in range(5)], columns=4)
    colours = {colour for _, colour in sheet.getcolors(100_000)}  # type: ignore[union-attr]
    assert {(value, value, value) for value in (0, 60, 120, 180, 240)} <= colours
    (tmp_path / "grid.png").write_bytes(png_bytes(sheet, {"prompt": "grün"}))
    assert Image.open(tmp_path / "grid.png").text["prompt"] == "grün"  # type: ignore[attr-defined]
