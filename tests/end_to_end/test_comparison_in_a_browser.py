"""Two runs compared, in a real browser: our page by day and by night, wide and narrow, and MLflow's own pages of them,
one of which was stopped and went on.

Screenshots go to the folder in $GLIDEPATH_SCREENSHOTS, if it is set, to be looked at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser
from mlflow.tracking import MlflowClient

from cluster.cli import run
from cluster.training import train_run
from trainer.recipes import parse_train_config

pytestmark = pytest.mark.drill

Values = Callable[..., dict[str, Any]]
PAPER = {"light": "rgb(245, 246, 248)", "dark": "rgb(21, 23, 27)"}


def keep(page: Browser, name: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("GLIDEPATH_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(folder / f"{name}.png")
    assert (folder / f"{name}.png").stat().st_size > 5_000


def test_a_person_reads_two_compared_runs_by_day_and_by_night_and_finds_them_in_mlflow(
    train_values: Values, dataset_uri: str, stack_env: Any, tmp_path: Path
) -> None:
    samples = {"every_images": 160, "prompts": ["a red apple", "a cat"] * 4, "sampling": {"spacing": 4}}
    heldout = {"dataset": dataset_uri, "images": 16, "every_images": 80}
    runs = {"slow": {"lr": 3e-4, "images": 320}, "fast-and-smaller-batches": {"lr": 3e-3, "images": 240, "batch": 8}}
    ids = []
    for name, changes in runs.items():
        values = train_values(name, samples=samples, heldout=heldout, checkpoint={"every_images": 1000}, **changes)
        if name == "slow":
            train_run(parse_train_config({**values, "images": 160}, name), lambda event: None)
        ids.append(train_run(parse_train_config(values, name), lambda event: None)["mlflow_run_id"])
    out = tmp_path / "compared.html"
    options = ["--price-per-gpu-hour", "2.5", "--html", str(out), "--png", str(out.with_suffix(".png"))]
    assert run(["runs", "compare", *ids, *options]) == 0

    with browser(tmp_path / "profile") as page:
        for theme, paper in PAPER.items():
            page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
            for width in (1200, 400):
                page.size(width, 900)
                page.open(f"file://{out}")
                assert page.run("getComputedStyle(document.body).backgroundColor") == paper
                assert page.run("document.documentElement.scrollWidth") <= width  # tables scroll in their own boxes
                page.size(width, int(page.run("document.documentElement.scrollHeight")))
                page.wait("[...document.images].every((image) => image.complete && image.naturalWidth > 300)")
                drawn = page.run("[...document.querySelectorAll('figure > svg')].map((s) => s.getBBox().width)")
                assert len(drawn) == 6 and min(drawn) > 300
                keep(page, f"compare-{theme}-{width}", tmp_path)
        assert page.requests() == [f"file://{out}"] * 4 and page.complaints() == []
        assert "smoothed over 4.8 images" in page.text() and "fast-and-smaller-batches" in page.text()
        page.run("document.querySelector('summary').click()")
        page.wait("document.querySelector('details').open && document.body.innerText.includes('memory/rss_bytes')")

        page.call("Emulation.setEmulatedMedia", features=[])
        page.size(1200, 1400)
        experiment = experiment_of(stack_env.mlflow, ids[0])
        page.open(f"{stack_env.mlflow}/#/compare-runs?runs={json.dumps(ids)}&experiments={json.dumps([experiment])}")
        page.wait("document.body.innerText.includes('fast-and-smaller-batches')")
        page.wait("document.body.innerText.includes('Comparing 2 Runs')")
        page.wait("document.body.innerText.includes('adam_betas')")
        page.click("[role=switch]")  # the first: of the params
        page.wait("!document.body.innerText.includes('adam_betas')")
        assert "0.003" in page.text()
        page.run("[...document.querySelectorAll('h3')].find((h) => h.innerText === 'Metrics')?.scrollIntoView()")
        keep(page, "compare-mlflow", tmp_path)

        page.open("about:blank")
        page.open(f"{stack_env.mlflow}/#/experiments/{experiment}/runs/{ids[0]}")
        page.wait("document.body.innerText.includes('Finished')")
        assert "from images-000000160/attempt-1" in page.text()
        keep(page, "mlflow-restarted", tmp_path)
        page.click("[role=tab]:nth-of-type(2)")  # Model metrics
        page.wait("document.querySelectorAll('.js-plotly-plot .scatterlayer path.js-line').length >= 2")
        keep(page, "mlflow-restarted-curve", tmp_path)
    steps = [
        metric.step for metric in MlflowClient(tracking_uri=stack_env.mlflow).get_metric_history(ids[0], "loss/total")
    ]
    assert sorted(steps) == list(range(16, 321, 16))  # both goes, every update once


def experiment_of(uri: str, run_id: str) -> str:
    return str(MlflowClient(tracking_uri=uri).get_run(run_id).info.experiment_id)
