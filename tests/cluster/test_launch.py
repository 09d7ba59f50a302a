"""The local launcher: workers live and die with each other and with their launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from support import alive, wait_for

Values = Callable[..., dict[str, Any]]


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
        wait_for(lambda: not any(alive(pid) for pid in pids), 20)
    finally:
        launcher.kill()
        launcher.wait()
