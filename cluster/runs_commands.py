"""The commands about runs: list them, and lay some side by side.

Always holds: what cli.py, which adds them, says of every command.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.console import Json, progress_bar, show
from cluster.imports import quick_imports

runs_app = typer.Typer(no_args_is_help=True, help="Runs, side by side.")
Tracking = Annotated[str | None, typer.Option(help="Tracking server; by default $MLFLOW_TRACKING_URI.")]


@runs_app.command("list")
def runs_list(tracking: Tracking = None, as_json: Json = False) -> None:
    """Every run of the tracking server, or without one of the state folder; newest first."""
    with quick_imports():
        from cluster import runs

    known = runs.known_runs(tracking)
    show([runs.summary(run) for run in known] if as_json else runs.list_rows(known), as_json)


@runs_app.command("compare")
def runs_compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Names, stores or MLflow ids.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="What to compare, such as 'loss/*'; by default losses, evaluations, gradient norms."),
    ] = None,
    smooth: Annotated[
        float | None, typer.Option(min=0, help="Images that curves are smoothed over; by default 1/50 of the shortest.")
    ] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(min=0, help="In any currency, for the cost.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw curves and sample grids into this picture.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with everything inside it.")] = None,
    tracking: Tracking = None,
    as_json: Json = False,
) -> None:
    """In what settings runs differ, how they stand at equal images and at equal GPU-hours, and what they cost."""
    with quick_imports():
        from cluster import comparison, comparison_page, runs
        from trainer.tracking.server import tracking_uri

    known = runs.known_runs(tracking)
    found = [runs.find_run(name, known) for name in names]
    comparison.refuse_same(names, [run.mlflow_run_id or run.store for run in found])
    if png or html:
        comparison_page.refuse_without_matplotlib()
    with progress_bar("runs") as bar:
        compared, metrics, histories = runs.compared_runs(
            found, tracking_uri(tracking, os.environ), metric or (), lambda done, note: bar(done, len(found), note)
        )
    document = comparison.compare(compared, metrics, smooth, price_per_gpu_hour)
    if png or html:
        pictures = comparison_page.read_grids(document["grids"], histories)
        for path, make in ((png, comparison_page.comparison_png), (html, comparison_page.comparison_html)):
            if path:
                path.write_bytes(make(document, pictures))
    document |= {"png": str(png) if png else None, "html": str(html) if html else None}
    show(document if as_json else comparison_rows(document), as_json)


def comparison_rows(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """`runs compare` for people: a line per figure, a column per run. Newest values of all metrics are too many."""
    from cluster.comparison import cell, headings, sections

    heads = headings(document["runs"])
    return [
        {"": name} | {head: cell(value) for head, value in zip(heads, values, strict=True)}
        for section in sections(document)[:-1]
        for name, values in section.lines
    ]
