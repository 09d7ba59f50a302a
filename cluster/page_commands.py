"""The command of the local pages: judging and sampling.

Always holds: what cli.py, which adds it, says of every command; the pages are on loopback, and nowhere else.
"""

from __future__ import annotations

from contextlib import ExitStack
from importlib.util import find_spec
from typing import Annotated

import typer

from cluster.console import Json, say, show
from data_pipeline.errors import UsageError, UserError

PORT = 8400


def page(
    study: Annotated[str | None, typer.Option(help="Study to judge: folder or bucket.")] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]URI", help="Model to draw with: checkpoint, or a run; may be given several times."
        ),
    ] = None,
    upsampler: Annotated[str | None, typer.Option(help="Checkpoint URI or run of an upsampler.")] = None,
    weights: Annotated[str, typer.Option(help="ema or master.")] = "ema",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0: a free one.")] = PORT,
    as_json: Json = False,
) -> None:
    """Serve the judging page of a study, the sampling page of models, or both, on this machine until Ctrl-C. The JSON
    is written once the page answers."""
    if not study and not checkpoint:
        raise UsageError("page", "--study or --checkpoint, or both", "neither", "say what to show")
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise UserError("glidepath page", f"package {package}", "not installed", "pip install 'glidepath[cluster]'")
    from cluster.pages.app import make_app
    from cluster.pages.serving import serve

    pages, closing = {}, ExitStack()
    if study:
        from cluster.judging.study import open_study
        from cluster.pages.judging import judging_routes

        pages["judge"] = judging_routes(open_study(study))
    if checkpoint:
        from cluster.pages.desk import Desk, named_models
        from cluster.pages.sampling import sampling_routes

        desk = Desk(named_models(checkpoint), upsampler, weights, device)
        closing.callback(desk.close)
        pages["sample"] = sampling_routes(desk)

    def ready(address: str) -> None:
        say(f"{address} (this machine only; Ctrl-C ends it)")
        if as_json:
            show({"address": address, "pages": list(pages)}, True)

    with closing:
        serve(make_app(pages), port, ready)
