"""`glidepath checkpoints …`: each command reads its arguments, calls one function, shows its result.

Always holds: as in `cli.py`, which adds these commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.console import Json, report_verification, say, show
from cluster.find_run import Run, checkpoint_or_run, run_store
from data_pipeline.errors import UsageError

checkpoints_app = typer.Typer(no_args_is_help=True, help="Checkpoints of a run.")
Name = Annotated[str, typer.Argument(help="images-<position>/attempt-<n>, or the checkpoint's URI.")]


@checkpoints_app.command("list")
def checkpoints_list(run: Run, as_json: Json = False) -> None:
    """Committed checkpoints of a run, newest first."""
    from trainer.checkpoint.inspect import list_checkpoints

    show(list_checkpoints(run_store(run)), as_json)


@checkpoints_app.command("verify")
def checkpoints_verify(run: Run, as_json: Json = False) -> None:
    """Read every byte of every checkpoint of a run and name each bad part."""
    from trainer.checkpoint.inspect import verify_checkpoints

    report_verification(verify_checkpoints(run_store(run)), as_json)


@checkpoints_app.command("prune")
def checkpoints_prune(
    run: Run,
    keep_newest: Annotated[int | None, typer.Option(min=1, help="Instead of the run's checkpoint.keep_newest.")] = None,
    keep_every_images: Annotated[int | None, typer.Option(min=1, help="Instead of the run's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would stay.")] = False,
    as_json: Json = False,
) -> None:
    """Remove the checkpoints that need not stay, by the run's settings or by those given here."""
    from data_pipeline.config import parse
    from data_pipeline.storage import open_store
    from trainer.checkpoint.retention import prune, recorded_settings
    from trainer.config import CheckpointSettings

    store = open_store(run_store(run))
    given = {"keep_newest": keep_newest, "keep_every_images": keep_every_images}
    values = recorded_settings(store).model_dump() | {key: value for key, value in given.items() if value is not None}
    settings = parse(CheckpointSettings, values, "checkpoints prune")
    if settings.keep_newest is None:
        raise UsageError(f"run {run}", "checkpoint.keep_newest, or --keep-newest", "neither", "say how many stay")
    rows = prune(store, settings, dry_run)
    show({"dry_run": dry_run, "checkpoints": rows} if as_json else rows, as_json)


@checkpoints_app.command("sweep")
def checkpoints_sweep(run: Run, as_json: Json = False) -> None:
    """Remove what saves that never committed left behind; every start of the run does so too."""
    from data_pipeline.storage import open_store
    from trainer.checkpoint.sweep import sweep_by_hand

    removed, running = sweep_by_hand(open_store(run_store(run)))
    if running is not None:
        say(f"attempt {running} has not ended: what it may be writing stays")
    show({"removed_objects": removed, "attempt_not_ended": running}, as_json)


@checkpoints_app.command("protect")
def checkpoints_protect(run: Run, name: Name, as_json: Json = False) -> None:
    """Have a checkpoint stay whatever checkpoint.keep_newest says: a parent of fine-tunes, or what a paper shows."""
    from data_pipeline.storage import open_store
    from trainer.checkpoint.manifest import parse_name
    from trainer.checkpoint.retention import protect

    protect(open_store(run_store(run)), parse_name(name))
    show({"checkpoint": str(parse_name(name)), "protected": True}, as_json)


@checkpoints_app.command("unprotect")
def checkpoints_unprotect(run: Run, name: Name, as_json: Json = False) -> None:
    """Let the run's settings decide again."""
    from data_pipeline.storage import open_store
    from trainer.checkpoint.manifest import parse_name
    from trainer.checkpoint.retention import unprotect

    unprotect(open_store(run_store(run)), parse_name(name))
    show({"checkpoint": str(parse_name(name)), "protected": False}, as_json)


@checkpoints_app.command("export")
def checkpoints_export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint URI, or a run (then its newest).")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    weights: Annotated[str, typer.Option(help="ema or master.")] = "ema",
    data_licence: Annotated[str, typer.Option(help="Licence of the training data, for the model card.")] = "unknown",
    as_json: Json = False,
) -> None:
    """Write a model as safetensors with its configuration and model card, and in the release's layout."""
    from trainer.interop.export import export_checkpoint

    if weights not in ("ema", "master"):
        raise UsageError("--weights", "ema or master", repr(weights), "correct it")
    uri = checkpoint_or_run(checkpoint)
    show(export_checkpoint(uri, out, "master" if weights == "master" else "ema", data_licence), as_json)
