"""Ray nodes of a drill's own on this machine: a head and further raylets, each in a process of its own, on loopback.

Always holds: ports are free ones; a node and all that came of it end with the `with` block, however that is left, and
with this process. What a second host would be, as far as one machine goes: a raylet with workers, resources and a node
id of its own. Called by drills and tests.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

from cluster.drills.scoreboard import CannotRun
from cluster.drills.servers import free_ports
from cluster.services import FOREIGN, HOST, LOOPBACK_RAY

# `ray start` takes no second node on loopback, the class behind it does. Ends with its stdin.
NODE = """
import json, sys
from ray._private.node import Node
from ray._private.parameter import RayParams
values = json.loads(sys.argv[1])
node = Node(RayParams(**values), head="gcs_address" not in values, shutdown_at_exit=True, spawn_reaper=True)
print(json.dumps({"raylet": node.all_processes["raylet"][0].process.pid, "id": node.node_id}), flush=True)
sys.stdin.read()
"""


@dataclass
class Raylet:
    """A node. `pid` is its raylet's."""

    process: subprocess.Popen[str]
    pid: int
    id: str

    def kill(self) -> None:
        """As when the host loses power: the raylet goes at once, and its workers with it."""
        os.kill(self.pid, signal.SIGKILL)
        self.end()

    def end(self) -> None:
        self.process.communicate()


@dataclass
class Raylets:
    """The nodes of one cluster; `environment` is what a driver needs besides its own."""

    folder: Path
    port: int
    environment: dict[str, str]
    dashboard_port: int | None = None
    nodes: list[Raylet] = field(default_factory=list)

    def add(self, cpus: int) -> Raylet:
        """One node more. Raises CannotRun when it does not start."""
        values: dict[str, Any] = {
            "node_ip_address": HOST,
            "num_cpus": cpus,
            "num_gpus": 0,
            "object_store_memory": 100 * 2**20,
            "min_worker_port": 0,
            "max_worker_port": 0,
            "dashboard_agent_listen_port": None,
            "node_manager_port": 0,
        }
        if self.nodes:
            values |= {"gcs_address": f"{HOST}:{self.port}", "include_log_monitor": False}
        else:
            values |= {"gcs_server_port": self.port, "temp_dir": str(self.folder), **self._dashboard_values()}
        environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        # Jobs say `python`.
        environment["PATH"] = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        with (self.folder / f"node-{len(self.nodes)}.log").open("wb") as log:
            command = [sys.executable, "-c", NODE, json.dumps(values)]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**environment, **LOOPBACK_RAY, "RAY_USAGE_STATS_ENABLED": "0"}, start_new_session=True,
            )  # fmt: skip
        assert process.stdout is not None
        said = process.stdout.readline()
        if not said:
            raise CannotRun(f"a Ray node did not start; see {self.folder}")
        about = json.loads(said)
        self.nodes.append(Raylet(process, about["raylet"], about["id"]))
        return self.nodes[-1]

    @property
    def dashboard(self) -> str | None:
        """The address of the Jobs API."""
        return f"http://{HOST}:{self.dashboard_port}" if self.dashboard_port else None

    def _dashboard_values(self) -> dict[str, Any]:
        if self.dashboard_port is None:
            return {"include_dashboard": False}
        address = {"dashboard_host": HOST, "dashboard_port": self.dashboard_port}
        return {"include_dashboard": True, "dashboard_agent_listen_port": 0, **address}

    def drain(self, node: Raylet, within_s: float) -> None:
        """Announce that the node goes, as a cloud does before it takes a machine back. Nothing ends it."""
        deadline_ms = int((time.time() + within_s) * 1000)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = GcsClient(address=f"{HOST}:{self.port}").drain_node(node.id, reason, "a drill", deadline_ms)
        if not accepted:
            raise CannotRun(f"node {node.id[:8]} is not drained: {why}")


@contextmanager
def raylets(*cpus: int, dashboard: bool = False) -> Iterator[Raylets]:
    """A head and further nodes with so many CPUs each; `dashboard`: jobs can be submitted. Ray's folder is short: paths
    of unix sockets end at 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="gp-", dir="/tmp"))
    port, dashboard_port = free_ports(2)
    variables = {**LOOPBACK_RAY, "RAY_ADDRESS": f"{HOST}:{port}"}
    cluster = Raylets(folder, port, variables, dashboard_port if dashboard else None)
    try:
        for count in cpus:
            cluster.add(count)
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            node.end()
        shutil.rmtree(folder, ignore_errors=True)
