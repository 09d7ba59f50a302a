"""How the loader reads ahead. Apart from the loader, so that settings of a run are read without what decodes pictures.

Always holds: no setting changes which rows a rank sees, but for damage. Called by the loader and `trainer.config`.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.config import Settings

Positive = Annotated[int, Field(gt=0)]

MOST_THREADS = 8  # that `auto` gives: beyond that Python's lock is what they wait for


class LoaderSettings(Settings):
    """How batches are brought, which changes none of them; but for damage, see `on_damage`."""

    threads: Literal["auto"] | Positive = (
        "auto"  # that read and decode; auto: this rank's share of the cores, at most 8
    )
    ahead: Positive = 4  # global batches prepared ahead
    # A record batch whose stored bytes are damaged: end the run; or take the rows of the next whole one instead.
    on_damage: Literal["stop", "substitute"] = "stop"

    def threads_of(self, ranks_here: int) -> int:
        """Threads of one of `ranks_here` ranks on this machine."""
        if self.threads != "auto":
            return self.threads
        return min(MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // ranks_here))
