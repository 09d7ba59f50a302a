"""A worker process of the local launcher: `python -m cluster.worker SPEC RANK WORLD_SIZE`.

Always holds: stdout carries one JSON event per line and nothing else; people read stderr.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError


def main() -> int:
    spec, rank, world_size = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), int(sys.argv[3])
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to stderr

    threading.Thread(target=_end_with_parent, daemon=True).start()

    def report(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")

    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format=f"%(asctime)s rank {rank}: %(message)s", datefmt="%H:%M:%S")

    import torch

    from trainer.engine.group import open_group
    from trainer.run import train

    torch.set_num_threads(1)
    try:
        group = open_group(rank, world_size, spec["rendezvous"], spec["train"]["values"]["launcher"]["device"])
        train(group=group, report=report, **spec["train"])
        group.close()
    except UserError as error:
        report({"event": "error", "fields": error.fields()})
        return error.exit_code
    return 0


def _end_with_parent() -> None:
    """A worker must not outlive its launcher, even one that was killed: its pipe closes, and this process ends."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
