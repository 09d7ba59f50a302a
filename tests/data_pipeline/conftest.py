"""Fixtures of the ground floor: the shared messy inputs, small corpora made on the spot, and S3 servers.

Two servers: `swift`, of the local stack, is a real one, but checks a condition before it writes; `moto` is a mock, but
its conditional writes are atomic.
"""

from __future__ import annotations

import io
import os
import tarfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import simplejpeg
from moto.server import ThreadedMotoServer

from cluster.faults import FaultyLink
from cluster.faults import faulty_link as link_to
from data_pipeline.storage import LocalStore, ObjectStore, open_store

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("GLIDEPATH_SHARED", REPOSITORY.parent / "shared"))

MakeTar = Callable[[Path, Mapping[str, bytes]], Path]
MakeJpeg = Callable[..., bytes]


def _shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no {name} in {SHARED}; set GLIDEPATH_SHARED to the folder that holds it")
    return SHARED / name


@pytest.fixture(scope="session")
def messy() -> Path:
    return _shared("messy")


@pytest.fixture
def photographs() -> Path:
    return _shared("corpus")


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def moto_uri(moto_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket of the mock; endpoint and credentials are in this process's environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = someone\naws_secret_access_key = s3cr3t\n")
    (tmp_path / "config").write_text(f"[default]\nregion = us-east-1\nendpoint_url = {moto_url}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    boto3.session.Session().client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture
def swift_uri(stack_env: Any) -> str:
    """An empty prefix in the stack's bucket."""
    return f"s3://{stack_env.bucket}/{uuid.uuid4().hex}"


@pytest.fixture(params=["moto", "swift"])
def s3_uri(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_uri"))


@pytest.fixture(params=["folder", "moto", "swift"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty store of each kind."""
    if request.param == "folder":
        return LocalStore(tmp_path / "store")
    return open_store(f"{request.getfixturevalue(f'{request.param}_uri')}/deep/in")


@pytest.fixture
def faulty_link(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], FaultyLink]]:
    """Put a link before the server of the environment, or before another one."""
    with ExitStack() as links:

        def make(url: str = "") -> FaultyLink:
            link = links.enter_context(link_to(url or boto3.session.Session().client("s3").meta.endpoint_url))
            if not url:
                monkeypatch.setenv("AWS_ENDPOINT_URL", link.url)
            return link

        yield make
