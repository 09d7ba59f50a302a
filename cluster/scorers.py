"""Scorer pools: the models of a corpus build, in this process or as actors of a Ray cluster.

Always holds: each actor loads its model once; an actor that dies is started again and its unit is scored again, which
finds what was committed; scores go to the store, never through Ray. Called by cluster.training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from data_pipeline.corpus import CorpusConfig
from data_pipeline.errors import UsageError, UserError
from data_pipeline.manifests import Document
from data_pipeline.scorers import InlineScorer, ScorerPool, ScorerSettings, refuse_unscored, score_columns
from data_pipeline.storage import ObjectStore
from trainer.evaluation.clip_score import NoisedClipScorer, open_clip_checkpoint, score_digest

ACTOR_TRIES = 4  # of one unit, when the actor's process or node dies under it


def scorer_pools(config: CorpusConfig) -> list[ScorerPool]:
    """The pools that a corpus configuration asks for. Raises UserError for a checkpoint that is none, or not a CLIP."""
    pools: list[ScorerPool] = []
    for settings in config.scorers:
        if config.executor.kind == "ray":
            pools.append(RayScorerPool(settings))
        else:
            _refuse_several(settings)
            pools.append(InlineScorer(NoisedClipScorer(settings.checkpoint, settings.device)))
    return pools


def check_scorers(config: CorpusConfig) -> None:
    """Raise what a build would of the scorers' checkpoints and of thresholds on their columns. For a plan: no weights
    are loaded, and neither Ray nor the device has to be here."""
    for settings in config.scorers:
        if config.executor.kind == "inline":
            _refuse_several(settings)
        open_clip_checkpoint(settings.checkpoint)
    refuse_unscored(config.filters.judged(), [NoisedClipScorer] * len(config.scorers))


def _refuse_several(settings: ScorerSettings) -> None:
    if settings.actors != 1:
        found = f"{settings.actors} with executor.kind inline"
        raise UsageError("scorers.actors", "1", found, "leave it out, or set executor.kind=ray")


class RayScorerPool:
    """`settings.actors` actors, alive while `map` runs. In a process that is connected to Ray."""

    columns = NoisedClipScorer.columns

    def __init__(self, settings: ScorerSettings) -> None:
        """Raises UserError also for a cluster without room for all actors: `map` would wait for one without a place."""
        _refuse_without_room(settings)
        checkpoint = open_clip_checkpoint(settings.checkpoint)
        # A run's store names its newest checkpoint, which may be another by the time that an actor looks.
        self._uri, self._settings = checkpoint.uri, settings
        self.digest = score_digest(checkpoint)

    def map(self, store: ObjectStore, prefixes: Sequence[str]) -> Iterator[Document]:
        """See ScorerPool. Raises the first error as it was, and UserError for a unit under which every actor died."""
        import ray
        from ray.exceptions import RayError, RayTaskError
        from ray.util import ActorPool

        on_gpu = self._settings.device == "cuda"
        actor: Any = ray.remote(num_cpus=1, num_gpus=int(on_gpu), max_restarts=-1, max_task_retries=ACTOR_TRIES - 1)(
            _Actor
        )
        count = min(self._settings.actors, len(prefixes))
        actors = [actor.remote(self._uri, self._settings.device) for _ in range(count)]
        try:
            pool: Any = ActorPool(actors)
            yield from pool.map_unordered(lambda one, prefix: one.score.remote(store, prefix), prefixes)
        except RayTaskError as error:
            raise error.cause or error from None
        except RayError as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            next_step = "run it again with fewer scorers.actors or on larger nodes; it goes on where it stopped"
            raise UserError("corpus scorer", f"to live through one of {ACTOR_TRIES} tries", what, next_step) from None
        finally:
            for one in actors:
                ray.kill(one)


def _refuse_without_room(settings: ScorerSettings) -> None:
    import ray

    resource = "GPU" if settings.device == "cuda" else "CPU"
    there = int(ray.cluster_resources().get(resource, 0))
    if there < settings.actors:
        expected, found = f"a {resource} of the cluster for each", f"{there} {resource} in all"
        raise UserError(f"scorers.actors {settings.actors}", expected, found, "lower it, or add nodes")


class _Actor:
    def __init__(self, uri: str, device: str) -> None:
        self._uri, self._device = uri, device
        self._scorer: NoisedClipScorer | None = None

    def score(self, store: ObjectStore, prefix: str) -> Document:
        # Not in the constructor: an error there reaches the driver as a traceback, not as it was.
        self._scorer = self._scorer or NoisedClipScorer(self._uri, self._device)
        return score_columns(store, prefix, self._scorer)
