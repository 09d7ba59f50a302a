"""Readers: every record of a hostile input is read or rejected with a reason, and nothing leaves the input."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import webdataset

from data_pipeline.errors import UserError
from data_pipeline.records import Record, Rejected
from data_pipeline.sources import Input, list_units, read_records


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
        ("derived__truncated_mid_member.tar", {"read": 9, "caption_missing": 1, "tar_truncated": 1}),
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
    assert outcomes(read("img2dataset", path)) == {"read": 1, "caption_missing": 1}
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
        Rejected("c.jpg", "not_a_file", "picture"),
        Rejected("d.jpg", "not_a_file", "picture"),
        Record("inner/a.JPG", b"picture", (b"caption",)),
    ]


def test_the_same_content_is_the_same_unit_wherever_it_lies(tmp_path: Path, make_tar) -> None:
    here = make_tar(tmp_path / "here" / "a.tar", {"0.jpg": b"j", "0.txt": b"t"})
    there = make_tar(tmp_path / "there" / "b.tar", {"0.jpg": b"j", "0.txt": b"t"})
    other = make_tar(tmp_path / "there" / "c.tar", {"0.jpg": b"j", "0.txt": b"u"})
    inputs = [Input(kind="webdataset", uri=str(path)) for path in (here, there.parent)]
    units = list_units(inputs)
    assert len(units) == 2
    assert [unit.digest for unit in units] == [unit.digest for unit in list_units(inputs[::-1])]
    assert str(other) in {unit.uri for unit in units}


@pytest.mark.parametrize(
    ("kind", "uri"), [("webdataset", "absent"), ("folder", "absent"), ("webdataset", "."), ("demo", "validation")]
)
def test_an_input_that_is_not_there_is_refused_by_name(tmp_path: Path, kind: str, uri: str) -> None:
    where = uri if kind == "demo" else str(tmp_path / uri)
    with pytest.raises(UserError, match=f"input {kind} {where}"):
        list_units([Input(kind=kind, uri=where)])  # type: ignore[arg-type]


def test_no_inputs_are_refused() -> None:
    with pytest.raises(UserError, match="at least one input"):
        list_units([])
