"""Parquets: pictures in them or named by them, and what the parquet beside an img2dataset tar adds to it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from data_pipeline.build import build_corpus
from data_pipeline.config import parse
from data_pipeline.corpus import CorpusConfig
from data_pipeline.errors import UsageError, UserError
from data_pipeline.records import Record, Rejected
from data_pipeline.sources import Input, Unit, img2dataset, list_units, read_records
from data_pipeline.sources.named import Pictures
from data_pipeline.storage import open_store


def unit_of(kind: str, uri: Path | str, **settings: str) -> Unit:
    (unit,) = list_units([Input(kind=kind, uri=str(uri), **settings)])  # type: ignore[arg-type]
    return unit


def read(kind: str, uri: Path | str, **settings: str) -> list[Record | Rejected]:
    return list(read_records(unit_of(kind, uri, **settings)))


def reasons(records: list[Record | Rejected]) -> dict[str, str]:
    return {record.key: record.reason for record in records if isinstance(record, Rejected)}


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize("image", ["image", "jpg", "bytes", "struct", "large", "dictionary", "view"])
def test_rows_with_bytes_are_records_with_all_their_captions_and_numbers(tmp_path: Path, image: str) -> None:
    data: Any = pa.array([b"j0", b"j1", None, b"j3"])
    if image == "struct":
        data = pa.array([{"bytes": b"j0", "path": "a"}, {"bytes": b"j1", "path": None}, None, {"bytes": b"j3"}])
    elif image == "large":
        data = data.cast(pa.large_binary())
    elif image == "dictionary":
        data = data.dictionary_encode()
    elif image == "view":
        data = data.cast(pa.binary_view())
    path = write(
        tmp_path / "a.parquet",
        {
            "n": pa.array([1, None, 3, 4], pa.uint8()),
            image if image in ("image", "jpg", "bytes") else "image": data,
            "TEXT": ["first", "only", "x", None],
            "captions": [["second", "first"], None, [], [None]],
            "half": pa.array(np.array([0.5, np.nan, np.inf, 1], np.float16)),
            "safe": [True, False, None, True],
            "words": ["1", "2", "3", "4"],
            "when": pa.array([0, 1, 2, 3], pa.timestamp("s")),
        },
        row_group_size=3,
    )
    assert read("parquet", path) == [
        Record("000000000", b"j0", (b"first", b"second"), {"n": 1.0, "half": 0.5, "safe": 1.0}),
        Record("000000001", b"j1", (b"only",), {"safe": 0.0}),
        Rejected("000000002", "image_missing", f"{'image' if image not in ('jpg', 'bytes') else image} is null"),
        Rejected("000000003", "caption_missing", "TEXT, captions: null or empty"),
    ]


def test_columns_are_named_in_the_input_and_one_that_is_absent_names_those_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"photo": [b"j"], "alt": ["words"], "image": [b"other"], "text": ["else"]})
    assert read("parquet", path, image="photo", caption="alt") == [Record("000000000", b"j", (b"words",))]
    there = r"found columns photo \(binary\), alt \(string\), image \(binary\), text \(string\)"
    with pytest.raises(UserError, match=rf"a\.parquet: expected a column of captions named caption, {there}; set the"):
        read("parquet", path, caption="caption")
    with pytest.raises(UserError, match=rf"expected a column of pictures, as bytes or names named jpg, {there}"):
        read("parquet", path, image="jpg")
    with pytest.raises(UserError, match="expected a column of pictures"):
        read("parquet", write(tmp_path / "b.parquet", {"score": [1.0], "text": ["x"]}))
    with pytest.raises(UsageError, match="'webdataset', 'img2dataset', 'parquet', 'folder' or 'demo', found 'zip'"):
        parse(CorpusConfig, {"inputs": [{"kind": "zip", "uri": "x"}]}, "test")
    with pytest.raises(UsageError, match="image and caption with kind parquet alone"):
        parse(CorpusConfig, {"inputs": [{"kind": "folder", "uri": "x", "caption": "alt"}]}, "test")
    digests = {unit_of("parquet", path).digest, unit_of("parquet", path, image="image", caption="text").digest}
    assert len(digests) == 1 and unit_of("parquet", path, image="photo").digest not in digests


def test_names_lead_to_files_beside_the_parquet_and_nowhere_else(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "a.jpg").write_bytes(b"j")
    (tmp_path / "secret.jpg").write_bytes(b"private")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "up").symlink_to(tmp_path)
    names = ["pictures/a.jpg", "gone.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "up/secret.jpg",
             "pictures", "", None, "a\0b", "x" * 300]  # fmt: skip
    path = write(folder / "a.parquet", {"url": names, "caption": ["c"] * len(names), "score": range(len(names))})
    found = read("parquet", path)
    assert found[0] == Record("000000000", b"j", (b"c",), {"score": 0.0})
    assert [record.reason for record in found[1:]] == [  # type: ignore[union-attr]
        "image_missing", "unsafe_name", "unsafe_name", "not_a_file", "not_a_file",
        "not_a_file", "unsafe_name", "image_missing", "unsafe_name", "image_missing",
    ]  # fmt: skip
    before = unit_of("parquet", path)
    (folder / "pictures" / "a.jpg").write_bytes(b"k")
    after = unit_of("parquet", path)
    assert before.digest != after.digest and after.bytes == path.stat().st_size + 1
    links = write(tmp_path / "b.parquet", {"URL": ["http://example.com/a.jpg"], "TEXT": ["c"]})
    with pytest.raises(UserError, match="found http:// links; download them first, for example with img2dataset"):
        read("parquet", links)


def test_names_relative_to_an_address_of_the_web_are_links_to_it() -> None:
    with (
        Pictures("https://example.com/in/a.parquet", False) as pictures,
        pytest.raises(UserError, match="found https:// links; download them first"),
    ):
        pictures.read([b"a.jpg"])


def test_a_parquet_larger_than_its_pages_is_read_in_their_memory(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()
    schema = pa.schema({"image": pa.binary(), "caption": pa.utf8()})
    path = tmp_path / "a.parquet"
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "data_page_size": 2**20}
    with pa.parquet.ParquetWriter(path, schema, write_batch_size=8, **options) as writer:
        pictures = [picture[number:] + picture[:number] for number in range(600)]
        writer.write_table(pa.table({"image": pictures, "caption": ["c"] * 600}, schema))
    del pictures
    assert pa.parquet.read_metadata(path).num_row_groups == 1 and path.stat().st_size > 50 * 2**20
    before, peak, count = pa.total_allocated_bytes(), 0, 0
    for record in read_records(unit_of("parquet", path)):
        count += isinstance(record, Record)
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert count == 600 and peak < 12 * 2**20


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.bytes(1000) for _ in range(30)]
    path = write(tmp_path / "a.parquet", {"image": images, "caption": ["c"] * 30},
                 row_group_size=10, write_page_checksum=True)  # fmt: skip
    data = bytearray(path.read_bytes())
    data[data.index(images[14]) + 500] ^= 1
    path.write_bytes(data)
    found = read("parquet", path)
    assert [record.key for record in found if isinstance(record, Record)] == [
        f"{row:09d}" for row in (*range(10), *range(20, 30))
    ]
    assert reasons(found) == {"(rows from 10)": "parquet_damaged"}
    path.write_bytes(data[:-20])
    assert reasons(read("parquet", path)) == {"(parquet)": "parquet_unreadable"}


def img2dataset_output(folder: Path, make_tar: Callable, make_jpeg: Callable) -> Path:
    """Five good samples, two failed downloads and one that the tar lacks."""
    files: dict[str, bytes] = {}
    for number in range(5):
        key = f"{number:09d}"
        about = {"caption": f"in json {number}", "key": key, "similarity": 0.25, "width": 96, "nsfw": None, "n": "7"}
        files |= {f"{key}.jpg": make_jpeg(number), f"{key}.json": json.dumps(about).encode()}
        files[f"{key}.txt"] = f"in txt {number}".encode()
    del files["000000001.txt"], files["000000002.txt"], files["000000002.json"]
    rows = [
        {"key": f"{number:09d}", "caption": f"in parquet {number}", "status": "success", "error_message": None,
         "punsafe": number / 8, "similarity": 0.75, "pwatermark": None, "exif": "{}"}
        for number in range(8)
    ]  # fmt: skip
    rows[0]["captions"] = ["in txt 0", "another"]
    rows[5] |= {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"}
    rows[6] |= {"status": "failed_to_resize", "error_message": "image decoding error"}
    table = pa.Table.from_pylist(rows)
    tar = make_tar(folder / "00000.tar", files)
    pa.parquet.write_table(table, folder / "00000.parquet", row_group_size=3)
    (folder / "00000_stats.json").write_text('{"count": 8}')
    return tar


def test_img2dataset_output_is_joined_by_key_and_failed_downloads_are_counted(
    tmp_path: Path, make_tar, make_jpeg, monkeypatch
) -> None:
    monkeypatch.setattr(img2dataset, "BLOCK_ROWS", 2)
    monkeypatch.setattr(img2dataset, "BLOCKS", 2)
    img2dataset_output(tmp_path / "in", make_tar, make_jpeg)
    found = {record.key: record for record in read("img2dataset", tmp_path / "in")}
    assert len(found) == 8
    numbers = {"similarity": 0.75, "width": 96.0}
    captions = [record.captions for record in found.values() if isinstance(record, Record)]
    columns = [dict(record.columns) for record in found.values() if isinstance(record, Record)]
    assert captions == [(b"in txt 0", b"another"), (b"in json 1",), (b"in parquet 2",), (b"in txt 3",), (b"in txt 4",)]
    assert columns[3] == numbers | {"punsafe": 0.375} and columns[2] == {"similarity": 0.75, "punsafe": 0.25}
    assert found["000000005"] == Rejected(
        "000000005", "download_failed", "failed_to_download: HTTP Error 404: Not Found"
    )
    assert reasons(list(found.values())) == {
        "000000005": "download_failed",
        "000000006": "download_failed",
        "000000007": "image_missing",
    }


@pytest.mark.parametrize("of", ["value", "rows"])
def test_a_parquet_made_to_fill_the_memory_costs_the_tar_nothing_but_it(
    tmp_path: Path, make_tar, monkeypatch, of: str
) -> None:
    monkeypatch.setattr(img2dataset, "BYTES_LIMIT", 2**24)
    tar = make_tar(tmp_path / "a.tar", {"0.jpg": b"j", "0.txt": b"t"})
    if of == "value":  # a few KB that hold 1 MB in each row
        keys = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), pa.array(["x" * 2**20]))
    else:
        keys = pa.nulls(2_000_000, pa.utf8())
    path = write(tmp_path / "a.parquet", {"key": keys}, compression="zstd")
    assert path.stat().st_size < 20_000
    before = pa.total_allocated_bytes()
    unreadable, record = read("img2dataset", tar)
    assert isinstance(unreadable, Rejected) and unreadable.reason == "parquet_unreadable"
    assert record == Record("0", b"j", (b"t",)) and pa.total_allocated_bytes() - before < 2**26


def test_the_parquet_beside_a_tar_is_part_of_the_unit(tmp_path: Path, make_tar, make_jpeg) -> None:
    tar = img2dataset_output(tmp_path / "in", make_tar, make_jpeg)
    with_parquet = unit_of("img2dataset", tar)
    assert unit_of("webdataset", tar).digest != with_parquet.digest
    beside = tmp_path / "in" / "00000.parquet"
    table = pa.parquet.read_table(beside)
    scores = pa.array([1.0] * 8)
    pa.parquet.write_table(table.append_column("aesthetic", scores), beside)
    rescored = unit_of("img2dataset", tar)
    assert rescored.digest != with_parquet.digest
    assert next(read_records(rescored)).columns["aesthetic"] == 1.0  # type: ignore[union-attr]
    beside.write_bytes(beside.read_bytes()[:-9])
    assert reasons(read("img2dataset", tar)) == {
        "(parquet beside the tar)": "parquet_unreadable",
        "000000002": "caption_missing",  # it had its caption from there
    }
    pa.parquet.write_table(table.drop_columns(["key"]), beside)
    with pytest.raises(UserError, match=r"00000.parquet: expected a column key of text, found columns caption, status"):
        read("img2dataset", tar)
    beside.unlink()
    assert unit_of("img2dataset", tar).digest not in (with_parquet.digest, rescored.digest)


def test_real_img2dataset_output_gives_every_caption_of_every_picture(photographs: Path) -> None:
    found = read("img2dataset", photographs / "coco_original")
    assert len(found) == 120 and all(isinstance(record, Record) for record in found)
    assert Counter(len(record.captions) for record in found).most_common(1)[0][0] == 5  # type: ignore[union-attr]
    assert set(found[0].columns) == {"width", "height", "original_width", "original_height", "coco_id"}  # type: ignore[union-attr]


def test_parquets_and_img2dataset_output_in_a_bucket_are_the_units_that_local_ones_are(
    moto_uri: str, tmp_path: Path, make_tar, make_jpeg, state_folder: Path, faulty_link
) -> None:
    local = tmp_path / "in"
    img2dataset_output(local, make_tar, make_jpeg)
    images = [make_jpeg(number) for number in range(20, 30)]
    write(local / "rows" / "a.parquet", {"image": images, "caption": [f"row {number}" for number in range(10)]})
    bucket = open_store(moto_uri)
    for path in (*local.glob("0*"), local / "rows" / "a.parquet"):
        bucket.put(path.relative_to(local).as_posix(), [path.read_bytes()])
    for number, image in enumerate(images):
        bucket.put(f"pictures/{number}.jpg", [image])
    names = [f"pictures/{number}.jpg" for number in range(2, 10)]
    names += ["pictures/0.jpg", f"{moto_uri}/pictures/1.jpg", "pictures/gone.jpg", "a//b", "../x", "s3://-/x"]
    write(tmp_path / "named.parquet", {"url": names, "caption": [f"named {name}" for name in names]})
    bucket.put("named.parquet", [(tmp_path / "named.parquet").read_bytes()])

    kinds = (("img2dataset", ""), ("parquet", "rows/a.parquet"))
    for kind, name in kinds:
        uri = f"{moto_uri}/{name or '00000.tar'}"
        assert unit_of(kind, uri).digest == unit_of(kind, local / name).digest
        assert read(kind, uri) == read(kind, local / name)
    named = unit_of("parquet", f"{moto_uri}/named.parquet")
    found = list(read_records(named))
    assert [record.image_bytes for record in found[:10]] == [*images[2:], *images[:2]]  # type: ignore[union-attr]
    assert list(reasons(found).values()) == ["image_missing", "image_missing", "unsafe_name", "unsafe_name"]
    link = faulty_link()
    link.cut_share = 0.3
    assert list(read_records(named)) == found and link.cuts > 0
    link.cut_share = 0.0
    bucket.put("pictures/1.jpg", [images[2]])
    assert unit_of("parquet", f"{moto_uri}/named.parquet").digest != named.digest

    inputs = [{"kind": kind, "uri": f"{moto_uri}/{name}"} for kind, name in kinds]
    values = {"inputs": inputs, "output": f"{moto_uri}/out", "filters": {"preset": "none"}, "budget": None}
    summary = build_corpus(parse(CorpusConfig, values, "test"))
    assert summary["funnel"]["in"] == 18
    assert summary["funnel"]["dropped"].items() >= {"download_failed": 2, "image_missing": 1}.items()
    with pytest.raises(UserError, match="expected a folder on this machine, found an address; pack the pictures"):
        read("folder", f"{moto_uri}/pictures/")
