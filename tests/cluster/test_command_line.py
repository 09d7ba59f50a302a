"""The command line: what scripts rely on, and one clear line for everything that is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from data_pipeline.build import CorpusConfig, build_corpus
from data_pipeline.config import parse
from data_pipeline.errors import UserError
from data_pipeline.shards import open_dataset
from data_pipeline.storage import LocalStore
from trainer.checkpoint.manifest import committed
from trainer.engine.group import Group
from trainer.recipes import parse_train_config
from trainer.run import prepare_run, train

Values = Callable[..., dict[str, Any]]
Cli = Callable[..., tuple[int, Any, str]]


def train_here(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The run in this process, as its only worker; its events."""
    events: list[dict[str, Any]] = []
    config = parse_train_config(values, "test")
    train(config.model_dump(mode="json"), prepare_run(config), Group(), events.append)
    return events


def refused(cli: Cli, code: int, *arguments: str) -> str:
    """The one line of a command that must fail, the same in the JSON and on stderr."""
    found, document, stderr = cli(*arguments)
    assert found == code and list(document) == ["error"]
    assert f"error: {document['error']}" in stderr and "\n" not in document["error"] and "Traceback" not in stderr
    return str(document["error"])


def config_file(folder: Path, values: dict[str, Any]) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_a_corpus_is_built_inspected_and_verified(cli: Cli, picture_folder: Path, tmp_path: Path) -> None:
    values = {"inputs": [{"kind": "folder", "uri": str(picture_folder)}], "output": str(tmp_path / "out")}
    config = config_file(tmp_path, values)
    code, built, _ = cli("corpus", "build", config, "filters.preset=none")
    assert code == 0
    assert {"dataset_id", "rows", "shards", "bytes", "funnel", "quarantined"} <= built.keys()
    funnel = built["funnel"]
    assert funnel["in"] == funnel["out"] + sum(funnel["dropped"].values())
    assert cli("corpus", "inspect", str(tmp_path / "out"))[1] == built
    assert cli("corpus", "verify", str(tmp_path / "out"))[:2] == (0, {"ok": True, "bad": []})

    shard = next((tmp_path / "out").rglob("upsampler/*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    code, verdict, _ = cli("corpus", "verify", str(tmp_path / "out"))
    assert code == 1 and not verdict["ok"] and shard.name in verdict["error"]
    assert any(shard.name in bad["part"] and bad["expected"] != bad["found"] for bad in verdict["bad"])


def test_checkpoints_are_listed_verified_and_sampled_from(cli: Cli, train_values: Values, tmp_path: Path) -> None:
    values = train_values(images=32)
    train_here(values)
    code, listed, _ = cli("checkpoints", "list", values["store"])
    assert code == 0 and [row["images"] for row in listed] == [32, 16]
    assert all(row["verified"] and row["world_size"] == 1 and row["zero_stage"] == 0 for row in listed)
    assert cli("checkpoints", "verify", values["store"])[:2] == (0, {"ok": True, "bad": []})

    out = tmp_path / "pictures"
    arguments = ["--prompt", "a cat", "--prompt", "a dog", "--spacing", "3", "--out", str(out)]
    code, drawn, _ = cli("sample", listed[1]["uri"], *arguments)
    assert code == 0 and drawn["checkpoint"] == listed[1]["uri"]
    assert "spacing" in refused(cli, 2, "sample", listed[1]["uri"], "--prompt", "a cat", "--spacing", "2000")
    assert [Path(path).name for path in drawn["images"]] == ["0000.png", "0001.png"] and Path(
        drawn["samples"]
    ).is_file()

    part = next((Path(values["store"]) / "checkpoints" / "images-000000032").rglob("part-*"))
    part.write_bytes(part.read_bytes()[:-1])
    code, verdict, _ = cli("checkpoints", "verify", values["store"])
    assert code == 1 and "images-000000032/attempt-1/part-00000-of-00001" in verdict["bad"][0]["part"]
    assert [row["verified"] for row in cli("checkpoints", "list", values["store"])[1]] == [False, True]
    assert "expected bytes that verify" in refused(cli, 1, "sample", listed[0]["uri"], "--prompt", "a cat")
    line = refused(cli, 1, "sample", listed[1]["uri"], "--upsampler", listed[1]["uri"], "--prompt", "a cat")
    assert "expected an upsampler, found recipe glide_base" in line


def test_sample_takes_prompts_from_a_file_and_every_setting_from_its_options(
    cli: Cli, train_values: Values, tmp_path: Path
) -> None:
    store = train_values(images=16)["store"]
    train_here(train_values(images=16))
    (tmp_path / "prompts.txt").write_text("a dog\n\n  grüner Apfel \n")
    options = {
        "--guidance": "1.5",
        "--spacing": "3",
        "--sampler": "ancestral",
        "--clip-denoised": "dynamic",
        "--clip-percentile": "0.9",
        "--noise-temperature": "0.98",
        "--seed": "4",
        "--first-number": "10",
        "--weights": "master",
        "--batch": "2",
        "--device": "cpu",
        "--upsampler-low-res-level": "0.25",
    }
    words = [word for pair in options.items() for word in pair]
    prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--prompt", "a cat"]
    code, drawn, _ = cli("sample", store, *prompts, *words, "--out", str(tmp_path / "out"))
    assert code == 0 and [Path(path).name for path in drawn["images"]] == ["0010.png", "0011.png", "0012.png"]
    texts = [Image.open(path).text for path in drawn["images"]]  # type: ignore[attr-defined]
    assert [text["prompt"] for text in texts] == ["a cat", "a dog", "grüner Apfel"]
    drawing = json.loads(texts[1]["drawing"])
    found = {"seed": 4, "first_number": 11, "weights": "master", "batch": 2, "device": "cpu", "best_of": 1}
    assert drawing.items() >= found.items() and drawing["checkpoint"] == drawn["checkpoint"]
    of_base = {"guidance_scale": 1.5, "spacing": "3", "sampler": "ancestral", "clip": "dynamic", "eta": 0.0}
    assert drawing["base"].items() >= (of_base | {"clip_percentile": 0.9, "noise_temperature": 0.98}).items()
    of_upsampler = {"spacing": "fast27", "noise_temperature": 0.997, "low_res_level": 0.25}
    assert drawing["enlarging"].items() >= of_upsampler.items()

    for wrong, line in (
        ([], "expected --prompt, or --prompts with a file of them, found no prompt"),
        (["--prompt", "x", "--sampler", "euler"], "key base.sampler: .*found 'euler'"),
        (["--prompt", "x", "--strength", "1.5"], "key base.strength: "),
        (["--prompt", "x", "--best-of", "2"], "expected a CLIP that judges the candidates"),
        (["--prompt", "x", "--image", "a.png"], "expected --mask or --strength below 1"),
        (["--prompt", "x", "--weights", "raw"], "key weights: "),
    ):
        assert re.search(line, refused(cli, 2, "sample", store, *wrong))
    for absent, words in (
        ("no.png", ["--prompt", "x", "--image", "no.png", "--strength", "0.5"]),
        ("no.txt", ["--prompts", "no.txt"]),
    ):
        line = f"{absent}: expected a path that can be used, found No such file or directory; check it and its rights"
        assert line in refused(cli, 1, "sample", store, *words)


def test_plan_counts_what_training_would_build(cli: Cli) -> None:
    code, planned, _ = cli("plan", "glide-base-3.5b", "launcher.workers=64")
    assert code == 0 and planned["parameters"]["total"] == 3_554_414_086
    assert (planned["micro_batch"], planned["accumulation"]) == (32, 1)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "tiny", "imags=3"], "key imags: .* did you mean images"),
        (["train", "tiny", "model.widht=3"], r"key model\.widht: .* did you mean"),
        (["train", "tiny", "model.image_size=65"], "key model: expected image_size divisible by"),
        (["train", "tiny", "samples={sampling: {spacing: '2000'}}"], "steps|spacing"),
        (["train", "tiny", "model.low_resolution=16"], "model.low_resolution for upsamplers only"),
        (["train", "tiny", "model.image_size=128"], "model.image_size of at most the stored 64"),
        (["train", "demo-upsampler", "samples.prompts=[a cat]"], "no samples.prompts"),
        (["train", "no-such-preset"], "presets are: .*tiny"),
        (["corpus", "build", "photos", "inputs=[{kind: zip, uri: x}]"], "key inputs.0.kind"),
        (["trian", "tiny"], "trian"),
        (["train"], "missing parameter: config"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(cli: Cli, arguments: list[str], line: str) -> None:
    assert re.search(line, refused(cli, 2, *arguments), flags=re.IGNORECASE)


def test_a_corpus_without_a_usable_picture_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = config_file(tmp_path, {"inputs": [{"kind": "folder", "uri": str(tmp_path / "empty")}], "output": "out"})
    assert "expected" in refused(cli, 1, "corpus", "build", config)
    assert "expected" in refused(cli, 1, "corpus", "inspect", str(tmp_path / "empty"))


def test_an_unreadable_picture_is_quarantined_and_loses_nothing_else(
    cli: Cli, picture_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(picture_folder, folder)
    (folder / "bad.jpg").write_bytes(b"<html>404</html>")
    (folder / "bad.txt").write_text("a page that was saved as a picture")
    values = {
        "inputs": [{"kind": "folder", "uri": str(folder)}],
        "output": str(tmp_path / "out"),
        "filters": {"preset": "none"},
        "budget": None,
    }
    code, built, _ = cli("corpus", "build", config_file(tmp_path, values))
    assert code == 0 and built["quarantined"] == 1 and built["rows"] == built["funnel"]["in"] - 1
    assert "raise budget" in refused(cli, 1, "corpus", "build", config_file(tmp_path, values), "budget=0.001")


def test_a_dataset_of_another_tokenizer_is_refused_with_both_digests(
    cli: Cli, dataset_uri: str, train_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.shards.TOKENIZER_SHA256", "f" * 64)
    config = config_file(tmp_path, train_values())
    line = refused(cli, 1, "train", config)
    assert "tokenizer" in line and "f" * 12 in line


def test_a_resume_that_changes_a_frozen_key_is_refused_by_name(cli: Cli, train_values: Values, tmp_path: Path) -> None:
    train_here(train_values(images=16))
    line = refused(cli, 2, "train", config_file(tmp_path, train_values(images=32)), "lr=0.5")
    assert "key lr: expected 0.001 as the run began, found 0.5" in line
    assert "expected run tiny, found run other" in refused(
        cli, 1, "train", config_file(tmp_path, train_values(images=32)), "run=other"
    )


def test_a_checkpoint_of_another_dataset_or_model_is_refused_with_both_names(
    train_values: Values, picture_folder: Path, tmp_path: Path, dataset_uri: str
) -> None:
    """The configuration may name the same URI while what lies there, or the code, is another."""
    mine = tmp_path / "mine"
    shutil.copytree(dataset_uri, mine)
    values = train_values(images=16, dataset=str(mine))
    train_here(values)
    first = open_dataset(str(mine)).id

    shutil.rmtree(mine)
    inputs = [{"kind": "folder", "uri": str(picture_folder)}]
    other = build_corpus(parse(CorpusConfig, {"inputs": inputs, "output": str(mine), "seed": 9}, "test"))
    with pytest.raises(UserError) as refusal:
        train_here({**values, "images": 32})
    assert f"expected dataset_id {first[:12]}, found dataset_id {other['dataset_id'][:12]}" in str(refusal.value)
    assert len(committed(LocalStore(Path(values["store"])))) == 1


def test_a_checkpoint_of_another_model_is_refused_by_parameter(train_values: Values, tmp_path: Path) -> None:
    narrow, wide = train_values(images=16), train_values(images=16, store=str(tmp_path / "wide"))
    wide["model"] = {**wide["model"], "text_width": 64}
    train_here(narrow)
    config = parse_train_config(wide, "test")
    prepare_run(config)
    shutil.copytree(Path(narrow["store"], "checkpoints"), Path(wide["store"], "checkpoints"))
    with pytest.raises(UserError, match=r"parameter base/\S+: expected \d+ elements, found \d+ elements"):
        train(config.model_dump(mode="json"), 2, Group(), lambda event: None)


def test_a_run_of_which_no_checkpoint_verifies_does_not_start_again_from_nothing(train_values: Values) -> None:
    values = train_values(images=16)
    train_here(values)
    for manifest in Path(values["store"]).rglob("manifest.json"):
        manifest.write_bytes(manifest.read_bytes().replace(b'"attempt":1', b'"attempt":2'))
    with pytest.raises(UserError, match="expected a checkpoint that verifies, found 1 that do not"):
        train_here({**values, "images": 32})


def test_a_run_goes_on_after_it_was_moved_and_after_settings_were_added_to_the_models(
    train_values: Values, tmp_path: Path
) -> None:
    values = train_values(images=16)
    train_here(values)
    first = Path(values["store"], "attempts", "00001.json")
    record = json.loads(first.read_text())
    del record["config"]["model"]["norm_groups"]  # as an older Glidepath, without that setting, wrote it
    first.write_text(json.dumps(record))
    moved = tmp_path / "moved"
    shutil.move(values["store"], moved)
    (*_, result) = train_here({**values, "images": 32, "store": str(moved)})
    assert result["images"] == 32 and result["checkpoint"].startswith(str(moved))


def test_a_finished_run_started_again_with_other_tracking_says_that_it_is_finished(
    train_values: Values, tmp_path: Path
) -> None:
    values = train_values(images=16)
    train_here(values)
    (*_, result) = train_here({**values, "tracking": {"uri": str(tmp_path / "elsewhere")}})
    assert result["images"] == 16 and result["checkpoint"].endswith("images-000000016/attempt-1")


def test_an_unknown_run_is_refused(cli: Cli) -> None:
    assert "expected a run's store" in refused(cli, 1, "checkpoints", "list", "nowhere")
