"""The local launcher: workers live and die with each other and with their launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Values = Callable[..., dict[str, Any]]


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Poll, since other processes cannot tell."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if done():
            return True
        time.sleep(0.05)
    return done()


def test_workers_end_when_their_launcher_is_killed(train_values: Values, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(train_values(images=10**6, launcher={"workers": 2})))
    code = (
        "import json, sys; from cluster.training import train_run; from cluster.cli import load_train_config\n"
        "train_run(load_train_config(sys.argv[1], []), lambda event: print(json.dumps(event), flush=True))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, str(config)], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    try:
        pids = json.loads(launcher.stdout.readline())["pids"]
        assert any(json.loads(line)["event"] == "progress" for line in launcher.stdout)
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        os.kill(launcher.pid, signal.SIGKILL)
        assert wait_until(lambda: not any(alive(pid) for pid in pids), 20)
    finally:
        launcher.kill()
        launcher.wait()
