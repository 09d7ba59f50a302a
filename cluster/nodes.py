"""The nodes of the connected Ray cluster: which live, which leave, what is free on each, whether one has gone.

Always holds: only reads, and takes nothing; safe to call from any thread. Everything that Ray does not publish as API
(free resources by node, draining nodes) is asked for here and nowhere else. Called by the Ray launcher.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import ray
from ray._private.state import state

REACH_TIMEOUT_S = 2.0  # of a node's raylet: one that does not take a connection in that time is gone


@dataclass(frozen=True)
class Node:
    """A node that Ray holds for alive. `leaves_in_s`: until it is taken away, inf unknown, None when it stays."""

    id: str
    host: str
    raylet_port: int
    total: Mapping[str, float]
    free: Mapping[str, float] = field(default_factory=dict)
    leaves_in_s: float | None = None


def live_nodes() -> list[Node]:
    """By id."""
    free, deadlines = state.available_resources_per_node(), state.get_draining_nodes()
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["NodeManagerPort"],
            node["Resources"],
            free.get(node["NodeID"], {}),
            _seconds_to(deadlines.get(node["NodeID"])),
        )
        for node in sorted(ray.nodes(), key=lambda node: str(node["NodeID"]))
        if node["Alive"]
    ]


def _seconds_to(deadline_ms: int | None) -> float | None:
    if deadline_ms is None:
        return None
    return max(0.0, deadline_ms / 1000 - time.time()) if deadline_ms else math.inf  # 0: drained without a deadline


def fits(node: Node, worker: Mapping[str, float], held: int = 0) -> int:
    """How many workers of such needs a node has room for, besides `held` that are its own already."""
    return held + min(int(node.free.get(name, 0.0) / amount + 1e-9) for name, amount in worker.items())


def is_gone(node_id: str) -> bool:
    """Whether a node has died. Asks the node itself: Ray takes several missed health checks to say so."""
    for node in live_nodes():
        if node.id == node_id:
            try:
                socket.create_connection((node.host, node.raylet_port), REACH_TIMEOUT_S).close()
            except OSError:
                return True
            return False
    return True
