"""The S3 server of the local stack: OpenStack Swift with its S3 API, run without root and outside /etc/swift.

Executed by the Python of Swift's own virtual environment, so it imports the standard library and swift only:
`python -I swift.py FOLDER CREDENTIALS S3_PORT ACCOUNT_PORT CONTAINER_PORT OBJECT_PORT`, CREDENTIALS in AWS's format
(without -I this file would itself be the module `swift`). One parent, four children (proxy, account, container,
object), all on 127.0.0.1; when one child dies the parent ends the others, so that the service is up or down but never
half up. Data live in FOLDER/disks and survive a change of ports: where an object lies depends on its name alone.
Called by `cluster.stack`.
"""

from __future__ import annotations

import configparser
import os
import pwd
import signal
import sys
from pathlib import Path
from types import FrameType

BACKENDS = ("account", "container", "object")
FILTERS = "catch_errors gatekeeper healthcheck listing_formats s3api tempauth copy slo dlo versioned_writes symlink"

# One replica on one disk: a node that is slow for a moment must not be left out for a minute (error_suppression), and a
# busy two-core machine needs longer than half a second to accept a connection.
PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {conf}
user = {user}
workers = 0
log_level = WARNING
[pipeline:main]
pipeline = {filters} proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
conn_timeout = 10
node_timeout = 60
error_suppression_limit = 1000000
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
dns_compliant_bucket_names = true
check_bucket_owner = false
max_upload_part_num = 10000
[filter:tempauth]
use = egg:swift#tempauth
user_{account} = {secret} .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
max_manifest_segments = 10000
rate_limit_after_segment = 0
yield_frequency = 0
[filter:dlo]
use = egg:swift#dlo
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_versioned_writes = true
allow_object_versioning = true
[filter:symlink]
use = egg:swift#symlink
"""

BACKEND = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
devices = {disks}
mount_check = false
swift_dir = {conf}
user = {user}
workers = 0
log_level = WARNING
disable_fallocate = true
fallocate_reserve = 0
[pipeline:main]
pipeline = healthcheck {name}-server
[filter:healthcheck]
use = egg:swift#healthcheck
[app:{name}-server]
use = egg:swift#{name}
"""

SWIFT = """
[swift-hash]
swift_hash_path_prefix = glidepath
swift_hash_path_suffix = glidepath
[storage-policy:0]
name = gold
default = yes
"""


def main() -> int:
    """Serve until SIGTERM (exit code 0) or until one of the four dies (1)."""
    folder, credentials = Path(sys.argv[1]), Path(sys.argv[2])
    proxy_port, *backend_ports = (int(port) for port in sys.argv[3:])
    ports = dict(zip(BACKENDS, backend_ports, strict=True))
    conf = write_settings(folder, read_credentials(credentials), proxy_port, ports)

    import swift.common.utils as utils

    utils.SWIFT_CONF_FILE = str(conf / "swift.conf")  # before anything reads /etc/swift
    write_rings(conf, ports)
    # Imported once here and forked, the four share these pages: less memory, and a third of the start.
    import swift.common.wsgi  # noqa: F401

    children = {_fork(conf, name): name for name in ("proxy", *BACKENDS)}

    def stop(*_: int | FrameType | None) -> None:
        for pid in children:
            os.kill(pid, signal.SIGTERM)
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    dead, status = os.wait()
    print(f"swift {children.pop(dead)} server ended with status {status}; ending the others", file=sys.stderr)
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    return 1


def read_credentials(path: Path) -> tuple[str, str]:
    """Access key and secret of an AWS credentials file."""
    parser = configparser.RawConfigParser()
    parser.read_string(path.read_text())
    return parser["default"]["aws_access_key_id"], parser["default"]["aws_secret_access_key"]


def write_settings(folder: Path, credentials: tuple[str, str], proxy_port: int, ports: dict[str, int]) -> Path:
    """The configuration files, readable by their owner alone (the proxy's holds the secret); their folder."""
    conf, disks = folder / "conf", folder / "disks"
    conf.mkdir(parents=True, exist_ok=True, mode=0o700)
    (disks / "d0").mkdir(parents=True, exist_ok=True, mode=0o700)
    access_key, secret = credentials
    common = {"conf": conf, "disks": disks, "user": pwd.getpwuid(os.geteuid()).pw_name}
    proxy = {"port": proxy_port, "filters": FILTERS, "account": access_key.replace(":", "_"), "secret": secret}
    _write_private(conf / "swift.conf", SWIFT)
    _write_private(conf / "proxy.conf", PROXY.format(**proxy, **common))
    for name, port in ports.items():
        _write_private(conf / f"{name}.conf", BACKEND.format(port=port, name=name, **common))
    return conf


def write_rings(conf: Path, ports: dict[str, int]) -> None:
    """Swift's maps from a name's hash to a server and disk; here always the one disk."""
    from swift.common.ring import RingBuilder

    for name, port in ports.items():
        builder = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
        builder.add_dev(
            {"id": 0, "region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "d0", "weight": 1.0}
        )
        builder.rebalance()
        builder.get_ring().save(str(conf / f"{name}.ring.gz"))


def _fork(conf: Path, name: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    from swift.common.wsgi import run_wsgi

    # os._exit: a forked child must not run the parent's exit handlers.
    os._exit(run_wsgi(str(conf / f"{name}.conf"), f"{name}-server", verbose=True))


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit(main())
