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
        assert json.loads(launcher.stdout.readline())["event"] == "progress"
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        os.kill(launcher.pid, signal.SIGKILL)
        assert wait_until(lambda: not any(alive(pid) for pid in pids), 20)
    finally:
        launcher.kill()
        launcher.wait()


def test_sigterm_ends_the_workers_and_is_one_line_of_json_with_exit_code_1(
    train_values: Values, tmp_path: Path
) -> None:
    values = train_values(images=10**6, launcher={"workers": 2})
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "cluster.cli", "train", str(config), "--json"]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        curves = Path(values["store"], "tracking", "metrics.jsonl")
        assert wait_until(curves.exists, 60), "the run never began"
        workers = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()
        driver.send_signal(signal.SIGTERM)
        stdout, stderr = driver.communicate(timeout=30)
    finally:
        driver.kill()
    assert driver.returncode == 1 and "interrupted" in json.loads(stdout)["error"]
    assert "error: interrupted" in stderr and "Traceback" not in stderr
    assert len(workers) == 2 and not any(alive(int(pid)) for pid in workers)
