"""`glidepath evaluate` and `glidepath features`: each reads its arguments, calls one function, shows its result.

Always holds: what cli.py, which adds them, says of every command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.console import Config, Json, Overrides, progress_bar, say, show
from data_pipeline.config import find_config, parse, read_values
from data_pipeline.errors import UsageError

SHOWN = (  # to people: the rest says how it was made
    "checkpoint",
    "images",
    "reference_images",
    "metrics",
    "pictures",
    "result",
    "sweep",
    "curves",
    "mlflow_run_id",
)

SWEPT = ("fid", "kid", "precision", "recall", "inception_score", "clip_score", "aesthetic")


def evaluate(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """FID, KID, Inception Score, precision, recall, CLIP score of a checkpoint's pictures; the same again goes on."""
    settings = load_evaluate_config(config, overrides)
    from cluster.evaluating import evaluate as run_evaluation

    with progress_bar("evaluate") as bar:
        document = run_evaluation(settings, bar, lambda line: say(f"warning: {line}"))
    if as_json:
        show(document, True)
        return
    if "points" in document:
        show(for_people(document["points"]), False)
    show({key: document[key] for key in SHOWN if key in document}, False)


def for_people(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of a sweep that its curves show, a row for each point and network."""
    taken = {name for point in points for name in point["metrics"]}
    columns = [metric for metric in SWEPT if any(name.startswith(f"{metric}/") for name in taken)]
    return [
        {
            "network": network,
            "spacing": point["sampling"]["spacing"],
            "guidance": f"{point['sampling']['guidance_scale']:g}",
            **{metric: point["metrics"].get(f"{metric}/{network}", "-") for metric in columns},
        }
        for network in points[0]["networks"]
        for point in points
    ]


def load_evaluate_config(name: str, overrides: list[str] | None) -> Any:
    """The configuration of a file or preset with overrides; runs given by name are found. Raises UsageError."""
    from cluster.evaluation_config import EvaluateConfig
    from cluster.find_run import checkpoint_or_run
    from trainer.evaluation.feature_networks import NoisedClipSettings

    values = read_values(find_config("evaluate", name), overrides or ())
    settings = parse(EvaluateConfig, values, name)

    def found(uri: str | None) -> str | None:
        return uri and checkpoint_or_run(uri)

    features = tuple(
        network.model_copy(update={"checkpoint": found(network.checkpoint)})
        if isinstance(network, NoisedClipSettings)
        else network
        for network in settings.features
    )
    models = {"checkpoint": found(settings.checkpoint), "upsampler": found(settings.upsampler)}
    return settings.model_copy(update={**models, "features": features})


def features(
    pictures: Annotated[Path, typer.Argument(help="Folder of pictures whose file names are numbers, such as AVA's.")],
    network: Annotated[str, typer.Option(help="As in a configuration: '{kind: clip, file: ViT-B-32.pt}'.")],
    out: Annotated[Path, typer.Option(help="The features file.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Store the features of pictures by a network, for the aesthetic score's linear probe."""
    from cluster.evaluation_config import parse_network
    from data_pipeline.manifests import sha256_of
    from trainer.evaluation.feature_networks import load_network
    from trainer.evaluation.linear_probe import in_lists, numbered_pictures, write_features

    if device not in ("cpu", "cuda"):
        raise UsageError("--device", "cpu or cuda", repr(device), "correct it")
    loaded, found = load_network(parse_network(network), device), numbered_pictures(pictures)
    out.parent.mkdir(parents=True, exist_ok=True)  # before hours of work, not after
    with progress_bar("features") as bar:
        write_features(out, loaded, list(found), in_lists(found, bar))
    name, digest = loaded.identity.name, sha256_of(out)
    show({"features": str(out), "sha256": digest, "network": name, "pictures": len(found)}, as_json)
