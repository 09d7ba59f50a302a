"""Judging whole corpora: copies of photographs, evaluation sets, and what is left in the store."""

from __future__ import annotations

import io
import os
import tarfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from PIL import Image

from data_pipeline.build import CorpusConfig, build_corpus, sweep_build
from data_pipeline.decontaminate import SHORTEST, DecontaminateSettings, read_evaluation
from data_pipeline.errors import UserError
from data_pipeline.executor import InlineExecutor
from data_pipeline.shards import open_dataset
from data_pipeline.storage import LocalStore

Build = Callable[..., dict[str, Any]]


@pytest.fixture
def pictures(photographs: Path) -> list[bytes]:
    """Eight different photographs."""
    with tarfile.open(photographs / "flickr8k_224" / "00000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")][:8]
        return [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def make(*tars: Path, output: str = "out", **settings: Any) -> dict[str, Any]:
        inputs = [{"kind": "webdataset", "uri": str(tar)} for tar in tars]
        return build_corpus(CorpusConfig(inputs=inputs, output=str(tmp_path / output), **settings))

    return make


def copy_of(data: bytes, share: float = 1.0, **options: Any) -> bytes:
    picture, sink = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    picture.resize((round(picture.width * share), round(picture.height * share))).save(sink, **options)
    return sink.getvalue()


def samples(pictures: Mapping[str, bytes]) -> dict[str, bytes]:
    """Members of a tar: each picture with a caption of its own."""
    return {
        name: data
        for key, picture in pictures.items()
        for name, data in ((f"{key}.jpg", picture), (f"{key}.txt", f"the picture called {key}".encode()))
    }


def dropped_rows(tmp_path: Path, summary: Mapping[str, Any], output: str = "out") -> list[dict[str, Any]]:
    entry = open_dataset(summary["uri"]).manifest["dropped_rows"]
    assert entry["key"] == f"judge/{summary['dataset_id'][:16]}/dropped.parquet"
    return list(pyarrow.parquet.read_table(tmp_path / output / entry["key"]).to_pylist())


def captions_of(summary: Mapping[str, Any]) -> set[str]:
    dataset = open_dataset(summary["uri"])
    batches = [dataset.shard("base", shard).batch(0) for shard in range(len(dataset.shard_rows))]
    return {caption for batch in batches for caption in batch["caption"].to_pylist()}


def test_of_copies_of_a_photograph_the_largest_stays(tmp_path: Path, pictures, make_tar, build: Build) -> None:
    copies = {"half": copy_of(pictures[0], 0.5, format="JPEG", quality=90)}
    copies |= {"poor": copy_of(pictures[0], format="JPEG", quality=30), "double": copy_of(pictures[0], 2, format="PNG")}
    others = {f"other{number}": data for number, data in enumerate(pictures[1:])}
    tars = make_tar(tmp_path / "a.tar", samples(copies)), make_tar(tmp_path / "b.tar", samples(others))
    apart = build(*tars)
    assert (apart["rows"], dropped_rows(tmp_path, apart)) == (10, [])
    summary = build(*tars, dedup={"near": 4})
    assert summary["funnel"]["dropped"] == {"near_duplicate": 2}
    left = {f"the picture called {key}" for key in ("double", *others)}
    assert captions_of(summary) == left
    rows = dropped_rows(tmp_path, summary)
    assert len({row["lost_to"] for row in rows}) == 1 and all(0 <= row["distance"] <= 4 for row in rows)
    two = build(*tars, output="two", dedup={"near": 4}, executor={"workers": 2})
    assert two["dataset_id"] == summary["dataset_id"] and dropped_rows(tmp_path, two, "two") == rows


def test_a_repeated_caption_goes_with_all_its_pictures(tmp_path: Path, pictures, make_tar, build: Build) -> None:
    files = samples({f"{number}": data for number, data in enumerate(pictures)})
    files |= {f"{number}.txt": text for number, text in enumerate([b"Click to Enlarge"] * 2 + [b"click to enlarge"])}
    summary = build(make_tar(tmp_path / "a.tar", files), filters={"max_caption_repeats": 2})
    assert summary["funnel"]["dropped"] == {"caption_frequent": 3}


def test_an_evaluation_set_is_removed_by_picture_and_by_caption(
    tmp_path: Path, pictures, make_tar, build: Build
) -> None:
    held_out = tmp_path / "held out"
    held_out.mkdir()
    (held_out / "0.jpg").write_bytes(pictures[0])
    (held_out / "1.png").write_bytes(copy_of(pictures[1], 0.7, format="PNG"))
    (held_out / "2.jpg").write_bytes(pictures[7])
    (held_out / "2.txt").write_text("Two dogs of different breeds looking at each other on the road")
    (held_out / "broken.jpg").write_bytes(b"no picture")
    files = samples({f"{number}": data for number, data in enumerate(pictures[:5])})
    files["3.txt"] = b"two dogs, of different breeds, looking at each other on a road"
    tar = make_tar(tmp_path / "a.tar", files)
    sets = [{"kind": "folder", "uri": str(held_out)}]
    summary = build(tar, decontaminate={"sets": sets})
    expected = {"evaluation_source": 1, "evaluation_near": 1, "evaluation_caption": 1}
    assert summary["funnel"]["dropped"] == expected
    assert captions_of(summary) == {"the picture called 2", "the picture called 4"}
    held_out.rename(tmp_path / "moved")
    moved = build(tar, output="moved out", decontaminate={"sets": [sets[0] | {"uri": str(tmp_path / "moved")}]})
    assert moved["dataset_id"] == summary["dataset_id"] != build(tar, output="moved out")["dataset_id"]
    build(make_tar(tmp_path / "b.tar", samples({"x": pictures[2]})), output="evaluation")
    assert build(tar, decontaminate={"sets": ["evaluation"]})["funnel"]["dropped"] == {"evaluation_near": 1}
    parts: list[Any] = []

    class Elsewhere:
        """Processes whose working folder is another one."""

        def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
            os.chdir("/")
            parts.extend(items)
            return map(function, parts)

    found = read_evaluation(DecontaminateSettings(sets=["evaluation"]), Elsewhere())
    assert found is not None and len(parts) == len(found.hashes) == 1


def test_only_captions_that_repeat_enough_words_count_as_known(tmp_path: Path, pictures) -> None:
    (tmp_path / "0.jpg").write_bytes(pictures[0])
    (tmp_path / "0.txt").write_text("A man in a red shirt climbs a steep wall of rock")
    (tmp_path / "1.jpg").write_bytes(pictures[1])
    (tmp_path / "1.txt").write_text("a dog on grass")
    sets = DecontaminateSettings(sets=[{"kind": "folder", "uri": str(tmp_path)}], words=6, share=0.5)
    evaluation = read_evaluation(sets, InlineExecutor())
    assert evaluation is not None
    known = {
        "a MAN in a red shirt - climbs a steep wall of rock!": True,
        "a man in a red shirt climbs a steep hill of sand": True,  # 4 of 7 runs of six words
        "a man in a red shirt climbs up the hill of sand and snow": False,  # 2 of 9
        "A dog on grass.": True,
        "a dog on grass today": False,
        "a dog": False,
    }
    assert SHORTEST == 4
    judged, _ = evaluation.judge(*_no_pictures(len(known)), list(known))
    assert dict(zip(known, (judged >= 0).tolist(), strict=True)) == known


def _no_pictures(count: int) -> tuple[Any, Any]:
    import numpy as np

    return np.zeros((count, 2), np.uint64), np.zeros(count, np.uint64)


def test_an_evaluation_set_without_pictures_is_refused(tmp_path: Path, make_corpus, build: Build) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"decontaminate.sets .*set: expected pictures, found none that can be read"):
        build(
            make_corpus(tmp_path / "a.tar", range(3)),
            decontaminate={"sets": [{"kind": "folder", "uri": str(tmp_path / "set")}]},
        )


def test_a_missing_evaluation_set_is_refused_before_anything_is_scored(
    tmp_path: Path, make_corpus, build: Build
) -> None:
    with pytest.raises(UserError, match=r"nowhere: expected one committed dataset, found none"):
        build(make_corpus(tmp_path / "a.tar", range(3)), decontaminate={"sets": [str(tmp_path / "nowhere")]})
    assert list(LocalStore(tmp_path / "out").list()) == []


def test_a_sweep_takes_what_a_stopped_judge_left_and_keeps_what_a_dataset_names(
    tmp_path: Path, make_corpus, build: Build
) -> None:
    summary = build(make_corpus(tmp_path / "a.tar", range(3)))
    store = LocalStore(tmp_path / "out")
    kept = [info.key for info in store.list("judge/")]
    assert kept == [f"judge/{summary['dataset_id'][:16]}/dropped.parquet"]
    store.put(f"judge/scratch-{uuid.uuid4().hex}/gather-00000.rows", [b"left"])
    store.put("judge/0123456789abcdef/dropped.parquet", [b"of a dataset that was never committed"])
    assert sweep_build(store) == 2 and [info.key for info in store.list("judge/")] == kept
