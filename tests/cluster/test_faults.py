"""The faults to order: each happens, is counted, shows to who meets it, and is gone when it is taken back."""

from __future__ import annotations

import http.client
import http.server
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import get_args
from urllib.parse import urlsplit

import pytest

from cluster.faults import DAMAGES, Damage, FaultyLink, damaged, faulty_link
from data_pipeline.storage import LocalStore

BODY = bytes(100_000)


class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def link() -> Iterator[FaultyLink]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with faulty_link(f"http://127.0.0.1:{server.server_port}") as made:
            yield made
        server.shutdown()


def ask(link: FaultyLink) -> int:
    """Status of an answer that came back whole."""
    connection = http.client.HTTPConnection(urlsplit(link.url).netloc, timeout=10)
    try:
        connection.request("PUT", "/", BODY)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status == 200 and body != BODY:  # cut in the headers, there may be no length to miss
            raise http.client.IncompleteRead(body)
        return answer.status
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("setting", "count", "seen"),
    [
        ({"busy_share": 1.0}, "busy", 503),
        ({"error_share": 1.0}, "errors", 500),
        ({"reset_share": 1.0}, "resets", ConnectionResetError),
        ({"cut_share": 1.0}, "cuts", (http.client.HTTPException, ConnectionError)),
        ({"upload_cut_share": 1.0}, "cuts", (http.client.HTTPException, ConnectionError)),
        ({"stall_share": 1.0, "stall_s": 0.05}, "stalls", 200),
        ({"down": True}, "refused", (http.client.HTTPException, ConnectionError)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_fault_of_a_link_shows_and_is_counted_and_heals(
    link: FaultyLink, setting: dict[str, float], count: str, seen: int | type[Exception]
) -> None:
    assert ask(link) == 200
    for name, value in setting.items():
        setattr(link, name, value)
    if isinstance(seen, int):
        assert ask(link) == seen
    else:
        with pytest.raises(seen):
            ask(link)
    assert getattr(link, count) > 0
    link.heal()
    assert ask(link) == 200


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_changes_the_bytes_and_is_undone(tmp_path: Path, damage: Damage) -> None:
    store = LocalStore(tmp_path)
    store.put("a", [bytes(9000), b"tail"])  # mostly zeros, of which zeroing changes nothing
    store.put("b", [b"other"])
    before = {key: store.get(key) for key in "ab"}
    for seed in range(20):
        with damaged(store, "a", damage, "b", random.Random(seed)) as told:
            assert store.get("a") != before["a"] and told.startswith("a: ")
            assert (store.get("b") != before["b"]) == (damage == "swapped")
        assert {key: store.get(key) for key in "ab"} == before
    assert set(DAMAGES) == set(get_args(Damage))
