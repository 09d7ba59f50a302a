"""The cache of this machine: whole files or none, bounded, shared by processes, unharmed by a kill."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import UsageError
from data_pipeline.storage.cache import Cache, CacheFull, machine_cache


def name_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def content(number: int, size: int = 1000) -> bytes:
    return random.Random(number).randbytes(size)


def read(cache: Cache, number: int, asked: list[int] | None = None) -> bytes:
    def pieces() -> Iterator[bytes]:
        if asked is not None:
            asked.append(number)
        yield content(number)[:300]
        yield content(number)[300:]

    return cache.open(name_of(number), 1000, pieces, Path.read_bytes)


def test_a_file_is_filled_once_and_the_least_recently_opened_go_first(tmp_path: Path) -> None:
    cache, asked = Cache(tmp_path, 3000), list[int]()
    for number in (1, 2, 3, 1, 4):  # 2 is the oldest when 4 needs room
        assert read(cache, number, asked) == content(number)
    assert {path.name for path in tmp_path.iterdir()} == {name_of(number) for number in (1, 3, 4)}
    assert asked == [1, 2, 3, 4]
    with pytest.raises(CacheFull):
        cache.open(name_of(9), 3001, lambda: iter([b"x" * 3001]), Path.read_bytes)
    # What cannot fit takes nothing else's place.
    assert {path.name for path in tmp_path.iterdir()} == {name_of(number) for number in (1, 3, 4)}


def test_a_file_that_another_finishes_between_the_look_and_the_lock_is_not_filled_again(tmp_path: Path) -> None:
    asked: list[int] = []

    class Overtaken(Cache):
        def _filling(self, part: Path) -> Any:
            read(Cache(self.folder, 3000), 1, asked)
            return super()._filling(part)

    assert read(Overtaken(tmp_path, 3000), 1, asked) == content(1)
    assert asked == [1] and [path.name for path in tmp_path.iterdir()] == [name_of(1)]


def test_a_removed_file_lives_on_for_who_has_it_open(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    with cache.open(name_of(1), 1000, lambda: [content(1)], lambda path: path.open("rb")) as file:
        read(cache, 2)
        assert [path.name for path in tmp_path.iterdir()] == [name_of(2)]
        assert file.read() == content(1)


def test_a_fill_that_fails_or_has_another_size_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10_000)

    def broken() -> Iterator[bytes]:
        yield b"some"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        cache.open(name_of(1), 1000, broken, Path.read_bytes)
    for size in (999, 1001):
        with pytest.raises(ValueError, match="expected 1000 bytes"):
            cache.open(name_of(1), 1000, lambda size=size: [content(1, size)], Path.read_bytes)
    assert not list(tmp_path.iterdir())
    (tmp_path / name_of(1)).write_bytes(b"")  # what a power cut can leave
    assert read(cache, 1) == content(1)


@pytest.mark.parametrize("full", ["folder", "entry", "rename"])
def test_a_disk_without_room_for_an_entry_is_a_full_cache_and_any_other_failure_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    cache, failure = Cache(tmp_path / "cache", 3000), [errno.ENOSPC]

    def refusing(plain: Callable[..., Any], refuses: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **keywords: Any) -> Any:
            if refuses(*arguments):
                raise OSError(failure[0], os.strerror(failure[0]))
            return plain(*arguments, **keywords)

        return called

    monkeypatch.setattr(os, "mkdir", refusing(os.mkdir, lambda *_: full == "folder"))
    monkeypatch.setattr(os, "rename", refusing(os.rename, lambda *_: full == "rename"))
    creates = lambda path, flags, *_: full == "entry" and flags & os.O_CREAT  # noqa: E731
    monkeypatch.setattr(os, "open", refusing(os.open, creates))
    for failure[0] in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(CacheFull, match="no space left in"):
            read(cache, 1)
    failure[0] = errno.EACCES
    with pytest.raises(PermissionError):
        read(cache, 1)
    monkeypatch.undo()
    assert not list(tmp_path.glob("cache/*")) and read(cache, 1) == content(1)


def test_many_threads_and_processes_share_it_within_its_bound(tmp_path: Path) -> None:
    here = Path(__file__).resolve()
    program = (
        "import sys, random; from pathlib import Path\n"
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('t', {str(here)!r})\n"
        "t = u.module_from_spec(spec); spec.loader.exec_module(t)\n"
        f"cache, draw = t.Cache(Path({str(tmp_path)!r}), 5000), random.Random(int(sys.argv[1]))\n"
        "for _ in range(150):\n"
        "    n = draw.randrange(12); assert t.read(cache, n) == t.content(n)\n"
    )
    root = here.parents[2]
    others = [subprocess.Popen([sys.executable, "-c", program, str(seed)], cwd=root) for seed in (1, 2)]
    asked: list[int] = []
    threads = [threading.Thread(target=read, args=(Cache(tmp_path, 5000), 100, asked)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in others] == [0, 0]
    files = list(tmp_path.iterdir())
    assert sum(path.stat().st_size for path in files) <= 5000
    assert all(len(path.name) == 64 for path in files)


def test_a_process_that_is_killed_while_it_fills_blocks_nobody(tmp_path: Path) -> None:
    program = (
        "import sys, threading; from pathlib import Path; from data_pipeline.storage.cache import Cache\n"
        "def pieces():\n"
        "    yield b'x' * 500\n"
        "    print('filling', flush=True); threading.Event().wait()\n"
        f"Cache(Path({str(tmp_path)!r}), 9000).open({name_of(1)!r}, 1000, pieces, Path.read_bytes)\n"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "filling\n"
    cache = Cache(tmp_path, 9000)
    assert read(cache, 2) == content(2)
    assert len(list(tmp_path.iterdir())) == 2  # what somebody is filling is left alone
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert read(cache, 3) == content(3)
    assert {path.name for path in tmp_path.iterdir()} == {name_of(2), name_of(3)}
    assert read(cache, 1) == content(1)


def test_the_bound_is_set_in_bytes(monkeypatch: pytest.MonkeyPatch, state_folder: Path) -> None:
    monkeypatch.setenv("GLIDEPATH_CACHE_BYTES", "12345")
    assert (machine_cache().folder, machine_cache().limit_bytes) == (state_folder / "cache", 12345)
    monkeypatch.setenv("GLIDEPATH_CACHE_BYTES", "20G")
    with pytest.raises(UsageError, match="GLIDEPATH_CACHE_BYTES"):
        machine_cache()
