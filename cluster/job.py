"""The driver inside a Ray job: `python -m cluster.job train|corpus-build|evaluate JSON`. What `submit` starts.

Always holds: the last line of the job's log is the result, for `submit` to read; SIGTERM, which `ray job stop` sends,
has a training run saved and ended with exit code 0, and ends a build at once. JSON is {"values": the resolved
configuration, "name": its name}.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from cluster.console import failure_line
from cluster.imports import quick_imports
from cluster.launch import Launcher
from cluster.ray_cluster import connected
from cluster.signals import end_on_signals, stop_on_signals
from data_pipeline.errors import UsageError, UserError

log = logging.getLogger("glidepath")

RESULT = "glidepath-result: "
PROGRESS_EVERY_S = 10.0


def main() -> int:
    end_on_signals()
    kind, document = sys.argv[1], json.loads(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    log.info("driver in process %d", os.getpid())
    try:
        result = {"train": train, "corpus-build": build, "evaluate": evaluate}[kind](
            document["values"], document["name"]
        )
    except UserError as error:
        return _fail(str(error), fields=error.fields(), usage=isinstance(error, UsageError))
    except OSError as error:
        return _fail(failure_line(error))
    except KeyboardInterrupt:
        return _fail("stopped; the same submit goes on from what is committed")
    return _end(result)


def train(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The job of a training run; the summary of `train --json`."""
    with stop_on_signals() as stop, connected(), _launcher_of(values) as launcher:
        with quick_imports():
            from cluster.training import train_run
            from trainer.recipes import parse_train_config

        said_at = 0.0

        def on_event(event: dict[str, Any]) -> None:
            nonlocal said_at
            if event["event"] == "progress" and time.monotonic() - said_at > PROGRESS_EVERY_S:
                said_at = time.monotonic()
                log.info("%d images, loss %.4f, %.1f images/s", event["images"], event["loss"], event["images_per_s"])

        return train_run(parse_train_config(values, name), on_event, stop, launcher)


def _launcher_of(values: dict[str, Any]) -> AbstractContextManager[Launcher | None]:
    """Opened before all else: its workers import torch while this process does."""
    if values["launcher"]["kind"] == "local":
        return nullcontext()
    from cluster.ray_launch import RayLauncher

    return RayLauncher(values)


def build(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The job of a corpus build; the summary of `corpus build --json`."""
    from cluster.progress import progress_lines
    from cluster.training import build_swept
    from data_pipeline.build import CorpusConfig
    from data_pipeline.config import parse

    with connected():
        return build_swept(parse(CorpusConfig, values, name), progress_lines(log.info))


def evaluate(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The job of an evaluation; the document of `evaluate --json`."""
    from cluster.evaluation_job import evaluate_in_task

    with connected():
        return evaluate_in_task(values, name)


def _fail(message: str, **about: Any) -> int:
    return _end({"error": message, **about}, f"error: {message}\n")


def _end(result: dict[str, Any], for_people: str = "") -> int:
    # After Ray has gone: nothing is logged into these lines, and nothing follows them.
    sys.stderr.write(for_people)
    sys.stderr.flush()
    sys.stdout.write(f"{RESULT}{json.dumps(result)}\n")
    sys.stdout.flush()
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main())
