"""The result of a drill, and how several are run one after the other and shown.

Always holds: a drill that could not run here, or ended with an error, has not passed, says why, and keeps no other from
running. Called by the command line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """What a drill showed. `faults`: how many were done to the system; `failures`: a line for each broken promise."""

    faults: int
    figures: dict[str, Any]
    failures: Sequence[str] = field(default=())


class CannotRun(Exception):
    """This machine lacks what the drill needs; the text says what."""


@dataclass(frozen=True)
class Row:
    """A drill on the scoreboard; `failures` is empty exactly when it passed."""

    id: str
    faults: int
    passed: bool
    figures: dict[str, Any]
    failures: Sequence[str]


def run_all(drills: Mapping[str, Callable[[], Score]]) -> Iterator[Row]:
    """One row for each drill, as it ends."""
    for name, drill in drills.items():
        try:
            score = drill()
        except CannotRun as reason:
            yield Row(name, 0, False, {"cannot_run": str(reason)}, (f"cannot run here: {reason}",))
        except Exception as error:  # whatever it is, it must not cost the rows of the other drills
            log.exception("drill %s", name)
            yield Row(name, 0, False, {}, (f"ended by {type(error).__name__}: {error}",))
        else:
            yield Row(name, score.faults, not score.failures, score.figures, tuple(score.failures))


def table_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The scoreboard for people."""
    return [
        {
            "drill": row.id,
            "faults": row.faults,
            "result": "passed" if row.passed else "cannot run" if "cannot_run" in row.figures else "FAILED",
            "figures": ", ".join(f"{name} {_short(value)}" for name, value in row.figures.items()),
        }
        for row in rows
    ]


def document(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return " ".join(f"{name} {_short(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)) and len(value) > 4:
        return f"({len(value)} of them)"
    return str(value)
