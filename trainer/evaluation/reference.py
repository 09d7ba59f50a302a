"""What drawn pictures are compared with: the captions to draw, the real pictures of a dataset, and their features.

Always holds: caption i is the same at any time, for any model and number of pictures; every distinct picture of the
dataset counts once, however many captions it has; real pictures are brought to the side of the drawn ones by the corpus
builder's area filter from the square that it kept (a centre crop, where the corpus says no other); features are taken
once, and found again by the digest of all that they depend on. Called by evaluation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import chain, islice

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from data_pipeline.digests import content_digest
from data_pipeline.errors import UserError
from data_pipeline.families import BASE_SIDE, UPSAMPLER_SIDE
from data_pipeline.images import AREA_FILTER_VERSION, area_resize, decode_stored
from data_pipeline.loader import Column, read_rows
from data_pipeline.manifests import digest_of
from data_pipeline.order import SampleOrder
from data_pipeline.shards import Dataset
from data_pipeline.storage import ObjectNotFound, ObjectStore
from trainer.evaluation.feature_networks import FeatureNetwork, Float32
from trainer.evaluation.heldout import EVALUATION_SEED
from trainer.recipes.recipe import Pixels
from trainer.sampling import Progress, unwatched

VERSION = "reference-1"
BLOCK = 64  # pictures decoded and passed through a network together
READ_ROWS = 256


def captions_of(dataset: Dataset, count: int) -> list[str]:
    """The first `count` captions in the order of evaluation. Raises UserError where the dataset has fewer rows."""
    order = SampleOrder(dataset.id, dataset.shard_rows, EVALUATION_SEED, 1)
    if count > order.epoch_images:
        name, expected = f"dataset {dataset.id[:12]}", f"at least {count} rows, one for each picture"
        raise UserError(name, expected, f"{order.epoch_images}", f"draw images={order.epoch_images}, or hold out more")
    captions: list[str] = []
    for begin in range(0, count, READ_ROWS):
        positions = np.arange(begin, min(begin + READ_ROWS, count), dtype=np.int64)
        captions += read_rows(dataset, [Column("base", "caption")], *order.rows_at(positions))["caption"]
    return captions


def real_pictures(dataset: Dataset, side: int) -> Iterator[Pixels]:
    """Every distinct picture of a dataset, uint8 [side, side, 3], in the order of its shards.

    Raises UserError for a side that the dataset does not store, ShardDamaged.
    """
    if side > UPSAMPLER_SIDE:
        name, found = f"dataset {dataset.id[:12]}", f"drawn ones of {side}"
        raise UserError(name, f"pictures of at most the stored {UPSAMPLER_SIDE} px", found, "evaluate a smaller model")
    seen: set[bytes] = set()
    for shard, rows in enumerate(dataset.shard_rows):
        for begin in range(0, rows, READ_ROWS):
            numbers = np.arange(begin, min(begin + READ_ROWS, rows), dtype=np.int64)
            for stored in _stored_pictures(dataset, side, np.full(len(numbers), shard), numbers):
                digest = content_digest(memoryview(stored).cast("B"))
                if digest not in seen:
                    seen.add(digest)
                    yield area_resize(_decoded(stored), side)


def _stored_pictures(
    dataset: Dataset, side: int, shards: NDArray[np.int64], rows: NDArray[np.int64]
) -> list[bytes] | Pixels:
    family, name = ("base", "image64") if side <= BASE_SIDE else ("upsampler", "image256")
    found: list[bytes] | Pixels = read_rows(dataset, [Column(family, name)], shards, rows)[name]
    return found


def _decoded(stored: bytes | Pixels) -> Pixels:
    if isinstance(stored, bytes):
        return decode_stored(stored)
    return stored.reshape(BASE_SIDE, BASE_SIDE, 3)


def reference_features(
    dataset: Dataset,
    side: int,
    network: FeatureNetwork,
    store: ObjectStore,
    pictures: int | None = None,
    progress: Progress = unwatched,
) -> Float32:
    """Features [n, D] of the dataset's first `pictures` distinct pictures, or of all of them.

    Taken from `store` where they are there already, else put there. Raises UserError as `real_pictures` does, and for
    stored features that are damaged.
    """
    depends_on = [VERSION, dataset.id, side, AREA_FILTER_VERSION, network.identity.digest, pictures]
    key = f"{network.identity.name}-{digest_of(depends_on)[:16]}.safetensors"
    try:
        return _verified(store.get(key), f"{store.uri}/{key}")
    except ObjectNotFound:
        pass
    found, note = [], f"real pictures by {network.identity.name}"
    source = islice(real_pictures(dataset, side), pictures)
    done = 0
    while block := list(islice(source, BLOCK)):
        found.append(network.features(np.stack(block)))
        done += len(block)
        progress(done, min(dataset.rows, pictures or dataset.rows), note)
    features = np.concatenate(found)
    metadata = {"sha256": _sha256(features), "network": network.identity.name, "dataset": dataset.id}
    store.put(key, [safetensors.numpy.save({"features": features}, metadata)])
    return features


def _verified(data: bytes, name: str) -> Float32:
    """Raises UserError for bytes that were not stored so."""
    try:
        features = safetensors.numpy.load(data)["features"]
        header = int.from_bytes(data[:8], "little")
        stated = json.loads(data[8 : 8 + header])["__metadata__"]["sha256"]
    except (SafetensorError, KeyError, ValueError):
        raise UserError(f"reference {name}", "features as stored", "other bytes", "delete it, and try again") from None
    if (found := _sha256(features)) != stated:
        raise UserError(f"reference {name}", f"sha256 {stated[:12]}", found[:12], "delete it, and try again")
    return features


def _sha256(features: Float32) -> str:
    return hashlib.sha256(np.ascontiguousarray(features).tobytes()).hexdigest()


def in_blocks(pictures: Iterator[Pixels]) -> Iterator[Pixels]:
    """Of pictures one by one: uint8 [at most BLOCK, s, s, 3]. Raises UserError for pictures of mixed size."""
    first = next(pictures, None)
    if first is None:
        return
    numbered = enumerate(chain([first], pictures))
    while block := list(islice(numbered, BLOCK)):
        for number, picture in block:
            if picture.shape != first.shape:
                expected, found = ("{1}x{0}".format(*shape) for shape in (first.shape, picture.shape))
                name = f"picture {number}"
                raise UserError(name, f"{expected} px as picture 0", f"{found} px", "give pictures of one size")
        yield np.stack([picture for _, picture in block])
