"""`glidepath evaluate` on small trained models: pictures kept by number, results found again, sweeps, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support import TINY_CLIP

from cluster import evaluating
from cluster.evaluating import Evaluation, evaluate, find_parts
from cluster.evaluation_config import EvaluateConfig
from cluster.evaluation_job import evaluate_in_task, evaluation_work
from cluster.signals import Interrupted
from data_pipeline.config import find_config, parse, read_values
from data_pipeline.errors import UsageError, UserError
from data_pipeline.images import decode
from data_pipeline.shards import open_dataset
from data_pipeline.storage import LocalStore
from tests.conftest import TINY_MODEL, Stack
from trainer.config import HeldoutSettings
from trainer.engine.group import Group
from trainer.evaluation.clip_score import NoisedClipScorer
from trainer.evaluation.feature_metrics import frechet_distance, moments, precision_recall
from trainer.evaluation.feature_networks import NoisedClipSettings, load_network
from trainer.evaluation.figures import MetricSettings, Taken, figures_of
from trainer.evaluation.heldout import heldout_loss
from trainer.evaluation.reference import captions_of, in_blocks, real_pictures
from trainer.recipes import parse_train_config
from trainer.run import prepare_run, train
from trainer.weights import load_trained

Cli = Callable[..., tuple[int, Any, str]]


@pytest.fixture(scope="module")
def runs(dataset_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A base model and a noised CLIP, a few updates away from their beginnings."""
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shared = {"dataset": dataset_uri, "images": 16, "batch": 8, "lr": 0.02, "ema": 0.5}
    enlarging = {**TINY_MODEL, "image_size": 32, "low_resolution": 16, "attention_resolutions": []}
    kinds: dict[str, dict[str, Any]] = {"upsampler": {"recipe": "glide_upsampler", "model": enlarging}}
    kinds |= {
        "base": {"recipe": "glide_base", "model": TINY_MODEL},
        "clip": {"recipe": "noised_clip", "model": TINY_CLIP},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GLIDEPATH_HOME", str(folder / "home"))
        for name, values in kinds.items():
            config = parse_train_config({"run": name, "store": str(folder / name), **shared, **values}, name)
            train(config.model_dump(mode="json"), prepare_run(config), Group(), lambda event: None)
    torch.set_num_threads(threads)
    yield {name: str(folder / name) for name in kinds}


@pytest.fixture
def values(runs: dict[str, str], dataset_uri: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "checkpoint": runs["base"],
        "dataset": dataset_uri,
        "images": 10,
        "sampling": {"guidance_scale": 1.0, "spacing": "ddim4"},
        "features": [{"kind": "noised-clip", "checkpoint": runs["clip"]}],
        "store": str(tmp_path / "evaluated"),
        "batch": 4,
    }


def settings_of(values: dict[str, Any]) -> EvaluateConfig:
    return parse(EvaluateConfig, values, "test")


def test_figures_are_those_of_the_stored_pictures_and_of_the_datasets_distinct_ones(
    values: dict[str, Any], runs: dict[str, str], dataset_uri: str, cli: Cli, tmp_path: Path
) -> None:
    file = tmp_path / "evaluate.yaml"
    file.write_text(yaml.safe_dump(values))
    code, document, errors = cli("evaluate", str(file), "heldout.images=16")
    assert code == 0, errors
    base, rows = load_trained(runs["base"]), HeldoutSettings(dataset=dataset_uri, images=16)
    loss = heldout_loss(base.config, base.modules, open_dataset(dataset_uri), rows, Group())
    assert document["metrics"]["heldout/mse"] == pytest.approx(loss["mse"])
    assert {f"heldout/{name}" for name in loss} <= set(document["metrics"])

    paths = sorted(Path(document["pictures"]).glob("*.png"))
    assert [path.name for path in paths] == [f"{number:08d}.png" for number in range(10)]
    network = load_network(NoisedClipSettings(kind="noised-clip", checkpoint=runs["clip"]))
    name = network.identity.name
    drawn_pictures = np.stack([decode(path.read_bytes()) for path in paths])
    dataset = open_dataset(dataset_uri)
    real_16 = np.stack(list(real_pictures(dataset, 16)))
    drawn, real = network.features(drawn_pictures), network.features(real_16)
    assert document["reference_images"] == len(real_16) <= dataset.rows
    assert document["metrics"][f"fid/{name}"] == pytest.approx(
        frechet_distance(moments(drawn), moments(real)), rel=1e-4
    )
    found = tuple(document["metrics"][f"{metric}/{name}"] for metric in ("precision", "recall"))
    assert found == precision_recall(drawn, real)

    captions = captions_of(dataset, 10)
    assert [Image.open(path).text["prompt"] for path in paths] == captions
    scorer = NoisedClipScorer(runs["clip"])
    right = scorer(captions, drawn_pictures)["clip_similarity"].mean()
    assert document["metrics"][f"clip_score/{name}"] == pytest.approx(right, abs=1e-5)
    low, margin, high = (document["metrics"][f"clip_score_margin{end}/{name}"] for end in ("_low", "", "_high"))
    assert low < margin < high

    assert name == f"noised-clip-{network.identity.sha256[:8]}"
    assert "area filter" in document["networks"][name]["resize"]
    assert document["drawn_now"] == 10
    assert (
        f"fid: expected at least 10000 pictures for a stable figure, found 10 drawn and {len(real_16)} real" in errors
    )
    assert json.loads(Path(document["result"]).read_text())["metrics"] == document["metrics"]


def test_pictures_of_both_stages_are_judged_at_the_side_of_the_second(
    values: dict[str, Any], runs: dict[str, str], dataset_uri: str
) -> None:
    both = {**values, "images": 4, "upsampler": runs["upsampler"], "upsampling": {"spacing": "ddim4"}}
    found = evaluate(settings_of(both))
    paths = sorted(Path(found["pictures"]).glob("*.png"))
    drawn = np.stack([decode(path.read_bytes()) for path in paths])
    assert drawn.shape == (4, 32, 32, 3) and found["pixels"] == 32
    real = np.stack(list(real_pictures(open_dataset(dataset_uri), 32)))
    network = load_network(NoisedClipSettings(kind="noised-clip", checkpoint=runs["clip"]))
    expected = frechet_distance(moments(network.features(drawn)), moments(network.features(real)))
    assert found["metrics"][f"fid/{network.identity.name}"] == pytest.approx(expected, rel=1e-4)
    assert found["pictures"] != evaluate(settings_of({**values, "images": 4}))["pictures"]


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_killed_evaluation_keeps_its_pictures_and_its_figures_are_those_of_one_that_was_not(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(settings_of(values))
    interrupted = settings_of({**values, "store": str(tmp_path / "interrupted")})

    puts: list[str] = []
    put = LocalStore.put

    def dying(store: LocalStore, key: str, chunks: Any) -> None:
        if "/pictures/" in key and len(puts) == 6:
            raise Killed
        puts.append(key)
        put(store, key, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", dying)
        with pytest.raises(Killed):
            evaluate(interrupted)
    kept = {path: path.read_bytes() for path in (tmp_path / "interrupted").rglob("*.png")}
    assert len(kept) == 6
    resumed = evaluate(interrupted)
    assert resumed["drawn_now"] == 4
    assert resumed["metrics"] == whole["metrics"]

    def nothing_is_loaded(*_: Any) -> Any:
        raise AssertionError("a finished result was taken again")

    monkeypatch.setattr(evaluating, "load_models", nothing_is_loaded)
    assert evaluate(interrupted)["metrics"] == whole["metrics"]
    # More pictures are other figures; those that are there already are kept.
    with pytest.raises(AssertionError):
        evaluate(settings_of({**values, "images": 12}))
    monkeypatch.undo()
    assert evaluate(settings_of({**values, "images": 12}))["drawn_now"] == 2


def test_checkpoints_that_training_removes_meanwhile_leave_an_evaluation_as_it_is(
    values: dict[str, Any], runs: dict[str, str], tmp_path: Path
) -> None:
    copies = {name: str(shutil.copytree(runs[name], tmp_path / name)) for name in ("base", "clip")}
    moving = {"checkpoint": copies["base"], "features": [{"kind": "noised-clip", "checkpoint": copies["clip"]}]}
    parts = find_parts(settings_of({**values, **moving, "images": 4}))
    (network,) = parts.config.features
    assert isinstance(network, NoisedClipSettings) and network.checkpoint == parts.identities[0].source

    def retention(*_: object) -> None:
        for copy in copies.values():
            shutil.rmtree(Path(copy, "checkpoints"), ignore_errors=True)

    found = Evaluation(parts, progress=retention).result(parts.config)
    assert not Path(copies["base"], "checkpoints").exists()
    assert (
        found["metrics"] == evaluate(settings_of({**values, "images": 4, "store": str(tmp_path / "kept")}))["metrics"]
    )


def test_a_sweep_is_a_table_and_the_papers_curves(values: dict[str, Any], cli: Cli, tmp_path: Path) -> None:
    swept = {**values, "images": 6, "sweep": {"guidance_scale": [1, 3], "spacing": ["2", "4"]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(swept))
    code, document, errors = cli(
        "evaluate", str(tmp_path / "sweep.yaml"), "metrics=[fid, precision_recall, clip_score]"
    )
    assert code == 0, errors
    table = json.loads(Path(document["sweep"]).read_text())["points"]
    assert [(row["spacing"], row["guidance_scale"]) for row in table] == [("2", 1), ("2", 3), ("4", 1), ("4", 3)]
    assert [point["metrics"] for point in document["points"]] == [
        {name: value for name, value in row.items() if "/" in name} for row in table
    ]
    assert len({point["pictures"] for point in document["points"]}) == 4
    curves = decode(Path(document["curves"]).read_bytes())
    assert curves.shape[1] > 2 * 400 and curves.std() > 10  # two panels: precision and recall, CLIP score and FID


def test_what_cannot_be_evaluated_is_one_line_before_anything_is_drawn(
    values: dict[str, Any], runs: dict[str, str], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**changes: Any) -> str:
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**values, **changes}))
        code, document, _ = cli("evaluate", str(tmp_path / "bad.yaml"))
        assert code in (1, 2) and not (tmp_path / "evaluated").exists()
        return str(document["error"])

    assert "metric inception_score: expected a feature network of kind inception, found noised-clip" in refused(
        metrics=["inception_score"]
    )
    assert "at least 500 rows, one for each picture, found 96" in refused(images=500)
    assert "expected a base model, found recipe noised_clip" in refused(checkpoint=runs["clip"])
    assert "recipe noised_clip, found glide_base" in refused(
        features=[{"kind": "noised-clip", "checkpoint": runs["base"]}]
    )
    assert "spacing" in refused(sweep={"spacing": ["3", "2000"]})
    assert "did you mean guidance_scale" in refused(sweep={"guidance": [1]})
    missing = [{"kind": "inception", "file": str(tmp_path / "weights.pth")}]
    assert "weights.pth: expected a file of weights, found none" in refused(features=missing)
    assert "tracking.uri: expected an MLflow server" in refused(tracking={"uri": "a-folder"})
    monkeypatch.setattr("trainer.evaluation.reference.UPSAMPLER_SIDE", 8)  # a dataset of smaller pictures than drawn
    assert "pictures of at most the stored 8 px, found drawn ones of 16" in refused()


def test_pictures_that_are_not_as_they_were_drawn_are_refused_by_name(values: dict[str, Any]) -> None:
    evaluation = Evaluation(find_parts(settings_of(values)))
    point = evaluation.parts.config
    evaluation.draw_missing(point)
    folder = Path(evaluation.parts.store.uri, evaluation.parts.folder(point), "pictures")
    Image.new("RGB", (20, 16)).save(folder / "00000003.png")
    with pytest.raises(UserError, match="picture 3: expected 16x16 px as picture 0, found 20x16 px"):
        evaluation.result(point)
    (folder / "00000003.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"00000003.png: expected a PNG as it was drawn, found .*; delete it"):
        evaluation.result(point)


def test_damaged_reference_features_are_found_and_named(values: dict[str, Any], state_folder: Path) -> None:
    evaluate(settings_of(values))
    (stored,) = (state_folder / "references").glob("*.safetensors")
    data = bytearray(stored.read_bytes())
    data[-3] ^= 1
    stored.write_bytes(data)
    with pytest.raises(UserError, match=r"reference .*: expected sha256 [0-9a-f]{12}, found .*; delete it"):
        evaluate(settings_of({**values, "images": 8}))


def test_the_aesthetic_score_is_that_of_a_probe_on_a_features_file(
    values: dict[str, Any], picture_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    network = values["features"][0]
    features = tmp_path / "new" / "rated.safetensors"
    code, made, errors = cli("features", str(picture_folder), "--network", json.dumps(network), "--out", str(features))
    assert code == 0, errors
    assert made["pictures"] == len(list(picture_folder.glob("*.png")))
    rng = np.random.default_rng(0)
    rows = [[number, number, *rng.integers(1, 30, 10), 1, 2, 3] for number in range(made["pictures"])]
    (tmp_path / "AVA.txt").write_text("\n".join(" ".join(map(str, row)) for row in rows))
    probe = {"features": str(features), "sha256": made["sha256"], "ratings": str(tmp_path / "AVA.txt")}
    asked = settings_of({**values, "images": 4, "metrics": ["aesthetic"], "probe": probe})
    metrics = evaluate(asked)["metrics"]
    assert set(metrics) == {f"aesthetic/{made['network']}", f"aesthetic_correlation/{made['network']}"}
    assert 1 <= metrics[f"aesthetic/{made['network']}"] <= 10
    with pytest.raises(UserError, match=r"rated.safetensors: expected sha256 0{12}, found"):
        evaluate(settings_of({**values, "metrics": ["aesthetic"], "probe": {**probe, "sha256": "0" * 64}}))


def test_features_that_are_not_finite_are_no_figure(runs: dict[str, str]) -> None:
    network = load_network(NoisedClipSettings(kind="noised-clip", checkpoint=runs["clip"]))
    drawn = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    broken = np.where(np.arange(3)[:, None] == 1, np.float32("nan"), drawn)
    for pictures, captions in ((broken, drawn), (drawn, broken)):
        taken = Taken(pictures, captions=captions)
        with pytest.raises(UserError, match=r"^clip_score: expected finite features, found 1 of 3 "):
            figures_of(network, taken, ["a", "b", "c"], None, ["clip_score"], MetricSettings())


def test_blocks_hold_every_picture_in_order() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (131, 2, 2, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.concatenate(list(in_blocks(iter(pictures)))), pictures)
    assert list(in_blocks(iter(()))) == []


@pytest.mark.parametrize("preset", ["tiny", "small", "coco-30k", "guidance-sweep"])
def test_presets_are_valid_but_for_what_they_say_must_be_set(preset: str) -> None:
    features = [{"kind": "noised-clip", "checkpoint": "x"}]
    read = read_values(find_config("evaluate", preset))
    if read["features"] == "SET-ME":
        with pytest.raises(UsageError, match="key features"):
            parse(EvaluateConfig, read, preset)
        read["features"] = features
    config = parse(EvaluateConfig, read, preset)
    if preset == "coco-30k":
        assert (config.images, config.sampling.guidance_scale, config.sampling.spacing) == (30_000, 1.5, "250")


def test_a_job_has_every_place_by_its_absolute_path_and_is_told_from_the_training_of_its_run(
    values: dict[str, Any], runs: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    del values["store"]
    home = Path(runs["base"]).parent
    monkeypatch.chdir(home)
    relative = {"checkpoint": "./base", "features": [{"kind": "noised-clip", "checkpoint": "./clip"}]}
    work = evaluation_work(settings_of({**values, **relative}), "quick")
    assert (work.kind, work.name, work.store) == ("evaluate", "evaluate-quick", f"{home}/base/evaluations")
    assert Path(work.values["checkpoint"]) == home / "base"
    assert Path(work.values["features"][0]["checkpoint"]) == home / "clip"
    assert parse(EvaluateConfig, work.values, "job").images == 10
    with pytest.raises(UsageError, match="credential") as refusal:
        evaluation_work(settings_of({**values, "checkpoint": "s3://key:secret@bucket/runs/base"}), "quick")
    assert "secret" not in str(refusal.value)
    apart = tmp_path / "clip"
    elsewhere = {"store": "s3://bucket/e", "features": [{"kind": "noised-clip", "checkpoint": str(apart)}]}
    assert str(apart) in evaluation_work(settings_of({**values, **elsewhere}), "quick").folders

    # The server of this environment, not of the job's; and nothing that everybody with the dashboard would read.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5999")
    assert evaluation_work(settings_of(values), "quick").values["tracking"] == {"uri": "http://127.0.0.1:5999"}
    with pytest.raises(UsageError, match="credentials in it") as refusal:
        evaluation_work(settings_of({**values, "tracking": {"uri": "http://me:secret@host"}}), "quick")
    assert "secret" not in str(refusal.value)
    with pytest.raises(UsageError, match="expected an MLflow server"):
        evaluation_work(settings_of({**values, "tracking": {"uri": "a-folder"}}), "quick")


def test_an_evaluation_whose_process_dies_at_every_try_fails_in_one_line_and_only_what_runs_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray
    from ray.exceptions import WorkerCrashedError

    def dies(_: object) -> None:
        raise WorkerCrashedError

    monkeypatch.setattr(ray, "remote", lambda **_: lambda function: SimpleNamespace(remote=lambda *_: "running"))
    monkeypatch.setattr(ray, "get", dies)
    cancelled: list[object] = []
    monkeypatch.setattr(ray, "cancel", lambda running, force: cancelled.append(running))
    with pytest.raises(
        UserError, match=r"^quick: expected to live .* 4 tries, found WorkerCrashedError: .*; submit it"
    ):
        evaluate_in_task({"device": "cpu"}, "quick")

    # One that has ended is left alone (Ray aborts a driver that cancels it too soon after), one under way is not.
    monkeypatch.setattr(ray, "get", lambda _: {"metrics": {}})
    assert evaluate_in_task({"device": "cpu"}, "quick") == {"metrics": {}}
    assert cancelled == []

    def interrupted(_: object) -> None:
        raise Interrupted

    monkeypatch.setattr(ray, "get", interrupted)
    with pytest.raises(Interrupted):
        evaluate_in_task({"device": "cpu"}, "quick")
    assert cancelled == ["running"]


@pytest.mark.drill
def test_an_evaluation_runs_as_a_job_of_the_cluster(
    values: dict[str, Any], stack_env: Stack, cli: Cli, tmp_path: Path
) -> None:
    here = evaluate(settings_of({**values, "store": str(tmp_path / "here")}))
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump(values))
    code, document, errors = cli("submit", "evaluate", str(tmp_path / "quick.yaml"), "--address", stack_env.dashboard)
    assert code == 0, errors
    assert document["metrics"] == pytest.approx(here["metrics"], rel=1e-3)
    assert document["submission_id"] == "evaluate-quick-1"
    assert document["mlflow_run_id"]
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump({**values, "images": 500}))
    code, document, _ = cli("submit", "evaluate", str(tmp_path / "quick.yaml"), "--address", stack_env.dashboard)
    assert code == 1 and "at least 500 rows" in document["error"]
