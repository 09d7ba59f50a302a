"""What a run could not deliver to its tracking server before it ended, kept in its store for the next attempt.

Always holds: a file that stays longer than it is needed does no harm, since points that arrived are not sent again.
Called by `trainer.run` on rank 0, and by the driver for what it says itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from data_pipeline.manifests import NotSealed, seal, unseal
from data_pipeline.storage import ObjectNotFound, ObjectStore
from trainer.tracking.tracker import Record

log = logging.getLogger(__name__)

UNDELIVERED = "tracking/undelivered.json"  # rank 0's
DRIVERS = "tracking/undelivered-driver.json"


def keep_undelivered(store: ObjectStore, records: Sequence[Record] | None, key: str = UNDELIVERED) -> None:
    """Store what was left when the tracker was closed; an older file goes when nothing was. None: the file is a newer
    attempt's."""
    if records is None:
        return
    try:
        if records:
            store.put(key, [seal({"records": list(records)})])
            uri = f"{store.uri}/{key}"
            log.warning(
                "tracking: %d records wait in %s; the same command delivers them once the server answers",
                len(records),
                uri,
            )
        elif store.exists(key):
            store.delete(key)
    except OSError as error:
        log.warning("tracking: %s/%s: could not be kept up to date: %s", store.uri, key, error)


def read_undelivered(store: ObjectStore, key: str = UNDELIVERED) -> list[Record]:
    """What the attempt before could not deliver; nothing when the file is damaged, which is said."""
    try:
        return list(unseal(store.get(key))["records"])
    except ObjectNotFound:
        return []
    except NotSealed as fault:
        log.warning("%s/%s: expected %s, found %s; left out", store.uri, key, fault.expected, fault.found)
        return []
