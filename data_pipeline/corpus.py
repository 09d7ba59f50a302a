"""Corpus configuration: what a corpus is built from and what is left out of it.

Always holds: a dataset's content depends on `inputs` and `scorers` (by content) and on the other settings, but for
`output`, `budget` and `executor`, which decide where, whether and how fast. Called by the command line and the corpus
builder.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data_pipeline.captions import CaptionPolicy
from data_pipeline.config import Settings, state_folder
from data_pipeline.decontaminate import DecontaminateSettings
from data_pipeline.dedup import DedupSettings
from data_pipeline.filters import FilterSettings
from data_pipeline.images import Crop
from data_pipeline.scorers import ScorerSettings
from data_pipeline.sources import Input


class ExecutorSettings(Settings):
    """Where the passes run."""

    kind: Literal["inline", "ray"] = "inline"  # processes of this machine, or tasks of a Ray cluster
    workers: int = Field(default=1, ge=1)  # at most that many at once; inline, 1: in the calling process


class CorpusConfig(Settings):
    """One corpus build."""

    inputs: tuple[Input, ...] = ()
    output: str | None = None  # URI of the output folder; null: `datasets/<configuration's name>` in the state folder
    captions: CaptionPolicy = "first"  # of a picture that has several
    crop: Crop = "centre"
    filters: FilterSettings = FilterSettings()
    scorers: tuple[ScorerSettings, ...] = ()  # models that add columns to what the score pass kept; see filters.scores
    decontaminate: DecontaminateSettings = DecontaminateSettings()
    dedup: DedupSettings = DedupSettings()
    budget: float | None = Field(default=0.05, ge=0, le=1)  # largest bad share of a unit's records; null: any
    executor: ExecutorSettings = ExecutorSettings()
    seed: int = Field(default=0, ge=0)  # of the shuffle
    shard_rows: int = Field(default=4096, ge=1)


def resolve_output(config: CorpusConfig, name: str) -> CorpusConfig:
    """`config` with an output; `name` is the configuration's name, such as demo."""
    return config if config.output else config.model_copy(update={"output": str(state_folder() / "datasets" / name)})
