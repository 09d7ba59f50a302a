"""JsonlTracker: curves and events as lines of JSON in a local file, no server needed.

Always holds: lines are appended, never changed; each carries its attempt, so that where a resumed run passes a point
again, the line of the highest attempt counts (`read_curves`).
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.tracking.tracker import Record

METRICS = "metrics.jsonl"


log = logging.getLogger(__name__)


class JsonlTracker:
    """See Tracker. Non-finite values become events, since JSON has no number for them."""

    def __init__(self, folder: Path, attempt: int) -> None:
        self.attempt = attempt
        self._path = folder / METRICS
        self._file: io.FileIO | None = None  # kept open: opening it takes longer than a line, at every step

    def log(self, images: int, values: Mapping[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._write({"images": images, "values": finite})
        for name in values.keys() - finite.keys():
            self.event(images, "not-finite", f"{name} is {values[name]}")

    def event(self, images: int, kind: str, text: str) -> None:
        self._write({"images": images, "event": kind, "text": text})

    def picture(self, images: int, key: str, png: bytes) -> None:
        """Nothing: the run's store has it."""

    def undelivered(self) -> list[Record]:
        return []  # a line is written at once or lost

    def replay(self, records: Sequence[Record]) -> None:
        """Of a run that had another tracker before."""
        for record in records:
            self._write({name: value for name, value in record.items() if name != "ms"})

    def close(self) -> list[Record] | None:
        if self._file is not None:
            self._file.close()
            self._file = None
        return []

    def _write(self, line: dict[str, Any]) -> None:
        try:
            if self._file is None:
                self._file = _open_lines(self._path)
            _write_line(self._file, {"attempt": self.attempt, **line})
        except OSError as error:  # a full disk must not end the training
            log.warning("%s: a line was lost: %s", self._path, error)
            self.close()  # the next one ends what is there of it


def append_line(path: Path, document: dict[str, Any]) -> None:
    """Append one JSON document as a line. A line that a killed process left unfinished is ended first, by itself."""
    with _open_lines(path) as file:
        _write_line(file, document)


def _write_line(file: io.FileIO, document: dict[str, Any]) -> None:
    """With one call, so that lines of other processes do not come between."""
    data = json.dumps(document).encode() + b"\n"
    if file.write(data) != len(data):
        raise OSError("only a part of it was written")


def _open_lines(path: Path) -> io.FileIO:
    """To append lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab+", buffering=0)
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line, in order; unfinished ones are said and left out. Empty without a file."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            log.warning("%s: left out an unfinished line: %.40s", path, text)
    return lines


def read_events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind, in the order in which they happened."""
    return [line for line in read_lines(folder / METRICS) if line.get("event") == kind]


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """name -> {images: value}, each point once: of the highest attempt that logged it. Empty without a file."""
    curves: dict[str, dict[int, float]] = {}
    lines = [line for line in read_lines(folder / METRICS) if "values" in line]
    for line in sorted(lines, key=lambda line: int(line["attempt"])):
        for name, value in line["values"].items():
            curves.setdefault(name, {})[line["images"]] = value
    return curves
