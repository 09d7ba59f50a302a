"""An S3 server of a drill's own: the one of the local stack, alone, in the scratch folder; it ends with the drill.

Always holds: it listens on loopback, on free ports, with credentials of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.drills.scoreboard import CannotRun
from cluster.services import (
    BUCKET,
    FOREIGN,
    PORTS,
    Service,
    describe_services,
    install_swift,
    service_environment,
    write_aws_files,
)
from cluster.swift import read_credentials
from data_pipeline.errors import UserError
from data_pipeline.storage import open_store
from data_pipeline.storage.s3 import make_bucket

START_S = 60.0
POLL_S = 0.1


@dataclass(frozen=True)
class S3Server:
    """`environment`: what its clients need; None removes a variable."""

    url: str
    environment: dict[str, str | None]

    def uri(self, prefix: str) -> str:
        return f"s3://{BUCKET}/{prefix}"


@contextmanager
def s3_server(folder: Path, tell: Callable[[str], None]) -> Iterator[S3Server]:
    """A running server with an empty bucket. Raises CannotRun where it cannot be installed or does not start."""
    try:
        open_store(f"s3://{BUCKET}")  # says so where boto3 is not installed
        install_swift(tell)
    except UserError as error:
        raise CannotRun(str(error)) from None
    folder.mkdir(parents=True)
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    write_aws_files(folder, ports["s3"])
    service = describe_services(folder, ports, None, str(folder))[0]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            service.argv, env=service_environment(service, "drill"), stdout=log, stderr=subprocess.STDOUT, cwd=folder,
            start_new_session=True,
        )  # fmt: skip
    try:
        await_health(service, process)
        make_bucket(BUCKET, service.url, *read_credentials(folder / "credentials"))
        clients: dict[str, str | None] = {name: None for name in FOREIGN if name.startswith("AWS_")}
        clients["AWS_SHARED_CREDENTIALS_FILE"] = str(folder / "credentials")
        clients["AWS_CONFIG_FILE"] = str(folder / "config")
        yield S3Server(service.url, clients)
    finally:
        process.terminate()
        process.wait()
        with suppress(ProcessLookupError):  # it has asked its children to end and does not wait for them
            os.killpg(process.pid, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has; held together, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [held.getsockname()[1] for held in sockets]
    finally:
        for held in sockets:
            held.close()


def await_health(service: Service, process: subprocess.Popen[bytes]) -> None:
    """A server tells nobody when it is up. Raises CannotRun when it ended or took too long."""
    until = time.monotonic() + START_S
    for url in service.health:
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > until:
                raise CannotRun(f"the {service.name} server did not start; no answer from {url}")
            time.sleep(POLL_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False
