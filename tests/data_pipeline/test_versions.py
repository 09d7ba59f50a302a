"""Versions: what other settings, filters or tokenizers made stands beside what is there, and is never mixed in."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import clip_tokenizer, enrich, score
from data_pipeline.build import CorpusConfig, build_corpus
from data_pipeline.config import parse
from data_pipeline.errors import UserError
from data_pipeline.executor import InlineExecutor
from data_pipeline.shards import open_dataset, verify_dataset


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_other_settings_make_a_dataset_beside_the_first_and_a_reader_has_to_choose(
    tmp_path: Path, make_corpus: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    inputs = [{"kind": "webdataset", "uri": str(make_corpus(tmp_path / "a.tar", range(12)))}]

    def build(**settings: Any) -> str:
        values = {"inputs": inputs, "output": str(output), "shard_rows": 5, **settings}
        return str(build_corpus(parse(CorpusConfig, values, "test"))["dataset_id"])

    first = build()
    before = contents(output)
    # What staged rows depend on, then what only the judge and the order depend on, then the code that stages.
    others = [build(filters={"max_caption": 20})]
    units = {path.name for path in (output / "units").iterdir()}
    others.append(build(seed=1))
    assert {path.name for path in (output / "units").iterdir()} == units, "the seed is no reason to score again"
    monkeypatch.setattr(score, "FORMAT", "glidepath-unit-of-tomorrow")
    assert build() == first, "staged otherwise, it still gives the same rows"
    assert len({first, *others}) == 3 and len(list((output / "units").iterdir())) == len(units) + 1
    assert before.items() <= contents(output).items()
    with pytest.raises(UserError, match=r"expected one committed dataset, found 3: .*; name one as"):
        open_dataset(str(output))
    for identity in (first, *others):
        assert verify_dataset(f"{output}/datasets/{identity}") == []


def test_a_family_made_by_another_version_is_not_gone_on_with(
    dataset_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(shutil.copytree(dataset_uri, tmp_path / "dataset"))
    enrich.enrich(str(output), "tokens_clip", None, InlineExecutor())
    [manifest] = output.glob("datasets/*/tokens_clip/manifest.json")
    monkeypatch.setattr(enrich, "WORDS", clip_tokenizer.WORDS + "|!")
    for half_made in (False, True):
        if half_made:
            manifest.unlink()
        with pytest.raises(UserError, match=r"family tokens_clip: expected made by producer .*delete datasets/\w+/tok"):
            enrich.enrich(str(output), "tokens_clip", None, InlineExecutor())
    assert open_dataset(str(output)).families() == ("base", "upsampler")
