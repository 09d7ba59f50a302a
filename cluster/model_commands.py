"""`glidepath models …`: each command reads its arguments, calls one function, shows its result.

Always holds: as in `cli.py`, which adds these commands.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from cluster.console import Json, show
from cluster.find_run import checkpoint_or_run
from data_pipeline.errors import UsageError

models_app = typer.Typer(no_args_is_help=True, help="Names and aliases for checkpoints, on the tracking server.")
Tracking = Annotated[str | None, typer.Option(help="Tracking server; by default $MLFLOW_TRACKING_URI.")]


@models_app.command("register")
def models_register(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint URI, or a run (then its newest).")],
    name: Annotated[str, typer.Argument(help="Of the model.")],
    alias: Annotated[str | None, typer.Option(help="Points here from now on, such as best or for-the-paper.")] = None,
    tracking: Tracking = None,
    as_json: Json = False,
) -> None:
    """Give a checkpoint a name, under which commands find it as models:/NAME@ALIAS or models:/NAME/VERSION. Nothing is
    copied; retention leaves it alone from now on. The same checkpoint again is the same version."""
    from trainer.checkpoint.attempts import first_record_key, read_record
    from trainer.checkpoint.retention import protect
    from trainer.tracking.registry import refuse_bad_names, register
    from trainer.weights import open_checkpoint

    server = _server(tracking)
    refuse_bad_names(name, alias)
    found = open_checkpoint(checkpoint_or_run(checkpoint))
    first = first_record_key(found.store)
    identity = read_record(found.store, first).get("identity") if first else None
    about = {"run": found.manifest.run, "recipe": found.config.recipe, "images": str(found.manifest.position)}
    tags = {f"glidepath.{key}": value for key, value in about.items()}
    protect(found.store, found.name)  # before the name: what it stands for must stay
    show(_row(register(server, name, found.uri, found.manifest_sha256, alias, identity, tags)), as_json)


@models_app.command("list")
def models_list(
    name: Annotated[str | None, typer.Argument(help="Of one model; without: all.")] = None,
    tracking: Tracking = None,
    as_json: Json = False,
) -> None:
    """Every version of every name with its aliases and the checkpoint that it stands for, newest first of each."""
    from trainer.tracking.registry import refuse_bad_names, registered

    server = _server(tracking)
    if name:
        refuse_bad_names(name, None)
    rows = [_row(version) for version in registered(server, name)]
    if not as_json:
        rows = [row | {"aliases": " ".join(row["aliases"]), "version": str(row["version"])} for row in rows]
    show(rows, as_json)


def _row(version: Any) -> dict[str, Any]:
    about = {key: version.tags.get(f"glidepath.{key}") for key in ("run", "recipe")}
    return {
        "name": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        **about,
        "images": int(version.tags.get("glidepath.images", 0)),
        "uri": version.uri,
        "checkpoint": version.checkpoint,
        "mlflow_run_id": version.mlflow_run_id,
    }


def _server(tracking: str | None) -> str:
    """The server that is given or in the environment. Raises UsageError without one."""
    from trainer.tracking.server import ENVIRONMENT, is_server, tracking_uri

    uri = tracking_uri(tracking, os.environ)
    if uri is None or not is_server(uri):
        found = uri or "none"
        raise UsageError("models", "a tracking server, http(s)://…", found, f"give --tracking, or set {ENVIRONMENT}")
    return uri
