"""MLflow's own pages as people see them: the ready layout of charts, the system metrics of nodes, grids by step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from browser import browser
from PIL import Image

from cluster.drills.tracking_outage import tracking_server
from trainer.pictures import png_bytes
from trainer.tracking.charts import CHARTS, charts_address
from trainer.tracking.mlflow import DatasetUse, MlflowServer, RunAbout, end_run, open_run
from trainer.tracking.spool import Point

UPDATES = 40


def make_run(uri: str, name: str, better: float) -> str:
    data = (DatasetUse("photos", name * 8, "s3://data/photos", "training"),)
    about = RunAbout(f"identity-{name}", name, f"s3://runs/{name}", {"run": name, "lr": better}, 1, data, "", {})
    run_id = open_run(uri, about)
    names = ("loss/total", "loss/q0", "loss/q1", "loss/q2", "loss/q3", "grad_norm", "lr", "images_per_s", "time/step_s")
    names += (
        "time/data_s",
        "time/save_s",
        "system/node-a/cpu_utilization_percentage",
        "system/node-b/gpu_0_utilization_percentage",
    )
    points = [
        Point(key, better / images + number, 1_763_000_000_000 + 1000 * images, images)
        for number, key in enumerate(names)
        for images in range(16, 16 * UPDATES + 1, 16)
    ]
    server = MlflowServer(uri, run_id)
    server.send(points, [])
    for images, colour in ((320, "navy"), (640, "crimson")):
        for weights in ("ema", "raw"):
            png = png_bytes(Image.new("RGB", (320, 160), colour), {})
            server.send_picture(images, f"samples/images-{images:09d}-{weights}.png", png)
    end_run(uri, run_id, "FINISHED", 1)
    return run_id


@pytest.mark.drill
def test_charts_system_metrics_and_grids_are_there_when_the_page_is_opened(tmp_path: Path) -> None:
    shots = Path(os.environ.get("GLIDEPATH_SCREENSHOTS", tmp_path))
    with tracking_server(tmp_path / "server") as server, browser(tmp_path / "profile") as page:
        from mlflow.tracking import MlflowClient

        uri = server.service.url
        run_id, _ = make_run(uri, "slow", 3.0), make_run(uri, "fast", 1.0)
        experiment = MlflowClient(tracking_uri=uri).get_run(run_id).info.experiment_id
        page.size(1400, 1800)
        page.open(charts_address(uri, experiment))
        for section, charts in CHARTS.items():
            page.wait(f"document.body.innerText.includes({section!r})")
            for metrics in charts:
                if metrics[0] not in ("heldout/total", "mfu"):  # of a child run, of GPUs
                    page.wait(f"document.body.innerText.includes({' vs '.join(metrics)!r})")
        page.wait("document.querySelectorAll('.js-plotly-plot .scatterlayer path.js-line').length >= 12")
        assert "Error loading shared view" not in page.text()
        page.screenshot(shots / "mlflow-charts.png")
        page.open("about:blank")
        page.open(f"{uri}/#/experiments/{experiment}/runs/{run_id}/system-metrics")
        for node in ("system/node-a", "system/node-b"):
            page.wait(f"document.body.innerText.includes({node!r})")
        page.wait("document.querySelectorAll('.js-plotly-plot .scatterlayer path.js-line').length >= 2")
        page.screenshot(shots / "mlflow-system-metrics.png")
        page.open("about:blank")
        page.open(f"{uri}/#/experiments/{experiment}/runs/{run_id}/model-metrics")
        page.wait("document.body.innerText.includes('samples')")
        page.wait("document.querySelector('[role=slider]') !== null")
        page.run("document.querySelector('[role=slider]').focus()")
        arrow = {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39}
        page.call("Input.dispatchKeyEvent", type="rawKeyDown", **arrow)  # to the first step that has one
        page.wait("[...document.querySelectorAll('img')].some(picture => picture.naturalWidth >= 200)")
        page.screenshot(shots / "mlflow-grids.png")
