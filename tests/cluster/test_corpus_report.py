"""`corpus inspect`: figures that agree with the funnel, examples of every reason, and a page that is safe to open."""

from __future__ import annotations

import html.parser
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import simplejpeg
from PIL import Image

from cluster import cli
from data_pipeline.build import CorpusConfig, build_corpus
from data_pipeline.config import parse
from data_pipeline.errors import UserError
from data_pipeline.inspect import KEPT, inspect
from data_pipeline.shards import open_dataset, verify_dataset

HOSTILE = '<script>alert(1)</script> & "quotes" <img src=x onerror=alert(1)>'


def jpeg(seed: int, height: int = 96, width: int = 120, smooth: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // smooth, width // smooth, 3), np.uint8)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels.repeat(smooth, 0).repeat(smooth, 1)), 95)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(inputs, output) of a corpus with every kind of verdict, several times each."""
    folder = tmp_path_factory.mktemp("in")
    pairs: dict[str, tuple[bytes, bytes]] = {}
    for number in range(12):
        pairs[f"good{number:02d}"] = jpeg(number), f"a picture, number {number} of the good ones".encode()
    for number in range(3):
        pairs[f"small{number}"] = jpeg(100 + number, 48, 48), b"a picture that is too small"
        pairs[f"same{number}"] = pairs[f"good{number:02d}"]
        pairs[f"torn{number}"] = jpeg(200 + number)[:-200], b"a picture of which the end is gone"
        pairs[f"odd{number}"] = jpeg(300 + number), b"caf\xe9 in an old encoding"
    pairs["hostile"] = jpeg(400), HOSTILE.encode()
    pairs["copy"] = simplejpeg.encode_jpeg(simplejpeg.decode_jpeg(jpeg(5)), 50), b"a worse copy of the fifth"
    for name, (picture, caption) in pairs.items():
        (folder / f"{name}.jpg").write_bytes(picture)
        (folder / f"{name}.txt").write_bytes(caption)
    (folder / "alone.jpg").write_bytes(jpeg(500))
    values = {
        "inputs": [{"kind": "folder", "uri": str(folder)}],
        "output": str(tmp_path_factory.mktemp("out")),
        "budget": None,
        "dedup": {"near": 6},
        "shard_rows": 8,
    }
    build_corpus(parse(CorpusConfig, values, "test"))
    return folder, Path(values["output"])


def test_every_reason_has_examples_with_their_pictures_and_the_figures_add_up(built: tuple[Path, Path]) -> None:
    folder, output = built
    found = inspect(open_dataset(str(output)), per_reason=2)
    assert found.funnel["dropped"] == {
        "caption_encoding": 3, "caption_missing": 1, "duplicate": 3, "image_damaged": 3, "image_too_small": 3,
        "near_duplicate": 1,
    }  # fmt: skip
    assert set(found.examples) == {KEPT, *found.funnel["dropped"]}
    assert {reason: len(shown) for reason, shown in found.examples.items()} == {
        KEPT: 4, "caption_encoding": 2, "caption_missing": 1, "duplicate": 2, "image_damaged": 2, "image_too_small": 2,
        "near_duplicate": 1,
    }  # fmt: skip
    assert {reason: found.passes[reason] for reason in ("image_damaged", "image_too_small", "near_duplicate")} == {
        "image_damaged": "broken", "image_too_small": "filtered", "near_duplicate": "judged",
    }  # fmt: skip
    for example in (one for reason, shown in found.examples.items() if reason != KEPT for one in shown):
        expected = None if example.reason == "caption_missing" else (folder / example.key).read_bytes()
        assert example.picture == expected
    [near] = found.examples["near_duplicate"]
    assert near.key == "copy.jpg" and near.distance is not None and near.distance <= 6 and near.winner is not None
    stays = np.asarray(Image.open(io.BytesIO(near.winner)).resize((8, 8)), float)
    assert (
        np.abs(stays - np.asarray(Image.open(io.BytesIO(jpeg(5))).crop((12, 0, 108, 96)).resize((8, 8)), float)).mean()
        < 8
    )
    assert found.examples["caption_encoding"][0].caption == "caf\\xe9 in an old encoding"
    assert "image_damaged" in found.examples["image_damaged"][0].detail
    sides = found.histograms["shorter side, px"]
    sized = found.funnel["in"] - 1 - 3  # the one without a caption and those of an old encoding were not measured
    assert (sides.all.sum(), sides.kept.sum()) == (sized, found.funnel["out"])
    assert sides.all[sides.labels.index("32")] == 3 and sides.kept[sides.labels.index("32")] == 0
    assert len(found.quarantine) == 7 == open_dataset(str(output)).manifest["quarantined"]


def test_the_page_shows_every_reason_and_neither_runs_nor_loads_anything(
    built: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, output = built
    assert cli.run(["corpus", "inspect", str(output), "--out", str(tmp_path / "report"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["funnel"]["in"] == 27 and document["rows"] == 13
    assert document["report"][0] == str(tmp_path / "report" / "index.html")
    names = {Path(file).name for file in document["report"]}
    assert {"funnel.png", "histograms.png", "kept.png", "figures.json", "dropped-near_duplicate.png"} <= names
    for file in document["report"]:
        if file.endswith(".png"):
            assert min(Image.open(file).size) > 100
    page = (tmp_path / "report" / "index.html").read_text()
    tags, links = [], []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            links.extend(value or "" for name, value in attributes if name in ("src", "href"))
            assert not [name for name, _ in attributes if name.startswith("on")]

    Reader().feed(page)
    assert "script" not in tags and "&lt;script&gt;alert(1)" in page
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert "default-src &#x27;none&#x27;" in page
    for reason in document["funnel"]["dropped"]:
        assert f'id="{reason}"' in page
    assert page.count("<img") >= 13 + 2 + 3 * 2 + 3 * 2


def test_pictures_that_are_gone_or_others_are_left_out_and_tables_that_are_gone_are_named(
    built: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = built
    (folder / "another.jpg").write_bytes(jpeg(600))
    try:
        found = inspect(open_dataset(str(output)), per_reason=2)
    finally:
        (folder / "another.jpg").unlink()
    assert all(one.picture is None for reason, shown in found.examples.items() if reason != KEPT for one in shown)
    assert all(one.picture for one in found.examples[KEPT])
    assert cli.run(["corpus", "inspect", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[-2:]] == [["near_duplicate", "1"], ["out", "13"]]
    [quarantine] = output.glob("units/*/quarantine.parquet")
    quarantine.rename(tmp_path / "taken")
    try:
        with pytest.raises(UserError, match=r"quarantine.parquet: expected sha256 \w+, found nothing"):
            inspect(open_dataset(str(output)))
    finally:
        (tmp_path / "taken").rename(quarantine)


@pytest.mark.parametrize("name", ["dropped.parquet", "verdicts-00000.parquet", "quarantine.parquet"])
def test_a_table_that_was_changed_is_not_inspected_as_if_it_were_the_builds(
    built: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    output = Path(shutil.copytree(built[1], tmp_path / "output"))
    [table] = output.rglob(name)
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(table).slice(0, 0), table)
    with pytest.raises(UserError, match=rf"{name}: expected sha256 \w+, found \w+; restore that object"):
        inspect(open_dataset(str(output)))
    assert [bad.part for bad in verify_dataset(str(output))] == ([str(table)] if name == "dropped.parquet" else [])


def test_a_dataset_that_was_copied_without_the_tables_of_its_build_is_whole(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(built[1] / "datasets", tmp_path / "datasets"))
    assert verify_dataset(str(next(alone.iterdir()))) == []
    assert verify_dataset(str(next(alone.iterdir()).rename(tmp_path / "renamed"))) == []


def test_a_reason_that_no_file_could_be_named_after_has_its_sheet_and_its_place_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    lines = []
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
        lines.append(
            json.dumps({"file_name": f"{number}.jpg", "text": f"picture {number}", "clip/a score": number / 4})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    values = {
        "inputs": [{"kind": "folder", "uri": str(folder)}],
        "output": str(tmp_path / "out"),
        "filters": {"preset": "none", "columns": {"clip/a score": {"min": 0.5}}},
    }
    build_corpus(parse(CorpusConfig, values, "test"))
    assert cli.run(["corpus", "inspect", str(tmp_path / "out"), "--out", str(tmp_path / "report"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["funnel"]["dropped"] == {"column_low_clip/a score": 2}
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"dropped-column_low_clip%2Fa%20score.png", "index.html", "figures.json"} <= names
    page = (tmp_path / "report" / "index.html").read_text()
    assert 'href="#column_low_clip%2Fa%20score">column_low_clip/a score</a>' in page
    assert 'id="column_low_clip%2Fa%20score">Dropped: column_low_clip/a score' in page
