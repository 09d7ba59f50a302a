"""Datasets and corpora in S3: the same bytes as in a folder, read through the cache, every flipped byte found."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest

from data_pipeline.build import CorpusConfig, build_corpus, inspect_dataset
from data_pipeline.config import parse
from data_pipeline.errors import UserError
from data_pipeline.loader import Column, Loader, read_rows
from data_pipeline.order import SampleOrder
from data_pipeline.shards import ShardDamaged, open_dataset, verify_dataset
from data_pipeline.storage import open_store

COLUMNS = (Column("base", "image64"), Column("upsampler", "image256"))


def build(output: str, *inputs: dict[str, Any], **settings: Any) -> dict[str, Any]:
    values = {"inputs": inputs, "output": output, "filters": {"preset": "none"}, **settings}
    return build_corpus(parse(CorpusConfig, values, "test"))


def all_rows(uri: str) -> dict[str, Any]:
    dataset = open_dataset(uri)
    shards = np.repeat(np.arange(len(dataset.shard_rows)), dataset.shard_rows)
    rows = np.concatenate([np.arange(rows) for rows in dataset.shard_rows])
    return dict(read_rows(dataset, COLUMNS, shards, rows))


def cached(home: Path) -> list[Path]:
    return sorted((home / "cache").iterdir())


def test_a_dataset_built_into_a_bucket_is_the_one_built_into_a_folder(
    s3_uri: str, dataset_uri: str, picture_folder: Path, state_folder: Path
) -> None:
    built = build(s3_uri, {"kind": "folder", "uri": str(picture_folder)}, shard_rows=32)
    local, distant = open_dataset(dataset_uri), open_dataset(s3_uri)
    assert built["dataset_id"] == local.id == distant.id
    for family in ("base", "upsampler"):
        assert list(distant.family_manifest(family)["shards"]) == list(local.family_manifest(family)["shards"])
    assert inspect_dataset(s3_uri) | {"uri": ""} == inspect_dataset(dataset_uri) | {"uri": ""}
    assert not verify_dataset(s3_uri)
    expected, found = all_rows(dataset_uri), all_rows(s3_uri)
    assert np.array_equal(found["image64"], expected["image64"]) and found["image256"] == expected["image256"]
    # One unit's staged rows and six shards; nothing half-filled.
    assert len(cached(state_folder)) == 7 and all(len(path.name) == 64 for path in cached(state_folder))


def test_a_flipped_byte_is_found_in_the_bucket_and_mended_in_the_cache(
    moto_uri: str, picture_folder: Path, state_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(moto_uri, {"kind": "folder", "uri": str(picture_folder)}, shard_rows=96)
    dataset = open_dataset(moto_uri)
    key, store = f"{dataset.prefix}base/shard-00000.arrow", open_store(moto_uri)
    expected = all_rows(moto_uri)
    batch = dataset.shard_file("base", 0).batches[0]

    for path in cached(state_folder):
        data = bytearray(path.read_bytes())
        data[batch.offset + batch.length // 2] ^= 1
        path.write_bytes(data)
    assert np.array_equal(all_rows(moto_uri)["image64"], expected["image64"])
    assert "in the cache; taking it from the store again" in caplog.text

    stored = bytearray(store.get(key))
    stored[batch.offset + batch.length // 2] ^= 1
    store.put(key, [stored])
    assert [bad.part for bad in verify_dataset(moto_uri)] == [f"{moto_uri}/{key}"]
    for path in cached(state_folder):
        path.unlink()
    with pytest.raises(ShardDamaged, match=r"shard-00000\.arrow batch 0"):
        all_rows(moto_uri)
    assert not any(path.suffix == ".part" for path in cached(state_folder))
    for cut in (stored[:-1], stored + b"x"):
        store.put(key, [bytes(cut)])
        with pytest.raises(ShardDamaged):
            all_rows(moto_uri)


def test_where_the_cache_has_no_room_rows_come_straight_from_the_store(
    moto_uri: str, dataset_uri: str, picture_folder: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("GLIDEPATH_CACHE_BYTES", "1000")
    built = build(moto_uri, {"kind": "folder", "uri": str(picture_folder)}, shard_rows=32)
    assert built["dataset_id"] == open_dataset(dataset_uri).id
    assert np.array_equal(all_rows(moto_uri)["image64"], all_rows(dataset_uri)["image64"])
    assert "reading it from the store, batch by batch" in caplog.text


def test_a_loader_fetches_shards_of_a_bucket_ahead_once_each_and_exactly_through_a_bad_link(
    moto_uri: str, dataset_uri: str, picture_folder: Path, faulty_link: Callable[..., Any], state_folder: Path
) -> None:
    build(moto_uri, {"kind": "folder", "uri": str(picture_folder)}, shard_rows=32)
    for path in cached(state_folder):
        path.unlink()
    link = faulty_link()
    link.cut_share = 0.1
    got = []
    for uri in (moto_uri, dataset_uri):
        dataset = open_dataset(uri)
        order = SampleOrder(dataset.id, dataset.shard_rows, 0, 32)
        loader = Loader(dataset, order, COLUMNS, lambda rows, draws: rows, [(0, 20), (20, 32)])
        got.append([micro.batch for step in loader.batches(0, 32 * 20) for micro in step])
    for distant, local in zip(*got, strict=True):
        assert np.array_equal(distant["image64"], local["image64"]) and distant["image256"] == local["image256"]
    assert link.cuts > 0 and len(cached(state_folder)) == 6


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files by address, for a signed link only; with ranges, as object stores give them."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        file = Path(self.directory, path.lstrip("/"))
        if query != "Signature=TopSecret":
            return self.send_error(403)
        if not file.is_file():
            return self.send_error(404)
        data, start = file.read_bytes(), 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            assert self.headers["If-Range"] == '"v1"'
        self.send_response(206 if asked else 200)
        self.send_header("ETag", '"v1"')
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:])
        return None


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server's address, and its folder."""
    (tmp_path / "web").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "web"
        server.shutdown()


def test_tars_of_a_bucket_and_of_a_signed_link_are_the_units_that_local_ones_are(
    moto_uri: str, web: tuple[str, Path], tmp_path: Path, make_corpus: Callable[[Path, range], Path],
    faulty_link: Callable[..., Any], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("DEBUG", "data_pipeline")
    url, folder = web
    for name, numbers in (("a.tar", range(3)), ("b.tar", range(3, 6)), ("c.tar", range(6, 200))):
        make_corpus(folder / name, numbers)
    local = build(str(tmp_path / "local"), {"kind": "webdataset", "uri": str(folder)})
    bucket = open_store(f"{moto_uri}/in")
    for name in ("a.tar", "b.tar"):
        bucket.put(name, [(folder / name).read_bytes()])
    bucket.put("notes.txt", [b"not a tar"])
    link = faulty_link(url)
    link.cut_share = 0.3
    signed = {"kind": "webdataset", "uri": f"{link.url}/c.tar?Signature=TopSecret"}
    distant = build(f"{moto_uri}/out", {"kind": "webdataset", "uri": f"{moto_uri}/in/"}, signed)
    assert link.cuts > 0
    assert distant["dataset_id"] == local["dataset_id"]
    everything = b"".join(open_store(f"{moto_uri}/out").get(info.key) for info in open_store(f"{moto_uri}/out").list())
    assert b"c.tar" in everything and b"TopSecret" not in everything
    assert "TopSecret" not in caplog.text
    config = parse(CorpusConfig, {"inputs": [signed]}, "test")
    assert "TopSecret" not in f"{config} {json.dumps(config.model_dump(mode='json'))}"


def test_tars_of_a_public_bucket_need_no_credentials(
    moto_uri: str, make_corpus: Callable[[Path, range], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(moto_uri).put("a.tar", [make_corpus(tmp_path / "a.tar", range(3)).read_bytes()])
    bucket = moto_uri.removeprefix("s3://")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    boto3.session.Session().client("s3").put_object_acl(Bucket=bucket, Key="a.tar", ACL="public-read")
    monkeypatch.delenv("AWS_SHARED_CREDENTIALS_FILE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    public = {"kind": "webdataset", "uri": f"{moto_uri}/a.tar", "anonymous": True}
    assert build(str(tmp_path / "out"), public)["rows"] == 3
    with pytest.raises(UserError, match="credentials"):
        build(str(tmp_path / "out"), {"kind": "webdataset", "uri": f"{moto_uri}/"})


@pytest.mark.parametrize(
    ("link", "found"),
    [("a.tar?Signature=Other", "HTTP 403"), ("absent.tar?Signature=TopSecret", "HTTP 404")],
)
def test_a_link_that_is_refused_is_named_without_its_signature(
    web: tuple[str, Path], tmp_path: Path, link: str, found: str
) -> None:
    with pytest.raises(UserError, match=found) as refused:
        build(str(tmp_path / "out"), {"kind": "webdataset", "uri": f"{web[0]}/{link}"})
    assert "Signature" not in str(refused.value)


def test_an_object_that_is_not_there_is_refused_by_name(moto_uri: str, tmp_path: Path) -> None:
    for uri, found in ((f"{moto_uri}/absent.tar", "found nothing"), (f"{moto_uri}/empty/", "none with that prefix")):
        with pytest.raises(UserError, match=found):
            build(str(tmp_path / "out"), {"kind": "webdataset", "uri": uri})
