"""Numbers of scorers: computed once per unit, stored beside it; thresholds on them drop rows without scoring again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.build import OWN_NAMES, build_corpus, sweep_build
from data_pipeline.corpus import CorpusConfig
from data_pipeline.enrich import enrich
from data_pipeline.errors import UserError
from data_pipeline.executor import InlineExecutor
from data_pipeline.filters import Judged
from data_pipeline.images import Pixels
from data_pipeline.manifests import digest_of
from data_pipeline.scorers import InlineScorer, first_failed, read_scores, score_columns, score_reasons
from data_pipeline.shards import open_dataset
from data_pipeline.storage import LocalStore

ROWS = 300  # more than one batch of staged rows


class Brightness:
    """A scorer to check by hand: the mean of a picture, and how long its caption is; one caption it cannot tell."""

    columns = ("brightness", "letters")
    digest = digest_of("brightness")

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, captions: Sequence[str], images64: Pixels) -> dict[str, NDArray[np.float32]]:
        assert images64.shape == (len(captions), 64, 64, 3) and images64.dtype == np.uint8
        self.calls.append(len(captions))
        letters = [np.nan if caption == "Picture number 7" else len(caption) for caption in captions]
        return {
            "brightness": images64.mean(axis=(1, 2, 3)).astype(np.float32),
            "letters": np.array(letters, np.float32),
        }


@pytest.fixture
def corpus(tmp_path: Path, make_corpus: Callable[..., Path]) -> Callable[..., tuple[dict[str, Any], Brightness]]:
    """Build two tars with the given score thresholds; the summary, and the scorer that was used."""
    tars = [
        make_corpus(tmp_path / "in" / "a.tar", range(ROWS)),
        make_corpus(tmp_path / "in" / "b.tar", range(300, 310)),
    ]

    def build(scores: dict[str, Any], **settings: Any) -> tuple[dict[str, Any], Brightness]:
        inputs = [{"kind": "webdataset", "uri": str(tar)} for tar in tars]
        values = {"inputs": inputs, "output": str(tmp_path / "out"), "filters": {"scores": scores}, **settings}
        scorer = Brightness()
        return build_corpus(CorpusConfig.model_validate(values), scorers=[InlineScorer(scorer)]), scorer

    return build


def captions_of(summary: dict[str, Any]) -> set[str]:
    dataset = open_dataset(summary["uri"])
    shards = (dataset.shard("base", shard) for shard in range(len(dataset.shard_rows)))
    return {caption for shard in shards for i in range(len(shard)) for caption in shard.batch(i)["caption"].to_pylist()}


def test_a_threshold_on_a_scorers_column_drops_rows_and_is_changed_without_scoring_again(
    corpus: Any, tmp_path: Path
) -> None:
    everything, scorer = corpus({})
    assert (everything["rows"], scorer.calls) == (310, [256, 44, 10])
    short, scorer = corpus({"letters": {"max": 17}})
    assert scorer.calls == []
    assert captions_of(short) == {f"Picture number {number}" for number in range(100) if number != 7}
    assert short["funnel"]["dropped"] == {"column_high_letters": 210, "column_missing_letters": 1}
    assert len({everything["dataset_id"], short["dataset_id"]}) == 2
    assert sweep_build(LocalStore(tmp_path / "out")) == 0


def test_scores_lie_in_the_order_of_the_staged_rows_and_damage_is_found(corpus: Any, tmp_path: Path) -> None:
    corpus({})
    store = LocalStore(tmp_path / "out")
    prefixes = sorted({info.key.rpartition("/")[0] + "/" for info in store.list("units/")})
    scores = [read_scores(store, prefix, [Brightness.digest]) for prefix in prefixes]
    assert sorted(len(columns["letters"]) for columns in scores) == [10, ROWS]
    assert all(columns["brightness"].dtype == np.float32 for columns in scores)
    again = Brightness()
    assert score_columns(store, prefixes[0], again)["scorer"] == Brightness.digest
    assert again.calls == []
    path = next((tmp_path / "out").rglob("scores-*.parquet"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=r"scores-.*parquet: expected sha256"):
        for prefix in prefixes:
            read_scores(store, prefix, [Brightness.digest])
    # A table whose manifest was never stored is a leftover, and so is one that another writer had begun with.
    path.with_suffix(".json").unlink()
    path.write_bytes(data)
    assert score_columns(store, f"{path.parent.relative_to(tmp_path / 'out').as_posix()}/", again)["rows"] in (10, ROWS)
    path.with_suffix(".json").unlink()
    assert sweep_build(store) == 1 and not path.exists()


def test_every_name_that_builds_and_enrichments_give_is_one_that_a_sweep_takes(
    corpus: Any, make_corpus: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, write = set(), LocalStore._write_temporary

    def noting(store: LocalStore, path: Path, chunks: Any) -> Path:
        given.add(path.relative_to(tmp_path / "out").as_posix())
        return write(store, path, chunks)

    monkeypatch.setattr(LocalStore, "_write_temporary", noting)
    held_out = {"kind": "webdataset", "uri": str(make_corpus(tmp_path / "held_out.tar", range(5)))}
    summary, _ = corpus(
        {"letters": {"max": 17}},
        dedup={"near": 4},
        decontaminate={"sets": [held_out]},
        shard_rows=64,
    )
    assert sum(summary["funnel"]["dropped"].values()) > 200
    enrich(summary["uri"], "tokens_clip", None, InlineExecutor())
    assert any("/scratch-" in name for name in given) and any("/tokens_clip/" in name for name in given)
    assert [name for name in given if not any(own.fullmatch(name) for own in OWN_NAMES)] == []

    store = LocalStore(tmp_path / "out")
    assert sweep_build(store) == 0
    for name in given:
        if name.endswith("manifest.json") or ("/shard-" in name and name.endswith(".json")):
            store.delete(name)
    store.put("units/notes/si.txt", [b"of somebody else"])
    assert sweep_build(store) > 0 and [info.key for info in store.list()] == ["units/notes/si.txt"]


def test_the_first_limit_that_a_row_does_not_meet_is_its_reason() -> None:
    judged = Judged(columns=(("a", 0.3, None), ("b", None, 1.0)))
    scores = {
        "a": np.array([0.3, 0.29, np.nan, 0.5, 0.1], np.float32),
        "b": np.array([1.0, 0.0, 0.0, 1.1, 2.0], np.float32),
    }
    reasons = score_reasons(judged)
    failed = [reasons[number] if number >= 0 else None for number in first_failed(scores, judged)]
    assert failed == [None, "column_low_a", "column_missing_a", "column_high_b", "column_low_a"]
    assert first_failed(scores, Judged()).tolist() == [-1] * 5


def test_a_threshold_on_a_score_that_nobody_computes_is_refused_in_one_line(corpus: Any) -> None:
    with pytest.raises(UserError, match=r"filters\.scores\.britness: .*; there are: brightness, letters") as refused:
        corpus({"britness": {"min": 1}})
    assert "\n" not in str(refused.value)
    scorers = [{"kind": "noised_clip", "checkpoint": "run"}]
    with pytest.raises(ValueError, match="the caller brings them"):
        build_corpus(CorpusConfig.model_validate({"scorers": scorers}))
