"""The command that makes manifests of a cluster.

Always holds: what cli.py, which adds it, says of every command; nothing is started and no cluster is asked.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from cluster.console import Json, Overrides, show
from data_pipeline.config import find_config, parse, read_values
from data_pipeline.errors import UserError


def manifests(
    cluster: Annotated[str, typer.Argument(help="A YAML file, or the name of a preset of configs/cluster/.")],
    config: Annotated[str | None, typer.Argument(help="A training run, for a cluster of its own (RayJob).")] = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder for the files; those of the same name are replaced.")] = Path(
        "manifests"
    ),
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of the cluster; may be given several times.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write what runs such a cluster: a RayCluster for KubeRay, with CONFIG a RayJob, and with `aws` in the cluster's
    settings a file for `ray up`."""
    from cluster.manifests.description import ClusterDescription
    from cluster.manifests.kuberay import ray_cluster
    from cluster.manifests.ray_up import launcher_file

    described = parse(ClusterDescription, read_values(find_config("cluster", cluster), settings or ()), cluster)
    documents = {"raycluster.yaml": ray_cluster(described)}
    if described.aws:
        documents["ray-up.yaml"] = launcher_file(described)
    if config:
        documents["rayjob.yaml"] = _ray_job(described, config, overrides)
    out.mkdir(parents=True, exist_ok=True)
    for name, document in documents.items():
        source = f"# Made by `glidepath manifests {cluster}`; change its settings, not this file.\n"
        (out / name).write_text(source + yaml.dump(document, Dumper=_Plain, sort_keys=False, width=120))
    show({"files": [str(out / name) for name in documents]}, as_json)


class _Plain(yaml.SafeDumper):
    """What stands in two places is written twice: a reference from one to the other helps no reader."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _ray_job(described: Any, config: str, overrides: list[str] | None) -> dict[str, Any]:
    """Raises UserError where the run does not fit onto the cluster, or lies on a disk that goes with it."""
    from cluster.manifests.kuberay import ray_job
    from cluster.work import refuse_unfit, training_work
    from trainer.recipes import parse_train_config

    values = read_values(find_config("train", config), ["launcher.kind=ray", *(overrides or ())])
    settings = parse_train_config(values, config)
    if described.tracking and settings.tracking.uri is None:
        tracking = settings.tracking.model_copy(update={"uri": described.tracking})
        settings = settings.model_copy(update={"tracking": tracking})
    work = training_work(settings)
    refuse_unfit(described.nodes(), work)
    if work.folders:
        raise UserError(
            f"{work.name}: {work.folders[0]}",
            "a place in a bucket",
            "a disk that goes with its pod",
            "put it at s3://…",
        )
    return ray_job(described, work, os.environ)
