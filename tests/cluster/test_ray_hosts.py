"""A run on several Ray nodes: one is lost, one comes, one is drained; one driver, and no sample too many or few."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import RUN, consumed_ids, ids_in_order

from cluster.drills.raylets import Raylets, raylets
from data_pipeline.storage import LocalStore
from trainer.stop import read_end, request_stop

Values = Callable[..., dict[str, Any]]


class Driver:
    """A run in a process of its own, as in a job, and what it tells."""

    def __init__(self, cluster: Raylets, values: dict[str, Any], folder: Path) -> None:
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        self.stderr = folder / "stderr"
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RUN, str(path)], stdout=subprocess.PIPE, stderr=stderr, text=True,
                env={**os.environ, **cluster.environment},
            )  # fmt: skip
        self.events = self._read()

    def _read(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("EVENT "):
                yield json.loads(line.removeprefix("EVENT "))

    def until(self, kind: str, steps: int = 0) -> dict[str, Any]:
        """The next event of that kind, or so many steps on."""
        for event in self.events:
            steps -= event["event"] == "progress" == kind
            if event["event"] == kind and steps <= 0:
                return event
        raise AssertionError(f"the run ended without {kind}: {self.stderr.read_text()[-5000:]}")


@pytest.fixture
def hosts() -> Iterator[Raylets]:
    """A head and a second node, with one CPU each."""
    with raylets(1, 1) as cluster:
        yield cluster


@pytest.mark.drill
def test_a_run_lives_through_a_lost_node_a_new_one_and_a_drained_one(
    hosts: Raylets, train_values: Values, dataset_uri: str, tmp_path: Path
) -> None:
    settings = {"kind": "ray", "workers": 2, "min_workers": 1, "grow_after_s": 1.0}
    values = train_values(images=10**6, launcher=settings, checkpoint={"every_images": 64})
    store = LocalStore(Path(values["store"]))
    head, second = (node.id for node in hosts.nodes)
    driver = Driver(hosts, values, tmp_path)
    try:
        assert set(driver.until("started")["node_ids"]) == {head, second}
        driver.until("progress", steps=8)

        hosts.nodes[1].kill()
        assert "node" in driver.until("restart")["reason"]
        assert driver.until("started")["node_ids"] == [head]
        driver.until("progress", steps=8)
        lost = read_end(store, 1)
        assert lost is not None and (lost.cause, lost.node) == ("node-lost", second)

        third = hosts.add(1)
        grown = driver.until("resize")
        assert (grown["from"], grown["to"]) == (1, 2)
        assert set(driver.until("started")["node_ids"]) == {head, third.id}
        driver.until("progress", steps=3)

        hosts.drain(third, within_s=60)
        shrunk = driver.until("resize")
        assert (shrunk["from"], shrunk["to"]) == (2, 1) and third.id[:8] in shrunk["reason"]
        assert driver.until("started")["node_ids"] == [head]
        driver.until("progress", steps=3)

        request_stop(store, 4)
        summary = driver.until("summary")
    finally:
        driver.process.kill()
        driver.process.wait()
    assert summary["stopped"] and summary["attempt"] == 4
    consumed = dict(consumed_ids(values["store"]))  # what was lost with the node is consumed again
    assert sorted(consumed.items()) == ids_in_order(dataset_uri, 0, 16, summary["images"])
