"""Readers: every record of a hostile input is read or rejected with a reason, and nothing leaves the input."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import webdataset

from data_pipeline.config import parse
from data_pipeline.corpus import CorpusConfig
from data_pipeline.errors import UsageError, UserError
from data_pipeline.records import Record, Rejected
from data_pipeline.sources import Input, list_units, read_records
from data_pipeline.sources.units import find_units, with_digest
from data_pipeline.storage import open_store


def read(kind: str, path: Path) -> list[Record | Rejected]:
    (unit,) = list_units([Input(kind=kind, uri=str(path))])  # type: ignore[arg-type]
    return list(read_records(unit))


def outcomes(records: list[Record | Rejected]) -> Counter[str]:
    return Counter(record.reason if isinstance(record, Rejected) else "read" for record in records)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("derived__bad_header_checksum_first.tar", {"tar_unreadable": 1}),
        ("derived__duplicate_keys.tar", {"read": 12, "duplicate_key": 2}),
        ("derived__gzipped_named.tar", {"read": 12}),
        ("derived__links_and_devices.tar", {"caption_missing": 1, "not_a_file": 3}),
        ("derived__missing_txt_json.tar", {"read": 11, "caption_missing": 1}),
        ("derived__path_traversal.tar", {"read": 1, "unsafe_name": 2}),
        ("derived__truncated_mid_member.tar", {"read": 9, "tar_truncated": 1}),
        ("derived__uppercase_ext_and_dirs.tar", {"read": 12}),
        ("webdataset__compressed.tar", {"image_missing": 3}),
        ("webdataset__sample.tgz", {"caption_missing": 90}),
        ("webdataset__testgz.tar", {"image_missing": 1000}),
    ],
)
def test_every_sample_of_a_messy_tar_is_read_or_rejected(messy: Path, name: str, expected: dict[str, int]) -> None:
    assert outcomes(read("img2dataset", messy / "tars" / name)) == expected


def test_a_tar_is_read_as_webdataset_reads_it(tmp_path: Path, make_jpeg) -> None:
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(20):
            writer.write({"__key__": f"a/b.c/{number}", "jpg": make_jpeg(number), "txt": f"number {number}"})
    with path.open("rb") as file:
        members = webdataset.tariterators.tar_file_iterator(file)
        samples = list(webdataset.tariterators.group_by_keys(member | {"__url__": ""} for member in members))
    expected = [Record(sample["__key__"], sample["jpg"], (sample["txt"],)) for sample in samples]
    assert len(expected) == 20
    assert read("webdataset", path) == expected


def test_files_of_a_sample_need_not_be_adjacent(tmp_path: Path, make_tar) -> None:
    files = {"0.jpg": b"j0", "1.jpg": b"j1", "1.txt": b"t1", "0.txt": b"t0"}
    assert read("webdataset", make_tar(tmp_path / "a.tar", files)) == [
        Record("0", b"j0", (b"t0",)),
        Record("1", b"j1", (b"t1",)),
    ]


def test_damage_in_the_middle_of_a_tar_is_reported_not_taken_for_its_end(tmp_path: Path, make_tar) -> None:
    path = make_tar(
        tmp_path / "a.tar", {f"{number}.{suffix}": b"x" for number in range(4) for suffix in ("jpg", "txt")}
    )
    data = bytearray(path.read_bytes())
    data[4 * 1024 + 10] ^= 1  # the header of the fifth member
    path.write_bytes(data)
    assert outcomes(read("webdataset", path)) == {"read": 2, "tar_truncated": 1}


def test_the_caption_in_json_is_used_by_img2dataset_alone(tmp_path: Path, make_tar) -> None:
    path = make_tar(
        tmp_path / "a.tar", {"0.jpg": b"j", "0.json": b'{"caption": "a dog"}', "1.jpg": b"j", "1.json": b"["}
    )
    assert read("img2dataset", path)[0] == Record("0", b"j", (b"a dog",))
    assert outcomes(read("img2dataset", path)) == {"read": 1, "metadata_damaged": 1}
    assert outcomes(read("webdataset", path)) == {"caption_missing": 2}


def test_a_folder_is_read_without_following_links_or_opening_pipes(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "private.jpg").write_bytes(b"private")
    (secret / "private.txt").write_bytes(b"private")
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.JPG").write_bytes(b"picture")
    (folder / "inner" / "a.txt").write_bytes(b"caption")
    (folder / "b.png").write_bytes(b"picture")
    (folder / "c.jpg").symlink_to(secret / "private.jpg")
    (folder / "c.txt").symlink_to(secret / "private.txt")
    (folder / "linked").symlink_to(secret)
    os.mkfifo(folder / "d.jpg")
    assert read("folder", folder) == [
        Rejected("b.png", "caption_missing", "b.txt"),
        Rejected("c.jpg", "not_a_file", "c.jpg: Too many levels of symbolic links"),
        Rejected("d.jpg", "not_a_file", "d.jpg"),
        Record("inner/a.JPG", b"picture", (b"caption",)),
    ]


def test_a_caption_without_a_picture_is_counted_in_a_folder_as_in_a_tar(tmp_path: Path, make_tar) -> None:
    samples = {
        "a.jpg": b"picture", "a.txt": b"caption",
        "in/b.PNG": b"picture", "in/b.txt": b"caption",
        "x.svg": b"drawing", "x.txt": b"caption",
        "alone.txt": b"caption", "in/UPPER.TXT": b"caption",
    }  # fmt: skip
    lines = b'{"file_name": "named.txt", "text": "of the line"}\n{"file_name": "gone.jpg", "text": "of none"}'
    others = {
        "README": b"of the set", ".hidden.txt": b"caption", ".DS_Store": b"data", "a.json": b"{}",
        "noext": b"picture", "noext.txt": b"caption", "named.txt": b"picture", "metadata.jsonl": lines,
    }  # fmt: skip
    folder = tmp_path / "folder"
    for name, data in (samples | others).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    assert read("folder", folder) == [
        Record("a.jpg", b"picture", (b"caption",)),
        Record("in/b.PNG", b"picture", (b"caption",)),
        Record("named.txt", b"picture", (b"of the line",)),
        Rejected("gone.jpg", "image_missing", "named in metadata.jsonl"),
        Rejected("alone.txt", "image_missing", "no picture of its name beside it"),
        Rejected("in/UPPER.TXT", "image_missing", "no picture of its name beside it"),
        Rejected("noext.txt", "image_missing", "no picture of its name beside it"),
        Rejected("x.txt", "image_missing", "no picture of its name beside it"),
    ]
    assert outcomes(read("webdataset", make_tar(tmp_path / "a.tar", samples)))["image_missing"] == 3


def test_a_caption_file_beside_a_picture_may_be_spelt_in_capitals(tmp_path: Path) -> None:
    for name, data in {
        "a.JPG": b"picture",
        "a.TXT": b"large",
        "b.jpg": b"picture",
        "b.TXT": b"large",
        "b.txt": b"small",
    }.items():
        (tmp_path / name).write_bytes(data)
    assert read("folder", tmp_path) == [
        Record("a.JPG", b"picture", (b"large",)),
        Record("b.jpg", b"picture", (b"small",)),
    ]


def test_a_folder_within_that_cannot_be_listed_is_named_not_passed_over(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "in" / "a.jpg").write_bytes(b"picture")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(
        UserError, match=r"input folder .*closed: expected a folder that can be listed, found Permission"
    ):
        read("folder", tmp_path / "in")


def zstandard(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard,
}


@pytest.mark.parametrize("ending", PACKERS)
def test_a_packed_tar_is_read_as_the_plain_one_whatever_its_name_and_cut_anywhere(
    tmp_path: Path, make_tar, make_jpeg, ending: str
) -> None:
    pictures = {f"{number}.jpg": make_jpeg(number, 240, 320) for number in range(30)}
    captions = {f"{number}.txt": b"number %d" % number for number in range(30)}
    plain = make_tar(tmp_path / "plain.tar", pictures | captions)  # a sample's files far from each other
    expected = read("webdataset", plain)
    packed = PACKERS[ending](plain.read_bytes())
    for name in (f"a.tar.{ending}", "named.tar"):
        path = tmp_path / name
        path.write_bytes(packed)
        assert read("webdataset", path) == expected
    for cut in (len(packed) // 2, len(packed) - 30_000 // len(packed) - 40):
        path.write_bytes(packed[:cut])
        found = outcomes(read("webdataset", path))
        assert set(found) <= {"read", "tar_truncated", "image_missing", "caption_missing", "tar_unreadable"}
        assert found["tar_truncated"] + found["tar_unreadable"] > 0 or cut > len(packed) // 2


@pytest.mark.parametrize("ending", PACKERS)
def test_a_tar_packed_to_fill_the_disk_is_given_up(tmp_path: Path, ending: str, monkeypatch) -> None:
    monkeypatch.setattr("data_pipeline.sources.compression.LIKELY_BYTES", 2**20)
    header = tarfile.TarInfo("0.jpg")
    header.size = 16 * 2**20
    path = tmp_path / "a.tar"
    path.write_bytes(PACKERS[ending](header.tobuf() + bytes(header.size)))
    (rejected,) = read("webdataset", path)
    assert isinstance(rejected, Rejected) and "bytes when unpacked" in rejected.detail


def test_packed_members_are_unpacked_within_a_limit(tmp_path: Path, make_tar) -> None:
    files = {
        "0.jpg": b"j0", "0.txt.gz": gzip.compress(b"a caption"),
        "1.JPG.gz": gzip.compress(b"j1"), "1.txt": b"another",
        "2.jpg": b"j2", "2.txt.gz": gzip.compress(bytes(2**21)),
        "3.jpg": b"j3", "3.txt.gz": gzip.compress(b"cut short")[:-9],
        "4.jpg": b"j4", "4.txt": b"first", "4.txt.gz": gzip.compress(b"second"),
        "5.jpg": b"j5", "5.txt": bytes(2**20 + 1),
    }  # fmt: skip
    found = read("webdataset", make_tar(tmp_path / "a.tar", files))
    assert found[:2] == [Record("0", b"j0", (b"a caption",)), Record("1", b"j1", (b"another",))]
    assert found[4] == Record("4", b"j4", (b"first",))
    reasons = [(record.key, record.reason) for record in found if isinstance(record, Rejected)]
    assert reasons == [("2", "file_too_large"), ("3", "file_damaged"), ("4", "duplicate_key"), ("5", "file_too_large")]


def header_with_size(name: str, size: bytes) -> bytes:
    """A tar header whose 12 bytes of size are as given, with its checksum right."""
    data = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    data[124:136] = size
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


def test_headers_made_to_trap_a_reader_end_it_at_once(tmp_path: Path) -> None:
    sample = io.BytesIO()
    with tarfile.open(fileobj=sample, mode="w") as tar:
        for name in ("0.jpg", "0.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    good = sample.getvalue()[:2048]
    backwards = header_with_size("1.jpg", b"\xff" * 10 + b"\xf6\x00")  # -2560: the first header again, for ever
    huge = header_with_size("1.jpg", b"\x80" + b"\x7f" * 11)
    digits = tarfile.TarInfo("x")
    digits.type, digits.size = tarfile.XHDTYPE, 60_000
    slow = digits.tobuf() + b"1" * 60_416
    long = tarfile.TarInfo("x")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 2**20
    nested = tarfile.TarInfo("x")
    nested.type, nested.size = tarfile.GNUTYPE_LONGNAME, 1
    deep = (nested.tobuf() + b"y" * 512) * 5000
    for trap in (backwards, huge, slow * 50, long.tobuf() + bytes(2**20), deep):
        path = tmp_path / "trap.tar"
        path.write_bytes(good + trap + good + bytes(1024))
        assert outcomes(read("webdataset", path))["read"] == 1
        assert outcomes(read("webdataset", path))["tar_truncated"] >= 1, trap[:20]


def test_a_jsonl_captions_a_folder_and_every_line_and_picture_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "train").mkdir(parents=True)
    (tmp_path / "outside.jpg").write_bytes(b"private")
    (folder / "train" / "linked").symlink_to(tmp_path)
    for name in ("a.jpg", "b.png", "c.webp", "d.data", "e.jpg"):
        (folder / "train" / name).write_bytes(name.encode())
    (folder / "train" / "e.txt").write_bytes(b"beside")
    lines = [
        {"file_name": "a.jpg", "text": "main", "captions": ["one", "main"], "score": 0.5, "safe": True, "note": "9"},
        {"file_name": "b.png"},
        {"file_name": "d.data", "caption": "named, so read"},
        {"file_name": "gone.jpg", "text": "no picture"},
        {"file_name": "../../outside.jpg", "text": "x"},
        {"file_name": "/etc/passwd", "text": "x"},
        {"file_name": "a.jpg", "text": "again"},
        {"file_name": "linked/outside.jpg", "text": "through a link"},
        {"file_name": "half a pair \ud800", "text": "x"},
        {"text": "no name"},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "train" / "metadata.jsonl").write_text(f"{text}\n\nno json\n{' ' * 2**21}{{}}\n")
    assert read("folder", folder) == [
        Record("train/a.jpg", b"a.jpg", (b"main", b"one"), {"score": 0.5, "safe": 1.0}),
        Rejected("train/b.png", "caption_missing", "none in train/metadata.jsonl"),
        Rejected("train/c.webp", "caption_missing", "c.txt"),
        Record("train/d.data", b"d.data", (b"named, so read",)),
        Record("train/e.jpg", b"e.jpg", (b"beside",)),
        Rejected("train/gone.jpg", "image_missing", "named in train/metadata.jsonl"),
        Rejected("train/half a pair \\ud800", "image_missing", "named in train/metadata.jsonl"),
        Rejected("train/linked/outside.jpg", "image_missing", "named in train/metadata.jsonl"),
        Rejected("train/metadata.jsonl:5", "unsafe_name", "../../outside.jpg"),
        Rejected("train/metadata.jsonl:6", "unsafe_name", "/etc/passwd"),
        Rejected("train/metadata.jsonl:7", "duplicate_key", "a.jpg was named before; the first line is kept"),
        Rejected("train/metadata.jsonl:10", "metadata_damaged", "no file_name"),
        Rejected("train/metadata.jsonl:12", "metadata_damaged", "not an object"),
        Rejected("train/metadata.jsonl:13", "metadata_damaged", "not an object"),
    ]


def test_a_unit_that_is_another_or_gone_when_its_turn_comes_is_named(tmp_path: Path, make_tar) -> None:
    path = make_tar(tmp_path / "a.tar", {"0.jpg": b"j", "0.txt": b"t"})
    (unit,) = list_units([Input(kind="webdataset", uri=str(path))])
    with path.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match=r"unit .*a\.tar: expected the content it had before, found another"):
        list(read_records(unit))
    path.unlink()
    with pytest.raises(UserError, match=r"input .*a\.tar: expected a file that can be opened, found No such file"):
        list(read_records(unit))


def test_the_same_content_is_the_same_unit_wherever_it_lies(tmp_path: Path, make_tar) -> None:
    here = make_tar(tmp_path / "here" / "a.tar", {"0.jpg": b"j", "0.txt": b"t"})
    there = make_tar(tmp_path / "there" / "b.tar", {"0.jpg": b"j", "0.txt": b"t"})
    other = make_tar(tmp_path / "there" / "c.tar", {"0.jpg": b"j", "0.txt": b"u"})
    inputs = [Input(kind="webdataset", uri=str(path)) for path in (here, there.parent)]
    units = list_units(inputs)
    assert len(units) == 2
    assert [unit.digest for unit in units] == [unit.digest for unit in list_units(inputs[::-1])]
    assert str(other) in {unit.uri for unit in units}


def test_units_that_hold_what_another_does_are_counted_and_named_in_the_log(
    tmp_path: Path, make_tar, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b", "c"):
        make_tar(tmp_path / "tars" / f"{name}.tar", {"0.jpg": b"j", "0.txt": b"t"})
    make_tar(tmp_path / "tars" / "d.tar", {"0.jpg": b"j", "0.txt": b"u"})
    units = list_units([Input(kind="webdataset", uri=str(tmp_path / "tars"))])
    assert {Path(unit.uri).name for unit in units} == {"a.tar", "d.tar"}
    (message,) = caplog.messages
    assert message.startswith("2 of 4 units hold what another does and are left out: webdataset ")
    assert "b.tar as webdataset" in message and "c.tar as webdataset" in message and "d.tar" not in message


TREE = ("a.tar", "C.TAR", "deep/er/b.tgz", "deep.tar", "deep/z.tar", "deep-er.tar")


def test_tars_in_a_folder_and_under_a_prefix_are_the_same_units_in_the_same_order(
    tmp_path: Path, make_tar, moto_uri: str
) -> None:
    (tmp_path / "tars").mkdir()
    store = open_store(f"{moto_uri}/tars")
    for number, name in enumerate((*TREE, ".x/y.tar", "deep/.z.tar")):  # dots: the state of programs
        data = make_tar(tmp_path / "0.tar", {"0.jpg": b"j", "0.txt": b"%d" % number}).read_bytes()
        for key in (name, f"{name}.md5"):
            (tmp_path / "tars" / key).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "tars" / key).write_bytes(data)
            store.put(key, [data])
    here, there = (
        find_units([Input(kind="webdataset", uri=uri)]) for uri in (str(tmp_path / "tars"), f"{moto_uri}/tars/")
    )
    names = [unit.uri.removeprefix(f"{tmp_path}/tars/") for unit in here]
    assert sorted(names) == sorted(TREE)
    assert [unit.uri.removeprefix(f"{moto_uri}/tars/") for unit in there] == names
    assert list(read_records(with_digest(here[names.index("C.TAR")]))) == [Record("0", b"j", (b"1",))]
    (unit,) = find_units([Input(kind="webdataset", uri=f"{moto_uri}/tars/C.TAR")])
    assert list(read_records(with_digest(unit))) == [Record("0", b"j", (b"1",))]


def test_a_link_to_a_tar_is_read_one_to_a_folder_is_named_and_one_to_nothing_refused(
    tmp_path: Path, make_tar, caplog: pytest.LogCaptureFixture
) -> None:
    tar = make_tar(tmp_path / "elsewhere" / "a.tar", {"0.jpg": b"j", "0.txt": b"t"})
    tars = tmp_path / "tars"
    tars.mkdir()
    (tars / "linked.tar").symlink_to(tar)
    (tars / "folder").symlink_to(tar.parent)
    (tars / "again").symlink_to(tars)
    inputs = [Input(kind="webdataset", uri=str(tars))]
    assert [unit.uri for unit in find_units(inputs)] == [str(tars / "linked.tar")]
    for name, message in zip(("again", "folder"), caplog.messages, strict=True):
        assert f"{tars / name} is a link to a folder" in message
    tar.unlink()
    with pytest.raises(UserError, match=r"linked\.tar: expected a file, found a link to none"):
        find_units(inputs)


def test_the_parquet_beside_a_tar_is_found_whatever_the_case_of_the_tars_ending(tmp_path: Path, make_tar) -> None:
    tar = make_tar(tmp_path / "A.TAR", {"0.jpg": b"j", "0.txt": b"t"})
    pa.parquet.write_table(pa.table({"key": ["1"], "status": ["failed_to_download"]}), tmp_path / "A.parquet")
    assert outcomes(read("img2dataset", tar)) == {"read": 1, "download_failed": 1}


@pytest.mark.parametrize(
    ("kind", "uri"),
    [("webdataset", "absent"), ("folder", "absent"), ("webdataset", "."), ("parquet", "."), ("demo", "validation")],
)
def test_an_input_that_is_not_there_is_refused_by_name(tmp_path: Path, kind: str, uri: str) -> None:
    where = uri if kind == "demo" else str(tmp_path / uri)
    with pytest.raises(UserError, match=f"input {kind} {where}"):
        list_units([Input(kind=kind, uri=where)])  # type: ignore[arg-type]


def test_an_address_that_is_malformed_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"inputs\.0\.uri: expected a path or an address, found one that is neither"):
        parse(CorpusConfig, {"inputs": [{"kind": "webdataset", "uri": "http://[x/a.tar?secret"}]}, "test")


def test_no_inputs_are_refused() -> None:
    with pytest.raises(UserError, match="at least one input"):
        list_units([])
