"""Gradients that go wrong on order in the ranks of a Ray cluster: what each worker of a drill's cluster runs first.

Always holds: nothing happens in a process that takes no rank; positions are written well before a rank reaches them, so
that all ranks read the same. Called by Ray, in every worker of a cluster that was started with `variables`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.drills.poked import Poke

FILE = "GLIDEPATH_DRILL_POKES_FILE"  # environment variable: a JSON list of Poke, replaced whole
RAYS_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"  # a function that each worker calls before its first task


def variables(file: Path) -> dict[str, str]:
    return {RAYS_HOOK: f"{__name__}.set_up", FILE: str(file)}


class WrittenPokes:
    """Those of the file, as it is each time they are asked for."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __iter__(self) -> Iterator[Poke]:
        return iter([tuple(poke) for poke in json.loads(self._file.read_text())] if self._file.exists() else [])


def set_up() -> None:
    """Here, before a rank trains, poke every recipe."""
    from cluster import ray_worker

    train = ray_worker._train

    def poked(*arguments: Any) -> None:
        from cluster.drills.poked import poke
        from trainer.recipes import RECIPES

        for recipe in list(RECIPES):
            poke(recipe, WrittenPokes(Path(os.environ[FILE])))
        train(*arguments)

    setattr(ray_worker, "_train", poked)  # noqa: B010  (a function: assignment is refused by mypy)
