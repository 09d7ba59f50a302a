"""`glidepath sample` below its command line: candidates, guidance, given pictures, and PNGs that can be drawn again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.drawing import DrawSettings, draw_to_folder, load_models, make_pipeline, unguidable
from data_pipeline.config import parse
from data_pipeline.draws import Draws
from data_pipeline.errors import UserError
from data_pipeline.images import area_resize
from trainer.config import SamplingSettings
from trainer.engine.group import Group
from trainer.models.glide import Glide
from trainer.pictures import read_mask, read_picture
from trainer.recipes import parse_train_config
from trainer.recipes.recipe import Batch, Given, Pixels, Recipe
from trainer.run import prepare_run, train
from trainer.sampling import CANDIDATE_STRIDE, RELEASED_UPSAMPLING, Edit, Pipeline, Sampler, upsampling_sampler

PROMPTS = ["red apple", "dog face on a green ground", "sun", "a house"]
CLIP = {
    "image_size": 16,
    "embedding": 16,
    "image_layers": 1,
    "image_heads": 1,
    "image_head_channels": 16,
    "text_layers": 1,
    "text_heads": 1,
    "text_head_channels": 16,
    "text_context": 8,
    "vocabulary": 49408,
}
# A stride, which leaves out the noisiest timesteps: there a network as bad as these decides between black and white by
# the last digit of a float.
FEW_STEPS = SamplingSettings(guidance_scale=2.0, spacing="ddim4")
FEW_STEPS_UP = RELEASED_UPSAMPLING.model_copy(update={"spacing": "ddim4"})

Uris = Mapping[str, str]


@pytest.fixture(scope="module")
def uris(dataset_uri: str, tiny_model: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Uris]:
    """A run of every kind that sampling takes, each a large update away from its initialisation, whose last
    convolution of zeros would draw the same for everything."""
    folder = tmp_path_factory.mktemp("models")
    upsampling = {**tiny_model, "image_size": 32, "low_resolution": 16, "attention_resolutions": []}
    kinds: dict[str, dict[str, Any]] = {
        "base": {"recipe": "glide_base", "model": tiny_model},
        "upsampler": {"recipe": "glide_upsampler", "model": upsampling},
        "inpaint-base": {"recipe": "inpaint_base", "model": {**tiny_model, "inpaint": True}},
        "inpaint-upsampler": {"recipe": "inpaint_upsampler", "model": {**upsampling, "inpaint": True}},
        "clip": {"recipe": "noised_clip", "model": CLIP},
        "clip-linear": {"recipe": "noised_clip", "model": CLIP, "diffusion": {"schedule": "linear"}},
        "clip-large": {"recipe": "noised_clip", "model": {**CLIP, "image_size": 32}},
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GLIDEPATH_HOME", str(folder / "home"))
        for name, changes in kinds.items():
            values = {"run": name, "store": str(folder / name), "dataset": dataset_uri, "images": 8, "batch": 8}
            config = parse_train_config({**values, "lr": 0.04, "ema": 0.5, **changes}, name)
            train(config.model_dump(mode="json"), prepare_run(config), Group(), lambda event: None)
        yield {name: str(folder / name) for name in kinds}
    torch.set_num_threads(threads)


@pytest.fixture
def photograph(tmp_path: Path, picture_folder: Path) -> Path:
    """A real picture that is no square: 80 wide, 40 high."""
    path = tmp_path / "given.png"
    with Image.open(picture_folder / "003.png") as picture:
        picture.convert("RGB").resize((80, 40)).save(path)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """The left half of the centred square is to be drawn anew."""
    path = tmp_path / "mask.png"
    pixels = np.zeros((40, 80), np.uint8)
    pixels[:, :40] = 255
    Image.fromarray(pixels).save(path)
    return path


def changed(**changes: Any) -> SamplingSettings:
    return FEW_STEPS.model_copy(update=changes)


def settings_of(uris: Uris, *parts: str, **changes: Any) -> DrawSettings:
    """Few steps, with these parts of `uris`."""
    names = {"base": "checkpoint", "upsampler": "upsampler", "clip": "clip"}
    values = {"base": FEW_STEPS, "enlarging": FEW_STEPS_UP, **{names[part]: uris[part] for part in parts}, **changes}
    return parse(DrawSettings, values, "sample")


def pixels_of(path: str | Path) -> Pixels:
    return np.asarray(Image.open(path))


def difference(some: Pixels, others: Pixels) -> int:
    return int(np.abs(some.astype(int) - others.astype(int)).max())


class Recorder(Recipe):
    """Draws its noise and its prompt's length instead of a picture."""

    def conditions(self, prompts: Sequence[str], given: Given) -> Batch:
        return {"lengths": torch.tensor([len(prompt) for prompt in prompts])}

    def sample(
        self, parts: Any, conditions: Batch, draws: Draws, settings: Any, gradient: Any = None, watch: Any = None
    ) -> Pixels:
        noise = (draws.normal("start", (4, 4, 3)) * 40 + 128).astype(np.uint8)
        noise[:, 0, 0, 0] = conditions["lengths"].numpy()
        return noise


class Words:
    """Judges by the first pixel after the one that the recorder writes."""

    def scores(self, images: Pixels, prompts: Sequence[str]) -> np.ndarray[Any, Any]:
        assert [image[0, 0, 0] for image in images] == [len(prompt) for prompt in prompts]
        return images[:, 0, 1, 0].astype(np.float64)


def test_a_pictures_noise_is_that_of_its_seed_number_and_candidate_whatever_is_drawn_beside_it() -> None:
    def pipeline(batch: int, candidates: int) -> Pipeline:
        return Pipeline(Sampler(Recorder(), {}, FEW_STEPS, 3, batch), judge=Words(), candidates=candidates)  # type: ignore[arg-type]

    together = pipeline(16, 5).draw(PROMPTS)
    assert together.scores is not None and together.scores.shape == (4, 5)
    for batch, first, prompts in ((1, 0, PROMPTS), (3, 0, PROMPTS), (16, 2, PROMPTS[2:])):
        again = pipeline(batch, 5).draw(prompts, first_number=first)
        np.testing.assert_array_equal(again.images, together.images[first:])
        np.testing.assert_array_equal(again.scores, together.scores[first:])
    fewer = pipeline(16, 2).draw(PROMPTS)  # the first candidates do not depend on how many follow
    np.testing.assert_array_equal(fewer.scores, together.scores[:, :2])
    assert len(np.unique(together.scores)) > 15
    assert together.chosen.tolist() == together.scores.argmax(axis=1).tolist()


@pytest.mark.parametrize("sampler", ["ddim", "dpm++sde"])
def test_batch_1_and_batch_16_draw_the_same_pictures(uris: Uris, sampler: str) -> None:
    """But for a level of 255 in fewer than one value of a hundred: a matrix product adds up in another order."""
    settings = settings_of(uris, "base", "upsampler", "clip", base=changed(sampler=sampler))
    models = load_models(settings)
    some, others = (
        make_pipeline(settings.model_copy(update={"batch": batch}), models).draw([*PROMPTS, *PROMPTS])
        for batch in (1, 16)
    )
    for alone, together in ((some.base, others.base), (some.images, others.images)):
        assert difference(alone, together) <= 1 and (alone != together).mean() < 0.01
    assert difference(some.images[:4], some.images[4:]) > 20  # equal prompts, other numbers


def test_the_best_candidate_by_the_clip_goes_on_to_the_upsampler(uris: Uris, tmp_path: Path) -> None:
    settings = settings_of(uris, "base", "upsampler", "clip", best_of=3, clip_guidance=0.0, seed=5)
    drawn = draw_to_folder(settings, PROMPTS, tmp_path)
    scores = np.array(drawn["scores"])
    assert scores.shape == (4, 3) and drawn["chosen"] == scores.argmax(axis=1).tolist()
    assert len(set(drawn["chosen"])) > 1  # else another seed: the test would not see the first one taken always

    models = load_models(settings)
    pipeline = make_pipeline(settings, models)
    assert pipeline.judge is not None
    positions = np.arange(4) + np.array(drawn["chosen"]) * CANDIDATE_STRIDE
    alone = pipeline.base.draw(PROMPTS, positions)
    written = np.stack([pixels_of(path) for path in drawn["base_images"]])
    assert difference(alone, written) <= 1
    np.testing.assert_allclose(pipeline.judge.scores(written, PROMPTS), scores.max(axis=1), atol=1e-3)

    # What the upsampler enlarged is what the files show, to the bit.
    second = upsampling_sampler(models["upsampler"], settings.enlarging, settings.seed)
    enlarged = second.draw(PROMPTS, np.arange(4), Given(low_res=written))
    np.testing.assert_array_equal(enlarged, np.stack([pixels_of(path) for path in drawn["images"]]))


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "dpm++"])
def test_a_clip_that_pulls_finds_its_captions_in_the_pictures(uris: Uris, sampler: str) -> None:
    settings = settings_of(uris, "base", "clip", base=changed(sampler=sampler, spacing="ddim8"))
    models = load_models(settings)
    means = []
    for scale in (0.0, 2.0):
        drawn = make_pipeline(settings.model_copy(update={"clip_guidance": scale}), models).draw(PROMPTS)
        assert drawn.scores is not None
        means.append(drawn.scores.mean())
    assert means[0] + 0.02 < means[1]


def test_known_pixels_stay_through_both_stages(uris: Uris, photograph: Path, mask: Path, tmp_path: Path) -> None:
    square = read_picture(photograph)
    known = read_mask(mask, photograph)
    assert square.shape == (40, 40, 3) and known.sum() == 40 * 20 and known[:, 20:].all()
    for base, upsampler in (
        ("base", "upsampler"),
        ("inpaint-base", "inpaint-upsampler"),
        ("inpaint-base", "upsampler"),
    ):
        files = {"image": photograph, "mask": mask}
        # A strong pull, which would move the known pixels too.
        settings = settings_of(
            uris, "clip", checkpoint=uris[base], upsampler=uris[upsampler], clip_guidance=300.0, **files
        )
        drawn = draw_to_folder(settings, PROMPTS[:2], tmp_path / f"{base} {upsampler}")
        for side, paths in ((16, drawn["base_images"]), (32, drawn["images"])):
            expected = area_resize(square, side)
            for path in paths:
                np.testing.assert_array_equal(pixels_of(path)[:, side // 2 :], expected[:, side // 2 :])
                assert difference(pixels_of(path)[:, : side // 2], expected[:, : side // 2]) > 20


def test_inpainting_models_are_shown_the_known_pixels_and_others_are_not(
    uris: Uris, photograph: Path, mask: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoise, seen = Glide.denoise, {}

    def seeing(model: Glide, x: torch.Tensor, timesteps: torch.Tensor, **keywords: Any) -> torch.Tensor:
        seen[model.config.inpaint, model.config.image_size] = keywords
        return denoise(model, x, timesteps, **keywords)

    monkeypatch.setattr(Glide, "denoise", seeing)
    edit = Edit(read_picture(photograph), read_mask(mask, photograph))
    for kind in ("", "inpaint-"):
        settings = settings_of(uris, checkpoint=uris[f"{kind}base"], upsampler=uris[f"{kind}upsampler"])
        make_pipeline(settings, load_models(settings)).draw(PROMPTS[:1], edit=edit)
    for side in (16, 32):
        assert not [name for name in seen[False, side] if name.startswith("inpaint")]
        shown, known = seen[True, side]["inpaint_image"][0], seen[True, side]["inpaint_mask"][0, 0]
        np.testing.assert_array_equal(known.numpy(), np.tile(np.arange(side) >= side // 2, (side, 1)))
        expected = torch.from_numpy(area_resize(edit.picture, side) / 127.5 - 1).permute(2, 0, 1)
        torch.testing.assert_close(shown, expected.float(), rtol=0, atol=1e-6)


def test_strength_leaves_as_much_of_the_picture_as_it_says(uris: Uris, photograph: Path, tmp_path: Path) -> None:
    expected = area_resize(read_picture(photograph), 16).astype(int)
    far = []
    for strength in (0.0, 0.2, 0.9):
        settings = settings_of(uris, "base", image=photograph, base=changed(strength=strength, spacing="10"))
        drawn = draw_to_folder(settings, PROMPTS[:2], tmp_path / str(strength))
        far.append(np.mean([np.abs(pixels_of(path) - expected).mean() for path in drawn["images"]]))
    assert far[0] == 0 < far[1] < far[2]


def test_a_png_holds_what_draws_it_again(uris: Uris, photograph: Path, mask: Path, tmp_path: Path) -> None:
    settings = settings_of(
        uris, "base", "upsampler", "clip", seed=7, best_of=2, image=photograph, mask=mask, base=changed(eta=0.5)
    )
    drawn = draw_to_folder(settings, PROMPTS, tmp_path / "first")
    text = Image.open(drawn["images"][2]).text  # type: ignore[attr-defined]
    assert (text["prompt"], text["number"], text["seed"]) == (PROMPTS[2], "2", "7")
    assert text["Software"].startswith("glidepath ") and text["candidate"] == str(drawn["chosen"][2])
    assert float(text["clip_score"]) == pytest.approx(max(drawn["scores"][2]), abs=1e-6)
    assert json.loads(text["sampling"])["eta"] == 0.5 and len(text["image_sha256"]) == 64
    values = json.loads(text["drawing"])
    assert values["checkpoint"].endswith("images-000000008/attempt-1") and values["device"] in ("cpu", "cuda")

    again = draw_to_folder(parse(DrawSettings, values, "png"), [text["prompt"]], tmp_path / "again")
    assert [Path(path).name for path in again["images"]] == ["0002.png"]
    assert difference(pixels_of(again["images"][0]), pixels_of(drawn["images"][2])) <= 1
    assert again["chosen"] == [drawn["chosen"][2]]


def test_a_prompt_that_is_cut_and_guidance_that_was_not_trained_are_told_once(uris: Uris, tmp_path: Path) -> None:
    long, told = "a dog " * 5, []
    settings = settings_of(uris, "base", "upsampler", "clip", first_number=10)
    drawn = draw_to_folder(settings, ["sun", long, long], tmp_path, warn=told.append)
    assert told == drawn["warnings"]
    assert told[0].startswith("guidance 2: expected a base model trained with empty captions, found caption_dropout 0;")
    assert told[1:] == [
        f"prompt 11 {long!r}: expected at most 8 tokens, found {found}; {models} read the beginning"
        for found, models in ((11, "base and upsampler"), (12, "clip"))
    ]


@pytest.mark.parametrize(("base", "upsampler"), [(2.0, 1.0), (1.0, 3.0), (2.0, 3.0), (1.0, 1.0)])
def test_guidance_that_was_not_trained_is_told_of_each_stage_that_has_some(
    uris: Uris, base: float, upsampler: float
) -> None:
    enlarging = FEW_STEPS_UP.model_copy(update={"guidance_scale": upsampler})
    settings = settings_of(uris, "base", "upsampler", base=changed(guidance_scale=base), enlarging=enlarging)
    told = [line.partition(" trained")[0] for line in unguidable(settings, load_models(settings))]
    expected = ["guidance 2: expected a base model"] * (base != 1)
    assert told == expected + ["upsampler-guidance 3: expected an upsampler"] * (upsampler != 1)


def test_progress_counts_every_step_of_every_batch(uris: Uris) -> None:
    seen: list[tuple[int, int, str]] = []
    settings = settings_of(uris, "base", "upsampler", batch=3)
    make_pipeline(settings, load_models(settings)).draw(PROMPTS, progress=lambda *now: seen.append(now))
    assert seen == [(n, 8, "base") for n in range(1, 9)] + [(n, 8, "upsampler") for n in range(1, 9)]


def test_pictures_are_written_as_their_batch_is_done(uris: Uris, tmp_path: Path) -> None:
    def stop(done: int, total: int, note: str) -> None:
        if note == "base of pictures 4 to 4 of 4":
            raise InterruptedError

    whole = draw_to_folder(settings_of(uris, "base"), PROMPTS, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        draw_to_folder(settings_of(uris, "base", batch=3), PROMPTS, tmp_path / "part", stop)
    written = sorted((tmp_path / "part").iterdir())
    assert [path.name for path in written] == ["0000.png", "0001.png", "0002.png"]
    for path, other in zip(written, whole["images"], strict=False):
        assert difference(pixels_of(path), pixels_of(other)) <= 1
    with Image.open(whole["samples"]) as sheet:
        assert sheet.width > 4 * 160 and json.loads(sheet.text["sampling"])["spacing"] == "ddim4"  # type: ignore[attr-defined]


def test_what_does_not_fit_is_refused_in_one_line(uris: Uris, photograph: Path, mask: Path, tmp_path: Path) -> None:
    small, page, other = tmp_path / "small.png", tmp_path / "page.png", tmp_path / "other.png"
    Image.new("RGB", (30, 20)).save(small)
    Image.new("L", (40, 80), 255).save(other)
    page.write_text("<html>")
    black = tmp_path / "black.png"
    Image.new("L", (80, 40)).save(black)
    half = changed(strength=0.5)
    for parts, changes, line in (
        (("base",), {"upsampler": uris["base"]}, "expected an upsampler, found recipe glide_base"),
        ((), {"checkpoint": uris["upsampler"]}, "expected a base model, found recipe glide_upsampler"),
        (("base",), {"clip": uris["base"]}, "expected a noised CLIP, found recipe glide_base"),
        (("base",), {"clip": uris["clip-linear"]}, "schedule: expected the base model's cosine, found linear"),
        (("base",), {"clip": uris["clip-large"]}, "pixels a side: expected the base model's 16, found 32"),
        (("base",), {"base": changed(spacing="2000")}, "--spacing: expected steps such as"),
        (("base", "upsampler"), {"enlarging": changed(spacing="x")}, "--upsampler-spacing: expected steps such as"),
        (
            ("base", "upsampler"),
            {"enlarging": FEW_STEPS_UP.model_copy(update={"low_res_level": 0.1})},
            "--upsampler-low-res-level: expected 0 for an upsampler that is not told of noise, found 0.1",
        ),
        (("base", "upsampler"), {"image": small, "mask": small}, "expected something to draw anew"),
        (("base",), {"image": page, "base": half}, "picture .*page.png: expected a picture file, found image_unknown"),
        (("base",), {"image": photograph, "mask": other}, "expected the size of .*, 80 x 40 px, found 40 x 80 px"),
        (("base",), {"image": photograph, "mask": black}, "expected something to draw anew, found none"),
        (("base",), {"base": changed(eta=0.5, sampler="dpm++")}, "expected no eta for the sampler dpm"),
        (("base",), {"best_of": 2}, "expected a CLIP that judges .*, found --best-of 2 without"),
        (("base",), {"mask": mask}, "found --mask without"),
        (("base",), {"base": half}, "found --strength 0.5 without"),
        (("base",), {"image": photograph}, "expected --mask or --strength below 1"),
    ):
        with pytest.raises(UserError, match=line) as refused:
            draw_to_folder(settings_of(uris, *parts, **changes), PROMPTS[:1], tmp_path / "out")
        assert "\n" not in str(refused.value)
    large = tmp_path / "large.png"
    Image.new("L", (30, 20), 255).save(large)
    settings = settings_of(uris, "base", "upsampler", image=small, mask=large)
    with pytest.raises(UserError, match="shorter side of at least 32 px, found 20 px"):
        draw_to_folder(settings, PROMPTS[:1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_transparent_and_white_are_drawn_anew(photograph: Path, tmp_path: Path) -> None:
    path = tmp_path / "painted.png"
    painted = np.zeros((40, 80, 4), np.uint8)
    painted[..., 3] = 255
    painted[:10, :, 3] = 0  # rubbed out
    painted[30:, :, :3] = 255  # painted white
    painted[20:30, :, :3] = 100  # the dark side of a soft rim
    Image.fromarray(painted).save(path)
    known = read_mask(path, photograph)
    assert known.all(axis=1).tolist() == [False] * 10 + [True] * 20 + [False] * 10
