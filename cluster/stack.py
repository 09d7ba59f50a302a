"""`glidepath up | down | status`: Ray, MLflow and an S3 server on this machine, for users who have no cluster yet.

Always holds: everything listens on 127.0.0.1 only; the secret stands in `credentials` and in Swift's own configuration,
both 0600, and reaches the other services as a path; `up` keeps what is healthy, starts what is not, and loses no data;
only recorded processes and what came of them are ever ended. A service that does not come up is ended and named, the
others stay, so that `up` goes on from there and `down` ends them. Called by the command line and the tests.
"""

from __future__ import annotations

import configparser
import fcntl
import hashlib
import http.client
import importlib.util
import json
import logging
import os
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cluster import processes
from cluster.processes import Identity
from cluster.services import (
    BUCKET,
    HOST,
    PORTS,
    Service,
    describe_services,
    env_script,
    exports,
    install_swift,
    prepare_ray_folder,
    service_environment,
    write_aws_files,
)
from data_pipeline.config import state_folder
from data_pipeline.errors import UsageError, UserError
from data_pipeline.storage.s3 import make_bucket

START_DEADLINE_S = 180.0
GRACE_S = 15.0
JOBS_DEADLINE_S = 120.0
POLL_S = 0.1
LAST_LINE_CHARACTERS = 300
HEALTH_TIMEOUT_S = 5.0
ENDING_ORDER = ("ray", "mlflow", "s3")  # jobs before the servers that they write to

log = logging.getLogger(__name__)

State = Literal["healthy", "unreachable", "down"]
OnProgress = Callable[[int, int, str], None]

# A proxy that the user's environment names must not be asked for 127.0.0.1.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Record:
    """`stack.json`: what the next command needs to know. Holds addresses and process ids, no secret."""

    ports: dict[str, int] = field(default_factory=dict)
    cpus: int | None = None  # Ray's logical CPUs; None: those of the machine
    ray_folder: str = ""
    processes: dict[str, Identity] = field(default_factory=dict)
    launches: dict[str, str] = field(default_factory=dict)  # service -> digest of how it was started
    starting: list[str] = field(default_factory=list)  # not yet healthy since they were started


def up(cpus: int | None, on_progress: OnProgress) -> list[dict[str, Any]]:
    """Start what is not running, wait until all is healthy, make the bucket; the rows of `status`.

    `cpus`: logical CPUs of the Ray head, 0 for those of the machine; None keeps the earlier choice. Raises UsageError
    when packages are missing, UserError when a service does not come up or another command is at work.
    """
    _require_packages()
    folder = stack_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _require_attributes(folder)
    with _only_command(folder):
        install_swift(lambda note: on_progress(0, len(ENDING_ORDER), note))
        record = _read_record(folder)
        record.cpus = record.cpus if cpus is None else cpus
        _start_missing(folder, record)
        _wait_until_healthy(folder, record, on_progress)
        make_bucket(BUCKET, f"http://127.0.0.1:{record.ports['s3']}", *_read_credentials(folder))
        return _rows(folder, record)


def down() -> list[str]:
    """Stop all jobs, end every service and all that came of it; names of those that ran.

    Raises UserError if one cannot be ended, or another command is at work.
    """
    folder = stack_folder()
    if not folder.exists():
        return []
    with _only_command(folder):
        record = _read_record(folder)
        ray = next(row for row in _rows(folder, record) if row["service"] == "ray")
        if ray["state"] == "healthy":
            _stop_jobs(ray["url"])
        ended = [name for name in ENDING_ORDER if _end(folder, record, name)]
        _write_record(folder, record)
    return ended


def status() -> list[dict[str, Any]]:
    """A row per service: service, url, pid, state, log."""
    folder = stack_folder()
    return _rows(folder, _read_record(folder))


def environment() -> dict[str, str]:
    """What `source …/stack/env` exports: paths and addresses, no secret."""
    folder = stack_folder()
    return exports(folder, _read_record(folder).ports)


def stack_folder() -> Path:
    """Where the stack keeps its data, settings and logs."""
    return state_folder() / "stack"


def _require_packages() -> None:
    missing = [name for name in ("ray", "mlflow", "boto3") if importlib.util.find_spec(name) is None]
    if missing:
        found = f"no {', no '.join(missing)}"
        raise UsageError("glidepath up", "ray, mlflow and boto3", found, "pip install 'glidepath[cluster]'")


def _require_attributes(folder: Path) -> None:
    """Swift keeps what it knows of an object in extended attributes; some temporary file systems have none."""
    try:
        os.setxattr(folder, "user.glidepath", b"1")
    except OSError as error:
        found, step = error.strerror or "none", "set GLIDEPATH_HOME to a folder on a disk"
        raise UserError(f"folder {folder}", "user extended attributes", found, step) from None


@contextmanager
def _only_command(folder: Path) -> Iterator[None]:
    """Two commands at once would start everything twice. The lock goes with the process, however that ends."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"stack {folder}", "one up or down at a time", "another at work", "wait for it, then try again"
            ) from None
        yield


def _start_missing(folder: Path, record: Record) -> None:
    """End what is sick or would be started differently now, and start it."""
    kept = {row["service"] for row in _rows(folder, record) if row["state"] == "healthy"}
    # An `up` that failed leaves the others on their way.
    kept |= {name for name in record.starting if processes.age_s(record.processes[name]) < START_DEADLINE_S}
    for name in ENDING_ORDER:
        if name not in kept:
            _end(folder, record, name)
    choose_ports(record, kept)
    record.ray_folder = prepare_ray_folder(record.ray_folder)
    write_aws_files(folder, record.ports["s3"])
    (folder / "env").write_text(env_script(folder, record.ports))
    for service in describe_services(folder, record.ports, record.cpus, record.ray_folder):
        launch = _launch_digest(service)
        if service.name in kept and record.launches.get(service.name) == launch:
            continue
        if service.name == "ray" and service.name in kept:
            _stop_jobs(service.url)
        _end(folder, record, service.name)
        output = _log_file(folder, service.name)
        if output.exists():
            output.replace(output.with_suffix(".previous.log"))  # why the last one died stays readable
        environment = service_environment(service, _mark(folder, service.name))
        record.processes[service.name] = processes.start(service.argv, environment, folder, output)
        record.launches[service.name] = launch
        record.starting.append(service.name)
        _write_record(folder, record)  # at once: what runs is on record, even if `up` is killed now


def choose_ports(record: Record, kept: set[str]) -> None:
    """Ports of what must be started: the earlier one, else the one people know, else any; whichever is free first."""
    with ExitStack() as held:  # until all are chosen, so that none is given twice
        for name, (service, known) in PORTS.items():
            if service not in kept:
                wanted = dict.fromkeys((record.ports.get(name, known), known, 0))
                record.ports[name] = next(port for port in map(partial(_take_port, held), wanted) if port)


def _take_port(held: ExitStack, port: int) -> int | None:
    """Hold `port` (0: any) on loopback; its number, or None if it is in use."""
    probe = held.enter_context(socket.socket())
    # Connections of the last server that are still closing do not count as use; a listening server does.
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((HOST, port))
        probe.listen()
    except OSError:
        return None
    return int(probe.getsockname()[1])


def _wait_until_healthy(folder: Path, record: Record, on_progress: OnProgress) -> None:
    """Raises UserError naming the service, its log and the log's last line, after ending that service."""
    services = describe_services(folder, record.ports, record.cpus, record.ray_folder)
    waiting = {service.name: service for service in services}
    deadline_s = time.monotonic() + START_DEADLINE_S
    while waiting:
        on_progress(len(services) - len(waiting), len(services), f"waiting for {', '.join(waiting)}")
        for name, service in list(waiting.items()):
            if not processes.is_alive(record.processes[name]):
                raise _failed(folder, record, name, "to keep running")
            if _answers(service):
                del waiting[name]
                record.starting = [other for other in record.starting if other != name]
                _write_record(folder, record)
        if waiting and time.monotonic() > deadline_s:
            raise _failed(folder, record, next(iter(waiting)), f"to be healthy within {START_DEADLINE_S:.0f} s")
        time.sleep(POLL_S)  # an external server says nothing when it is ready; it can only be asked again
    on_progress(len(services), len(services), "")


def _failed(folder: Path, record: Record, name: str, expected: str) -> UserError:
    _end(folder, record, name)
    output = _log_file(folder, name)
    last = output.read_text(errors="replace").strip().splitlines()[-1:] or ["an empty log"]
    found = f"{last[0][:LAST_LINE_CHARACTERS]!r} as the last line of its log"
    return UserError(f"service {name}", expected, found, f"read {output}; the others stay up")


def _stop_jobs(dashboard: str) -> None:
    """Let each job end by itself, in the time that it was submitted with: a training run saves first."""
    try:
        running = _ask_jobs_to_stop(dashboard)
    except (OSError, http.client.HTTPException) as error:
        log.warning("Ray's Jobs API failed (%s); ending its jobs without asking them", error)
    else:
        if running:
            log.warning("jobs %s still run after %d s; ending them", ", ".join(sorted(running)), JOBS_DEADLINE_S)


def _ask_jobs_to_stop(dashboard: str) -> set[str]:
    """Ask every job to stop and wait; those that still run at the deadline."""
    deadline_s = time.monotonic() + JOBS_DEADLINE_S
    asked: set[str] = set()
    while True:
        jobs = json.load(_opener.open(f"{dashboard}/api/jobs/", timeout=HEALTH_TIMEOUT_S))
        running = {job["submission_id"] for job in jobs if job["type"] == "SUBMISSION" and not _is_over(job)}
        if not running or time.monotonic() > deadline_s:
            return running
        for job in running - asked:
            stop = urllib.request.Request(f"{dashboard}/api/jobs/{job}/stop", method="POST")
            _opener.open(stop, timeout=HEALTH_TIMEOUT_S).close()
        asked |= running
        time.sleep(POLL_S)  # Ray's Jobs API has no way to wait for the end of a job


def _is_over(job: dict[str, Any]) -> bool:
    return job["status"] in ("STOPPED", "SUCCEEDED", "FAILED")


def _end(folder: Path, record: Record, name: str) -> int:
    """End a service and all that came of it; the number of processes ended."""
    try:
        ended = processes.end(record.processes.pop(name, None), _mark(folder, name), GRACE_S)
    except TimeoutError as error:
        raise UserError(f"service {name}", "an end", str(error), "see what it waits for, then try again") from None
    record.starting = [other for other in record.starting if other != name]
    _write_record(folder, record)
    return ended


def _rows(folder: Path, record: Record) -> list[dict[str, Any]]:
    if not record.ports:
        return [
            {"service": name, "url": None, "pid": None, "state": "down", "log": str(_log_file(folder, name))}
            for name in reversed(ENDING_ORDER)
        ]
    rows = []
    for service in describe_services(folder, record.ports, record.cpus, record.ray_folder):
        process = record.processes.get(service.name)
        alive = process is not None and processes.is_alive(process)
        state: State = "down" if not alive else "healthy" if _answers(service) else "unreachable"
        pid = process.pid if process and alive else None
        output = str(_log_file(folder, service.name))
        rows.append({"service": service.name, "url": service.url, "pid": pid, "state": state, "log": output})
    return rows


def _answers(service: Service) -> bool:
    try:
        for url in service.health:
            _opener.open(url, timeout=HEALTH_TIMEOUT_S).close()
        return service.name != "ray" or _has_node(service.url)
    except (OSError, http.client.HTTPException):  # refused, cut, too late, or a status that is not 200
        return False


def _has_node(dashboard: str) -> bool:
    """Whether jobs can run: a head answers before its raylet is there, and for a while after that has died."""
    with _opener.open(f"{dashboard}/api/v0/nodes", timeout=HEALTH_TIMEOUT_S) as answer:
        nodes = json.load(answer)["data"]["result"]["result"]
    return any(node["state"] == "ALIVE" for node in nodes)


def _launch_digest(service: Service) -> str:
    # Not PATH: it differs from shell to shell, and a running Ray with its jobs must not end for that.
    said = json.dumps([service.argv, sorted(item for item in service.environment.items() if item[0] != "PATH")])
    return hashlib.sha256(said.encode()).hexdigest()


def _mark(folder: Path, name: str) -> str:
    return f"{folder}/{name}"


def _log_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.log"


def _read_credentials(folder: Path) -> tuple[str, str]:
    parser = configparser.RawConfigParser()
    parser.read_string((folder / "credentials").read_text())
    return parser["default"]["aws_access_key_id"], parser["default"]["aws_secret_access_key"]


def _read_record(folder: Path) -> Record:
    path = folder / "stack.json"
    try:
        values = json.loads(path.read_text())
        identities = {name: Identity(**process) for name, process in values.pop("processes").items()}
        return Record(**values, processes=identities)
    except FileNotFoundError:
        return Record()
    except (ValueError, KeyError, TypeError) as error:
        step = "delete it: `down` and `up` find what runs without it"
        raise UserError(str(path), "the record of a stack", f"{type(error).__name__}: {error}", step) from None


def _write_record(folder: Path, record: Record) -> None:
    """Replaced whole: a half-written file would lose track of what runs."""
    fresh = folder / "stack.json.new"
    fresh.write_text(json.dumps(asdict(record), indent=1))
    fresh.replace(folder / "stack.json")
