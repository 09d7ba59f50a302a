"""What tests of the command line share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from cluster.cli import run

Cli = Callable[..., tuple[int, Any, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command with --json: (exit code, document, stderr)."""

    def call(*arguments: str) -> tuple[int, Any, str]:
        code = run([*arguments, "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out), captured.err

    return call
