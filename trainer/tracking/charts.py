"""A ready layout of charts for MLflow's page of runs: the curves that one looks at first, loss before speed.

Always holds: it is a shared view as the page's own Share button makes them, kept in a tag of the experiment, so
nobody's own layout is touched; the page adds below what is not in it. Called by `trainer.tracking.mlflow`; read by
MLflow's page, whose own format it is (seen in 3.17), and which says so when it does not understand it.
"""

from __future__ import annotations

import json
from typing import Any

VIEW = "glidepath"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
SMOOTHNESS = 20  # of 100
# Section -> its charts, each of these metrics; the page names a chart after them.
CHARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "Loss": (("loss/total",), ("loss/q0", "loss/q1", "loss/q2", "loss/q3"), ("heldout/total",)),
    "Optimisation": (("grad_norm",), ("lr",)),
    "Speed": (("images_per_s",), ("time/step_s",), ("time/data_s", "time/save_s"), ("mfu",)),
}


def layout() -> str:
    """The view, as the page reads it."""
    charts, sections = [], []
    for number, (section, of_section) in enumerate(CHARTS.items()):
        uuid = f"{VIEW}-{number}"
        sections.append({"uuid": uuid, "name": section, "display": True, "isReordered": True})
        charts += [_line(uuid, metrics) for metrics in of_section]
    smooth = {"xAxisKey": "step", "lineSmoothness": SMOOTHNESS, "selectedXAxisMetricKey": ""}
    view = {"compareRunCharts": charts, "compareRunSections": sections, "isAccordionReordered": True}
    return json.dumps(view | {"globalLineChartConfig": smooth, "hideEmptyCharts": True}, separators=(",", ":"))


def _line(section: str, metrics: tuple[str, ...]) -> dict[str, Any]:
    return {
        "type": "LINE", "uuid": f"{section}-{metrics[0]}", "metricSectionId": section, "deleted": False,
        "isGenerated": False, "metricKey": metrics[0], "selectedMetricKeys": metrics, "xAxisKey": "step",
        "yAxisKey": "metric", "yAxisExpressions": [], "scaleType": "linear", "xAxisScaleType": "linear", "range": {},
        "lineSmoothness": SMOOTHNESS, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True,
    }  # fmt: skip


def charts_address(server: str, experiment: str) -> str:
    """Where a browser shows all runs of the experiment in this layout."""
    return f"{server}/#/experiments/{experiment}/runs?viewStateShareKey={VIEW}&compareRunsMode=CHART"
