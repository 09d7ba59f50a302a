"""Faults to order: a link to a server that fails, stored bytes that are damaged, a disk that is small.

Always holds: whatever is drawn comes from the `random.Random` that the caller gives; a fault is counted when it
happens, so that a drill can tell one that passed from one in which nothing happened. Knows no run, checkpoint or
dataset. Called by `cluster.drills` and by tests.
"""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import socket
import socketserver
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

from data_pipeline.storage import ObjectStore

# -------------------------------------------------------------------------------------------------------- a bad link

REQUEST = re.compile(rb"[A-Z]+ \S+ HTTP/1\.1\r\n")
NO_LINGER = struct.pack("ii", 1, 0)  # close() then sends a reset and drops what was not sent yet


class FaultyLink(socketserver.ThreadingTCPServer):
    """A way to a server that fails: what is set on it happens to that share of requests or of chunks of answers, or to
    the next connections. Signatures pass through it unharmed; TLS too, but then it sees no requests to refuse."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, url: str, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        parts = urlsplit(url)
        self.upstream = (parts.hostname, parts.port)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.random = random.Random(seed)
        self.busy_share = self.error_share = 0.0  # requests answered by 503, by 500
        self.cut_share = self.reset_share = self.stall_share = 0.0  # chunks of answers
        self.upload_cut_share = 0.0  # chunks of requests
        self.latency_s, self.stall_s = 0.0, 0.0  # before each chunk of an answer; before one that stalls
        self.down = False  # connections are refused and live ones cut
        self.refuse_next = self.lose_next = self.half_continue_next = 0  # connections; answers; connections
        # What happened so far.
        self.connections = self.requests = self.refused = self.busy = self.errors = 0
        self.cuts = self.resets = self.stalls = 0

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        # The server's own says goodbye first, and then no reset is ever seen.
        self.close_request(request)

    def heal(self) -> None:
        """From now on it passes everything."""
        self.busy_share = self.error_share = self.cut_share = self.reset_share = self.stall_share = 0.0
        self.upload_cut_share = 0.0
        self.latency_s, self.down = 0.0, False

    def refusal(self) -> str | None:
        """The status line's end for a request that is to be refused."""
        self.requests += 1
        drawn = self.random.random()
        if drawn < self.busy_share:
            self.busy += 1
            return "503 Slow Down"
        if drawn < self.busy_share + self.error_share:
            self.errors += 1
            return "500 Internal Server Error"
        return None


class _Connection(socketserver.BaseRequestHandler):
    server: FaultyLink

    def handle(self) -> None:
        link, client = self.server, self.request
        link.connections += 1
        if link.down or link.refuse_next > 0:
            link.refuse_next -= not link.down
            link.refused += 1
            return self._end()
        if link.half_continue_next > 0:
            link.half_continue_next -= 1
            client.recv(65536)
            client.sendall(b"HTTP/1.1 100 Continue\r\n")
            return self._end()
        with socket.create_connection(link.upstream) as upstream:
            threading.Thread(target=self._pass_requests, args=(upstream,), daemon=True).start()
            self._pass_answers(upstream)
        return None

    def _pass_requests(self, upstream: socket.socket) -> None:
        client = self.request
        with suppress(OSError):  # the other side of the link was cut
            while data := client.recv(65536):
                status = self.server.refusal() if REQUEST.match(data) else None
                if status:
                    self._refuse(status)
                    upstream.shutdown(socket.SHUT_RDWR)  # ends _pass_answers
                    return
                if self.server.random.random() < self.server.upload_cut_share:
                    self.server.cuts += 1
                    upstream.sendall(data[: self.server.random.randrange(len(data))])
                    upstream.shutdown(socket.SHUT_RDWR)
                    return
                upstream.sendall(data)

    def _refuse(self, status: str) -> None:
        client = self.request
        client.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        client.shutdown(socket.SHUT_WR)
        # To the end of the request's body: closed with bytes unread, the connection would be reset and the answer lost.
        client.settimeout(5.0)
        while client.recv(65536):
            pass

    def _pass_answers(self, upstream: socket.socket) -> None:
        link, client = self.server, self.request
        while data := self._received(upstream):
            time.sleep(link.latency_s)
            if link.down:
                return self._end()
            if link.lose_next > 0 and not data.startswith(b"HTTP/1.1 100"):  # 100: go on, send the body
                link.lose_next -= 1
                return self._end()
            if link.random.random() < link.stall_share:
                link.stalls += 1
                time.sleep(link.stall_s)
            if link.random.random() < link.reset_share:
                link.resets += 1
                return self._reset()
            if link.random.random() < link.cut_share:
                link.cuts += 1
                with suppress(OSError):
                    client.sendall(data[: link.random.randrange(len(data))])
                return self._end()
            with suppress(OSError):  # the client left, having seen enough
                client.sendall(data)
        with suppress(OSError):  # said at once: a client that keeps the connection must not ask on it again
            client.shutdown(socket.SHUT_WR)
        return None

    def _received(self, upstream: socket.socket) -> bytes:
        with suppress(ConnectionError):  # a server that ends is one that hung up
            return upstream.recv(65536)
        return b""

    def _end(self) -> None:
        # Not close(): the other thread still waits in recv, and until it returns nothing would be sent.
        with suppress(OSError):  # the client was faster
            self.request.shutdown(socket.SHUT_RDWR)

    def _reset(self) -> None:
        with suppress(OSError):
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            self.request.shutdown(socket.SHUT_RD)  # wakes the other thread, and says nothing to the client


@contextmanager
def faulty_link(url: str, seed: int = 0) -> Iterator[FaultyLink]:
    """A link to the server at `url`, which passes everything until told otherwise."""
    link = FaultyLink(url, seed)
    thread = threading.Thread(target=link.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield link
    finally:
        link.shutdown()
        link.server_close()
        thread.join()


# ------------------------------------------------------------------------------------------------------ damaged bytes

Damage = Literal["bit", "truncated", "longer", "zeroed", "swapped"]
DAMAGES: tuple[Damage, ...] = get_args(Damage)
ZEROED_BYTES = 4096


@contextmanager
def damaged(store: ObjectStore, key: str, damage: Damage, other: str, chance: random.Random) -> Iterator[str]:
    """Inside, the object's bytes are not what was stored; afterwards they are again. Yields what was done, in words.

    `swapped` exchanges them with those of the object `other`, which must differ.
    """
    before, others = store.get(key), store.get(other)
    if damage == "swapped":
        after, told = others, f"exchanged with {other}"
        store.put(other, [before])
    else:
        after, told = _damage(before, damage, chance)
    assert after != before, f"{key}: {told} changed nothing"
    store.put(key, [after])
    try:
        yield f"{key}: {told}"
    finally:
        store.put(key, [before])
        if damage == "swapped":
            store.put(other, [others])


def _damage(data: bytes, damage: Damage, chance: random.Random) -> tuple[bytes, str]:
    changed = bytearray(data)
    if damage == "bit":
        at, bit = chance.randrange(len(data)), chance.randrange(8)
        changed[at] ^= 1 << bit
        return bytes(changed), f"bit {bit} of byte {at} flipped"
    if damage == "truncated":
        left = chance.randrange(len(data))
        return data[:left], f"cut from {len(data)} to {left} bytes"
    if damage == "longer":
        more = chance.randrange(1, ZEROED_BYTES)
        return data + chance.randbytes(more), f"{more} bytes longer"
    while bytes(changed) == data:  # zeros stay what they are
        begin = chance.randrange(len(data))
        end = min(begin + ZEROED_BYTES, len(data))
        changed[begin:end] = bytes(end - begin)
    return bytes(changed), f"bytes {begin} to {end} zeroed"


# ------------------------------------------------------------------------------------------------------ a small disk

MOUNT = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && shift 2 && exec "$@"'
BALLAST = "ballast"


def on_small_disk(folder: Path, size_bytes: int, argv: Sequence[str]) -> list[str]:
    """The command that runs `argv` with a disk of its own, of that size, mounted at `folder`; it vanishes at the end.

    In a user and mount namespace of its own: no root is needed, and nobody else sees the disk.
    """
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh", str(size_bytes), str(folder),
            *argv]  # fmt: skip


def why_no_small_disk(folder: Path) -> str | None:
    """Why `on_small_disk` cannot work on this machine; None where it can."""
    if shutil.which("unshare") is None:
        return "no command `unshare` (util-linux)"
    probe = subprocess.run(on_small_disk(folder, 2**20, ["true"]), capture_output=True, text=True, check=False)
    if probe.returncode == 0:
        return None
    return "no small disk without root: " + (probe.stderr.strip().splitlines() or ["unshare failed"])[-1]


def fill_disk(folder: Path, leave_bytes: int = 0) -> None:
    """Take all room of the disk at `folder` but so much."""
    facts = shutil.disk_usage(folder)
    with (folder / BALLAST).open("ab", buffering=0) as file, contextlib.suppress(OSError):
        left = facts.free - leave_bytes
        while left > 0:
            left -= file.write(bytes(min(left, 2**16)))


def make_room(folder: Path) -> None:
    """What `fill_disk` took is free again."""
    (folder / BALLAST).unlink()
