"""The shared messy inputs in every role, and others of the same kinds: kept or rejected for a reason, within bounds.

The builds run in a process of their own, whose memory is measured, and whose every written file must lie in its output
and state folder.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import images
from data_pipeline.errors import UserError
from data_pipeline.records import Record, Rejected
from data_pipeline.sources import Input, list_units, read_records

MEMORY_LIMIT_BYTES = 1.5 * 2**30
TIME_LIMIT_S = 240
PICTURE_FOLDERS = ("broken", "lies", "bombs", "colour", "exif", "animated", "avif_heif")

BUILD = """
import json, sys
from pathlib import Path
from data_pipeline.build import build_corpus
from data_pipeline.corpus import CorpusConfig
from data_pipeline.errors import UserError
summaries = {}
for name, values in json.loads(sys.argv[1]).items():
    try:
        summaries[name] = build_corpus(CorpusConfig(**values))
    except UserError as error:
        summaries[name] = {"error": str(error)}
# Not ru_maxrss, which begins at the largest memory of the process that started this one.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps([summaries, int(peak.split()[1]) * 1024]))
"""


def build_apart(folder: Path, inputs: dict[str, tuple[str, Path]]) -> tuple[dict[str, Any], int]:
    """The summaries of corpora by name, each of one (kind, folder or file), built into folder/out/NAME in another
    process that has nothing but `folder`; and that process's largest memory in bytes."""
    configs = {
        name: {
            "inputs": [{"kind": kind, "uri": str(path)}],
            "output": str(folder / "out" / name),
            "filters": {"preset": "none"},
            "budget": None,
        }
        for name, (kind, path) in inputs.items()
    }
    (folder / "elsewhere").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
        "GLIDEPATH_HOME": str(folder / "state"),
        "HOME": str(folder / "elsewhere"),
        "TMPDIR": str(folder / "elsewhere"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(images.__file__).parents[1]),
    }
    before = set(folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", BUILD, json.dumps(configs)],
        env=environment, cwd=folder / "elsewhere", timeout=TIME_LIMIT_S, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    appeared = {path.relative_to(folder).parts[0] for path in set(folder.rglob("*")) - before}
    assert appeared <= {"out", "state"}
    summaries, peak_bytes = json.loads(done.stdout.splitlines()[-1])
    return summaries, peak_bytes


def verdicts(folder: Path, name: str) -> dict[str, str | None]:
    """Each key's reason, null where the score pass kept it."""
    tables = [pa.parquet.read_table(path, columns=["key", "reason"])
              for path in (folder / "out" / name / "units").rglob("verdicts-*.parquet")]  # fmt: skip
    return {row["key"]: row["reason"] for table in tables for row in table.to_pylist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, messy: Path, make_jpeg: Callable) -> tuple[Path, Any, int]:
    """(folder, summaries by role, memory in bytes) of the messy files in all roles."""
    folder = tmp_path_factory.mktemp("messy")
    pictures, captions = folder / "pictures", folder / "captions"
    captions.mkdir()
    rows: dict[str, list[Any]] = {"image": [], "caption": []}
    for kind in PICTURE_FOLDERS:
        (pictures / kind).mkdir(parents=True)
        for path in sorted((messy / kind).iterdir()):
            shutil.copy(path, pictures / kind / path.name)
            (pictures / kind / path.name).with_suffix(".txt").write_text(f"a picture called {path.name}")
            rows["image"].append(path.read_bytes())
            rows["caption"].append(f"a picture called {path.name}")
    pa.parquet.write_table(pa.table(rows), folder / "pictures.parquet")
    for number, path in enumerate(sorted((messy / "captions").glob("*.txt"))):
        shutil.copy(path, captions / path.name)
        (captions / path.name).with_suffix(".jpg").write_bytes(make_jpeg(number))
    # A few KB that hold one value of 100 MB in each of twenty rows.
    bomb = pa.DictionaryArray.from_arrays(pa.array([0] * 20, pa.int32()), pa.array([bytes(100 * 2**20)], pa.binary()))
    table = pa.table({"image": bomb, "caption": [f"bomb {row}" for row in range(20)]})
    pa.parquet.write_table(table, folder / "bomb.parquet", compression="zstd")
    inputs = {
        "bomb": ("parquet", folder / "bomb.parquet"),
        "pictures": ("folder", pictures),
        "rows": ("parquet", folder / "pictures.parquet"),
        "captions": ("folder", captions),
        "tars": ("img2dataset", messy / "tars"),
        "links": ("parquet", messy / "captions" / "img2dataset__test_1000.parquet"),
    }
    return folder, *build_apart(folder, inputs)


# What the score pass refuses of the pictures, by reason; it keeps all others.
REFUSED_PICTURES = {
    "image_empty": ["lies/derived__empty.jpg"],
    "image_too_many_pixels": ["bombs/derived__12000x12000_rgb.png", "broken/imagers__Bad_reallybig.bmp"],
    "image_unknown_format": [
        "bombs/pillow__decompression_bomb.ico",
        "broken/imagers__Bad_unusual_extend_buffer_usage.bmp",  # run-length coded
        "broken/pillow__broken.png",
        "broken/pillow__hopper_unknown_pixel_mode.tif",
        "broken/pillow__not_enough_data.jp2",
        "broken/pillow__oom-225817ca0f8c663be7ab4b9e717b02c661e66834.tif",
        "broken/pillow__unknown_compression_method.png",
        "lies/derived__8bytes.png",
        "lies/derived__html_error_page.jpg",
        "lies/derived__svg_named.jpg",
    ],
    "image_damaged": [
        "bombs/pillow__png_decompression_dos.png",
        "broken/exifsamples__corrupted.jpg",
        "broken/imagers__Bad_clrsUsed.bmp",
        "broken/pillow__crash-0c7e0e8e11ce787078f00b5b0ca409a167f070e0.tif",
        "broken/pillow__crash-0e16d3bfb83be87356d026d66919deaefca44dac.tif",
        "broken/pillow__crash-1185209cf7655b5aed8ae5e77784dfdd18ab59e9.tif",
        "broken/pillow__crash-338516dbd2f0e83caddb8ce256c22db3bd6dc40f.tif",
        "broken/pillow__crash-4fb027452e6988530aa5dabee76eecacb3b79f8a.j2k",
        "broken/pillow__crash-86214e58da443d2b80820cff9677a38a33dcbbca.tif",
        "broken/pillow__crash-d2c93af851d3ab9a19e34503626368b2ecde9c03.j2k",
        "broken/pillow__cross_scan_line_truncated.tga",
        "broken/pillow__truncated_jpeg.jpg",
        "colour/pillow__ultrahdr.jpg",
        "lies/derived__zeros_tail.jpg",
    ],
}
REFUSED_CAPTIONS = ["cp1251_ru__pig_golden", "derived__overlong_utf8", "eucjp_ja__pig_golden", "koi8r_ru__pig_golden",
                    "shiftjis_ja__pig_golden"]  # fmt: skip


def test_every_messy_picture_is_kept_or_refused_for_its_reason_from_a_folder_and_from_a_parquet(
    built: tuple[Path, Any, int], messy: Path
) -> None:
    folder, summaries, _ = built
    files = [f"{kind}/{path.name}" for kind in PICTURE_FOLDERS for path in sorted((messy / kind).iterdir())]
    expected: dict[str, str | None] = dict.fromkeys(files)
    expected |= {name: reason for reason, names in REFUSED_PICTURES.items() for name in names}
    assert verdicts(folder, "pictures") == expected
    rows = verdicts(folder, "rows")
    assert [rows[f"{row:09d}"] for row in range(len(files))] == [expected[name] for name in files]
    assert len(rows) == len(files) == summaries["pictures"]["funnel"]["in"]


def test_every_messy_caption_is_kept_or_refused_for_its_reason(built: tuple[Path, Any, int], messy: Path) -> None:
    stems = [path.stem for path in (messy / "captions").glob("*.txt")]
    expected = {f"{stem}.jpg": "caption_encoding" if stem in REFUSED_CAPTIONS else None for stem in stems}
    assert verdicts(built[0], "captions") == expected


def test_every_sample_of_the_messy_tars_is_accounted_for(built: tuple[Path, Any, int]) -> None:
    funnel = built[1]["tars"]["funnel"]
    broken = {reason: count for reason, count in funnel["dropped"].items() if reason != "duplicate"}
    assert broken == {
        "caption_missing": 92,
        "duplicate_key": 2,
        "image_missing": 1003,
        "not_a_file": 3,
        "tar_truncated": 1,
        "tar_unreadable": 1,
        "unsafe_name": 2,
    }
    assert built[1]["tars"]["quarantined"] == sum(broken.values())


def test_no_messy_file_takes_more_memory_than_stated_or_loses_a_record(built: tuple[Path, Any, int]) -> None:
    folder, summaries, peak_bytes = built
    assert peak_bytes < MEMORY_LIMIT_BYTES
    for name, summary in summaries.items():
        if name in ("links", "bomb"):
            found = (
                "found http:// links; download them first" if name == "links" else "0 of 20: image_unknown_format 20"
            )
            assert found in summary["error"]
            continue
        assert summary["funnel"]["in"] == summary["funnel"]["out"] + sum(summary["funnel"]["dropped"].values())
    for path in (folder / "out").rglob("quarantine.parquet"):
        assert "root:" not in str(pa.parquet.read_table(path).to_pylist())  # of /etc/passwd, to which a tar links


def test_the_messy_tars_made_into_parquets_give_the_same_records(messy: Path, tmp_path: Path) -> None:
    for tar in sorted((messy / "tars").iterdir()):
        found = [record for record in read("img2dataset", tar) if isinstance(record, Record)]
        captions = pa.array([record.captions for record in found], pa.list_(pa.binary()))
        images_ = pa.array([record.image_bytes for record in found], pa.binary())
        path = tmp_path / f"{tar.name}.parquet"
        pa.parquet.write_table(pa.table({"image": images_, "captions": captions}), path)
        again = read("parquet", path)
        assert [(record.image_bytes, record.captions) for record in again] == [  # type: ignore[union-attr]
            (record.image_bytes, record.captions) for record in found
        ]


def read(kind: str, path: Path) -> list[Record | Rejected]:
    (unit,) = list_units([Input(kind=kind, uri=str(path))])  # type: ignore[arg-type]
    return list(read_records(unit))


LINE = b'{"file_name": "a.jpg", "caption": "of json", "captions": ["one", "two"], "score": 1, "safe": true}'


def some_tar(format_: int, names: list[str]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format_) as tar:
        for name in names:
            data = LINE if name.endswith("json") else name.encode()
            data = gzip.compress(data) if name.endswith(".gz") else data
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1.5
            tar.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def some_parquet(**options: Any) -> bytes:
    rows = range(20)
    columns = {
        "image": [random.Random(row).randbytes(300) for row in rows],
        "caption": [f"caption {row}" for row in rows],
        "captions": [["a", "b"]] * 20,
        "score": [row / 4 for row in rows],
        "key": [f"{row:09d}" for row in rows],
        "status": ["success"] * 20,
    }
    sink = io.BytesIO()
    pa.parquet.write_table(pa.table(columns), sink, row_group_size=7, **options)
    return sink.getvalue()


NAMES = [f"{'long' * 30 + '/' if number == 3 else ''}dir/{number}.{ending}" for number in range(5) for ending in
         ("jpg", "txt.gz", "json")]  # fmt: skip
TARS = [some_tar(format_, NAMES) for format_ in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
PACKED = [gzip.compress(TARS[2]), bz2.compress(TARS[1]), lzma.compress(TARS[0]),
          pa.Codec("zstd").compress(TARS[2], asbytes=True)]  # fmt: skip
PARQUETS = [some_parquet(), some_parquet(compression="none", use_dictionary=False, data_page_version="2.0"),
            some_parquet(compression="zstd", write_page_checksum=True)]  # fmt: skip
KINDS = [("img2dataset", data) for data in (*TARS, *PACKED)] + [("parquet", data) for data in PARQUETS]
KINDS.append(("folder", b"\n".join([LINE, LINE.replace(b"a.jpg", b"../b.jpg"), LINE.replace(b"a.jpg", b"in/c.jpg")])))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_inputs_give_records_or_one_line(tmp_path: Path, data: st.DataObject) -> None:
    kind, whole = data.draw(st.sampled_from(KINDS))
    damaged = bytearray(whole)
    near_end = st.integers(max(0, len(whole) - 800), len(whole) - 1)  # where a parquet says what it holds
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1) | near_end, max_size=8)):
        damaged[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(whole))) :]
    folder = tmp_path / kind
    folder.mkdir(exist_ok=True)
    path = folder / {"parquet": "a.parquet", "folder": "metadata.jsonl"}.get(kind, "a.tar")
    path.write_bytes(damaged)
    (folder / "a.jpg").write_bytes(b"picture")
    try:
        found = read(kind, folder)
    except UserError as refused:
        assert "\n" not in str(refused)
        return
    kept = [record.key for record in found if isinstance(record, Record)]
    assert len(set(kept)) == len(kept)
    assert all(record.key.encode() and (isinstance(record, Record) or record.reason) for record in found)
    assert damaged == whole or len(found) > 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(max_size=30) | st.sampled_from(["../a.jpg", "/b.txt", "./c.jpg", "d..jpg", ".jpg", "e.JPG.gz"]))
)
def test_members_of_any_name_are_read_or_rejected(tmp_path: Path, names: list[str]) -> None:
    path = tmp_path / "a.tar"
    endings = [name + ending for name in names for ending in ("", ".jpg", ".txt")]
    path.write_bytes(some_tar(tarfile.PAX_FORMAT, [name for name in endings if name]))
    for record in read("img2dataset", path):
        assert record.key.encode().decode() == record.key
        assert not isinstance(record, Record) or not record.key.startswith("/")
