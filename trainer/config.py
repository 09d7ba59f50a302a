"""Settings of a training run that every recipe shares, and what a resume may change of them.

A recipe adds its own keys in a subclass beside it (`trainer/recipes/`). Progress counts images, not steps, and the
global `batch` is a setting: micro batch and accumulation follow from it and the world size.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction as Rational
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from data_pipeline.config import Settings
from data_pipeline.errors import UsageError
from data_pipeline.loader_settings import LoaderSettings
from trainer.diffusion.samplers import SamplerName
from trainer.diffusion.steps import Clip

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveTime = Annotated[float, Field(gt=0, allow_inf_nan=False)]

# What a resume may change: how far, on what, how often - nothing that alters the optimisation or the data. `store` is
# where the run was found, so it cannot differ from itself; a run that was moved has another.
MAY_CHANGE = ("images", "launcher", "checkpoint", "tracking", "zero", "store", "loader", "watch")


Precision = Literal["fp32", "bf16", "fp16"]


class ZeroSettings(Settings):
    """How the state is spread over ranks. Stage 0: not at all; 1 to 3: DeepSpeed's ZeRO."""

    stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "cpu"] = "none"  # cpu: masters, moments and the update itself stay in host memory


class DatasetShare(Settings):
    """One dataset of a mixture, and how much of it to how much of the others."""

    uri: str
    weight: Annotated[str, Field(coerce_numbers_to_str=True)]  # 3, 0.7 or "2/3": kept as written, so that it is exact

    @field_validator("weight")
    @classmethod
    def _refuse_no_number(cls, weight: str) -> str:
        try:
            positive = Rational(weight) > 0
        except (ValueError, ZeroDivisionError):
            positive = False
        if not positive:
            raise ValueError(f"a number above 0, found {weight}")
        return weight


Datasets = Annotated[
    Annotated[str, Tag("uri")] | Annotated[tuple[DatasetShare, ...], Field(min_length=1), Tag("mixture")],
    Discriminator(lambda value: "uri" if isinstance(value, str) else "mixture"),
]


class RestartBudgets(Settings):
    """Restarts after deaths of each cause since the run last committed a checkpoint; one death more gives it up."""

    killed: NotNegative = 3  # a process that a signal ended
    node_lost: NotNegative = 5
    hung: NotNegative = 2
    out_of_memory: NotNegative = 1  # the same size of the same run mostly needs the same memory
    raised: NotNegative = 2  # an exception that is not for users


class RestartSettings(Settings):
    """When a run whose workers died starts again by itself (kind ray); the decisions are cluster/policy.py's."""

    budgets: RestartBudgets = RestartBudgets()
    # Pauses before restarts since the last commit: none, then this, then twice that each time, up to the most.
    backoff_s: PositiveTime = 5.0
    backoff_most_s: PositiveTime = 300.0
    exclude_after: Positive = 3  # deaths in a row on one node of several: nothing is placed there any more
    wait_for_room_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 600.0  # for launcher.min_workers

    @field_validator("budgets", mode="before")
    @classmethod
    def _refuse_no_budgets(cls, budgets: Any) -> Any:
        if budgets is None or budgets == {}:
            names = ", ".join(RestartBudgets.model_fields)
            raise ValueError(f"restarts allowed by cause ({names}), for a run must not restart without end, found none")
        return budgets


class LauncherSettings(Settings):
    """Where the workers run."""

    kind: Literal["local", "ray"] = "local"  # processes of this machine, or actors of a Ray cluster
    workers: Positive = 1  # with min_workers: the most
    # Kind ray. Set: the run goes on with this many where there is no room for more; null: with `workers` only.
    min_workers: Positive | None = None
    grow_after_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 60.0  # room for more that stayed so long is used
    device: Literal["cpu", "cuda"] = "cpu"  # cuda: one GPU per worker
    # Kind ray: a process per worker that has done every import waits on its node, for a short recovery.
    standby: bool = True
    restart: RestartSettings = RestartSettings()

    @model_validator(mode="after")
    def _refuse_more_than_the_most(self) -> LauncherSettings:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers of at most workers ({self.workers}), found {self.min_workers}")
        return self


class KeepBest(Settings):
    """The checkpoints with the best held-out figure, among those that were saved where one was taken."""

    metric: str  # as it is tracked, such as heldout/total
    count: Positive = 1
    better: Literal["smallest", "largest"] = "smallest"


class CheckpointSettings(Settings):
    """When to save, and which checkpoints stay. A run also saves when it ends."""

    every_images: Positive = 100_000
    every_minutes: PositiveTime | None = None  # also when so long has passed, by rank 0's clock
    deadline_s: PositiveTime = 900.0  # a save that is not stored by then is given up
    # The newest that stay; null: all. The two below keep others besides. Protected ones always stay.
    keep_newest: Positive | None = None
    keep_every_images: Positive | None = None  # the first at or after each multiple
    keep_best: KeepBest | None = None

    @model_validator(mode="after")
    def _refuse_exceptions_to_nothing(self) -> CheckpointSettings:
        besides = [name for name in ("keep_every_images", "keep_best") if getattr(self, name) is not None]
        if besides and self.keep_newest is None:
            raise ValueError(f"keep_newest with {besides[0]}, since without it all checkpoints stay, found null")
        return self


class TrackingSettings(Settings):
    """Where the curves go: a folder for metrics.jsonl; null means beside the run's store, in `tracking/`."""

    uri: str | None = None
    consumed_ids: bool = False  # also list the ids of every global batch, in consumed.jsonl
    system_s: PositiveTime | None = 10.0  # between samples of each node's CPU, memory, disk, network, GPUs; null: none


class GuardSettings(Settings):
    """When an update is refused, when the run goes back to a checkpoint, and when it ends (trainer/guard.py)."""

    window: Positive = 100  # accepted updates that make the history
    spike_factor: Annotated[float, Field(gt=1)] = 20.0  # skip when loss or gradient norm exceeds its median times this
    warmup: Positive = 20  # updates before spikes are judged: early norms fall by orders of magnitude
    rollback_after: Positive = 4  # refused updates in a row that take the run back
    sustained_factor: Annotated[float, Field(gt=1)] = 3.0  # a loss that exceeds its median times this is high
    sustained_after: Positive = 20  # updates in a row that were refused or had a high loss take it back as well
    # Rollbacks that brought the run no further, which is `window` updates beyond where it had been; the next ends it.
    halt_after: Annotated[int, Field(ge=0)] = 10


class WatchSettings(Settings):
    """When a rank counts as hung or as slow (trainer/watch.py). Seconds that a rank may stay in one section without
    getting on; generous, since an alarm ends the attempt, and a rank that waits for another is never blamed for it."""

    start_s: PositiveTime = 1800.0  # before the first step: meeting, building networks, restoring; each collective anew
    first_step_s: PositiveTime = 1800.0  # every section of an attempt's first step, which compiles kernels
    data_s: PositiveTime = 600.0  # for the batch: a dead store is waited for 120 s and more
    forward_s: PositiveTime = 300.0  # one micro batch
    backward_s: PositiveTime = 300.0
    reduce_s: PositiveTime = 600.0  # all ranks at once in a collective call: the network
    update_s: PositiveTime = 300.0
    save_s: PositiveTime = 600.0  # the snapshot; storing it has checkpoint.deadline_s
    restore_s: PositiveTime = 1800.0  # of a rollback
    sample_s: PositiveTime = 1800.0
    evaluate_s: PositiveTime = 1800.0
    loop_s: PositiveTime = 300.0  # between sections: logging
    silent_s: PositiveTime = 120.0  # without a heartbeat: a stopped process, a dead host, a call that blocks threads
    # Slow: own work per step above this many times the median of the other ranks, in so many windows in a row.
    straggler_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 1.5
    straggler_window_s: PositiveTime = 60.0
    straggler_windows: Positive = 3


class HeldoutSettings(Settings):
    """Loss on data that is never trained on, at fixed positions, noise and timesteps."""

    dataset: str
    images: Positive = 256
    every_images: Positive = 100_000
    bits_per_dimension: Annotated[int, Field(ge=0)] = (
        0  # of this many rows, at the end; diffusion.steps passes for each
    )


class SamplingSettings(Settings):
    """How to draw from a trained model."""

    # Classifier-free guidance. 1: the caption alone; above: away from the empty caption.
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] = 3.0
    spacing: Annotated[str, Field(coerce_numbers_to_str=True)] = (
        "50"  # sampling steps, as trainer/diffusion/respacing.py reads them
    )
    sampler: SamplerName = "ddim"
    eta: Fraction = 0.0  # DDIM's noise: 0 none, 1 as much as ancestral sampling
    clip: Clip = "static"  # of the predicted image: to [-1, 1], to its own percentile and back (dynamic), or none
    clip_percentile: Annotated[float, Field(gt=0, le=1)] = 0.995  # dynamic clipping only
    strength: Fraction = 1.0  # below 1: starts from a given picture with this part of the noise (SDEdit)
    noise_temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = (
        1.0  # scales the initial noise; the release's upsampler uses 0.997
    )
    low_res_level: Fraction = 0.0  # noise on an upsampler's low resolution, for one that is told of it

    @model_validator(mode="after")
    def _eta_is_for_ddim(self) -> SamplingSettings:
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"no eta for the sampler {self.sampler}, which fixes its noise, found {self.eta}")
        return self


class SampleSettings(Settings):
    """Grids of fixed prompts at fixed seeds while training."""

    prompts: tuple[str, ...] = ()  # none: the captions (and for an upsampler the pictures) of the first held-out rows
    weights: Literal["ema", "raw", "both"] = "ema"  # raw: as trained; both: two grids, twice the time
    every_images: Positive = 100_000
    sampling: SamplingSettings = SamplingSettings()


class TrainConfig(Settings):
    """The keys of every training configuration (`configs/train/*.yaml`)."""

    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    recipe: str
    store: str | None = None  # URI of the run's folder; null: $GLIDEPATH_HOME/runs/<run>
    parent: str | None = None  # the checkpoint that a fine-tune starts from; a run's store or name: its newest one
    parent_weights: Literal["ema", "master"] = "ema"
    # URI, or a mixture [{uri: …, weight: …}, …]; `demo` and `demo-heldout` are built in the state folder when absent.
    dataset: Datasets
    images: Positive  # train until this many were consumed, rounded up to whole batches
    seed: int = 0
    batch: Positive  # global batch: images per update, at every world size
    micro_batch: Literal["auto"] | Positive = "auto"
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    warmup_images: Annotated[int, Field(ge=0)] = 0
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    dropout: Fraction = 0.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    model: Any
    precision: Precision = "fp32"  # of forward and backward passes; masters, moments and EMA are fp32 always
    zero: ZeroSettings = ZeroSettings()
    launcher: LauncherSettings = LauncherSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    guard: GuardSettings = GuardSettings()
    watch: WatchSettings = WatchSettings()
    loader: LoaderSettings = LoaderSettings()
    heldout: HeldoutSettings | None = None
    samples: SampleSettings = SampleSettings()

    @model_validator(mode="after")
    def _refuse_fp16_without_zero(self) -> TrainConfig:
        if self.precision == "fp16" and self.zero.stage == 0:
            raise ValueError("zero.stage 1, 2 or 3 with precision fp16, whose loss scale is DeepSpeed's, found 0")
        return self

    @model_validator(mode="after")
    def _refuse_best_without_figures(self) -> TrainConfig:
        if self.checkpoint.keep_best is None:
            return self
        every = self.checkpoint.every_images
        if self.heldout is None or self.heldout.every_images % every:
            found = self.heldout.every_images if self.heldout else "no heldout"
            raise ValueError(
                f"heldout.every_images in multiples of checkpoint.every_images ({every}) with checkpoint.keep_best, so "
                f"that figures are taken where it saves, found {found}"
            )
        return self

    def dataset_uris(self) -> tuple[str, ...]:
        """Of the data that is trained on."""
        return (self.dataset,) if isinstance(self.dataset, str) else tuple(share.uri for share in self.dataset)

    def for_evaluation(self) -> TrainConfig:
        """The same run without what is random, or worth its while, in training only; recipes with more of it extend
        this."""
        return self.model_copy(update={"dropout": 0.0})

    def micro_batch_size(self) -> int:
        """Images per forward pass and rank: the setting, or for `auto` at most 16 (kind to a small machine)."""
        return 16 if self.micro_batch == "auto" else self.micro_batch


def refuse_changed_keys(began: TrainConfig, config: TrainConfig) -> None:
    """Raise UsageError naming the first key that a resume changes and must not. `began`: what the run began with."""
    now = dict(flat_keys(config.model_dump(mode="json")))
    then = dict(flat_keys(began.model_dump(mode="json")))
    for key in sorted(now.keys() | then.keys()):
        if now.get(key) == then.get(key) or any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE):
            continue
        raise UsageError(
            f"run {config.run}: key {key}",
            f"{then.get(key)!r} as the run began",
            f"{now.get(key)!r}",
            f"on resume only {', '.join(MAY_CHANGE)} may change; choose another run and store for a new one",
        )


def flat_keys(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested dictionary."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def lr_at(images: int, lr: float, warmup_images: int) -> float:
    """Learning rate of the update that begins at `images`: linear warm-up, then constant (GLIDE, ADM: no decay)."""
    if images >= warmup_images:
        return lr
    return lr * (images + 1) / warmup_images
