"""Fixtures of the ground floor: the shared messy inputs, and small corpora made on the spot."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("GLIDEPATH_SHARED", REPOSITORY.parent / "shared"))

MakeTar = Callable[[Path, Mapping[str, bytes]], Path]
MakeJpeg = Callable[..., bytes]


def _shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no {name} in {SHARED}; set GLIDEPATH_SHARED to the folder that holds it")
    return SHARED / name


@pytest.fixture
def messy() -> Path:
    return _shared("messy")


@pytest.fixture
def photographs() -> Path:
    return _shared("corpus")


@pytest.fixture
def make_jpeg() -> MakeJpeg:
    def make(seed: int, height: int = 72, width: int = 96) -> bytes:
        noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        return simplejpeg.encode_jpeg(np.ascontiguousarray(noise.repeat(8, 0).repeat(8, 1)), 90)

    return make


@pytest.fixture
def make_tar() -> MakeTar:
    def make(path: Path, files: Mapping[str, bytes]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return path

    return make


@pytest.fixture
def make_corpus(make_tar: MakeTar, make_jpeg: MakeJpeg) -> Callable[[Path, range], Path]:
    """A tar of captioned pictures, one for each number of the range."""

    def make(path: Path, numbers: range) -> Path:
        files = {}
        for number in numbers:
            files[f"{number:06d}.jpg"] = make_jpeg(number)
            files[f"{number:06d}.txt"] = f"Picture number {number}".encode()
        return make_tar(path, files)

    return make
