"""A run as commands are given it: by the URI of its store, or by its name.

Always holds: what is found has an attempt; a name is looked for in the state folder first, then on the tracking server.
Called by the command line.
"""

from __future__ import annotations

from typing import Annotated

import typer

from data_pipeline.config import state_folder
from data_pipeline.errors import UserError

Run = Annotated[
    str, typer.Argument(help="A run's store URI, or its name in the state folder or on the tracking server.")
]


def checkpoint_or_run(model: str) -> str:
    """The URI of a checkpoint as it is, that which a registered model stands for, or that of the store of a run. Raises
    UserError as `run_store` and `open_checkpoint` do."""
    from trainer.checkpoint.manifest import is_checkpoint_uri
    from trainer.tracking.registry import is_model_uri
    from trainer.weights import open_checkpoint

    if is_model_uri(model):
        return open_checkpoint(model).uri
    return model if is_checkpoint_uri(model) else run_store(model)


def run_store(run: str) -> str:
    """The store URI of a run given by URI or by name. Raises UserError if there is no such run."""
    from cluster.runs import known_store
    from data_pipeline.storage import open_store
    from trainer.checkpoint.attempts import newest_attempt

    for store in (open_store(run), open_store(str(state_folder() / "runs" / run))):
        if newest_attempt(store):
            return store.uri
    if known := known_store(run):
        return known
    raise UserError(
        f"run {run}",
        f"a run's store, or a name in {state_folder() / 'runs'} or on the tracking server",
        "neither",
        "check the URI or the name",
    )
