"""The perceptual hash: what it tells apart and what it does not."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from data_pipeline import images
from data_pipeline.perceptual_hash import perceptual_hash


def hash_of(data: bytes) -> int:
    return perceptual_hash(images.area_resize(images.centre_crop(images.decode(data)), 64))


def test_pictures_too_plain_to_tell_apart_have_no_hash() -> None:
    noise = np.random.default_rng(0).normal(0, 3, (64, 64, 3))
    gradient = np.tile(np.linspace(0, 255, 64)[:, None, None], (1, 64, 3))
    dot = np.full((64, 64, 3), 255.0)
    dot[28:36, 28:36] = 0
    plain = [np.full((64, 64, 3), level) for level in (0, 128, 255)] + [128 + noise, gradient, dot]
    assert {perceptual_hash(np.clip(picture, 0, 255).astype(np.uint8)) for picture in plain} == {0}
    text = cv2.putText(np.full((64, 64, 3), 255, np.uint8), "hello", (5, 35), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0))
    assert perceptual_hash(np.asarray(text, np.uint8)).bit_count() == 32


def test_copies_of_photographs_are_within_four_bits_and_others_far_away(photographs: Path) -> None:
    with tarfile.open(photographs / "coco_original" / "00000.tar") as tar:
        pictures = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")][:12]  # type: ignore[union-attr]
    hashes = [hash_of(data) for data in pictures]
    assert min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]) > 8
    for data, hash_ in zip(pictures, hashes, strict=True):
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        for size, options in (
            (1.0, {"format": "JPEG", "quality": 30}),
            (0.5, {"format": "WEBP"}),
            (1.5, {"format": "PNG"}),
        ):
            sink = io.BytesIO()
            picture.resize((round(picture.width * size), round(picture.height * size))).save(sink, **options)
            assert (hash_of(sink.getvalue()) ^ hash_).bit_count() <= 4
        mirrored = np.asarray(picture)[:, ::-1]
        assert (perceptual_hash(images.area_resize(images.centre_crop(mirrored), 64)) ^ hash_).bit_count() > 8
