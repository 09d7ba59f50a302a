"""The sampling page over HTTP: what it draws is what `glidepath sample` draws, and what is wrong is one line."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages_case import ask, fetch, refusal, served, tiny_models
from PIL import Image
from support import wait_for

import cluster.pages.desk
from cluster.drawing import DrawSettings, draw_to_folder
from cluster.pages.app import LARGEST_BODY
from cluster.pages.desk import WAITING, Desk, Wish, named_models
from cluster.pages.sampling import sampling_routes
from data_pipeline.config import parse
from data_pipeline.errors import UserError

PROMPT = "red apple"


@pytest.fixture(scope="module")
def models(
    dataset_uri: str, tiny_model: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    folder, threads = tmp_path_factory.mktemp("models"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIDEPATH_HOME", str(folder / "home"))
        yield tiny_models(folder, dataset_uri, tiny_model)
    torch.set_num_threads(threads)


@pytest.fixture
def page(models: dict[str, str]) -> Iterator[str]:
    """The address of a page that draws with all of them."""
    desk = Desk({"base": models["base"], "inpaint": models["inpaint"]}, models["upsampler"], "ema", "cpu")
    with served({"sample": sampling_routes(desk)}) as base:
        yield base


def png(pixels: Any) -> str:
    """A picture as the page sends it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def finished(base: str, **wish: Any) -> dict[str, Any]:
    """A job that has ended."""
    job = ask(f"{base}/api/sample/jobs", {"model": "base", "prompt": PROMPT, "steps": "ddim3", "pictures": 2, **wish})
    ended = ("done", "failed", "cancelled")
    return wait_for(lambda: (now := ask(f"{base}/api/sample/jobs/{job['id']}"))["state"] in ended and now)  # type: ignore[no-any-return]


def pixels_of(base: str, job: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    assert job["state"] == "done", job["error"]
    return [np.asarray(Image.open(io.BytesIO(fetch(base + path)[1]))) for path in job["pictures"]]


def test_the_page_draws_what_the_command_draws(page: str, models: dict[str, str], tmp_path: Path) -> None:
    about = ask(f"{page}/api/sample")
    assert about["models"] == [{"name": "base", "side": 16}, {"name": "inpaint", "side": 16}]
    assert about["enlarged_side"] == 32 and "ddim" in about["samplers"]
    job = finished(page, guidance=2.5, seed=7, enlarge=True)
    base = {"guidance_scale": 2.5, "spacing": "ddim3"}
    values = {"checkpoint": models["base"], "upsampler": models["upsampler"], "base": base, "seed": 7, "device": "cpu"}
    drawn = draw_to_folder(parse(DrawSettings, values, "sample"), [PROMPT, PROMPT], tmp_path / "drawn")
    for mine, path in zip(pixels_of(page, job), drawn["images"], strict=True):
        np.testing.assert_array_equal(mine, np.asarray(Image.open(path)))
    first = Image.open(io.BytesIO(fetch(page + job["pictures"][0])[1]))
    assert first.info["prompt"] == PROMPT and '"seed":7' in first.info["drawing"]  # saved from the page, it tells all
    assert job["done"] == job["steps"] > 0 and job["wish"]["guidance"] == 2.5
    assert ask(f"{page}/api/sample/jobs")[0]["id"] == job["id"]
    for path in ("/drawn/nothing/0", f"/drawn/{job['id']}/2", f"/drawn/{job['id']}/..%2F0000.png", "/judge"):
        assert fetch(page + path)[0] in (404, 422)


def test_what_is_painted_is_drawn_anew_and_the_rest_stays(page: str) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[:, :8] = 255
    for model in ("base", "inpaint"):
        for drawn in pixels_of(page, finished(page, model=model, image=png(picture), mask=png(mask))):
            np.testing.assert_array_equal(drawn[:, 8:], picture[:, 8:])
            assert (drawn[:, :8] != picture[:, :8]).mean() > 0.5
    varied = finished(page, image=png(picture), strength=0.4)
    assert varied["edited"] == "varied" and len(pixels_of(page, varied)) == 2


def test_a_wish_that_cannot_be_drawn_is_refused_or_fails_in_one_line(page: str) -> None:
    wish = {"model": "base", "prompt": PROMPT, "steps": "ddim3", "pictures": 1}
    jobs = f"{page}/api/sample/jobs"
    picture, small = (png(np.zeros((side, side, 3), np.uint8)) for side in (16, 8))
    lines = {
        "prompt: expected what to draw": {"prompt": "  "},
        "model: expected base or inpaint, found 'other'": {"model": "other"},
        "steps: expected steps such as 50": {"steps": "many"},
        "pictures: ": {"pictures": 17},
        "guidance: ": {"guidance": "much"},
        "colour: ": {"colour": "red"},
        "image: expected base64": {"image": "no base64!"},
        "settings: expected --mask or --strength below 1": {"image": picture},
    }
    for start, change in lines.items():
        assert refusal(jobs, {**wish, **change}).startswith(start)
    assert fetch(jobs, wish, {"Content-Length": str(LARGEST_BODY + 1)})[0] == 413
    failures = {
        "a picture file": {"image": base64.b64encode(b"no picture").decode(), "strength": 0.5},
        "a shorter side of at least 16 px, found 8 px": {"image": small, "strength": 0.5},
        "the size of": {"image": picture, "mask": small},
        "something to draw anew": {"image": picture, "mask": picture},
    }
    for part, change in failures.items():
        failed = finished(page, **change)
        assert failed["state"] == "failed" and part in failed["error"] and "\n" not in failed["error"]
    assert finished(page)["state"] == "done"  # the thread goes on


def test_jobs_wait_for_each_other_are_cancelled_and_are_not_taken_without_end(
    page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, goes_on = threading.Event(), threading.Event()

    def slow(settings: Any, prompts: Any, folder: Any, progress: Callable[[int, int, str], None], *_: Any) -> Any:
        began.set()
        assert goes_on.wait(60)
        if prompts[0] == "broken":
            raise ZeroDivisionError("a defect\nof ours")
        progress(1, 2, "base of pictures 1 to 1")
        return {"images": []}

    monkeypatch.setattr(cluster.pages.desk, "draw_to_folder", slow)
    wish, jobs = {"model": "base", "prompt": PROMPT, "steps": "ddim3"}, f"{page}/api/sample/jobs"
    first = ask(jobs, wish)
    assert began.wait(60)
    waiting = [ask(jobs, {**wish, "prompt": "broken" if number == 1 else PROMPT}) for number in range(WAITING)]
    assert {job["state"] for job in waiting} == {"waiting"}
    assert "expected at most 8 waiting, found as many" in refusal(jobs, wish)
    for job in (first, waiting[0]):
        ask(f"{jobs}/{job['id']}/cancel", {})
    goes_on.set()

    def states() -> list[str]:
        return [job["state"] for job in reversed(ask(jobs))]

    wait_for(lambda: states()[-1] == "done")
    assert states() == ["cancelled", "cancelled", "failed", *["done"] * (WAITING - 2)]
    assert ask(f"{jobs}/{waiting[1]['id']}")["error"] == "ZeroDivisionError: a defect of ours"


def test_a_desk_that_is_closed_ends_what_it_draws_and_begins_nothing_more(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, began, goes_on = Desk({"base": models["base"]}, None, "ema", "cpu"), threading.Event(), threading.Event()

    def slow(settings: Any, prompts: Any, folder: Any, progress: Callable[[int, int, str], None], *_: Any) -> Any:
        began.set()
        assert goes_on.wait(60)
        progress(1, 2, "base of pictures 1 to 1")

    monkeypatch.setattr(cluster.pages.desk, "draw_to_folder", slow)
    first, second = (desk.ask(Wish(model="base", prompt=PROMPT, steps="ddim3")) for _ in range(2))
    assert began.wait(60)
    closing = threading.Thread(target=desk.close)
    closing.start()
    wait_for(desk._closed.is_set)
    goes_on.set()
    closing.join(60)
    assert not closing.is_alive() and (first.state, second.state) == ("cancelled", "waiting")


def test_a_page_is_not_started_with_what_is_no_model(models: dict[str, str]) -> None:
    with pytest.raises(UserError, match="expected a base model, found recipe glide_upsampler"):
        Desk({"wrong": models["upsampler"]}, None, "ema", "cpu")
    with pytest.raises(UserError, match="expected an upsampler, found recipe glide_base"):
        Desk({"base": models["base"]}, models["base"], "ema", "cpu")
    assert named_models(["a=s3://b/c", "s3://b/x=y", "run"]) == {
        "a": "s3://b/c",
        "s3://b/x=y": "s3://b/x=y",
        "run": "run",
    }
    with pytest.raises(UserError, match="each name once"):
        named_models(["a=b", "a=c"])
