"""The plan of a corpus: measured on a sample, scaled by arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import corpus_plan
from data_pipeline.build import build_corpus
from data_pipeline.corpus import CorpusConfig
from data_pipeline.corpus_plan import is_corpus, measured, plan_corpus, planned
from data_pipeline.errors import UserError
from data_pipeline.filters.language import _identifier
from data_pipeline.storage import LocalStore
from data_pipeline.tokenizer import load_bpe


def test_the_plan_of_a_corpus_is_near_what_building_it_takes(tmp_path: Path, make_corpus) -> None:
    tars = [make_corpus(tmp_path / f"{number}.tar", range(40 * number, 40 * number + 40)) for number in range(3)]
    inputs = [{"kind": "webdataset", "uri": str(tar)} for tar in tars]
    config = CorpusConfig(inputs=inputs, output=str(tmp_path / "out"), shard_rows=50)
    plan = plan_corpus(config, pairs=120, records=30)
    summary = build_corpus(config)
    assert (plan["rows"], plan["shards"], plan["tasks"]["emit"]) == (120, summary["shards"], 3)
    # A tar has headers besides its pictures, so there seem to be fewer units.
    assert 1 <= plan["units"] <= 3 and plan["tasks"]["judge"] == 4
    assert plan["storage_bytes"]["dataset"] == pytest.approx(summary["bytes"], rel=0.1)
    manifests = sum(path.stat().st_size for path in (tmp_path / "out" / "datasets").rglob("shard-*.json"))
    assert plan["manifest_bytes"]["all_shards"] == pytest.approx(manifests, rel=0.3)
    assert plan["sample"]["records"] == 30
    json.dumps(plan)


def test_what_a_process_loads_once_is_in_no_rate_of_a_plan(
    tmp_path: Path, make_corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, timed = (load_bpe, _identifier), corpus_plan._timed
    entry = {"kind": "webdataset", "uri": str(make_corpus(tmp_path / "a.tar", range(20)))}
    config = CorpusConfig(inputs=[entry], filters={"languages": ["en"], "language_from": 0, "language_confidence": 1})

    def nothing_loaded_in(work: Callable[[], Any]) -> tuple[Any, float]:
        before = [load.cache_info().misses for load in loads]
        result = timed(work)
        assert [load.cache_info().misses for load in loads] == before
        return result

    for load in loads:
        load.cache_clear()
    monkeypatch.setattr(corpus_plan, "_timed", nothing_loaded_in)
    measured(config, 20, LocalStore(tmp_path / "try"))
    assert all(load.cache_info().misses == 1 for load in loads)


def test_a_plan_grows_in_proportion_and_with_what_is_asked(tmp_path: Path, make_corpus) -> None:
    entry = {"kind": "webdataset", "uri": str(make_corpus(tmp_path / "a.tar", range(20)))}
    config = CorpusConfig(inputs=[entry])
    sample = replace(measured(config, 20, LocalStore(tmp_path / "try")), score_pairs_per_s=100.0)
    small, large = (planned(config, pairs, sample) for pairs in (10**8, 10**9))
    for key in ("source", "staged", "dataset", "judge_scratch"):
        assert large["storage_bytes"][key] == pytest.approx(10 * small["storage_bytes"][key], rel=1e-3)
    assert small["core_hours"]["score"] == pytest.approx(10**8 / 100 / 3600, rel=1e-3)
    with_near = planned(CorpusConfig(inputs=[entry], dedup={"near": 4}), 10**9, sample)
    assert with_near["tasks"]["judge"] > large["tasks"]["judge"] and with_near["agreeing_blocks"] == 4


def test_pictures_with_several_captions_need_as_many_fewer_units(tmp_path: Path, make_corpus) -> None:
    config = CorpusConfig(inputs=[{"kind": "webdataset", "uri": str(make_corpus(tmp_path / "a.tar", range(20)))}])
    sample = measured(config, 20, LocalStore(tmp_path / "try"))
    one, five = (planned(config, 10**6, replace(sample, pairs=20 * captions))["units"] for captions in (1, 5))
    assert one == pytest.approx(5 * five, rel=1e-3)


def test_a_sample_of_which_nothing_is_kept_is_refused(tmp_path: Path, make_corpus) -> None:
    entry = {"kind": "webdataset", "uri": str(make_corpus(tmp_path / "a.tar", range(5)))}
    with pytest.raises(UserError, match=r"sample of webdataset .*a.tar: .*found 0 of 5: image_too_small 5"):
        plan_corpus(CorpusConfig(inputs=[entry], filters={"min_side": 1000}), 10**8)
    with pytest.raises(UserError, match="at least one input"):
        plan_corpus(CorpusConfig(), 10**8)


def test_corpus_configurations_are_told_from_trainings() -> None:
    assert is_corpus("demo") and is_corpus("photos")
    assert not is_corpus("tiny") and not is_corpus("no such thing")
