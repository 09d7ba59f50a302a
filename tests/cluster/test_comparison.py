"""What a comparison of runs says, from given curves: what differs, values at equal cost, smoothing, the page."""

from __future__ import annotations

import html
import io
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cluster.comparison import (
    Compared,
    at_equal,
    choose_metrics,
    compare,
    differing_settings,
    equal_grids,
    gpu_hours,
    refuse_same,
    sections,
    smoothed,
    thinned,
    values_at,
)
from cluster.comparison_page import comparison_html, comparison_png, panels, read_grids
from data_pipeline.errors import UsageError, UserError
from trainer.pictures import png_bytes
from trainer.tracking.runs import Grid, evaluation_curves

CURVES = st.dictionaries(st.integers(1, 10**9), st.floats(-1e6, 1e6), min_size=1, max_size=60)
ABOUT = {"run": "a", "store": "s3://runs/a", "status": "FINISHED", "images": 64}


def run(name: str, batch: int, images: int, step_s: float, workers: float = 1.0, **more: Any) -> Compared:
    """A run whose loss is 100 / images."""
    at = range(batch, images + 1, batch)
    curves = {
        "loss/total": {x: 100 / x for x in at},
        "time/step_s": dict.fromkeys(at, step_s),
        "workers": dict.fromkeys(at, workers),
        "images_per_s": dict.fromkeys(at, batch / step_s),
        "heldout/total": {0: 3.0, images: 1.0},
    }
    about = {**ABOUT, "run": name, "store": f"s3://runs/{name}", "images": images}
    newest = {key: curve[max(curve)] for key, curve in curves.items()}
    return Compared(about, newest, **{"settings": {"lr": 1e-3, "batch": batch}, "curves": curves, **more})


def test_settings_differ_by_value_and_type_and_what_tells_runs_apart_is_no_difference() -> None:
    runs: list[dict[str, Any]] = [
        {"run": "a", "lr": 1, "seed": 1, "flag": True, "text": "1", "heldout": None, "mix": [{"w": 1}], "same": [0.1]},
        {
            "run": "b",
            "lr": 1.0,
            "seed": 2,
            "flag": 1,
            "text": 1,
            "heldout.images": 4,
            "mix": [{"w": "1"}],
            "same": [0.1],
        },
    ]
    assert differing_settings(runs) == {
        "flag": [True, 1],
        "heldout.images": [None, 4],
        "mix": [[{"w": 1}], [{"w": "1"}]],
        "seed": [1, 2],
        "text": ["1", 1],
    }


def test_values_at_equal_images_and_gpu_hours_are_those_of_the_run_that_had_least() -> None:
    """By hand: `quick` did 120 images in 12 steps of 36 s on 2 GPUs, 0.24 GPU-hours; `long` 200 in 10 of 72 s, 0.2."""
    quick, long = run("quick", 10, 120, 36.0, workers=2.0), run("long", 20, 200, 72.0)
    document = compare([quick, long], ["loss/total", "heldout/total"], window=0, price=2.5)
    at_images = document["equal_images"]["loss/total"]
    assert at_images == {"images": 120, "values": pytest.approx([100 / 120, 100 / 120])}
    at_hours = document["equal_gpu_hours"]["loss/total"]
    assert at_hours["gpu_hours"] == pytest.approx(0.2)
    assert at_hours["values"] == pytest.approx([100 / 100, 100 / 200])
    assert document["equal_images"]["heldout/total"]["values"] == pytest.approx([1.0, 1.8])  # between 0 and 200 images
    first, second = document["runs"]
    assert (first["gpu_hours"], second["gpu_hours_at_equal_images"]) == pytest.approx((0.24, 0.12))
    assert (first["cost"], second["cost"], second["cost_at_equal_images"]) == pytest.approx((0.6, 0.5, 0.3))
    assert first["images_per_gpu_hour"] == pytest.approx(500)
    assert second["cost_per_million_images"] == pytest.approx(2500)
    assert (first["images_per_s"], second["images_per_s"]) == pytest.approx((10 / 36, 20 / 72))
    assert document["params_that_differ"] == {"batch": [10, 20]}
    assert document["metrics"]["loss/total"] == pytest.approx([100 / 120, 0.5])


def test_gpu_hours_follow_the_workers_that_each_update_had_and_are_unknown_where_none_were_logged() -> None:
    curves = {"time/step_s": {10: 3600.0, 20: 1800.0, 30: 1800.0}, "workers": {10: 1.0, 20: 2.0, 30: 4.0}}
    assert gpu_hours(curves) == pytest.approx({10: 1.0, 20: 2.0, 30: 4.0})
    old = run("old", 10, 40, 1.0)
    del old.curves["workers"]
    unknown = Compared(old.about, old.newest, old.settings, old.curves)
    document = compare([unknown, run("new", 10, 40, 1.0)], ["loss/total"], window=0, price=1.0)
    assert (document["runs"][0]["gpu_hours"], document["runs"][0]["cost"]) == (None, None)
    assert document["equal_gpu_hours"]["loss/total"]["values"][0] is None
    old.curves["workers"] = {30: 1.0, 40: 1.0}  # another version went on with it
    assert gpu_hours(old.curves) == {}


@given(CURVES, st.floats(0, 1e9))
def test_a_line_has_its_points_and_nothing_beyond_its_ends(curve: dict[int, float], x: float) -> None:
    assert values_at(curve, curve) == list(curve.values())
    (value,) = values_at(curve, [x])
    assert (value is None) == (not min(curve) <= x <= max(curve))
    if value is not None:
        around = [min(curve.values()), max(curve.values())]
        assert around[0] - 1e-9 * abs(around[0]) <= value <= around[1] + 1e-9 * abs(around[1])


@given(CURVES, st.floats(1, 1e9))
def test_smoothing_is_the_weighted_mean_of_what_came_before_by_distance_in_images(
    curve: dict[int, float], window: float
) -> None:
    assert smoothed(curve, 0) == {x: curve[x] for x in sorted(curve)}
    made = smoothed(curve, window)
    for x in made:
        before = [at for at in curve if at <= x]
        weights = [math.exp((at - x) / window) for at in before]
        mean = math.fsum(w * curve[at] for w, at in zip(weights, before, strict=True)) / math.fsum(weights)
        assert made[x] == pytest.approx(mean, rel=1e-9, abs=1e-6)


@given(st.lists(st.one_of(CURVES, st.just({})), min_size=1, max_size=4))
def test_the_equal_position_is_the_last_that_every_curve_reaches(curves: list[dict[int, float]]) -> None:
    found = at_equal(curves)
    there = [curve for curve in curves if curve]
    assert (found is None) == (not there)
    if found:
        assert found[0] == min(max(curve) for curve in there)
        assert [value is None for value in found[1]] == [not c or min(c) > found[0] for c in curves]


@given(st.integers(1, 5000), st.integers(0, 4999))
def test_thinning_keeps_the_ends_and_every_highest_spike(points: int, spike: int) -> None:
    curve = {10 * x: float(x % 7) for x in range(points)}
    curve[10 * (spike % points)] = 99.0
    kept = thinned(curve)
    assert kept == sorted(set(kept)) and len(kept) <= 602
    assert {0, 10 * (points - 1), 10 * (spike % points)} <= set(kept)
    assert points > 600 or len(kept) == points


def test_a_metric_nobody_logged_and_a_run_named_twice_are_refused_in_one_line() -> None:
    names = ["loss/total", "loss/mse", "lr", "heldout/total", "text/loss/total", "evaluation/fid/x (8 of ab)"]
    assert choose_metrics(names, ()) == ["loss/total", "text/loss/total", "heldout/total", "evaluation/fid/x (8 of ab)"]
    assert choose_metrics(names, ["lr", "loss/*", "loss/mse"]) == ["lr", "loss/mse", "loss/total"]
    with pytest.raises(UserError, match=r"^metric loss/totl: expected one that a run logged, .* loss/total$"):
        choose_metrics(names, ["lr", "loss/totl"])
    with pytest.raises(UsageError, match="expected two runs or more, found 1"):
        refuse_same(["a"], ["s3://a"])
    with pytest.raises(UsageError, match="found a and 8f2, one run"):
        refuse_same(["b", "a", "8f2"], ["1", "2", "2"])


def test_evaluations_of_other_settings_are_other_curves() -> None:
    facts = {
        "images": "256",
        "dataset": "5f3a91c2" * 8,
        "weights": "ema",
        "seed": "0",
        "sampling.guidance_scale": "3.0",
    }
    results: list[Any] = [(64, facts, {"fid/n": 9.0}), (128, facts, {"fid/n": 7.0})]
    results += [(128, {**facts, "sampling.guidance_scale": "1.0", "weights": "raw"}, {"fid/n": 8.0})]
    results += [(128, {**facts, "upsampler": "runs/up"}, {"fid/n": 6.0})]
    assert evaluation_curves(results) == {
        "evaluation/fid/n (256 of 5f3a91c2, upsampler=runs/up)": {128: 6.0},
        "evaluation/fid/n (256 of 5f3a91c2)": {64: 9.0, 128: 7.0},
        "evaluation/fid/n (256 of 5f3a91c2, guidance_scale=1.0, weights=raw)": {128: 8.0},
    }


def grids(*images: int, weights: str = "ema") -> list[Grid]:
    return [Grid(at, weights, f"samples/images-{at:09d}-{weights}.png") for at in images]


def test_grids_are_of_equal_images_where_there_are_such_and_else_the_newest_within() -> None:
    def chosen(*of_runs: list[Grid]) -> list[Any]:
        runs = [run(str(number), 10, 40, 1.0, grids=found) for number, found in enumerate(of_runs)]
        return [(row["weights"], row["images"]) for row in equal_grids(runs, 96)]

    assert chosen(grids(32, 64, 96), grids(32, 64, 90, 128)) == [("ema", [64, 64])]
    assert chosen(grids(32, 64), grids(50, 100)) == [("ema", [64, 50])]
    assert chosen(grids(32) + grids(32, weights="raw"), grids(128)) == [("ema", [32, None]), ("raw", [32, None])]


class Pictures:
    """The grids of a run, one of them broken."""

    def picture(self, grid: Grid) -> bytes | None:
        pixels = np.full((64, 128, 3), grid.images, np.uint8)
        return b"no picture" if grid.weights == "raw" else png_bytes(Image.fromarray(pixels), {})


def test_the_last_of_an_odd_number_of_panels_has_nothing_beside_it() -> None:
    alone = run("alone", 10, 40, 1.0)
    del alone.curves["workers"]
    document = compare([alone, alone], ["loss/total"], 0, None)
    assert len(panels(document)) == 1
    with Image.open(io.BytesIO(comparison_png(document, {}))) as picture:
        right = picture.convert("L").crop((picture.width * 3 // 5, 0, picture.width, picture.height))
    assert right.getextrema() == (255, 255)


def test_a_metric_with_one_point_in_every_run_is_in_the_table_and_is_not_drawn() -> None:
    runs = [run(name, 10, 40, 1.0) for name in ("a", "b")]
    for number, one in enumerate(runs):
        one.curves["evaluation/fid/x (8 of ab)"] = {400: 7.0 + number}
    document = compare(runs, ["loss/total", "evaluation/fid/x (8 of ab)"], 0, None)
    assert {name for name, _, _ in panels(document)} == {"loss/total"}
    assert document["equal_images"]["evaluation/fid/x (8 of ab)"]["values"] == [7.0, 8.0]
    runs[0].curves["evaluation/fid/x (8 of ab)"][80] = 9.0
    document = compare(runs, ["loss/total", "evaluation/fid/x (8 of ab)"], 0, None)
    assert len({name for name, _, _ in panels(document)}) == 2


def test_the_page_and_the_picture_hold_everything_and_load_nothing() -> None:
    found = grids(32) + grids(32, weights="raw")
    evil = "<script>alert(1)</script>"
    settings: list[dict[str, Any]] = [{"prompts": [evil], "lr": 1.0}, {"prompts": ["b"], "lr": 1.0}]
    runs = [run(f"run-{n}", 10, 4000, 36.0, grids=found, settings=settings[n % 2]) for n in range(8)]
    runs[0].curves["loss/total"][2000] = 1e5
    document = compare(runs, ["loss/total", "heldout/total"], None, 2.0)
    pictures = read_grids(document["grids"], [Pictures()] * len(runs))  # type: ignore[list-item]
    assert set(pictures) == {("ema", number) for number in range(8)}
    png = comparison_png(document, pictures)
    assert png[:4] == b"\x89PNG" and len(png) > 20_000
    page = comparison_html(document, pictures).decode()
    assert evil not in page and html.escape(evil) in page
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", page.replace("s3://", ""))
    assert page.count("<svg viewBox") == 4 + page.count("aria-hidden") and page.count("data:image/png") == 8
    assert "none</div>" in page  # the broken grids
    for section in sections(document):
        assert section.title in page or section.title == "Settings that differ"
    assert "#2456a6" in page.split("</style>")[0] and "#2456a6" not in page.split("</style>")[1]
    assert "var(--run-5)" in page and "stroke-dasharray" in page
