"""The build: the same bytes however it is run; every record accounted for."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from data_pipeline import build as build_module
from data_pipeline import images, score
from data_pipeline.build import CorpusConfig, build_corpus, inspect_dataset, resolve_output, sweep_build
from data_pipeline.config import find_config, parse, read_values
from data_pipeline.errors import UsageError, UserError
from data_pipeline.executor import InlineExecutor
from data_pipeline.inspect import inspect
from data_pipeline.judge import KeepList, judge
from data_pipeline.judge_rows import Task
from data_pipeline.shards import open_dataset, verify_dataset
from data_pipeline.sources import Input, reopen
from data_pipeline.storage import open_store


def build(output: Path, *inputs: Path, kind: str = "webdataset", **settings: Any) -> dict[str, Any]:
    entries = [{"kind": kind, "uri": str(path)} for path in inputs]
    return build_corpus(CorpusConfig(inputs=entries, output=str(output), **({"shard_rows": 10} | settings)))


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder by its relative path, with the sha256 of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def two_tars(tmp_path: Path, make_corpus: Callable) -> tuple[Path, Path]:
    return make_corpus(tmp_path / "in" / "a.tar", range(17)), make_corpus(tmp_path / "in" / "b.tar", range(17, 30))


def test_building_twice_and_with_two_workers_gives_identical_bytes(tmp_path: Path, two_tars: tuple[Path, Path]) -> None:
    first = build(tmp_path / "one", *two_tars)
    second = build(tmp_path / "two", *two_tars)
    parallel = build(tmp_path / "three", *two_tars, executor={"workers": 2})
    assert first["dataset_id"] == second["dataset_id"] == parallel["dataset_id"]
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")
    assert verify_dataset(first["uri"]) == []


def test_a_unit_of_many_records_is_judged_in_parts_and_gives_the_same_dataset(
    tmp_path: Path, two_tars: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(tmp_path / "whole", *two_tars, dedup={"near": 4})
    tasks: list[Sequence[int]] = []

    class Watching(InlineExecutor):
        def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
            for item in items:
                if isinstance(item, Task) and item.step == "gather":
                    tasks.append([part.rows for part in item.verdicts])
                yield function(item)

    monkeypatch.setattr(score, "PART_ROWS", 7)
    monkeypatch.setattr(build_module, "judge", partial(judge, task_rows=8))
    entries = [{"kind": "webdataset", "uri": str(tar)} for tar in two_tars]
    config = CorpusConfig(inputs=entries, output=str(tmp_path / "parts"), shard_rows=10, dedup={"near": 4})
    assert build_corpus(config, Watching())["dataset_id"] == whole["dataset_id"]
    assert sorted(map(list, tasks)) == [[3], [6], [7], [7], [7]]
    found, expected = (
        {name: digest for name, digest in contents(tmp_path / folder).items() if not name.startswith("units/")}
        for folder in ("parts", "whole")
    )
    assert found == expected
    assert inspect(open_dataset(str(tmp_path / "parts"))).to_json() == (
        inspect(open_dataset(str(tmp_path / "whole"))).to_json()
    )


def test_the_summary_accounts_for_every_record(tmp_path: Path, two_tars: tuple[Path, Path]) -> None:
    summary = build(tmp_path / "out", *two_tars)
    assert summary | {"bytes": 0} == {
        "dataset_id": summary["dataset_id"],
        "rows": 30,
        "shards": 3,
        "bytes": 0,
        "funnel": {"in": 30, "out": 30, "dropped": {}},
        "quarantined": 0,
        "uri": f"{tmp_path}/out/datasets/{summary['dataset_id']}",
    }
    assert inspect_dataset(str(tmp_path / "out")) == summary


def test_a_row_holds_the_picture_and_caption_of_one_record(tmp_path: Path, two_tars, make_jpeg) -> None:
    dataset = open_dataset(build(tmp_path / "out", *two_tars)["uri"])
    captions = set()
    for index in range(len(dataset.shard_rows)):
        base, upsampler = (dataset.shard(family, index).batch(0) for family in ("base", "upsampler"))
        assert base["id"].equals(upsampler["id"]) and base["tokens"].equals(upsampler["tokens"])
        for row in range(base.num_rows):
            captions.add(base["caption"][row].as_py())
            source = images.decode(make_jpeg(int(base["caption"][row].as_py().split()[-1])))
            small = np.array(base["image64"][row].as_py(), np.uint8).reshape(64, 64, 3)
            square = images.area_resize(images.centre_crop(source), 256)
            np.testing.assert_array_equal(small, images.area_resize(square, 64))
            large = images.decode_stored(upsampler["image256"][row].as_buffer()).astype(int)
            assert np.abs(large - square).mean() < 3
    assert captions == {f"Picture number {number}" for number in range(30)}


@pytest.mark.parametrize("change", [{"seed": 1}, {"shard_rows": 7}, {"filters": {"min_side": 65}}])
def test_a_setting_of_the_content_changes_the_id(tmp_path: Path, two_tars, change: dict[str, Any]) -> None:
    assert build(tmp_path / "a", *two_tars)["dataset_id"] != build(tmp_path / "b", *two_tars, **change)["dataset_id"]


def test_paths_and_budget_do_not_change_the_id(tmp_path: Path, two_tars: tuple[Path, Path]) -> None:
    here = build(tmp_path / "a", *two_tars)
    shutil.move(two_tars[0].parent, tmp_path / "moved")
    there = build(tmp_path / "b", *sorted((tmp_path / "moved").iterdir())[::-1], budget=None)
    assert here["dataset_id"] == there["dataset_id"]


def test_adding_an_input_scores_only_the_new_unit(tmp_path: Path, two_tars, monkeypatch) -> None:
    from data_pipeline import score

    read: list[str] = []
    original = score.read_records
    monkeypatch.setattr(score, "read_records", lambda unit: read.append(Path(unit.uri).name) or original(unit))
    one = build(tmp_path / "out", two_tars[0])
    both = build(tmp_path / "out", *two_tars)
    assert read == ["a.tar", "b.tar"]
    assert (one["rows"], both["rows"]) == (17, 30)
    fresh = build(tmp_path / "fresh", *two_tars)
    assert both["dataset_id"] == fresh["dataset_id"]


def test_an_exact_repeat_is_dropped_once_and_counted(tmp_path: Path, make_tar, make_jpeg) -> None:
    same, text = make_jpeg(1), b"the same caption"
    files = {"0.jpg": same, "0.txt": text, "1.jpg": same, "1.txt": text, "2.jpg": same, "2.txt": b"another caption"}
    other = make_tar(tmp_path / "b.tar", {"9.jpg": same, "9.txt": text})
    summary = build(tmp_path / "out", make_tar(tmp_path / "a.tar", files), other)
    assert summary["funnel"] == {"in": 4, "out": 2, "dropped": {"duplicate": 2}}
    assert summary["quarantined"] == 0


def test_a_unit_over_budget_fails_the_build_naming_it_and_its_bad_records(tmp_path: Path, make_tar, make_jpeg) -> None:
    files = {f"{number}.jpg": make_jpeg(number) for number in range(10)}
    files |= {f"{number}.txt": b"a caption" for number in range(10)} | {"4.jpg": b"broken", "7.txt": b"caf\xe9"}
    tar = make_tar(tmp_path / "a.tar", files)
    with pytest.raises(
        UserError, match=r"unit .*a.tar: expected at most 10.0% bad records, found 2 of 10: 4 \(image_unk"
    ):
        build(tmp_path / "out", tar, budget=0.1)
    summary = build(tmp_path / "out", tar, budget=0.2)
    assert summary["funnel"]["dropped"] == {"caption_encoding": 1, "image_unknown_format": 1}
    assert summary["quarantined"] == 2


def test_a_corpus_of_which_nothing_is_left_is_refused_in_one_line(tmp_path: Path, make_tar, make_jpeg) -> None:
    tar = make_tar(tmp_path / "a.tar", {"0.jpg": make_jpeg(0, 16, 16), "0.txt": b"small"})
    with pytest.raises(UserError, match="at least one usable record, found 0 of 1: image_too_small 1") as refused:
        build(tmp_path / "out", tar)
    assert "\n" not in str(refused.value)


def test_a_damaged_staged_row_is_found_before_it_reaches_a_shard(tmp_path: Path, two_tars: tuple[Path, Path]) -> None:
    build(tmp_path / "out", *two_tars)
    path = next((tmp_path / "out" / "units").rglob("rows.bin"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"rows.bin row \d+: expected crc32"):
        build(tmp_path / "out", *two_tars, seed=1)
    left = [path for path in (tmp_path / "out" / "judge").rglob("*") if path.is_file() and "scratch" in str(path)]
    assert left == []  # in a bucket nobody would sweep them


def test_names_of_bad_records_are_told_in_one_line_without_commands_to_a_terminal(tmp_path: Path, make_tar) -> None:
    tar = make_tar(tmp_path / "a.tar", {"one\n\x1b[2Jtwo.jpg": b"no picture", "one\n\x1b[2Jtwo.txt": b"a dog"})
    with pytest.raises(UserError, match=r"one \[2Jtwo \(image_unknown_format\)") as refused:
        build(tmp_path / "out", tar)
    assert str(refused.value).isprintable()


def test_a_tar_whose_name_is_not_utf8_is_built_and_found_again(tmp_path: Path, make_corpus: Callable) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"-\xff"))
    make_corpus(folder / "a.tar", range(3))
    summary = build(tmp_path / "out", folder)
    assert summary["rows"] == 3
    (unit,) = open_dataset(summary["uri"]).manifest["units"]
    assert unit["uri"] == f"{tmp_path}/in-\\xff/a.tar"
    assert reopen([Input(kind="webdataset", uri=str(folder))], unit["uri"], unit["digest"]) is not None


def test_verdicts_written_in_groups_are_those_written_at_once(tmp_path: Path, two_tars, monkeypatch) -> None:
    at_once = build(tmp_path / "one", *two_tars, filters={"min_caption": 17}, dedup={"near": 4})
    monkeypatch.setattr(score, "GROUP_ROWS", 3)
    monkeypatch.setattr(score, "SPOOL_BYTES", 1000)
    assert build(tmp_path / "two", *two_tars, filters={"min_caption": 17}, dedup={"near": 4}) == at_once | {
        "uri": f"{tmp_path}/two/datasets/{at_once['dataset_id']}"
    }
    assert 0 < at_once["funnel"]["dropped"]["caption_too_short"] < 30
    tables = {path.relative_to(tmp_path / "one"): path for path in (tmp_path / "one" / "units").rglob("*.parquet")}
    assert len(tables) == 4
    for name, path in tables.items():
        grouped = pyarrow.parquet.ParquetFile(tmp_path / "two" / name)
        assert grouped.read().equals(pyarrow.parquet.read_table(path))
        assert grouped.num_row_groups == -(-grouped.metadata.num_rows // 3)


def test_messy_tars_are_built_with_every_record_kept_or_counted(tmp_path: Path, messy: Path) -> None:
    summary = build(tmp_path / "out", messy / "tars", kind="img2dataset", budget=None)
    funnel = summary["funnel"]
    assert funnel["in"] == funnel["out"] + sum(funnel["dropped"].values())
    assert funnel["out"] >= 12
    assert {"tar_unreadable", "tar_truncated", "not_a_file", "unsafe_name", "duplicate_key"} <= set(funnel["dropped"])


def test_records_scored_one_by_one_give_the_bytes_of_those_scored_together(
    tmp_path: Path, messy: Path, monkeypatch
) -> None:
    settings = {"kind": "img2dataset", "budget": None, "captions": "all", "filters": {"min_deviation": 5}}
    together = build(tmp_path / "one", messy / "tars", **settings)
    assert together["funnel"]["out"] >= 12 and len(together["funnel"]["dropped"]) > 5
    monkeypatch.setattr(score, "BATCH_BYTES", 0)
    build(tmp_path / "two", messy / "tars", **settings)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_messy_pictures_are_built_with_every_file_kept_or_counted(tmp_path: Path, messy: Path) -> None:
    folder = tmp_path / "pictures"
    expected = 0
    for path in [path for path in sorted(messy.rglob("*")) if path.is_file()]:
        if path.parent.name not in ("tars", "captions", "doc") and path.name != "README.md":
            (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.parent.name / path.name)
            (folder / path.parent.name / f"{path.stem}.txt").write_text(f"a picture called {path.stem}")
            expected += 1
    outside = {path for path in tmp_path.rglob("*") if folder not in path.parents}
    summary = build(tmp_path / "out", folder, kind="folder", budget=None)
    assert summary["funnel"]["in"] == expected
    assert summary["funnel"]["out"] + sum(summary["funnel"]["dropped"].values()) == expected
    quarantine = pyarrow.parquet.read_table(next((tmp_path / "out" / "units").rglob("quarantine.parquet")))
    assert set(quarantine["reason"].to_pylist()) <= set(images.ImageError.REASONS)
    assert len(quarantine) == summary["quarantined"] > 20
    appeared = {path for path in tmp_path.rglob("*") if folder not in path.parents} - outside
    assert all((tmp_path / "out") in (path, *path.parents) for path in appeared)


def test_real_photographs_build(tmp_path: Path, photographs: Path) -> None:
    values = read_values(find_config("corpus", "photos")) | {
        "inputs": [{"kind": "img2dataset", "uri": str(photographs / "flickr8k_224" / "00000.tar")}],
        "output": str(tmp_path / "out"),
    }
    summary = build_corpus(parse(CorpusConfig, values, "photos"))
    assert summary["rows"] >= 990 and summary["quarantined"] == 0
    assert verify_dataset(summary["uri"]) == []


@pytest.mark.parametrize("name", ["demo", "demo-heldout", "photos", "web"])
def test_presets_parse_and_have_an_output(name: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLIDEPATH_HOME", str(tmp_path))
    config = parse(CorpusConfig, read_values(find_config("corpus", name)), name)
    assert resolve_output(config, name).output == str(tmp_path / "datasets" / name)
    assert resolve_output(config.model_copy(update={"output": "x"}), name).output == "x"
    assert (config.budget is None) == (name in ("photos", "web"))


@pytest.mark.parametrize("place", ["folder", "moto"])
def test_a_sweep_takes_what_has_a_builds_names_and_nothing_else(
    place: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    store = open_store(str(tmp_path) if place == "folder" else request.getfixturevalue("moto_uri"))
    unit, dataset = f"units/{64 * 'a'}-{16 * 'b'}", f"datasets/{64 * 'c'}"
    left = [
        *(
            f"{unit}/{name}"
            for name in ("verdicts-00000.parquet", "quarantine.parquet", "scores-0123456789abcdef.parquet")
        ),
        f"{dataset}/base/shard-00000.arrow",
        f"judge/scratch-{32 * 'd'}/gather-00000.rows",
        f"judge/{16 * 'c'}/dropped.parquet",
    ]
    of_others = [
        "datasets/cats/train/data-00000-of-00001.arrow",
        f"{dataset}/base/data-00000-of-00001.arrow",
        f"{dataset}/faces/shard-00000.arrow",
        "judge/2026/verdict.docx",
        f"judge/{16 * 'c'}/verdict.docx",
        "judge/scratch-paper/notes.txt",
        "units/notes/scores-2026.parquet",
        "units/notes/si.txt",
        f"{unit}/notes.txt",
    ]
    for name in (*left, *of_others):
        store.put(name, [b"bytes"])
    assert sweep_build(store) == len(left)
    assert [info.key for info in store.list()] == sorted(of_others)
    assert sweep_build(store) == 0


def test_an_output_that_an_input_would_read_is_refused_before_anything_is_read(
    tmp_path: Path, make_jpeg: Callable, make_corpus: Callable, moto_uri: str
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "one.jpg").write_bytes(make_jpeg(1))
    (pictures / "one.txt").write_text("a picture")
    (tmp_path / "link").symlink_to(pictures)
    for output in (pictures, pictures / "deep" / "out", tmp_path / "link" / "out"):
        with pytest.raises(UsageError, match=r"output .*: expected a folder outside the inputs, found one in folder"):
            build(output, pictures, kind="folder")
    tar = make_corpus(tmp_path / "tars" / "a.tar", range(3))
    sets = {"sets": [{"kind": "folder", "uri": str(pictures)}]}
    with pytest.raises(UsageError, match="found one in folder"):
        build(pictures / "out", tar, decontaminate=sets)
    for place in (moto_uri, str(tmp_path)):
        inputs = [{"kind": "parquet", "uri": f"{place}/pairs/"}]
        with pytest.raises(UsageError, match=f"found one in parquet {place}/pairs/; choose another output"):
            build_corpus(CorpusConfig(inputs=inputs, output=f"{place}/pairs/out"))
        with pytest.raises(UserError, match="input parquet"):  # there is none: its listing leaves dots out
            build_corpus(CorpusConfig(inputs=inputs, output=f"{place}/pairs/.state/out"))
    assert sorted(path.name for path in pictures.rglob("*")) == ["one.jpg", "one.txt"]

    # Not read: what begins with a dot, as the state folder does, in a folder of pictures; what is no tar among tars.
    for output, source, kind in (
        (pictures / ".glidepath" / "out", pictures, "folder"),
        (tmp_path / "tars" / "out", tar.parent, "webdataset"),
    ):
        first, second = (build(output, source, kind=kind)["dataset_id"] for _ in range(2))
        assert first == second


def test_a_dataset_keeps_the_table_of_dropped_rows_that_it_was_committed_with(
    tmp_path: Path, two_tars: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(tmp_path / "out", *two_tars)
    [table] = (tmp_path / "out" / "judge").rglob("dropped.parquet")
    written = table.read_bytes()
    with monkeypatch.context() as another_arrow:
        another_arrow.setattr(KeepList, "write_dropped", lambda keep, key: pytest.fail("written again"))
        assert build(tmp_path / "out", *two_tars) == first
    table.unlink()
    assert build(tmp_path / "out", *two_tars) == first and table.read_bytes() == written
