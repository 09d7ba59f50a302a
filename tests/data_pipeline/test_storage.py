"""What every store promises; and of the local one, whole objects or none, by a double that stops at any operation."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from data_pipeline.errors import UsageError, UserError
from data_pipeline.storage import LocalStore, ObjectNotFound, ObjectStore, open_store
from data_pipeline.storage.crash import Crashed, CrashPointStore


def test_what_was_put_is_read_back_whole_and_in_ranges(store: ObjectStore) -> None:
    store.check()
    store.put("a/b", [b"one", memoryview(b"two")])
    store.put("empty", [])
    assert store.get("a/b") == b"onetwo"
    ranges = {(2, 3): b"etw", (4, 100): b"wo", (0, 6): b"onetwo", (6, 1): b"", (60, 9): b"", (1, 0): b""}
    assert {place: store.get_range("a/b", *place) for place in ranges} == ranges
    assert store.get("empty") == store.get_range("empty", 0, 5) == b""
    assert [(info.key, info.bytes) for info in store.list()] == [("a/b", 6), ("empty", 0)]
    store.put("a/b", [b"other"])
    assert store.get("a/b") == b"other"
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b") and not store.exists("a")
    for read in (store.get, lambda key: store.get_range(key, 0, 1), lambda key: store.get_range(key, 0, 0)):
        with pytest.raises(ObjectNotFound):
            read("a/b")


def test_a_listing_is_sorted_and_takes_any_prefix(store: ObjectStore) -> None:
    assert not list(store.list())
    for key in ("b/2", "b/10", "a", "bc", "é"):
        store.put(key, [b""])
    assert [info.key for info in store.list()] == ["a", "b/10", "b/2", "bc", "é"]
    assert [info.key for info in store.list("b")] == ["b/10", "b/2", "bc"]
    assert [info.key for info in store.list("b/")] == ["b/10", "b/2"]


@pytest.mark.parametrize("key", ["../x", "/x", "a/../../x", ""])
def test_a_key_cannot_leave_the_store(store: ObjectStore, key: str) -> None:
    for call in (lambda: store.put(key, [b""]), lambda: store.get(key), lambda: store.delete(key)):
        with pytest.raises(ValueError, match="inside the store"):
            call()


def test_what_is_there_is_never_replaced_by_put_if_absent(store: ObjectStore) -> None:
    assert store.put_if_absent("key", b"first")
    assert not store.put_if_absent("key", b"second")
    assert store.get("key") == b"first"


@pytest.mark.parametrize("kind", ["folder", "moto"])
def test_of_many_writers_of_one_absent_key_exactly_one_wins(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    uri = str(tmp_path / "store") if kind == "folder" else request.getfixturevalue("moto_uri")
    start, won = threading.Barrier(16), []

    def write(number: int) -> None:
        start.wait()
        if open_store(uri).put_if_absent("key", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert open_store(uri).get("key") == str(won[0]).encode()
    assert open_store(uri).sweep_uploads() == 0


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


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a folder that can be written"):
        LocalStore(tmp_path / "file" / "store").check()
