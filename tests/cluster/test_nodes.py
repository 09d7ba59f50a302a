"""What fits on a node, without Ray."""

from __future__ import annotations

from cluster.nodes import Node, fits


def test_a_node_has_room_for_what_is_free_of_the_scarcest_resource_and_for_what_runs_there() -> None:
    node = Node("a", "10.0.0.1", 1, {"CPU": 16.0, "GPU": 8.0}, free={"CPU": 3.9999999999, "GPU": 5.0})
    assert fits(node, {"CPU": 1.0, "GPU": 1.0}) == 4  # Ray's amounts are sums of fractions
    assert fits(node, {"CPU": 1.0, "GPU": 1.0}, held=2) == 6
    assert fits(node, {"CPU": 1.0, "TPU": 1.0}, held=1) == 1
    assert fits(Node("b", "10.0.0.2", 1, {}), {"CPU": 1.0}) == 0
