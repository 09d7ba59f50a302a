"""S3Store beyond what every store promises: failing ways to the server, large objects, refusals, secrets."""

from __future__ import annotations

import pickle
import random
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import pytest

from data_pipeline.errors import UsageError, UserError
from data_pipeline.storage import ObjectNotFound, StoreError, open_store, s3
from data_pipeline.storage.s3 import S3Store
from data_pipeline.storage.s3_errors import explain

DATA = random.Random(0).randbytes(12 * 2**20 + 5)


def client() -> Any:
    return boto3.session.Session().client("s3")


def test_chunks_of_any_size_become_parts_of_one_object(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)  # the smallest that S3 takes
    store = S3Store(s3_uri)
    tiny = [DATA[at : at + 7] for at in range(0, 7000, 7)]
    store.put("large", [memoryview(DATA), *tiny, memoryview(bytearray(DATA))])
    assert store.get("large") == DATA + DATA[:7000] + DATA
    assert store.facts("large")[0].strip('"').endswith("-5")
    store.put("one part", [DATA[: 5 * 2**20]])
    assert "-" not in store.facts("one part")[0]
    assert store.sweep_uploads() == 0


def test_parts_grow_so_that_ten_thousand_of_them_hold_terabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 4)
    monkeypatch.setattr(s3, "GROW_EVERY_PARTS", 2)
    parts = list(s3._parts([b"0123456789", b"", memoryview(b"abcdefghijklmnopqrst")]))
    assert [len(part) for part in parts] == [4, 4, 8, 8, 6]
    assert b"".join(parts) == b"0123456789abcdefghijklmnopqrst"


def test_an_upload_that_is_ended_midway_leaves_neither_object_nor_parts(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)

    def chunks() -> Iterator[bytes]:
        yield DATA
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        S3Store(s3_uri).put("key", chunks())
    assert not S3Store(s3_uri).exists("key")
    assert S3Store(s3_uri).sweep_uploads() == 0


def test_a_sweep_aborts_only_the_uploads_it_is_told_to(s3_uri: str) -> None:
    store = S3Store(s3_uri)
    for key in ("mine/1", "mine/2", "other/1"):
        client().create_multipart_upload(Bucket=store.bucket, Key=store.prefix + key)
    client().create_multipart_upload(Bucket=store.bucket, Key="elsewhere")
    assert store.sweep_uploads("mine/", owned=lambda key: key == "mine/1") == 1
    assert store.sweep_uploads(owned=lambda key: key.startswith("mine/")) == 1
    assert store.sweep_uploads(owned=lambda key: key == "other/1") == 1
    client().abort_multipart_upload(
        Bucket=store.bucket,
        Key="elsewhere",
        UploadId=client().list_multipart_uploads(Bucket=store.bucket, Prefix="elsewhere")["Uploads"][0]["UploadId"],
    )


def test_a_body_cut_in_mid_stream_is_resumed(swift_uri: str, faulty_link: Callable[..., Any]) -> None:
    store = S3Store(swift_uri)
    store.put("key", [DATA])
    link = faulty_link()
    link.cut_share = 0.08
    places, plain, lost = random.Random(1), client(), 0
    for _ in range(40):
        start, length = places.randrange(len(DATA)), places.randrange(1, 2**21)
        assert store.get_range("key", start, length) == DATA[start : start + length]
        asked = {"Bucket": store.bucket, "Key": store.prefix + "key", "Range": f"bytes={start}-{start + length - 1}"}
        try:
            plain.get_object(**asked)["Body"].read()
        except (botocore.exceptions.BotoCoreError, ValueError):  # the latter of a date that was cut
            lost += 1
    assert store.get("key") == DATA
    print(f"{link.cuts} cuts; of 40 plain reads {lost} were lost")
    assert link.cuts > 40 and lost > 10


ANSWER = (
    b"HTTP/1.1 206 Partial Content\r\nLast-Modified: Sat, 21 Nov 2026 10:00:00 GMT\r\nContent-Length: 5\r\n"
    b'ETag: "5d41402abc4b2a76b9719d911017c592"\r\nContent-Range: bytes 0-4/5\r\nConnection: close\r\n'
    b"Content-Type: application/octet-stream\r\n\r\nhello"
)


def test_an_answer_that_is_cut_at_any_byte_of_its_headers_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_pause", lambda attempt: None)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    cuts = range(len(ANSWER) - len(b"hello"))
    lengths = [length for cut in cuts for length in (cut, len(ANSWER))]
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for length in lengths:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(2**16)
                    connection.sendall(ANSWER[:length])

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        store = S3Store("s3://bucket/folder")
        assert all(store.get_range("key", 0, 5) == b"hello" for _ in cuts)
        server.join(timeout=10)
        assert not server.is_alive()


def test_an_object_that_is_replaced_while_it_is_read_is_refused(
    s3_uri: str, faulty_link: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3Store(s3_uri)
    store.put("key", [DATA, DATA, DATA])  # more than fits into what lies between the server and its reader
    link = faulty_link()
    pieces = store.stream("key")
    next(pieces)
    with monkeypatch.context() as direct:
        direct.delenv("AWS_ENDPOINT_URL")
        store.put("key", [DATA[::-1]])
    link.lose_next = 1
    with pytest.raises(StoreError, match="replaced by another object"):
        b"".join(pieces)


def test_a_server_that_is_busy_or_away_for_a_while_fails_no_call(
    swift_uri: str, faulty_link: Callable[..., Any]
) -> None:
    store = S3Store(swift_uri)
    link = faulty_link()
    link.busy_share = 0.3
    for number in range(12):
        link.refuse_next = number % 4
        store.put(f"key-{number}", [str(number).encode()])
        link.refuse_next = number % 3
        assert store.get(f"key-{number}") == str(number).encode()
    assert len(list(store.list())) == 12
    assert not store.put_if_absent("key-0", b"")


def test_a_conditional_write_that_meets_its_own_success_says_that_the_key_is_taken(
    moto_uri: str, faulty_link: Callable[..., Any]
) -> None:
    link = faulty_link()
    link.lose_next = 1  # the server writes, the answer is lost
    assert not S3Store(moto_uri).put_if_absent("key", b"mine")  # callers then compare what is there with theirs
    assert S3Store(moto_uri).get("key") == b"mine"


def test_what_makes_a_store_unusable_is_said_in_one_line_without_secrets(
    swift_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PATIENCE_S", 0.0)

    def refusals(uri: str) -> Iterator[str]:
        store = S3Store(uri)
        with pytest.raises(UserError) as refused:
            store.check()
        yield str(refused.value)
        for call in (lambda: store.put("k", [b""]), lambda: list(store.list()), lambda: store.put_if_absent("k", b"")):
            with pytest.raises(OSError) as failed:
                call()
            yield "".join(traceback.format_exception(failed.value)).splitlines()[-1]
            assert failed.value.__cause__ is None

    for line in refusals("s3://there-is-no-such-bucket/x"):
        assert "no such bucket" in line
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "glidepath:nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "TopSecret")
    for line in refusals(swift_uri):
        assert "a refusal" in line and "nobody" not in line and "TopSecret" not in line
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for line in refusals(swift_uri):
        assert "no answer from 127.0.0.1:9" in line and "nobody" not in line
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "absent"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for line in refusals(swift_uri):
        assert "AWS_SHARED_CREDENTIALS_FILE" in line


def test_a_store_travels_as_its_uri_alone(moto_uri: str) -> None:
    store = S3Store(f"{moto_uri}/runs/a/")
    store.put("key", [b"x"])
    shipped = pickle.dumps(store)
    assert len(shipped) < 200 and b"s3cr3t" not in shipped
    assert pickle.loads(shipped).get("key") == b"x"
    failure = pickle.loads(pickle.dumps(StoreError("s3://b/k", "no answer")))
    assert str(failure) == "s3://b/k: no answer"
    with pytest.raises(StoreError):
        S3Store("s3://there-is-no-such-bucket").get("key")


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3://key:TopSecret@bucket/x", "s3://bucket/x?TopSecret"])
def test_a_uri_that_names_no_bucket_or_holds_credentials_is_refused_unseen(uri: str) -> None:
    with pytest.raises(UsageError) as refused:
        open_store(uri)
    assert "TopSecret" not in str(refused.value)


def test_without_boto3_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UsageError, match=r"pip install 'glidepath\[cluster\]'"):
        open_store("s3://bucket")


def test_a_missing_key_is_not_a_failure_of_the_store(s3_uri: str) -> None:
    with pytest.raises(ObjectNotFound, match="absent"):
        S3Store(s3_uri).get("absent")


def test_a_handshake_that_is_cut_is_tried_again_and_a_bad_certificate_is_not() -> None:
    cut, bad = (
        botocore.exceptions.SSLError(endpoint_url="https://host", error=text)
        for text in ("EOF occurred", "CERTIFICATE_VERIFY_FAILED")
    )
    assert explain(cut, "https://host").transient
    assert not explain(bad, "https://host").transient
    assert "certificate" in explain(bad, "https://host").expected


def test_a_finished_upload_whose_object_is_gone_is_a_failure_of_the_store(swift_uri: str) -> None:
    store = S3Store(swift_uri)
    upload = store._call("create_multipart_upload", "swept", ChecksumAlgorithm="CRC32")["UploadId"]
    store._abort("swept", upload)
    with pytest.raises(StoreError, match="NoSuchUpload"):
        store._complete("swept", upload, [{"PartNumber": 1, "ETag": '"0123456789abcdef0123456789abcdef"'}], 1)


def test_an_upload_whose_link_is_cut_within_the_word_to_go_on_ends_and_is_tried_again(
    moto_uri: str, faulty_link: Callable[..., Any]
) -> None:
    link = faulty_link()
    link.half_continue_next = 1
    # In a thread of its own: what this guards against is a client that reads on for ever.
    upload = threading.Thread(target=lambda: S3Store(moto_uri).put("object", [DATA[:1000]]), daemon=True)
    upload.start()
    upload.join(timeout=30)
    assert not upload.is_alive() and link.half_continue_next == 0
    assert S3Store(moto_uri).get("object") == DATA[:1000]
