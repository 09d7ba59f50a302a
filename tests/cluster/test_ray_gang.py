"""Who takes a rank of a gang on Ray, and who is no longer waited for. No cluster: Ray's answers are given here."""

from __future__ import annotations

from typing import Any, cast

import pytest
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup

from cluster import ray_launch
from cluster.environment import NodeFacts
from cluster.launch import WorkerDied
from cluster.ray_launch import _Gang, _Standbys
from cluster.ray_places import Places

WARM = {"pid": 7, "on_main_thread": True, "machine_bytes": 1, "host": "a"}


class Actor:
    """A worker whose imports never end if `hangs`; what Ray hands out for its calls is itself."""

    def __init__(self, name: str, hangs: bool = False) -> None:
        self.name, self.hangs = name, hangs
        self.answer = self
        self.remote = lambda: self


class Started(_Standbys):
    """Standbys that are named by what they were started for; `hang`: the numbers of those that do."""

    def __init__(self, *hang: int) -> None:
        super().__init__({})
        self.hang, self.count = hang, 0

    def start(self, places: Places, node: str) -> tuple[Any, Any]:
        self.count += 1
        actor = Actor(f"{self.count}: {node} {','.join(places.facts[node].gpu_ids)}", self.count in self.hang)
        return actor, actor


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of actors that were ended."""

    def get(call: Actor, timeout: float | None = None) -> dict[str, Any]:
        assert timeout is not None, "nothing is waited for without end"
        if call.hangs:
            raise GetTimeoutError
        return WARM

    names: list[str] = []
    monkeypatch.setattr(ray_launch.ray, "kill", lambda actor: names.append(actor.name))
    monkeypatch.setattr(ray_launch.ray, "get", get)
    return names


def places(**gpus: str) -> Places:
    """One rank on each node, with these GPUs."""
    facts = {node: NodeFacts("cuda", 1, (ids,)) for node, ids in gpus.items()}
    return Places(cast(PlacementGroup, None), tuple(gpus), facts)


def test_standbys_for_other_gpus_of_a_node_end_and_those_of_other_nodes_stay(killed: list[str]) -> None:
    standbys = Started()
    standbys.fill(places(a="0", b="0"))
    standbys.fill(places(a="1"))
    standbys.fill(places(a="1"))
    assert killed == ["1: a 0"] and standbys.count == 3
    assert standbys.take(places(b="0"), "b") is not None and standbys.take(places(a="0"), "a") is None


def test_a_worker_whose_imports_hang_is_ended_and_replaced_if_a_standby_and_else_ends_the_attempt(
    killed: list[str],
) -> None:
    standbys, here = Started(1), places(a="0")
    standbys.fill(here)
    gang = _Gang(1, here, cast(Any, None), {})
    gang.muster(standbys)
    assert killed == ["1: a 0"] and [cast(Actor, actor).name for actor in gang.actors] == ["2: a 0"]
    assert gang.standbys == 0 and gang.pids == [7]

    with pytest.raises(WorkerDied, match="no answer for 600 s") as death:
        _Gang(2, here, cast(Any, None), {}).muster(Started(1))
    assert (death.value.cause, death.value.rank, death.value.node) == ("hung", 0, "a")
