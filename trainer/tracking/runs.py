"""RunFigures: what is known of one training run, wherever it was tracked. Made by the trackers, shown by `cluster`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from trainer.config import flat_keys


@dataclass(frozen=True)
class RunFigures:
    """`params`: the resolved configuration, flat, as text. `metrics`: the newest value of each."""

    run: str
    store: str
    mlflow_run_id: str | None
    status: str
    images: int
    updated_ms: int  # UTC milliseconds since 1970
    params: dict[str, str]
    metrics: dict[str, float]


def flat_text(config: dict[str, Any]) -> dict[str, str]:
    """A configuration's settings by dotted key: text as it is, anything else as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat_keys(config)}
