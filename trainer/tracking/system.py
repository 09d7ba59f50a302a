"""What a node is doing while it trains: CPU, memory, disk, network and GPUs, sampled beside the training.

Always holds: a thread of its own takes the samples, of one rank per node; the training thread has no part in it, and
what cannot be read is left out. The names are those of MLflow's own monitor, which has a page for them; that monitor
itself counts its own steps, asks the server before each sample and ends for good at the first answer that fails. Opened
by `trainer.run`; the driver logs what is reported (cluster/tracking.py).
"""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from data_pipeline.config import state_folder

log = logging.getLogger(__name__)

SYSTEM = "system/"  # metrics whose names begin so are of a node: system/<node>/<name>
MEGABYTE = 1e6
END_S = 5.0  # of the thread, which may be in a call of a GPU's driver


class SystemSampler:
    """Reports {"event": "system", "node", "images", "figures", "gpu" (name of the first one, or null)} every so often,
    from another thread. A context."""

    def __init__(self, every_s: float, report: Callable[[dict[str, Any]], None], position: Callable[[], int]) -> None:
        """`position`: images consumed, at which a sample is noted."""
        self._every_s, self._report, self._position = every_s, report, position
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)

    def __enter__(self) -> SystemSampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(END_S)

    def _run(self) -> None:
        node = re.sub(r"[^A-Za-z0-9._-]", "_", socket.gethostname())
        try:
            machine = Machine()
            while not self._over.wait(self._every_s):
                told = {"images": self._position(), "figures": machine.figures(), "gpu": machine.gpu}
                self._report({"event": "system", "node": node, **told})
        except Exception as error:  # noqa: BLE001  (of the system, a GPU's driver or a closed pipe: never the training's)
            log.warning("no more system metrics of %s: %s: %s", node, type(error).__name__, error)


class Machine:
    """This machine, since this was made. Its GPUs only where nvidia-ml-py is installed and finds any."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first answer is of no time at all
        self._network = psutil.net_io_counters()
        self._gpus, self._nvml = _gpus()
        self.gpu = str(self._nvml.nvmlDeviceGetName(self._gpus[0])) if self._gpus else None

    def figures(self) -> dict[str, float]:
        """Means since the last call (CPU), sums since the beginning (network), else as they are now."""
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(_state_disk()), psutil.net_io_counters()
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_megabytes": disk.used / MEGABYTE,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / MEGABYTE,
            "network_receive_megabytes": (network.bytes_recv - self._network.bytes_recv) / MEGABYTE,
            "network_transmit_megabytes": (network.bytes_sent - self._network.bytes_sent) / MEGABYTE,
            **{name: value for number, gpu in enumerate(self._gpus) for name, value in self._of_gpu(number, gpu)},
        }

    def _of_gpu(self, number: int, gpu: Any) -> list[tuple[str, float]]:
        nvml, figures = self._nvml, list[tuple[str, float]]()
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
            figures.append((f"gpu_{number}_memory_usage_megabytes", memory.used / MEGABYTE))
            figures.append((f"gpu_{number}_memory_usage_percentage", 100 * memory.used / memory.total))
            busy = nvml.nvmlDeviceGetUtilizationRates(gpu).gpu
            figures.append((f"gpu_{number}_utilization_percentage", float(busy)))
            figures.append((f"gpu_{number}_power_usage_watts", nvml.nvmlDeviceGetPowerUsage(gpu) / 1000))
        except nvml.NVMLError as error:  # a slice of a GPU has no power of its own, for one
            log.debug("GPU %d: %s", number, error)
        return figures


def _gpus() -> tuple[list[Any], Any]:
    """Handles of all GPUs of this machine, and the library that reads them; none, said, where there is no such."""
    try:
        import pynvml
    except ImportError:
        return [], None
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())], pynvml
    except pynvml.NVMLError as error:
        log.debug("no GPU metrics: %s", error)
        return [], None


def _state_disk() -> str:
    """The disk that caches and local stores are on."""
    folder = state_folder().absolute()
    return str(next((place for place in (folder, *folder.parents) if place.exists()), Path("/")))
