"""The noised CLIP as a scorer of a corpus: the same numbers in this process and from actors of a real Ray."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from support import TINY_CLIP

from cluster.cli import run
from cluster.scorers import RayScorerPool, scorer_pools
from cluster.training import build_swept
from data_pipeline import images
from data_pipeline.build import unheard
from data_pipeline.config import parse
from data_pipeline.corpus import CorpusConfig
from data_pipeline.errors import UsageError, UserError
from data_pipeline.scorers import ScorerSettings, read_scores
from data_pipeline.storage import LocalStore
from trainer.engine.group import Group
from trainer.evaluation.clip_score import NoisedClipScorer
from trainer.recipes import parse_train_config
from trainer.run import prepare_run, train

# Scores the units of a store again, by actors of which each unit's first one dies.
DYING = """
import os, signal, sys
from pathlib import Path
from cluster import scorers
from cluster.ray_cluster import connected
from data_pipeline.scorers import ScorerSettings
from data_pipeline.storage import LocalStore

marks, output, checkpoint = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

class Dying(scorers._Actor):
    def score(self, store, prefix):
        mark = marks / prefix.strip("/").replace("/", "-")
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(store, prefix)

scorers._Actor = Dying
with connected():
    pool = scorers.RayScorerPool(ScorerSettings(kind="noised_clip", checkpoint=checkpoint, actors=2))
    prefixes = [f"units/{path.name}/" for path in (output / "units").iterdir()]
    print("SCORED", sum(document["rows"] for document in pool.map(LocalStore(output), prefixes)))
"""


@pytest.fixture(scope="module")
def clip_run(dataset_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A noised CLIP that has learnt some of the pictures by heart."""
    folder = tmp_path_factory.mktemp("clip")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    values = {
        "run": "clip",
        "store": str(folder / "clip"),
        "dataset": dataset_uri,
        "recipe": "noised_clip",
        "model": TINY_CLIP,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GLIDEPATH_HOME", str(folder / "home"))
        config = parse_train_config(
            {**values, "images": 3200, "batch": 32, "lr": 3e-3, "ema": 0.9, "logit_scale": 20}, "clip"
        )
        train(config.model_dump(mode="json"), prepare_run(config), Group(), lambda event: None)
        yield str(folder / "clip")
    torch.set_num_threads(threads)


@pytest.fixture
def corpus_values(picture_folder: Path, clip_run: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A corpus of two folders of real pictures, to be scored."""
    for number, path in enumerate(sorted(picture_folder.iterdir())):
        folder = tmp_path / "in" / ("a" if number < 100 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.name)

    def make(output: str, **changes: Any) -> dict[str, Any]:
        return {
            "inputs": [{"kind": "folder", "uri": str(tmp_path / "in" / name)} for name in ("a", "b")],
            "output": str(tmp_path / output),
            "filters": {"preset": "none", "scores": {"clip_similarity": {"min": -1.0}}},
            "scorers": [{"kind": "noised_clip", "checkpoint": clip_run}],
            **changes,
        }

    return make


def build(values: dict[str, Any]) -> dict[str, Any]:
    return build_swept(parse(CorpusConfig, values, "test"), unheard)


def scores_in(output: str) -> NDArray[np.float32]:
    """All scores of a build, by unit."""
    store = LocalStore(Path(output))
    manifests = [json.loads(path.read_text()) for path in sorted(Path(output).rglob("scores-*.json"))]
    folders = [path.parent.name for path in sorted(Path(output).rglob("scores-*.json"))]
    pairs = zip(folders, manifests, strict=True)
    return np.concatenate(
        [read_scores(store, f"units/{folder}/", [manifest["scorer"]])["clip_similarity"] for folder, manifest in pairs]
    )


def test_scores_are_those_of_the_model_and_a_threshold_takes_the_worst_pairs(
    corpus_values: Any, picture_folder: Path, clip_run: str, one_thread: None
) -> None:
    everything = build(corpus_values("out"))
    assert everything["rows"] == 96
    scores = scores_in(corpus_values("out")["output"])
    scorer = NoisedClipScorer(clip_run)
    captions = [path.read_text() for path in sorted(picture_folder.glob("*.txt"))]
    decoded = [images.decode(path.read_bytes()) for path in sorted(picture_folder.glob("*.png"))]
    pictures = np.stack([images.area_resize(images.centre_crop(picture), 64) for picture in decoded])
    own = scorer(captions, pictures)["clip_similarity"]
    np.testing.assert_allclose(np.sort(scores), np.sort(own), atol=1e-5)
    others = scorer(captions[1:] + captions[:1], pictures)["clip_similarity"]
    assert own.mean() > others.mean() + 0.1  # it knows which caption is whose, or a threshold would mean nothing

    threshold = float(np.sort(scores)[30:32].mean())
    filters = {"preset": "none", "scores": {"clip_similarity": {"min": threshold}}}
    stricter = build(corpus_values("out", filters=filters))
    assert stricter["funnel"] == {"in": 96, "out": 65, "dropped": {"column_low_clip_similarity": 31}}


def test_a_plan_names_the_scorers_that_are_in_no_figure_and_loads_none(
    corpus_values: Any, clip_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, executor in enumerate(({"kind": "inline"}, {"kind": "ray", "workers": 2})):
        scorer = {"kind": "noised_clip", "checkpoint": clip_run, "device": "cuda"}  # neither Ray nor a GPU is needed
        path = tmp_path / f"corpus-{number}.yaml"
        path.write_text(yaml.safe_dump(corpus_values("out", executor=executor, scorers=[scorer])))
        assert run(["plan", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["not_counted"] == [f"scorer {clip_run}"]


@pytest.fixture
def on_ray(stack: Any) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python on the stack's Ray, as a process of its own."""
    gcs = json.loads((stack.home / "stack" / "stack.json").read_text())["ports"]["gcs"]
    environment = {**os.environ, **stack.env, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    return run


@pytest.mark.drill
def test_actors_of_a_ray_cluster_give_the_same_dataset_even_when_each_dies_once(
    on_ray: Callable[..., subprocess.CompletedProcess[str]],
    corpus_values: Any,
    clip_run: str,
    tmp_path: Path,
    one_thread: None,
) -> None:
    here = build(corpus_values("here"))
    expected = scores_in(str(tmp_path / "here"))
    values = corpus_values("there", executor={"kind": "ray", "workers": 2})
    values["scorers"][0]["actors"] = 2
    (tmp_path / "there.yaml").write_text(yaml.safe_dump(values))
    done = on_ray("-m", "cluster.cli", "corpus", "build", str(tmp_path / "there.yaml"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dataset_id"] == here["dataset_id"]
    np.testing.assert_allclose(scores_in(values["output"]), expected, atol=1e-5)

    for path in list((tmp_path / "there" / "units").rglob("scores-*")):
        path.unlink()
    (tmp_path / "marks").mkdir()
    done = on_ray("-c", DYING, str(tmp_path / "marks"), values["output"], clip_run)
    assert "SCORED 96" in done.stdout, done.stderr
    assert len(list((tmp_path / "marks").iterdir())) == 2
    np.testing.assert_allclose(scores_in(values["output"]), expected, atol=1e-5)


def test_more_actors_than_the_cluster_has_room_for_are_refused_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    for changes, found in (({"actors": 5}, "found 4 CPU in all"), ({"device": "cuda"}, "found 0 GPU in all")):
        with pytest.raises(UserError, match=found):
            RayScorerPool(ScorerSettings(kind="noised_clip", checkpoint="run", **changes))  # type: ignore[arg-type]


def test_what_cannot_score_is_refused_before_anything_is_read(
    corpus_values: Any, clip_run: str, tmp_path: Path
) -> None:
    def pools(**changes: Any) -> Any:
        values = corpus_values("out")
        values["scorers"][0] |= changes
        return scorer_pools(parse(CorpusConfig, values, "test"))

    assert [pool.columns for pool in pools()] == [("clip_similarity",)]
    with pytest.raises(UserError, match="expected a run with a committed checkpoint, found none"):
        pools(checkpoint=str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match=r"expected 1, found 2 with executor\.kind inline"):
        pools(actors=2)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="expected a GPU that torch sees, found none"):
            pools(device="cuda")
