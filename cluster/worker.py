"""A worker process of the local launcher: `python -m cluster.worker SPEC RANK WORLD_SIZE`.

Always holds: stdout carries one JSON event per line and nothing else; people read stderr. It ends by its own end, by
that of its launcher, or by SIGKILL: SIGTERM and Ctrl-C are the driver's to heed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from cluster.imports import quick_imports
from cluster.signals import SIGNALS
from data_pipeline.errors import UserError


def main() -> int:
    spec, rank, world_size = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), int(sys.argv[3])
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to stderr

    for number in SIGNALS:
        # What ends a service or a job step often signals every process of it; this one's save is still to come.
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    lock = threading.Lock()

    def report(event: dict[str, Any]) -> None:
        with lock:  # heartbeats come from another thread
            events.write(json.dumps(event) + "\n")

    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format=f"%(asctime)s rank {rank}: %(message)s", datefmt="%H:%M:%S")

    with quick_imports():
        from cluster.out_of_memory import raised_event
        from cluster.rank import train_rank
    try:
        train_rank(rank, world_size, spec["rendezvous"], spec["train"], report)
    except UserError as error:
        report({"event": "error", "fields": error.fields()})
        return error.exit_code
    except Exception as error:
        report(raised_event(rank, error))
        raise
    return 0


def _end_with_parent() -> None:
    """A worker must not outlive its launcher, even one that was killed: its pipe closes, and this process ends."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
