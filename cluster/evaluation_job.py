"""An evaluation as a Ray job: one task beside the training that it judges.

Always holds: the task has resources of its own and waits until some are free, so training never waits for it; it takes
the newest checkpoint that is committed when it starts; when its process or node dies it is tried again, and goes on
from the pictures that are stored, unless a newer checkpoint was committed meanwhile. Called by `submit` and by the job.
"""

from __future__ import annotations

import logging
from typing import Any

from cluster.evaluation_config import FOLDER, EvaluateConfig, ServerSettings, named_server
from cluster.work import Work, absolute_dataset, absolute_model, is_folder, store_of_model
from data_pipeline.config import parse
from data_pipeline.errors import UserError
from data_pipeline.storage import open_store
from trainer.evaluation.feature_networks import NoisedClipSettings
from trainer.run import dataset_uri

log = logging.getLogger("glidepath")

TRIES = 4  # of a task whose process or node dies


def evaluation_work(config: EvaluateConfig, name: str) -> Work:
    """The job of an evaluation: every folder by its absolute path, since jobs run elsewhere; the tracking server of
    this environment. Raises UsageError, for a URI that carries credentials as well."""
    models = {key: absolute_model(uri) for key in ("checkpoint", "upsampler") if (uri := getattr(config, key))}
    dataset = absolute_dataset(config.dataset)
    features = tuple(
        settings.model_copy(update={"checkpoint": absolute_model(settings.checkpoint)})
        if isinstance(settings, NoisedClipSettings)
        else settings.model_copy(update={"file": settings.file.absolute()})
        for settings in config.features
    )
    server = ServerSettings(uri=named_server(config.tracking))
    changes: dict[str, Any] = {**models, "dataset": dataset, "features": features, "tracking": server}
    if config.store:
        changes["store"] = open_store(config.store).uri
    if config.probe:
        files = {"features": config.probe.features.absolute(), "ratings": config.probe.ratings.absolute()}
        changes["probe"] = config.probe.model_copy(update=files)
    config = config.model_copy(update=changes)
    store = config.store or store_of_model(config.checkpoint)
    datasets = [dataset_uri(config.dataset)]
    networks = [settings.checkpoint for settings in features if isinstance(settings, NoisedClipSettings)]
    places = [store, *datasets, *models.values(), *(uri for uri in networks if "/" in uri)]
    return Work(
        kind="evaluate",
        name=f"evaluate-{name}",
        store=f"{store}/{FOLDER}",
        values=config.model_dump(mode="json"),
        workers=1,
        gpus_per_worker=1 if config.device == "cuda" else 0,
        datasets=datasets,
        folders=[place for place in places if is_folder(place)],
    )


def evaluate_in_task(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The document of `evaluate --json`, in a process that is connected to Ray. Raises UserError as that does, and
    where no try lived to its end."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    gpus = 1 if values["device"] == "cuda" else 0
    task: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=TRIES - 1)(_evaluate)
    running = task.remote(values, name)
    try:
        document: dict[str, Any] = ray.get(running)
    except RayTaskError as error:
        raise error.cause or error from None
    except RayError as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        next_step = "submit it again, with a smaller batch or on larger nodes; it goes on where it stopped"
        raise UserError(name, f"to live through one of {TRIES} tries", found, next_step) from None
    except BaseException:
        # Only a task that is under way: Ray aborts a driver that cancels one whose reply is still being taken in.
        ray.cancel(running, force=True)
        raise
    return document


def _evaluate(values: dict[str, Any], name: str) -> dict[str, Any]:
    from cluster.evaluating import evaluate

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    said: set[str] = set()

    def progress(done: int, total: int, note: str) -> None:
        stage = f"{note.partition(':')[0]}: {10 * done // max(1, total)} tenths of {total}"
        if stage not in said:
            said.add(stage)
            log.info(stage)

    return evaluate(parse(EvaluateConfig, values, name), progress, log.warning)
