"""Released files in and out: arguments, keys and shapes, checkpoints made of them, exports that give them back."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.errors import UsageError, UserError
from data_pipeline.manifests import sha256_of
from data_pipeline.storage import LocalStore
from trainer.checkpoint.inspect import list_checkpoints, verify_checkpoints
from trainer.checkpoint.manifest import committed, read_manifest
from trainer.config import SamplingSettings
from trainer.interop.arguments import KINDS, Kind, glide_arguments, read_arguments
from trainer.interop.export import export_checkpoint
from trainer.interop.importer import import_release, read_json, recorded_config
from trainer.interop.openai import CLIP_FILES, build_network, load_release, release_states
from trainer.models.config import GlideModelConfig
from trainer.models.glide import Glide, parameter_counts
from trainer.models.noised_clip import NoisedClip
from trainer.models.surgery import inpaint_surgery
from trainer.recipes import parse_train_config
from trainer.sampling import draw_images
from trainer.weights import lineage_of, load_trained, start_of

PARITY = Path(os.environ.get("GLIDEPATH_PARITY", Path(__file__).resolve().parents[2].parent / "shared" / "parity"))
TINY_GLIDE = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "num_head_channels": 16,
    "attention_resolutions": "16,8",
    "dropout": 0.0,
    "text_ctx": 12,
    "xf_width": 16,
    "xf_layers": 1,
    "xf_heads": 2,
}
TINY_CLIP = {
    "image_size": 16,
    "n_vocab": 49408,
    "n_embd": 8,
    "n_head_state_text": 8,
    "n_head_text": 1,
    "n_xf_blocks_text": 1,
    "n_head_state_image": 8,
    "n_head_image": 1,
    "n_xf_blocks_image": 1,
}


RELEASED_NAMES: dict[Kind, tuple[str, ...]] = {  # glide_text2im/download.py
    "base": ("base.pt",),
    "upsample": ("upsample.pt",),
    "base-inpaint": ("base_inpaint.pt",),
    "upsample-inpaint": ("upsample_inpaint.pt",),
    "clip": ("clip_image_enc.pt", "clip_text_enc.pt"),
}


def tiny_arguments(kind: Kind) -> dict[str, Any]:
    if kind == "clip":
        return TINY_CLIP
    return {**TINY_GLIDE, "inpaint": kind.endswith("inpaint"), "super_res": kind.startswith("upsample")}


def tiny_network(kind: Kind) -> nn.Module:
    """With random weights in every tensor."""
    torch.manual_seed(1)
    module = build_network(read_arguments(kind, tiny_arguments(kind)))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05)
    return module


def release_file(kind: Kind, folder: Path) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A released file (for clip the folder of both) of a tiny network, and the state dicts in it, by file."""
    folder.mkdir(exist_ok=True)
    states = release_states(kind, tiny_network(kind))
    for name, state in states.items():
        torch.save(state, folder / name)
    return (folder if kind == "clip" else folder / next(iter(states))), states


def imported_base(folder: Path) -> str:
    """The store of a tiny imported base model."""
    path, _ = release_file("base", folder / "release")
    import_release("base", tiny_arguments("base"), path, str(folder / "run"))
    return str(folder / "run")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, values in expected.items() if not torch.equal(found[name], values)] == []


def load(kind: Kind, path: Path) -> dict[str, Tensor]:
    return load_release(kind, tiny_arguments(kind), path).state_dict()


def joined(states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The state dicts of the clip's two files as one, under our keys."""
    prefix_of = {file: prefix for prefix, file in CLIP_FILES.items()}
    return {prefix_of.get(file, "") + name: values for file, state in states.items() for name, values in state.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_released_file_loads_as_float32_in_evaluation_mode(kind: Kind, tmp_path: Path) -> None:
    path, states = release_file(kind, tmp_path)
    module = load_release(kind, tiny_arguments(kind), path)
    assert not module.training
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in module.parameters())
    assert_equal(module.state_dict(), joined(states))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_network_is_called_by_the_public_names(kind: Kind, tmp_path: Path) -> None:
    path, _ = release_file(kind, tmp_path)
    module = load_release(kind, tiny_arguments(kind), path)
    x, timesteps = torch.zeros(2, 3, 16, 16), torch.tensor([0, 999])
    with torch.no_grad():
        if isinstance(module, NoisedClip):
            image = module.encode_image(x=x, timesteps=timesteps)
            text = module.encode_text(tokens=torch.zeros(2, 77, dtype=torch.int64), lengths=torch.tensor([2, 77]))
            assert image.shape == text.shape == (2, 8)
            return
        given: dict[str, Tensor] = {"tokens": torch.zeros(2, 12, dtype=torch.int64), "mask": torch.ones(2, 12) > 0}
        if kind.startswith("upsample"):
            given["low_res"] = torch.zeros(2, 3, 4, 4)
        if kind.endswith("-inpaint"):
            given |= {"inpaint_image": x, "inpaint_mask": torch.ones(2, 1, 16, 16)}
        output = module(x=x, timesteps=timesteps, **given)
    assert output.shape == (2, 6, 16, 16)
    assert not torch.equal(output[0], output[1])  # the timesteps are read


def test_half_precision_becomes_float32_and_the_file_is_let_go(tmp_path: Path) -> None:
    state = {name: values.half() for name, values in release_states("base", tiny_network("base"))["base.pt"].items()}
    torch.save(state, tmp_path / "half.pt")
    found = load("base", tmp_path / "half.pt")
    (tmp_path / "half.pt").write_bytes(b"gone")
    assert_equal(found, {name: values.float() for name, values in state.items()})


def test_a_noised_clip_is_found_by_folder_by_either_file_and_in_one_file(tmp_path: Path) -> None:
    folder, states = release_file("clip", tmp_path)
    expected = joined(states)
    torch.save(expected, tmp_path / "both.pt")
    encoders = {prefix.removesuffix("."): states[name] for prefix, name in CLIP_FILES.items()}
    torch.save(encoders, tmp_path / "encoders.pt")
    for name in ("", "clip_image_enc.pt", "clip_text_enc.pt", "both.pt", "encoders.pt"):
        assert_equal(load("clip", folder / name), expected)
    import_release("clip", TINY_CLIP, tmp_path / "encoders.pt", str(tmp_path / "run"))
    assert_equal(load_trained(str(tmp_path / "run")).modules["clip"].state_dict(), expected)

    torch.save({"image_encoder": encoders["image_encoder"]}, tmp_path / "half.pt")
    with pytest.raises(UserError, match=r"half\.pt: text_encoder\.[a-z_.0-9]+: expected shape \[.*\], found none"):
        load("clip", tmp_path / "half.pt")
    (folder / "clip_text_enc.pt").unlink()
    with pytest.raises(UserError, match=r"clip_text_enc\.pt: expected a released file, found none"):
        load("clip", folder / "clip_image_enc.pt")


def test_a_clip_with_fewer_words_than_the_tokenizer_has_loads_but_is_no_checkpoint(tmp_path: Path) -> None:
    arguments = {**TINY_CLIP, "n_vocab": 100}
    module = build_network(read_arguments("clip", arguments))
    for name, state in release_states("clip", module).items():
        torch.save(state, tmp_path / name)
    assert_equal(load_release("clip", arguments, tmp_path).state_dict(), module.state_dict())
    with pytest.raises(UsageError, match="vocabulary of at least CLIP's 49408, found 100"):
        import_release("clip", arguments, tmp_path, str(tmp_path / "run"))


def change(state: dict[str, Tensor], fault: str) -> dict[str, Any]:
    key = "input_blocks.0.0.weight"
    if fault == "missing":
        return {name: values for name, values in state.items() if name != key}
    if fault == "unexpected":
        return {**state, "ema_decay": torch.zeros(2)}
    if fault == "shape":
        return {**state, key: torch.zeros(32, 7, 3, 3)}
    return {"model": state}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"input_blocks\.0\.0\.weight: expected shape \[32, 3, 3, 3\], found none;"),
        ("unexpected", r"ema_decay: expected no such key, found shape \[2\];"),
        ("shape", r"input_blocks\.0\.0\.weight: expected shape \[32, 3, 3, 3\], found shape \[32, 7, 3, 3\];"),
        ("nested", r"file\.pt: model: expected a tensor of weights, found dict;"),
    ],
)
def test_a_state_dict_that_does_not_fit_names_the_key_and_both_shapes(fault: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save(change(release_states("base", tiny_network("base"))["base.pt"], fault), path)
    with pytest.raises(UserError, match=message) as refusal:
        load("base", path)
    assert "\n" not in str(refusal.value)


def test_weights_that_are_no_numbers_or_are_not_dense_are_refused_by_key(tmp_path: Path) -> None:
    path, key = tmp_path / "file.pt", "input_blocks.0.0.weight"
    for change, line in (
        (lambda values: values.flatten().index_fill(0, torch.tensor([3, 5]), torch.nan).view_as(values), "2 of 864"),
        (lambda values: values.index_fill(0, torch.tensor([0]), -torch.inf), "27 of 864"),
        (lambda values: values.to_sparse(), "dense tensor, found layout torch.sparse_coo"),
    ):
        state = release_states("base", tiny_network("base"))["base.pt"]
        torch.save({**state, key: change(state[key])}, path)
        with pytest.raises(UserError, match=rf"file\.pt: {re.escape(key)}: expected .*{line}") as refusal:
            load("base", path)
        assert "\n" not in str(refusal.value)


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_executed_and_unreadable_files_are_named(tmp_path: Path) -> None:
    torch.save({"weight": Evil(tmp_path / "executed")}, tmp_path / "evil.pt")
    whole, _ = release_file("base", tmp_path)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("evil.pt", "cut.pt", "text.pt", "list.pt", "absent.pt"):
        with pytest.raises(UserError, match=rf"{name}: expected ") as refusal:
            load("base", tmp_path / name)
        assert "\n" not in str(refusal.value)
        assert "weights_only=False" not in str(refusal.value) and "`False`" not in str(refusal.value)
    assert not (tmp_path / "executed").exists()


def test_arguments_left_out_are_those_of_the_released_files() -> None:
    published = {
        "base": 385_030_726,
        "upsample": 398_361_286,
        "base-inpaint": 385_037_638,
        "upsample-inpaint": 398_368_198,
        "clip": 158_123_264,
    }
    with torch.device("meta"):
        for kind in KINDS:
            module = build_network(read_arguments(kind, {}))
            assert sum(parameter.numel() for parameter in module.parameters()) == published[kind]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("base", {"xf_ar": 1.0}, "key xf_ar: expected 0, found 1.0"),
        ("base", {"xf_padding": False}, "key xf_padding: expected True, found False"),
        ("base", {"num_head_channels": -1}, "expected num_head_channels above 0 .*, found -1"),
        ("base", {"image_size": 48}, "expected channel_mult .*, found none"),
        ("base", {"channel_mult": "1,x"}, "key channel_mult"),
        ("base", {"num_chanels": 192}, "did you mean num_channels"),
        ("base", {"inpaint": True}, "inpaint: expected False, found True"),
        ("upsample", {"super_res": False}, "super_res: expected True, found False"),
        ("base", {"num_channels": 33}, "release arguments, as our model: expected channels divisible by norm_groups"),
        ("clip", {"patch_size": 5}, "expected image_size divisible by patch_size 5, found 64"),
        ("clip", {"n_vocabulary": 3}, "did you mean n_vocab"),
        ("vae", {}, "kind: expected one of base, upsample,"),
    ],
)
def test_arguments_that_are_not_computed_here_are_refused_by_name(
    kind: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read_arguments(kind, arguments).model()


def test_attention_at_a_resolution_that_no_level_has_is_without_effect_as_in_the_release() -> None:
    arguments = {**TINY_GLIDE, "attention_resolutions": "64,8,4"}
    model = read_arguments("base", arguments).model()
    assert isinstance(model, GlideModelConfig)
    assert model.attention_resolutions == (8,)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"image_size": 64, "channel_mult": (1, 2, 3, 4), "attention_resolutions": (32, 16, 8)},
        {"attention_resolutions": ()},
        {"low_resolution": 4, "inpaint": True},
    ],
)
def test_public_arguments_and_our_configuration_say_the_same_network(change: dict[str, Any]) -> None:
    ours = read_arguments("base", TINY_GLIDE).model().model_copy(update=change)
    assert isinstance(ours, GlideModelConfig)
    theirs = glide_arguments(ours, dropout=0.1, schedule="linear", steps=1000)
    kind = ("upsample" if ours.low_resolution else "base") + ("-inpaint" if ours.inpaint else "")
    again = read_arguments(kind, theirs).model()
    expected = ours if ours.low_resolution is None else ours.model_copy(update={"low_resolution": 4})
    assert again == expected


@pytest.mark.parametrize(
    ("change", "schedule", "message"),
    [
        ({"norm_groups": 8}, "cosine", "model.norm_groups is 8, and the public code has 32"),
        ({"learned_variance": False}, "cosine", "model.learned_variance is False"),
        (
            {"low_resolution": 4, "low_res_level": True},
            "cosine",
            "model.low_res_level is True, and the public code has",
        ),
        ({"channel_mult": (1, 2, 2), "image_size": 64}, "cosine", "only as many levels as lead to 8 px"),
        ({}, "sqrt_linear", "diffusion.schedule is sqrt_linear"),
    ],
)
def test_what_the_public_code_would_compute_otherwise_has_no_public_arguments(
    change: dict[str, Any], schedule: str, message: str
) -> None:
    ours = read_arguments("base", TINY_GLIDE).model().model_copy(update=change)
    assert isinstance(ours, GlideModelConfig)
    with pytest.raises(ValueError, match=message):
        glide_arguments(ours, 0.0, schedule, 1000)


@pytest.mark.parametrize("kind", KINDS)
def test_import_followed_by_export_gives_back_equal_tensors_and_names(kind: Kind, tmp_path: Path) -> None:
    path, states = release_file(kind, tmp_path / "release")
    imported = import_release(kind, tiny_arguments(kind), path, str(tmp_path / "run"))
    exported = export_checkpoint(str(tmp_path / "run"), tmp_path / "export", licence="CC0")
    assert exported["checkpoint"] == imported["checkpoint"]
    assert exported["kind"] == kind

    release = Path(exported["release"])
    assert {file.name for file in release.iterdir()} == {*RELEASED_NAMES[kind], "arguments.json"}
    for name, state in states.items():
        assert_equal(torch.load(release / name, weights_only=True), state)
    assert_equal(load_file(tmp_path / "export" / "model.safetensors"), joined(states))
    arguments = json.loads((release / "arguments.json").read_text())
    assert arguments.items() >= tiny_arguments(kind).items()
    again = load_release(kind, arguments, release if kind == "clip" else release / RELEASED_NAMES[kind][0])
    assert_equal(again.state_dict(), joined(states))

    for file, digest in exported["files"].items():
        assert sha256_of(tmp_path / "export" / file) == digest
    card = (tmp_path / "export" / "README.md").read_text()
    assert "Licence of the data | CC0 |" in card
    assert f"| {exported['parameters']:,} |" in card
    assert all(digest in card for digest in imported["sha256"].values())
    assert all(f"release/{name}" in card for name in RELEASED_NAMES[kind])


@pytest.mark.skipif(
    not (PARITY / "config.json").is_file(),
    reason=f"NO ROUND TRIP OF REFERENCE WEIGHTS WAS MADE: {PARITY} is absent; set GLIDEPATH_PARITY",
)
@pytest.mark.parametrize("kind", ["base", "upsample"])
def test_the_reference_weights_survive_import_and_export(kind: Kind, tmp_path: Path) -> None:
    arguments = json.loads((PARITY / "config.json").read_text())["config"][kind]
    import_release(kind, arguments, PARITY / f"{kind}.pt", str(tmp_path / "run"))
    export_checkpoint(str(tmp_path / "run"), tmp_path / "export", "master")
    theirs = torch.load(PARITY / f"{kind}.pt", weights_only=True)
    assert_equal(torch.load(tmp_path / "export" / "release" / f"{kind}.pt", weights_only=True), theirs)
    written = json.loads((tmp_path / "export" / "release" / "arguments.json").read_text())
    assert written.items() >= arguments.items()


def test_an_imported_checkpoint_is_one_as_any_other(tmp_path: Path) -> None:
    path, states = release_file("base", tmp_path / "release")
    out = str(tmp_path / "runs" / "released")
    imported = import_release("base", {**tiny_arguments("base"), "noise_schedule": "linear"}, path, out)
    (row,) = list_checkpoints(out)
    assert row["uri"] == imported["checkpoint"] and row["images"] == 0 and row["verified"]
    assert verify_checkpoints(out) == []

    (name,) = committed(LocalStore(out))
    lineage = read_manifest(LocalStore(out), name.manifest_key).lineage
    assert lineage["base"]["sha256"] == imported["sha256"] == {"base.pt": sha256_of(path)}

    for weights in ("ema", "master"):
        trained = load_trained(imported["checkpoint"], weights)
        assert_equal(trained.modules["base"].state_dict(), states["base.pt"])
    assert trained.config.run == "released"
    assert trained.config.model_dump()["diffusion"]["schedule"] == "linear"
    pictures = draw_images(trained.recipe, trained.modules, ["a corgi"], SamplingSettings(spacing="2"), seed=0)
    assert pictures.shape == (1, 16, 16, 3)

    with pytest.raises(UserError, match="expected no run there, found one"):
        import_release("base", tiny_arguments("base"), path, out)


def test_an_imported_checkpoint_is_a_parent(tmp_path: Path) -> None:
    path, states = release_file("base", tmp_path / "release")
    imported = import_release("base", tiny_arguments("base"), path, str(tmp_path / "run"))
    values = load_trained(imported["checkpoint"]).config.model_dump(mode="json")
    values = {key: value for key, value in values.items() if key not in ("recipe", "store", "parent")}
    values["model"]["inpaint"] = True
    child = parse_train_config({**values, "recipe": "inpaint_base", "parent": imported["checkpoint"]}, "test")
    assert_equal(start_of(child, lineage_of(child))["base"], inpaint_surgery(states["base.pt"], "base"))


def test_a_failed_import_or_export_leaves_nothing(tmp_path: Path) -> None:
    path, _ = release_file("base", tmp_path / "release")
    with pytest.raises(UserError, match=r"final_ln\.bias: expected shape \[32\], found shape \[16\]"):
        import_release("base", {**tiny_arguments("base"), "xf_width": 32}, path, str(tmp_path / "run"))
    assert not list_checkpoints(str(tmp_path / "run"))
    import_release("base", tiny_arguments("base"), path, str(tmp_path / "run"))

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").touch()
    with pytest.raises(UserError, match="expected none, or an empty one, found one with files"):
        export_checkpoint(str(tmp_path / "run"), tmp_path / "full")
    part = next((tmp_path / "run").rglob("part-*"))
    part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(UserError, match="bytes that verify"):
        export_checkpoint(str(tmp_path / "run"), tmp_path / "export")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="bytes that verify"):
        export_checkpoint(str(tmp_path / "run"), tmp_path / "empty")
    assert {entry.name for entry in tmp_path.iterdir()} == {"release", "run", "full", "empty"}
    assert not any((tmp_path / "empty").iterdir())


def test_an_export_removes_nothing_that_it_did_not_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = imported_base(tmp_path)
    kept = tmp_path / "export.partial" / "of somebody else"
    kept.parent.mkdir()
    kept.touch()
    export_checkpoint(store, tmp_path / "export")
    assert (tmp_path / "export").stat().st_mode == kept.parent.stat().st_mode  # open to others as a folder is usually

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.interop.export._write_json", full_disk)
    (tmp_path / "empty").mkdir()
    for name in ("another", "empty"):
        with pytest.raises(OSError, match="No space left"):
            export_checkpoint(store, tmp_path / name)
    assert not any((tmp_path / "empty").iterdir())
    assert {entry.name for entry in tmp_path.iterdir()} == {"release", "run", "export", "export.partial", "empty"}
    assert kept.exists()


def test_an_export_fills_the_empty_folder_one_stands_in_and_refuses_one_with_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = imported_base(tmp_path)
    standing = tmp_path / "here"
    standing.mkdir()
    inode = standing.stat().st_ino
    monkeypatch.chdir(standing)
    exported = export_checkpoint(store, Path())
    assert exported["folder"] == str(standing.resolve())
    assert standing.stat().st_ino == inode  # a shell in it is not left in a folder that is gone
    assert {entry.name for entry in standing.iterdir()} == {"README.md", "config.json", "model.safetensors", "release"}
    for file, digest in exported["files"].items():
        assert sha256_of(standing / file) == digest
    for folder in (".", "..", "config.json"):
        with pytest.raises(UserError, match="expected none, or an empty one, found one with files"):
            export_checkpoint(store, Path(folder))
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_configuration_draws_in_at_most_the_steps_of_its_process(kind: Kind) -> None:
    count = "n_timesteps" if kind == "clip" else "diffusion_steps"
    for steps, spacing in ((4, "4"), (1000, "50")):
        arguments = read_arguments(kind, {**tiny_arguments(kind), count: steps})
        config = recorded_config(kind, arguments, "run")
        assert config.model_dump()["diffusion"]["steps"] == steps
        assert config.samples.sampling.spacing == spacing
        if kind != "clip":  # only the base models were trained with empty captions
            assert config.samples.sampling.guidance_scale == (3.0 if kind.startswith("base") else 1.0)


def test_a_release_of_a_short_process_is_imported_and_drawn_from(tmp_path: Path) -> None:
    path, _ = release_file("base", tmp_path / "release")
    imported = import_release("base", {**tiny_arguments("base"), "diffusion_steps": 4}, path, str(tmp_path / "run"))
    trained = load_trained(imported["checkpoint"])
    pictures = draw_images(trained.recipe, trained.modules, ["a corgi"], trained.config.samples.sampling, seed=0)
    assert pictures.shape == (1, 16, 16, 3)


def test_a_network_that_the_public_code_has_not_is_exported_without_its_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = imported_base(tmp_path)
    monkeypatch.setattr("trainer.interop.arguments.PUBLIC_NORM_GROUPS", 16)
    exported = export_checkpoint(store, tmp_path / "export")
    assert exported["release"] is None
    assert not (tmp_path / "export" / "release").exists()
    assert "model.norm_groups is 32" in exported["why_not"]
    assert exported["why_not"] in (tmp_path / "export" / "README.md").read_text()

    config = json.loads((tmp_path / "export" / "config.json").read_text())
    model = Glide(GlideModelConfig(**config["model"]))  # as the card says
    model.load_state_dict(load_file(tmp_path / "export" / "model.safetensors"))
    assert parameter_counts(model)["total"] == exported["parameters"]


def test_arguments_come_as_json_or_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "arguments.json").write_text('{"text_ctx": 12}')
    assert read_json('{"text_ctx": 12}') == read_json(str(tmp_path / "arguments.json")) == {"text_ctx": 12}
    for text in ('{"text_ctx": ', str(tmp_path / "absent.json")):
        with pytest.raises(UsageError, match="expected a JSON object, or a file of one"):
            read_json(text)
