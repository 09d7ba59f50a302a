"""What the local stack runs: for each service its command, environment, ports and health, and the files it needs first.

Always holds: every address given out is on 127.0.0.1; a file with the secret is 0600 from the moment it exists; nothing
of the caller's AWS_ or MLFLOW_ environment reaches a service. Starts and ends nothing. Called by `cluster.stack`.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.processes import MARK
from data_pipeline.config import state_folder
from data_pipeline.errors import UserError

HOST = "127.0.0.1"
BUCKET = "glidepath"
SWIFT = Path(sys.prefix) / "swift-2.38.3"
SWIFT_REQUIREMENTS = Path(__file__).with_name("swift-requirements.txt")
RAY_SESSIONS_KEPT = 2  # with their logs: the one that runs and the one before

# Port name -> (service, the port people know it by; 0: none).
PORTS = {
    "s3": ("s3", 8333),
    "swift_account": ("s3", 0),
    "swift_container": ("s3", 0),
    "swift_object": ("s3", 0),
    "mlflow": ("mlflow", 5000),
    "dashboard": ("ray", 8265),
    "gcs": ("ray", 6379),
    "ray_client": ("ray", 0),
}

# On Linux, Ray replaces 127.0.0.1 by the machine's address and then listens on every interface; with this setting it
# does what it does on other systems: it stays on loopback. Drivers need it too, to find their node under that address.
# Tokens: a bare ray.init() leaves one in the home folder, and from then on Ray would ask every client of this one for
# it, the health checks of the stack too; what listens on loopback alone needs none.
LOOPBACK_RAY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled"}

# Set by a user for other stores and servers; with them in place the files of the stack would not be read.
FOREIGN = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "RAY_ADDRESS",
)


@dataclass(frozen=True)
class Service:
    """How a service is started, where people find it, and the addresses that answer 200 when it is healthy."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    url: str
    health: tuple[str, ...]


def describe_services(folder: Path, ports: Mapping[str, int], cpus: int | None, ray_folder: str) -> tuple[Service, ...]:
    """The three services, in the order to start them. `cpus`: Ray's logical CPUs, None for those of the machine."""
    return _s3(folder, ports), _mlflow(folder, ports), _ray(folder, ports, cpus, ray_folder)


def exports(folder: Path, ports: Mapping[str, int]) -> dict[str, str]:
    """What clients of the stack need in their environment: paths and addresses, no secret."""
    return {
        **_aws_files(folder),
        "MLFLOW_TRACKING_URI": _url(ports["mlflow"]),
        "RAY_API_SERVER_ADDRESS": _url(ports["dashboard"]),
        **LOOPBACK_RAY,
    }


def env_script(folder: Path, ports: Mapping[str, int]) -> str:
    """The file to `source`."""
    lines = ["# Addresses of the local stack, made by `glidepath up`.", f"unset {' '.join(FOREIGN)}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in exports(folder, ports).items()]
    return "\n".join(lines) + "\n"


def service_environment(service: Service, mark: str) -> dict[str, str]:
    """The environment to start a service with: the caller's without what belongs to other servers, plus its own."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "AWS_CA_BUNDLE" or not (name in FOREIGN or name.startswith(("AWS_", "MLFLOW_")))
    }
    return {**kept, **service.environment, MARK: mark}


def write_aws_files(folder: Path, s3_port: int) -> None:
    """`credentials`, made once with a random key and secret, and `config`, which follows the port."""
    if not (folder / "credentials").exists():
        # Swift's own form of an access key: account, colon, user.
        keys = {
            "aws_access_key_id": f"glidepath:{secrets.token_hex(8)}",
            "aws_secret_access_key": secrets.token_hex(32),
        }
        text = "[default]\n" + "".join(f"{name} = {value}\n" for name, value in keys.items())
        handle = os.open(folder / "credentials", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "w") as file:
            file.write(text)
    (folder / "config").write_text(
        f"[default]\nregion = us-east-1\nendpoint_url = {_url(s3_port)}\ns3 =\n    addressing_style = path\n"
    )


def prepare_ray_folder(earlier: str) -> str:
    """Ray's own folder: the earlier one without old sessions, or a new one. Its path is short.

    Paths of unix sockets end at 107 characters, and Ray adds about 80; the state folder may lie deep. Ray opens its
    folders to every user of the machine, so they stand in one that is not.
    """
    folder = Path(earlier)
    if not earlier or not folder.is_dir():
        folder = Path(tempfile.mkdtemp(prefix="glidepath-", dir="/tmp")) / "ray"
        folder.mkdir()
    for session in sorted(folder.glob("session_2*"))[:-RAY_SESSIONS_KEPT]:
        shutil.rmtree(session)
    return str(folder)


def install_swift(on_progress: Callable[[str], None]) -> None:
    """Swift's own virtual environment beside the packages of this one, made on first use; shared by all stacks.

    Its own, because its dependencies need not agree with Glidepath's. Built beside and renamed, so that an interrupted
    build is never used. Raises UserError when the packages cannot be had.
    """
    wanted = SWIFT_REQUIREMENTS.read_text()
    finished = SWIFT / "installed.txt"
    if finished.exists() and finished.read_text() == wanted:
        return
    on_progress("installing Swift, once")
    try:
        build = Path(tempfile.mkdtemp(prefix="swift-", dir=SWIFT.parent))
    except OSError as error:
        place, reason = str(SWIFT.parent), error.strerror or str(error)
        raise UserError(
            place, "a folder to install Swift in", reason, "use a virtual environment of your own"
        ) from None
    try:
        _run([sys.executable, "-m", "venv", str(build)])
        _run([str(build / "bin/python"), "-m", "pip", "install", "--quiet", "-r", str(SWIFT_REQUIREMENTS)])
        (build / "installed.txt").write_text(wanted)
        if SWIFT.exists():
            shutil.rmtree(SWIFT)  # of another version's pins, or half removed
        build.rename(SWIFT)
    except OSError:
        # Another `up` was first: its environment is finished, and ours goes.
        if not finished.exists() or finished.read_text() != wanted:
            raise
    finally:
        shutil.rmtree(build, ignore_errors=True)


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        last = done.stdout.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UserError("Swift's environment", "packages from the index that pip uses", last[0], "check pip's settings")


def _s3(folder: Path, ports: Mapping[str, int]) -> Service:
    numbers = [ports[name] for name, (service, _) in PORTS.items() if service == "s3"]
    script = Path(__file__).with_name("swift.py")
    argv = (str(SWIFT / "bin/python"), "-I", str(script), str(folder / "s3"), str(folder / "credentials"))
    return Service(
        "s3",
        (*argv, *(str(number) for number in numbers)),
        {},
        _url(ports["s3"]),
        tuple(f"{_url(number)}/healthcheck" for number in numbers),
    )


def _mlflow(folder: Path, ports: Mapping[str, int]) -> Service:
    url = _url(ports["mlflow"])
    options = {
        "--host": HOST,
        "--port": str(ports["mlflow"]),
        "--workers": "1",
        "--backend-store-uri": f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination": f"s3://{BUCKET}/mlflow",
    }
    environment = {
        **_aws_files(folder),
        # Said here too, so that a change of the port starts MLflow again: its client keeps the address it began with.
        "MLFLOW_S3_ENDPOINT_URL": _url(ports["s3"]),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # judges of language models, in four more processes
    }
    argv = (sys.executable, "-m", "mlflow", "server", *_flat(options))
    return Service("mlflow", argv, environment, url, (f"{url}/health",))


def _ray(folder: Path, ports: Mapping[str, int], cpus: int | None, ray_folder: str) -> Service:
    url = _url(ports["dashboard"])
    options = {
        "--node-ip-address": HOST,
        "--port": str(ports["gcs"]),
        "--include-dashboard": "true",
        "--dashboard-host": HOST,
        "--dashboard-port": str(ports["dashboard"]),
        "--dashboard-agent-listen-port": "0",
        "--ray-client-server-port": str(ports["ray_client"]),
        "--min-worker-port": "0",  # any free port: Ray's own range covers ports that people use
        "--max-worker-port": "0",
        "--temp-dir": ray_folder,
    }
    if cpus:
        options["--num-cpus"] = str(cpus)
    environment = {
        **exports(folder, ports),
        "PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # jobs say `python`
        "GLIDEPATH_HOME": str(state_folder()),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # `down` has stopped the jobs; there is nothing to drain
        "SPT_NOENV": "1",  # a process that renames itself must not write over its environment, where it is marked
        "PYTHONUNBUFFERED": "1",
    }
    # --block: this process stays, is the one on record, and ends all the others when it is asked to end.
    argv = (sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *_flat(options))
    return Service("ray", argv, environment, url, (f"{url}/api/gcs_healthz", f"{url}/api/version"))


def _aws_files(folder: Path) -> dict[str, str]:
    return {"AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"), "AWS_CONFIG_FILE": str(folder / "config")}


def _url(port: int) -> str:
    return f"http://{HOST}:{port}"


def _flat(options: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(word for pair in options.items() for word in pair)
