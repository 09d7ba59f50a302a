"""System metrics: what a node is doing, told from a thread of its own."""

from __future__ import annotations

import sys
import threading
import types
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.tracking import system
from trainer.tracking.system import Machine, SystemSampler


class NVMLError(Exception):
    pass


def driver_of(gpus: int) -> types.ModuleType:
    """As nvidia-ml-py has it; the last GPU tells nothing but its memory."""

    def busy(gpu: int) -> SimpleNamespace:
        if gpu == gpus - 1:
            raise NVMLError("not supported")
        return SimpleNamespace(gpu=75)

    module = types.ModuleType("pynvml")
    module.__dict__.update(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: gpus,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetName=lambda gpu: "NVIDIA H200",
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=3e9, total=12e9),
        nvmlDeviceGetUtilizationRates=busy,
        nvmlDeviceGetPowerUsage=lambda gpu: 350_000,
    )
    return module


def test_a_machine_tells_its_figures_by_the_names_that_mlflow_has_a_page_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for monitor in monitors:
        monitor.collect_metrics()
    theirs = {name for monitor in monitors for name in monitor.aggregate_metrics()}
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    figures = Machine().figures()
    assert figures.keys() == theirs and all(value >= 0 for value in figures.values())
    assert 0 < figures["system_memory_usage_percentage"] <= 100


def test_gpus_are_told_as_far_as_their_driver_tells_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver_of(2))
    machine = Machine()
    figures = {name: value for name, value in machine.figures().items() if name.startswith("gpu_")}
    assert machine.gpu == "NVIDIA H200"
    assert figures == {
        "gpu_0_memory_usage_megabytes": 3000.0,
        "gpu_0_memory_usage_percentage": 25.0,
        "gpu_0_utilization_percentage": 75.0,
        "gpu_0_power_usage_watts": 350.0,
        "gpu_1_memory_usage_megabytes": 3000.0,
        "gpu_1_memory_usage_percentage": 25.0,
    }


def test_samples_come_from_another_thread_with_the_position_and_end_with_the_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(system.socket, "gethostname", lambda: "node:7/b")
    heard, enough = list[dict[str, Any]](), threading.Event()

    def report(event: dict[str, Any]) -> None:
        heard.append(event | {"thread": threading.current_thread().name})
        if len(heard) == 2:
            enough.set()
            raise BrokenPipeError("the launcher is gone")

    with SystemSampler(0.01, report, lambda: 16 * len(heard)) as sampler:
        assert enough.wait(30)
        sampler._thread.join(30)
        assert not sampler._thread.is_alive() and "no more system metrics of node_7_b: BrokenPipeError" in caplog.text
    assert [(event["event"], event["node"], event["images"]) for event in heard] == [
        ("system", "node_7_b", 0), ("system", "node_7_b", 16)
    ]  # fmt: skip
    assert {event["thread"] for event in heard} == {"system-metrics"} and "cpu_utilization_percentage" in heard[0][
        "figures"
    ]
