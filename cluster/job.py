"""The driver inside a Ray job: `python -m cluster.job train|corpus-build JSON`. What `glidepath submit` starts.

Always holds: the last line of the job's log is the result, for `submit` to read; SIGTERM, which `ray job stop` sends,
has a training run saved and ended with exit code 0. JSON is {"values": the resolved configuration, "name": its name}.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from typing import Any

from cluster.console import failure_line
from cluster.ray_cluster import connected
from data_pipeline.errors import UsageError, UserError

log = logging.getLogger("glidepath")

RESULT = "glidepath-result: "
PROGRESS_EVERY_S = 10.0


class Stopped(BaseException):
    """SIGTERM during work that goes on from what is committed. Not an exception that a library handles."""


def main() -> int:
    kind, document = sys.argv[1], json.loads(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        with connected():
            result = {"train": train, "corpus-build": build}[kind](document["values"], document["name"])
    except UserError as error:
        return _fail(str(error), fields=error.fields(), usage=isinstance(error, UsageError))
    except OSError as error:
        return _fail(failure_line(error))
    except Stopped:
        return _fail("stopped; the same submit goes on from what is committed")
    return _end(result)


def train(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The job of a training run; the summary of `train --json`."""
    from cluster.training import train_run
    from trainer.recipes import parse_train_config

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    said_at = 0.0

    def on_event(event: dict[str, Any]) -> None:
        nonlocal said_at
        if event["event"] == "progress" and time.monotonic() - said_at > PROGRESS_EVERY_S:
            said_at = time.monotonic()
            log.info("%d images, loss %.4f, %.1f images/s", event["images"], event["loss"], event["images_per_s"])

    return train_run(parse_train_config(values, name), on_event, stop)


def build(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The job of a corpus build; the summary of `corpus build --json`."""
    from cluster.progress import progress_lines
    from cluster.training import build_swept
    from data_pipeline.build import CorpusConfig
    from data_pipeline.config import parse

    def stop(*_: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    return build_swept(parse(CorpusConfig, values, name), progress_lines(log.info))


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
