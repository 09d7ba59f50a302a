"""What an evaluation is of: the keys of `configs/evaluate/*.yaml`, and the points of a sweep.

Always holds: everything that decides a picture or a figure is a key, but for what the checkpoint and the dataset hold.
Called by the evaluate command.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from cluster.drawing import DrawSettings
from data_pipeline.config import Settings, parse
from data_pipeline.errors import UsageError
from trainer.config import NotNegative, Positive, SamplingSettings
from trainer.evaluation.feature_networks import NetworkSettings
from trainer.evaluation.figures import Metric, MetricSettings
from trainer.evaluation.linear_probe import ProbeSettings
from trainer.sampling import BATCH, RELEASED_UPSAMPLING
from trainer.tracking.server import is_server, tracking_uri
from trainer.weights import WeightsKind

FOLDER = "evaluations"  # of a store


class SweepSettings(Settings):
    """Values that are evaluated in every combination; none: that of `sampling`."""

    guidance_scale: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] = ()
    spacing: tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...] = ()


class HeldoutRows(Settings):
    """How many rows of the dataset the base model's loss is taken of."""

    images: Positive = 256
    bits_per_dimension: NotNegative = 0  # of this many, which takes diffusion.steps passes for each


class ServerSettings(Settings):
    """Where results are logged besides the store; null: the server of the environment, or of the checkpoint's run."""

    uri: str | None = None


def named_server(setting: ServerSettings) -> str | None:
    """The server that the setting or this environment names. Raises UsageError for a folder, and as `tracking_uri`
    does."""
    uri = tracking_uri(setting.uri, os.environ)
    if uri is not None and not is_server(uri):
        raise UsageError(
            "tracking.uri", "an MLflow server, http(s)://…", uri, "leave it out: results are stored as well"
        )
    return uri


class _Network(Settings):
    network: NetworkSettings


def parse_network(text: str) -> NetworkSettings:
    """A feature network as YAML text. Raises UsageError."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = text
    return parse(_Network, {"network": values}, "--network").network


class EvaluateConfig(Settings):
    """The keys of an evaluation (`configs/evaluate/*.yaml`)."""

    checkpoint: str  # URI, or a run (then its newest)
    upsampler: str | None = None
    weights: WeightsKind = "ema"
    dataset: str  # captions to draw and real pictures, never trained on; `demo-heldout` is built when absent
    images: Positive  # drawn, one for each of the first captions
    seed: int = 0
    sampling: SamplingSettings = SamplingSettings()
    upsampling: SamplingSettings = RELEASED_UPSAMPLING
    features: Annotated[tuple[NetworkSettings, ...], Field(min_length=1)]
    metrics: tuple[Metric, ...] = ()  # none: all that the networks can take
    reference_images: Positive | None = None  # real pictures to compare with; null: all of the dataset
    probe: ProbeSettings | None = None  # what the metric `aesthetic` is fitted on
    constants: MetricSettings = MetricSettings()
    heldout: HeldoutRows | None = None  # also the loss, by quartiles of the timesteps, on rows of the dataset
    sweep: SweepSettings | None = None
    store: str | None = None  # URI of the folder for pictures and results; null: the store of the checkpoint's run
    tracking: ServerSettings = ServerSettings()
    batch: Positive = BATCH  # pictures drawn together; changes memory and time only
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _aesthetic_has_a_probe(self) -> EvaluateConfig:
        if ("aesthetic" in self.metrics) != (self.probe is not None):
            found = "probe" if self.probe else "the metric"
            raise ValueError(f"the metric aesthetic and probe together, found {found} alone")
        return self

    def drawing(self) -> DrawSettings:
        """How the pictures are drawn."""
        return DrawSettings(
            checkpoint=self.checkpoint,
            upsampler=self.upsampler,
            weights=self.weights,
            seed=self.seed,
            base=self.sampling,
            enlarging=self.upsampling,
            batch=self.batch,
            device=self.device,
        )

    def points(self) -> list[EvaluateConfig]:
        """The settings of each point of the sweep; without one, these."""
        if self.sweep is None:
            return [self]
        scales = self.sweep.guidance_scale or (self.sampling.guidance_scale,)
        spacings = self.sweep.spacing or (self.sampling.spacing,)
        return [
            self.model_copy(
                update={
                    "sampling": self.sampling.model_copy(update={"guidance_scale": scale, "spacing": spacing}),
                    "sweep": None,
                }
            )
            for spacing in spacings
            for scale in scales
        ]
