"""A linear probe: what people said about pictures, predicted from a network's features; the aesthetic score.

Always holds: a probe is fitted on features of unit length of one named network, and refuses features of another; a
features file is refused under another digest than the stated one; the split that the fit is judged on depends on the
pictures' ids alone. Called by evaluation.

    features file   safetensors: "features" float32 [n, D], "ids" int64 [n]; metadata "network": its name and digest
    ratings file    AVA.txt of the AVA dataset: a line a picture: number, id, counts of the ratings 1 to 10, three tags

Sources: Ramesh et al. 2022 (unCLIP): a linear probe on CLIP's features that predicts AVA's ratings, applied to samples.
Murray et al. 2012 (AVA). The ridge has a closed form: w = (X'X + s n I)^-1 X'y about the means.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError

from data_pipeline.config import Settings
from data_pipeline.draws import mix64
from data_pipeline.errors import UserError
from data_pipeline.manifests import sha256_of
from data_pipeline.records import IMAGE_SUFFIXES
from trainer.evaluation.feature_networks import SHA256, FeatureNetwork, Float32, Identity
from trainer.evaluation.reference import BLOCK
from trainer.pictures import read_picture
from trainer.recipes.recipe import Pixels
from trainer.sampling import Progress, unwatched

Float64 = NDArray[np.float64]

RATINGS = np.arange(1, 11)
HELD_OUT = 10  # one picture in so many judges the fit
AVA_COLUMNS = 15


class ProbeSettings(Settings):
    """Of the figure `aesthetic`."""

    features: Path
    sha256: Annotated[str, Field(pattern=SHA256)]  # of the features file
    ratings: Path
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3  # times n, on the squared weights


class Probe(NamedTuple):
    """score = features of unit length @ weights [D] + bias, on AVA's scale of 1 to 10. `network`: the digest of the one
    that it was fitted on; `correlation` and `rated`: Pearson's, on the held-out pictures, and how many were fitted."""

    weights: Float64
    bias: float
    network: str
    correlation: float
    rated: int


def numbered_pictures(folder: Path) -> dict[int, Path]:
    """{number: file} of a folder's pictures that are named by a number, in its order. Raises UserError for none."""
    pictures = (path for path in folder.glob("*.*") if path.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES)
    files = sorted((int(path.stem), path) for path in pictures if path.stem.isdecimal())
    if not files:
        raise UserError(f"folder {folder}", "pictures named by their ids, such as 953619.jpg", "none", "check the path")
    return dict(files)


def in_lists(files: Mapping[int, Path], progress: Progress = unwatched) -> Iterator[list[Pixels]]:
    """The largest centred squares of pictures, BLOCK at a time. Raises UserError for what is no picture."""
    for begin in range(0, len(files), BLOCK):
        paths = list(files.values())[begin : begin + BLOCK]
        yield [read_picture(path) for path in paths]
        progress(begin + len(paths), len(files), "pictures")


def write_features(
    file: Path, network: FeatureNetwork, ids: Sequence[int], blocks: Iterable[Sequence[Pixels] | Pixels]
) -> Float32:
    """Store the features [n, D] of pictures, in the order of `ids` [n]."""
    features = np.concatenate([network.features(block) for block in blocks])
    if len(features) != len(ids):
        raise ValueError(f"{len(ids)} ids for {len(features)} pictures")
    about = {"network": json.dumps({"name": network.identity.name, "digest": network.identity.digest})}
    safetensors.numpy.save_file({"features": features, "ids": np.array(ids, np.int64)}, file, about)
    return features


def read_features(file: Path, sha256: str, identity: Identity) -> tuple[Float32, NDArray[np.int64]]:
    """(features, ids) of a features file. Raises UserError for another file than stated, and for another network."""
    name = f"features file {file}"
    if not file.is_file():
        raise UserError(name, "a file", "none", "check the path")
    if (found := sha256_of(file)) != sha256:
        raise UserError(name, f"sha256 {sha256[:12]}", found[:12], "restore it, or state this one's digest")
    try:
        with safetensors.safe_open(file, "np") as opened:
            made_by = json.loads(opened.metadata()["network"])
            features, ids = opened.get_tensor("features"), opened.get_tensor("ids")
    except (SafetensorError, KeyError, TypeError, ValueError):
        expected, found = "features and ids with the network's name", "another safetensors file, or none"
        raise UserError(name, expected, found, "make it again from the pictures") from None
    if made_by["digest"] != identity.digest:
        expected, next_step = f"features by {identity.name}", "make it again with this network, or evaluate by that one"
        raise UserError(name, expected, f"those by {made_by['name']}", next_step)
    return features, ids


def read_ava(file: Path) -> dict[int, float]:
    """{picture id: mean rating}. Raises UserError naming the first line that is no line of AVA.txt."""
    if not file.is_file():
        raise UserError(f"ratings {file}", "a file", "none", "check the path")
    means = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        counts = np.array([int(field) if field.isdecimal() else -1 for field in fields[2:12]])
        if len(fields) != AVA_COLUMNS or not fields[1].isdecimal() or (counts < 0).any() or counts.sum() == 0:
            expected = f"{AVA_COLUMNS} numbers: place, id, counts of the ratings 1 to 10, three tags"
            raise UserError(f"ratings {file}: line {number}", expected, repr(line[:60]), "give AVA.txt as published")
        means[int(fields[1])] = float(counts @ RATINGS / counts.sum())
    return means


def fit_probe(settings: ProbeSettings, identity: Identity) -> Probe:
    """The probe on a features file by the network of that identity. Raises UserError as the readers do, and where too
    few pictures have features and ratings."""
    features, ids = read_features(settings.features, settings.sha256, identity)
    means = read_ava(settings.ratings)
    rated = np.array([int(id_) in means for id_ in ids], bool)
    x, y = unit(features[rated]), np.array([means[int(id_)] for id_ in ids[rated]])
    judging = mix64(ids[rated].astype(np.uint64)) % np.uint64(HELD_OUT) == 0
    if judging.sum() < 2 or (~judging).sum() < 2:
        name, found = f"linear probe on {settings.features}", f"{int(rated.sum())} in both files"
        raise UserError(name, f"at least {4 * HELD_OUT} pictures with ratings", found, "give the files of one dataset")
    weights, bias = ridge(x[~judging], y[~judging], settings.ridge)
    predicted = x[judging] @ weights + bias
    correlation = (
        float(np.corrcoef(predicted, y[judging])[0, 1]) if predicted.std() > 0 and y[judging].std() > 0 else 0.0
    )
    return Probe(weights, bias, identity.digest, correlation, int((~judging).sum()))


def ridge(x: Float64, y: Float64, strength: float) -> tuple[Float64, float]:
    """(weights [D], bias) that minimise mean (x w + b - y)^2 + strength |w|^2; the bias is not held down."""
    centred = x - x.mean(axis=0)
    gram = centred.T @ centred / len(x) + strength * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, centred.T @ (y - y.mean()) / len(x))
    return weights, float(y.mean() - x.mean(axis=0) @ weights)


def aesthetic_scores(probe: Probe, features: Float32, identity: Identity) -> Float64:
    """[n] on AVA's scale of features [n, D] by the network that the probe was fitted on."""
    assert probe.network == identity.digest
    return np.asarray(unit(features) @ probe.weights + probe.bias)


def unit(features: Float32) -> Float64:
    """Of unit length, float64 [n, D]."""
    values = features.astype(np.float64)
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))
