"""Saving: snapshot to host, then upload and commit behind the training's back. It stalls training for the snapshot,
and for the save before it if that one is not done yet.

The protocol, per rank: clone the shard view; digest from memory; put the part; put a receipt that describes it. Rank 0
then reads all receipts and commits by putting the manifest if absent. No collective call happens off the main thread:
the store carries the receipts. Always holds: nothing is visible as a checkpoint before its manifest, and the manifest
comes last; a failed save deletes nothing and training goes on.
"""

from __future__ import annotations

import datetime
import json
import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage import ObjectNotFound, ObjectStore, canonical_json
from trainer.checkpoint.attempts import Superseded, newest_attempt
from trainer.checkpoint.manifest import CheckpointName, Manifest, part_file
from trainer.checkpoint.parts import PartInfo, encode_part
from trainer.engine.engine import Interval

log = logging.getLogger(__name__)

RECEIPT_DEADLINE_S = 600.0
RECEIPT_POLL_S = 0.05


class SaveFailed(UserError):
    """This save did not commit; the older checkpoints stand."""

    def __init__(self, name: CheckpointName, expected: str, found: str) -> None:
        super().__init__(f"save of {name}", expected, found, "older checkpoints stand; mend the store and run again")


@dataclass(frozen=True)
class RunIdentity:
    """What every manifest of an attempt says alike."""

    run: str
    attempt: int
    rank: int
    world_size: int
    zero_stage: int
    parameters: dict[str, int]
    config: dict[str, Any]
    code_version: str
    lineage: dict[str, dict[str, Any]] = field(default_factory=dict)


def upload_share(store: ObjectStore, identity: RunIdentity, position: int, intervals: list[Interval]) -> None:
    """Store this rank's part, then its receipt."""
    name = CheckpointName(position, identity.attempt)
    info, chunks = encode_part(part_file(identity.rank, identity.world_size), intervals)
    store.put(name.folder + info.file, chunks)
    store.put(_receipt_key(name, identity.rank), [canonical_json(info.model_dump(mode="json"))])


def commit(
    store: ObjectStore, identity: RunIdentity, position: int, state: dict[str, Any], deadline_s: float
) -> CheckpointName:
    """Rank 0: wait for all receipts, then put the manifest. Raises SaveFailed, Superseded; then nothing is visible."""
    name = CheckpointName(position, identity.attempt)
    parts = tuple(_await_receipt(store, name, rank, deadline_s) for rank in range(identity.world_size))
    newest = newest_attempt(store)
    if newest > identity.attempt:
        raise Superseded(
            f"run {identity.run}, attempt {identity.attempt}",
            "to be its newest attempt",
            f"attempt {newest}",
            "this one ends and leaves the store to that one",
        )
    manifest = Manifest(
        run=identity.run,
        attempt=identity.attempt,
        position=position,
        world_size=identity.world_size,
        zero_stage=identity.zero_stage,
        parameters=identity.parameters,
        parts=parts,
        config=identity.config,
        code_version=identity.code_version,
        lineage=identity.lineage,
        committed_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **state,
    ).encode()
    if not store.put_if_absent(name.manifest_key, manifest) and store.get(name.manifest_key) != manifest:
        raise SaveFailed(name, "no manifest there", "one of another writer")
    _delete_receipts(store, name, identity.world_size)
    return name


def _delete_receipts(store: ObjectStore, name: CheckpointName, world_size: int) -> None:
    try:
        for rank in range(world_size):
            store.delete(_receipt_key(name, rank))
    except OSError as error:
        # The checkpoint is committed, whatever becomes of them: the next attempt's sweep takes what is left.
        log.warning("receipts of %s stay for now: %s", name, error)


def _receipt_key(name: CheckpointName, rank: int) -> str:
    return f"{name.folder}receipt-{rank:05d}.json"


def _await_receipt(store: ObjectStore, name: CheckpointName, rank: int, deadline_s: float) -> PartInfo:
    """Poll: a store tells nobody when an object appears."""
    until = time.monotonic() + deadline_s
    while True:
        try:
            receipt = json.loads(store.get(_receipt_key(name, rank)))
        except ObjectNotFound:
            if time.monotonic() > until:
                raise SaveFailed(name, f"a receipt from rank {rank} in {deadline_s:.0f} s", "none") from None
            time.sleep(RECEIPT_POLL_S)
            continue
        if "error" in receipt:
            raise SaveFailed(name, f"the part of rank {rank}", receipt["error"])
        return PartInfo.model_validate(receipt)


class Saver:
    """Runs saves of one rank in the background, one at a time."""

    def __init__(self, store: ObjectStore, identity: RunIdentity) -> None:
        self.store, self.identity = store, identity
        self.committed: CheckpointName | None = None  # newest commit, known to rank 0
        self.failures = 0  # saves that did not commit while training went on
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, position: int, view: Iterable[Interval], state: dict[str, Any]) -> SaveFailed | None:
        """Snapshot now, store later. Waits for the save before it; returns why that one failed, if it did.

        Raises Superseded when a newer attempt of the run has begun.
        """
        failed = self.settle()
        snapshot = [Interval(i.name, i.kind, i.offset, i.values.detach().to("cpu", copy=True)) for i in view]
        self._thread = threading.Thread(target=self._run, args=(position, snapshot, state), name="save")
        self._thread.start()
        return failed

    def wait(self) -> None:
        """Until the save that is under way has ended. Raises SaveFailed, Superseded."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def settle(self) -> SaveFailed | None:
        """`wait`, for a caller that goes on without this save: its failure is counted, logged and returned."""
        try:
            self.wait()
        except SaveFailed as error:
            self.failures += 1
            log.warning("%s", error)
            return error
        return None

    def _run(self, position: int, snapshot: list[Interval], state: dict[str, Any]) -> None:
        try:
            self._store(position, snapshot, state)
        except Exception as error:  # noqa: BLE001  (handed to the main thread by wait())
            self._error = error

    def _store(self, position: int, snapshot: list[Interval], state: dict[str, Any]) -> None:
        name = CheckpointName(position, self.identity.attempt)
        try:
            upload_share(self.store, self.identity, position, snapshot)
            if self.identity.rank == 0:
                self.committed = commit(self.store, self.identity, position, state, RECEIPT_DEADLINE_S)
        except OSError as error:
            self._tell_rank_0(name, error)
            raise SaveFailed(name, f"the part of rank {self.identity.rank} in the store", str(error)) from error

    def _tell_rank_0(self, name: CheckpointName, error: OSError) -> None:
        """So that it need not wait out its deadline. The store may well refuse this too: then it does wait."""
        try:
            self.store.put(_receipt_key(name, self.identity.rank), [canonical_json({"error": str(error)})])
        except OSError as second:
            log.warning("rank %d could not store its error either: %s", self.identity.rank, second)
