"""`glidepath plan` of a corpus configuration, as the command line gives it."""

from __future__ import annotations

import json

import pytest

from cluster.cli import run


def test_plan_of_a_corpus_says_what_it_will_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "demo", "dedup.near=4", "--pairs", "1e9", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["pairs"] == 10**9 and plan["tasks"]["emit"] == plan["shards"] == -(-plan["rows"] // 4096)
    assert plan["storage_bytes"]["total"] > plan["storage_bytes"]["dataset"] > 10**12
    assert set(plan["core_hours"]) == {"read", "score", "judge", "emit", "total"}
    assert run(["plan", "demo", "--pairs", "1e8"]) == 0
    assert "core_hours" in capsys.readouterr().out


def test_plan_of_a_corpus_without_input_fails_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "photos", "--json"]) == 1
    assert "at least one input" in json.loads(capsys.readouterr().out)["error"]
