"""The commands of judging by people: make a study, read its results. The page itself is `glidepath page --study`.

Always holds: what cli.py, which adds them, says of every command.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cluster.console import Json, say, show
from data_pipeline.errors import UsageError

judge_app = typer.Typer(no_args_is_help=True, help="Pictures compared by people: studies, Elo, win rates.")
StudyUri = Annotated[str, typer.Argument(metavar="STUDY", help="Folder or bucket of the study.")]


@judge_app.command("new")
def judge_new(
    study: StudyUri,
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="What a model drew with `sample`; two or more.")
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="photorealism, caption or diversity; by default the first two.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order in which pairs come.")] = 0,
    as_json: Json = False,
) -> None:
    """Make a study of what several models drew for the same prompts. Pictures are copied without their settings."""
    from cluster.judging.study import make_study

    made = make_study(study, named_options("--model", model), question or ["photorealism", "caption"], seed)
    document = made.document
    pairs = len(document.models) * (len(document.models) - 1) // 2
    comparisons = {question: pairs * len(made.items(question)) for question in document.questions}
    height, width = document.pixels
    summary = {"study": made.store.uri, "sha256": document.sha256, "captions": len(document.captions)}
    show(summary | {"pictures": len(made.ids()), "px": f"{width}x{height}", "comparisons": comparisons}, as_json)


@judge_app.command("results")
def judge_results(
    study: StudyUri,
    out: Annotated[Path | None, typer.Option(help="Folder for results.json, answers.csv and elo.png.")] = None,
    tracking: Annotated[
        str | None, typer.Option(help="MLflow server to send them to; by default $MLFLOW_TRACKING_URI.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap intervals.")] = 0,
    as_json: Json = False,
) -> None:
    """Elo ratings and win rates of a study so far, with 95% intervals."""
    from tempfile import TemporaryDirectory

    from cluster.judging.answers import Answers
    from cluster.judging.results import flat_metrics, results, rows_for_people, write_results
    from cluster.judging.study import open_study
    from trainer.tracking.server import is_server, tracking_uri

    uri = tracking_uri(tracking, os.environ)
    if uri is not None and not is_server(uri):
        raise UsageError("--tracking", "an MLflow server, http(s)://…", uri, "use --out for a folder")
    opened = open_study(study)
    answers = Answers(opened).all()
    document = results(opened, answers, seed)
    for found in document["questions"].values():
        if found["undecided"]:
            say(f"warning: {found['undecided']}")
    if out:
        document["files"] = write_results(opened, answers, document, out)
    if uri is not None:
        from trainer.tracking.mlflow import store_results

        with TemporaryDirectory(prefix="glidepath-") as folder:
            write_results(opened, answers, document, Path(folder))
            name = f"judging {Path(opened.store.uri).name}"
            about = ("judging", document["sha256"], name, document["answers"])
            document["mlflow_run_id"] = store_results(uri, *about, flat_metrics(document), Path(folder))
    show(document if as_json else rows_for_people(document), as_json)


def named_options(option: str, given: list[str] | None) -> dict[str, str]:
    """NAME=VALUE options by name. Raises UsageError for another form and for a name given twice."""
    found: dict[str, str] = {}
    for text in given or ():
        name, separator, value = text.partition("=")
        if not separator or not name or not value:
            raise UsageError(f"{option} {text!r}", "NAME=…", "another form", "write for example cfg=samples/cfg")
        if name in found:
            raise UsageError(f"{option} {name}", "each name once", "it twice", "choose another name")
        found[name] = value
    return found
