"""Saving: snapshot to host, then upload and commit behind the training's back, which waits for the snapshot alone.

The protocol, per rank: copy the shard view; digest from memory; put the part; put a receipt that describes it. Rank 0
then reads all receipts and commits by putting the manifest if absent. No collective call happens off the main thread:
the store carries the receipts. Always holds: nothing is visible as a checkpoint before its manifest, and the manifest
comes last; one save at a time; whatever the store does, a save ends by its deadline or is given up, and neither moves
what is committed nor ends the training. Called by the loop, and by the importer.
"""

from __future__ import annotations

import datetime
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import ValidationError

from data_pipeline.errors import UserError
from data_pipeline.manifests import NotSealed, seal, unseal
from data_pipeline.storage import ObjectNotFound, ObjectStore, StoreError
from trainer.checkpoint.attempts import Superseded, newest_attempt
from trainer.checkpoint.load import Restored
from trainer.checkpoint.manifest import CheckpointName, Manifest, part_file
from trainer.checkpoint.parts import PartInfo, encode_part
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.snapshot import HostMemory
from trainer.engine.engine import Interval

log = logging.getLogger(__name__)

T = TypeVar("T")

DEADLINE_S = 900.0
GRACE_S = 200.0  # after the deadline, for the requests under way to lose their own patience, the store's to abort too
LONGEST_PAUSE_S = 10.0  # between tries
RECEIPT_POLL_S = 0.05
LONGEST_POLL_S = 1.0
PIECE_BYTES = 16 * 2**20  # of an upload; before each of them the deadline is looked at


class SaveFailed(UserError):
    """This save did not commit; the older checkpoints stand."""

    def __init__(self, name: CheckpointName, expected: str, found: str) -> None:
        super().__init__(f"save of {name}", expected, found, "older checkpoints stand; mend the store")


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


def nothing() -> None:
    pass


class Deadline:
    """So many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._until = time.monotonic() + seconds

    def left_s(self) -> float:
        """Negative once it has passed."""
        return self._until - time.monotonic()


def insist(name: CheckpointName, what: Callable[[], T], deadline: Deadline) -> T:
    """`what()`, again and again while the store fails it; OSError once the deadline has passed."""
    pause_s, level = 0.1, logging.WARNING
    while True:
        try:
            return what()
        except OSError as error:
            if deadline.left_s() <= 0:
                raise
            log.log(level, "save of %s: %s; trying again for %.0f s", name, error, deadline.left_s())
        time.sleep(min(pause_s, max(deadline.left_s(), 0.0)))
        pause_s, level = min(2 * pause_s, LONGEST_PAUSE_S), logging.DEBUG


def upload_share(
    store: ObjectStore,
    identity: RunIdentity,
    position: int,
    intervals: list[Interval],
    deadline: Deadline | None = None,
) -> None:
    """Store this rank's part, then its receipt. Raises OSError once the deadline (DEADLINE_S) has passed."""
    deadline = deadline or Deadline(DEADLINE_S)
    name = CheckpointName(position, identity.attempt)
    info, chunks = encode_part(part_file(identity.rank, identity.world_size), intervals)
    receipt = seal(info.model_dump(mode="json"))

    def put_part() -> None:
        try:
            store.put(name.folder + info.file, _while_in_time(info.file, chunks, deadline))
        except OSError as error:
            _tell_rank_0(store, identity, name, error)
            raise

    insist(name, put_part, deadline)
    insist(name, lambda: store.put(_receipt_key(name, identity.rank), [receipt]), deadline)


def _while_in_time(file: str, chunks: Iterable[memoryview], deadline: Deadline) -> Iterator[memoryview]:
    """The chunks in small pieces; ends an upload that was begun in time and crawls. Raises StoreError."""
    for chunk in chunks:
        for begin in range(0, len(chunk), PIECE_BYTES):
            if deadline.left_s() < 0:
                raise StoreError(file, f"not stored within {deadline.seconds:.0f} s")
            yield chunk[begin : begin + PIECE_BYTES]


def _tell_rank_0(store: ObjectStore, identity: RunIdentity, name: CheckpointName, error: OSError) -> None:
    """So that it can name the cause, if this rank does not get its part stored at all."""
    if identity.rank == 0:
        return
    try:
        store.put(_receipt_key(name, identity.rank), [seal({"error": str(error)})])
    except OSError as second:
        log.warning("rank %d could not store its error either: %s", identity.rank, second)


def commit(
    store: ObjectStore, identity: RunIdentity, position: int, state: dict[str, Any], deadline_s: float
) -> CheckpointName:
    """Rank 0: wait for all receipts, then put the manifest.

    Raises SaveFailed or Superseded, and then nothing is visible; OSError where the store does not even say whether it
    has the manifest.
    """
    deadline = Deadline(deadline_s)
    name = CheckpointName(position, identity.attempt)
    parts = tuple(_await_receipt(store, name, rank, deadline) for rank in range(identity.world_size))
    _put_manifest(store, identity, name, parts, state, deadline)
    _delete_receipts(store, name, identity.world_size)
    return name


def refer(
    store: ObjectStore,
    identity: RunIdentity,
    position: int,
    other: Restored,
    state: dict[str, Any],
    deadline: Deadline | None = None,
) -> CheckpointName:
    """Rank 0: commit at `position` a checkpoint whose parts are those of `other`, in the folders where they lie.

    Raises as `commit` does.
    """
    name = CheckpointName(position, identity.attempt)
    folder = other.name.folder
    parts = tuple(part.model_copy(update={"folder": part.folder or folder}) for part in other.manifest.parts)
    its = replace(identity, world_size=other.manifest.world_size, zero_stage=other.manifest.zero_stage)
    _put_manifest(store, its, name, parts, state, deadline or Deadline(DEADLINE_S))
    return name


def _put_manifest(
    store: ObjectStore,
    identity: RunIdentity,
    name: CheckpointName,
    parts: tuple[PartInfo, ...],
    state: dict[str, Any],
    deadline: Deadline,
) -> None:
    """The commit. Raises as `commit` does."""
    try:
        newest = insist(name, lambda: newest_attempt(store), deadline)
    except OSError as error:
        raise SaveFailed(name, "to be told of newer attempts", str(error)) from None
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
        position=name.position,
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

    def put_manifest() -> None:
        # The one that is there may be ours, of a request whose answer was lost.
        if not store.put_if_absent(name.manifest_key, manifest) and store.get(name.manifest_key) != manifest:
            raise SaveFailed(name, "no manifest there", "one of another writer")

    insist(name, put_manifest, deadline)


def _delete_receipts(store: ObjectStore, name: CheckpointName, world_size: int) -> None:
    try:
        for rank in range(world_size):
            store.delete(_receipt_key(name, rank))
    except OSError as error:
        # The checkpoint is committed, whatever becomes of them: the next attempt's sweep takes what is left.
        log.warning("receipts of %s stay for now: %s", name, error)


def _receipt_key(name: CheckpointName, rank: int) -> str:
    return f"{name.folder}receipt-{rank:05d}.json"


def _await_receipt(store: ObjectStore, name: CheckpointName, rank: int, deadline: Deadline) -> PartInfo:
    """Poll: a store tells nobody when an object appears."""
    found, pause_s = "none", RECEIPT_POLL_S
    while True:
        try:
            receipt = unseal(store.get(_receipt_key(name, rank)))
            del receipt["sha256"]
            if "error" not in receipt:
                return PartInfo.model_validate(receipt)
            found = receipt["error"]
        except ObjectNotFound:
            pass
        except OSError as error:
            found = str(error)
        except (NotSealed, ValidationError) as fault:
            raise SaveFailed(name, f"a receipt from rank {rank}", f"other bytes ({fault})") from None
        if deadline.left_s() <= 0:
            raise SaveFailed(name, f"a receipt from rank {rank} in {deadline.seconds:.0f} s", found)
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, LONGEST_POLL_S)


def _forget(store: ObjectStore, name: CheckpointName) -> None:
    """Remove what a given-up save left, so that they do not fill the store. Its writers must be done with it."""
    if store.exists(name.manifest_key):
        return  # whatever became of it: it is committed
    for info in list(store.list(name.folder)):
        store.delete(info.key)
    store.sweep_uploads(name.folder)


@dataclass
class _Save:
    """A save that has begun."""

    name: CheckpointName
    deadline: Deadline
    thread: threading.Thread
    error: Superseded | SaveFailed | None = None
    reported: bool = False


class Saver:
    """Runs saves of one rank in the background, one at a time. All but `_store` is the main thread's."""

    def __init__(
        self,
        store: ObjectStore,
        identity: RunIdentity,
        deadline_s: float = DEADLINE_S,
        retention: Retention | None = None,
    ) -> None:
        """`retention`: rank 0's, which is told of every commit."""
        self.store, self.identity, self.deadline_s, self.retention = store, identity, deadline_s, retention
        # Rank 0's: stores what has to be there once a checkpoint is; called again when it raises OSError.
        self.before_commit: Callable[[], None] = nothing
        self.committed: CheckpointName | None = None  # newest commit, known to rank 0
        self.failures = 0  # saves that did not commit while training went on
        self.memory = HostMemory()
        self._save: _Save | None = None
        self._left_behind: list[CheckpointName] = []  # by saves that were given up before their manifest

    @property
    def busy(self) -> bool:
        """Whether a save is under way, as `poll` last saw it. Its thread reads the snapshot until it ends, even when it
        was given up."""
        return self._save is not None

    def save(self, position: int, view: Iterable[Interval], state: dict[str, Any]) -> None:
        """Snapshot now, store later. Only while no rank is `busy`. Raises SaveFailed if this one still is."""
        name = CheckpointName(position, self.identity.attempt)
        if self._save is not None:
            raise SaveFailed(name, "the save before it to end", f"that of {self._save.name} under way")
        snapshot = self.memory.snapshot(view)
        # A daemon: a request that never ends must not keep a finished worker from ending.
        thread = threading.Thread(target=self._run, args=(snapshot, state), name="save", daemon=True)
        self._save = _Save(name, Deadline(self.deadline_s), thread)
        thread.start()

    def refer(self, position: int, other: Restored, state: dict[str, Any]) -> SaveFailed | None:
        """Rank 0, on the main thread: commit the state of another checkpoint at `position`. Returns once it is there,
        or why it will not be, counted. Raises Superseded."""
        name, deadline = CheckpointName(position, self.identity.attempt), Deadline(self.deadline_s)
        try:
            insist(name, self.before_commit, deadline)
            self.committed = refer(self.store, self.identity, position, other, state, deadline)
        except SaveFailed as error:
            return self._count(error)
        except OSError as error:
            return self._count(SaveFailed(name, "its manifest and what goes before it in the store", str(error)))
        if self.retention is not None:
            self.retention.begin(name)
        return None

    def poll(self) -> SaveFailed | None:
        """Why the save that began last will not be a checkpoint, once that is known; said once, and counted.

        Raises Superseded when a newer attempt of the run has begun.
        """
        save = self._save
        if save is None:
            return None
        failed = None
        if not save.thread.is_alive():  # asked first: what the thread sets, it has set by now
            failed, self._save = save.error, None
            if isinstance(failed, Superseded):
                raise failed
        elif save.deadline.left_s() < -GRACE_S:
            failed = SaveFailed(save.name, f"to end within {self.deadline_s:.0f} s", "a request that does not end")
        if failed is None or save.reported:
            return None
        assert isinstance(failed, SaveFailed)
        save.reported = True
        return self._count(failed)

    def settle(self) -> SaveFailed | None:
        """`poll`, once the save that is under way has ended or missed its deadline."""
        if self._save is not None:
            self._save.thread.join(max(self._save.deadline.left_s() + GRACE_S, 0.0) + RECEIPT_POLL_S)
        return self.poll()

    def let_end(self) -> None:
        """Before a save that cannot be put off: one that was given up may take as long again to end."""
        if self._save is not None:
            self._save.thread.join(self.deadline_s)
            self.poll()

    def wait(self) -> None:
        """`settle`, for a caller that cannot do without this save. Raises SaveFailed, Superseded."""
        if failed := self.settle():
            raise failed

    def _count(self, failed: SaveFailed) -> SaveFailed:
        self.failures += 1
        log.warning("%s", failed)
        return failed

    def _run(self, snapshot: list[Interval], state: dict[str, Any]) -> None:
        assert self._save is not None
        save = self._save
        try:
            self._store(save, snapshot, state)
        except (SaveFailed, Superseded) as error:
            save.error = error
        except Exception as error:  # whatever it is, it costs a save and not the training
            log.warning("save of %s", save.name, exc_info=error)
            save.error = SaveFailed(save.name, "no error", repr(error))

    def _store(self, save: _Save, snapshot: list[Interval], state: dict[str, Any]) -> None:
        position, rank = save.name.position, self.identity.rank
        self._clear_left_behind(rank, save.name)
        try:
            upload_share(self.store, self.identity, position, snapshot, save.deadline)
        except OSError as error:
            self._left_behind.append(save.name)  # cleared away by rank 0, whose save fails by this
            raise SaveFailed(save.name, f"the part of rank {rank} in the store", str(error)) from None
        if rank > 0:
            return
        try:
            insist(save.name, self.before_commit, save.deadline)
            self.committed = commit(self.store, self.identity, position, state, max(save.deadline.left_s(), 0.0))
        except SaveFailed:
            self._left_behind.append(save.name)
            raise
        except OSError as error:
            raise SaveFailed(save.name, "its manifest in the store", str(error)) from None
        if self.retention is not None:
            self.retention.begin(save.name)

    def _clear_left_behind(self, rank: int, now: CheckpointName) -> None:
        """All ranks were done with those saves before this one began, which may need their room. One of its own place
        is overwritten with the same state: other ranks may have stored theirs anew by now."""
        self._left_behind = [name for name in self._left_behind if name != now]
        try:
            while rank == 0 and self._left_behind:
                _forget(self.store, self._left_behind[-1])
                self._left_behind.pop()
        except OSError as error:
            log.warning("what is left of save %s stays for now: %s", self._left_behind[-1], error)
