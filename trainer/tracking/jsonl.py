"""JsonlTracker: curves and events as lines of JSON in a local file, no server needed.

Always holds: lines are appended, never changed; each carries its attempt, so that where a resumed run passes a point
again, the line of the highest attempt counts (`read_curves`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


class JsonlTracker:
    """See Tracker. Non-finite values become events, since JSON has no number for them."""

    def __init__(self, folder: Path, attempt: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.attempt = attempt
        self._file = (folder / METRICS).open("a", buffering=1)

    def log(self, images: int, values: Mapping[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._write({"images": images, "values": finite})
        for name in values.keys() - finite.keys():
            self.event(images, "not-finite", f"{name} is {values[name]}")

    def event(self, images: int, kind: str, text: str) -> None:
        self._write({"images": images, "event": kind, "text": text})

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps({"attempt": self.attempt, **line}) + "\n")


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """name -> {images: value}, each point once: of the highest attempt that logged it. Empty without a file."""
    path = folder / METRICS
    curves: dict[str, dict[int, float]] = {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []
    for line in sorted((line for line in lines if "values" in line), key=lambda line: int(line["attempt"])):
        for name, value in line["values"].items():
            curves.setdefault(name, {})[line["images"]] = value
    return curves
