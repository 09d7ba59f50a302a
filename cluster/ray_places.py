"""Places for the ranks of a gang: a placement group, which holds their CPUs and GPUs, and where its bundles lie.

Always holds: ranks of a node are neighbours; nothing runs in the bundles but one short question for their GPUs: workers
stand on the nodes beside them, so that they outlive the group. Called by the Ray launcher.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.environment import Device, NodeFacts, threads_of_rank
from cluster.nodes import live_nodes
from cluster.ray_worker import gpu_ids

NODE_LABEL = "ray.io/node-id"  # every node has it


@dataclass(frozen=True)
class Places:
    """`nodes`: by rank; `facts`: by node."""

    group: PlacementGroup
    nodes: tuple[str, ...]
    facts: Mapping[str, NodeFacts]

    @property
    def size(self) -> int:
        return len(self.nodes)

    def release(self) -> None:
        remove_placement_group(self.group)


def reserve(
    workers: int, bundle: Mapping[str, float], device: Device, avoided: Collection[str], timeout_s: float
) -> Places | None:
    """Places for `workers` workers of such needs, on as few nodes as possible and none of `avoided`; None when there is
    no room within that time."""
    selector = [{NODE_LABEL: f"!in({','.join(sorted(avoided))})"}] * workers if avoided else None
    group = placement_group([dict(bundle)] * workers, strategy="PACK", bundle_label_selector=selector)
    if not group.wait(timeout_s):
        remove_placement_group(group)
        return None
    where = placement_group_table(group)["bundles_to_node_id"]
    bundles = sorted(where, key=lambda index: (where[index], index))
    nodes = tuple(where[index] for index in bundles)
    gpus = _gpus(group, bundles) if device == "cuda" else {}
    cpus = {node.id: int(node.total.get("CPU", 1)) for node in live_nodes()}
    facts = {
        node: NodeFacts(
            device,
            threads_of_rank(device, cpus.get(node, 1), count),
            tuple(sorted(gpus[index] for index in bundles if where[index] == node and index in gpus)),
        )
        for node, count in Counter(nodes).items()
    }
    return Places(group, nodes, facts)


def _gpus(group: PlacementGroup, bundles: Collection[int]) -> dict[int, str]:
    """The GPU that Ray holds in each bundle: only what runs in a bundle is told."""
    ask = ray.remote(gpu_ids)
    calls = {
        index: ask.options(
            num_cpus=0, num_gpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(group, index)
        ).remote()
        for index in bundles
    }
    return {index: ray.get(call)[0] for index, call in calls.items()}
