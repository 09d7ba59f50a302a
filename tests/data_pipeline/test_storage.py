"""The local store: whole objects or none, and a double that stops at any operation."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from data_pipeline.errors import UsageError
from data_pipeline.storage import LocalStore, ObjectNotFound, open_store
from data_pipeline.storage.crash import Crashed, CrashPointStore


def test_what_was_put_is_read_back_whole_and_in_ranges(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b", [b"one", memoryview(b"two")])
    assert store.get("a/b") == b"onetwo"
    assert store.get_range("a/b", 2, 3) == b"etw"
    assert store.get_range("a/b", 4, 100) == b"wo"
    assert [(info.key, info.bytes) for info in store.list()] == [("a/b", 6)]
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b")
    with pytest.raises(ObjectNotFound):
        store.get("a/b")


def test_a_listing_is_sorted_and_takes_any_prefix(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for key in ("b/2", "b/10", "a", "bc"):
        store.put(key, [b""])
    assert [info.key for info in store.list("b")] == ["b/10", "b/2", "bc"]
    assert [info.key for info in store.list("b/")] == ["b/10", "b/2"]
    assert not list(LocalStore(tmp_path / "absent").list())


@pytest.mark.parametrize("key", ["../x", "/x", "a/../../x", ""])
def test_a_key_cannot_leave_the_store(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="inside the store"):
        LocalStore(tmp_path).put(key, [b""])


def test_of_many_writers_of_one_absent_key_exactly_one_wins(tmp_path: Path) -> None:
    start, won = threading.Barrier(8), []

    def write(number: int) -> None:
        start.wait()
        if LocalStore(tmp_path).put_if_absent("key", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert LocalStore(tmp_path).get("key") == str(won[0]).encode()
    assert LocalStore(tmp_path).sweep_uploads() == 0


@pytest.mark.parametrize("call", ["put", "put_if_absent"])
def test_a_stop_at_any_operation_leaves_the_whole_object_or_none_and_nothing_after_the_sweep(
    tmp_path: Path, call: str
) -> None:
    def write(store: LocalStore) -> None:
        if call == "put":
            store.put("folder/key", [b"data" * 100])
        else:
            assert store.put_if_absent("folder/key", b"data" * 100)

    counting = CrashPointStore(tmp_path / "count")
    write(counting)
    assert counting.operations >= 4
    for stop_at in range(counting.operations):
        root = tmp_path / str(stop_at)
        with pytest.raises(Crashed):
            write(CrashPointStore(root, stop_at))
        store = LocalStore(root)
        assert not store.exists("folder/key") or store.get("folder/key") == b"data" * 100
        store.sweep_uploads()
        assert {path.name for path in root.rglob("*") if path.is_file()} <= {"key"}


def test_a_sweep_takes_only_the_uploads_it_is_told_to(tmp_path: Path) -> None:
    for key in ("mine/x", "other/x"):
        with pytest.raises(Crashed):
            CrashPointStore(tmp_path, stop_at=1).put(key, [b"data"])
    assert LocalStore(tmp_path).sweep_uploads(owned=lambda key: key == "mine/x") == 1
    assert LocalStore(tmp_path).sweep_uploads() == 1


def test_a_store_that_is_not_built_in_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a folder"):
        open_store("ftp://somewhere/else")
