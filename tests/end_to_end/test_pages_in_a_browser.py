"""The judging page and the sampling page in a real browser: seen, clicked, chosen, submitted.

Screenshots go to the folder in $GLIDEPATH_SCREENSHOTS, if it is set, to be looked at.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser
from pages_case import MODELS, sample_folders, served, tiny_models
from PIL import Image

from cluster.judging.answers import Answers
from cluster.judging.study import make_study
from cluster.pages.desk import Desk
from cluster.pages.judging import judging_routes
from cluster.pages.sampling import sampling_routes

pytestmark = pytest.mark.drill


def keep(page: Browser, name: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("GLIDEPATH_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(folder / f"{name}.png")
    assert (folder / f"{name}.png").stat().st_size > 5_000


SEEN = "!document.querySelector('#stage').hidden && !document.querySelector('#sides').classList.contains('waiting')"


def seen(page: Browser, count: str) -> None:
    page.wait(f"{SEEN} && document.querySelector('#count').textContent === {json.dumps(count)} && turn !== null")


def test_a_person_judges_by_keys_and_clicks_and_is_told_of_a_second_page(tmp_path: Path) -> None:
    study = make_study(
        str(tmp_path / "study"), sample_folders(tmp_path / "samples", pictures=9), ("caption", "diversity"), seed=1
    )
    with served({"judge": judging_routes(study)}) as base, browser(tmp_path / "profile") as page:
        page.size(1280, 800)
        page.open(f"{base}/")
        page.wait("document.querySelectorAll('#questions label').length === 2")
        keep(page, "judge-start", tmp_path)
        page.write("#judge", "Ada")
        page.click("#start button.main")
        seen(page, "1 of 81")
        keep(page, "judge-pair", tmp_path)
        left, right = page.box("#left img"), page.box("#right img")
        assert (left["width"], left["height"], left["y"]) == (right["width"], right["height"], right["y"])
        assert left["width"] > 400  # 64 px are shown as large as the window has room
        for number, press in enumerate((page.key, page.key, page.key), 2):
            press(("1", "0", "2")[number - 2])
            seen(page, f"{number} of 81")
        page.click("#left")
        seen(page, "5 of 81")
        page.click(".answers [data-choice=tie]")
        seen(page, "6 of 81")
        assert [one.choice for one in Answers(study).all()] == ["left", "tie", "right", "left", "tie"]
        assert all(0 <= one.ms < 60_000 for one in Answers(study).all())

        # The same judge opens the page again, elsewhere; this one is told at its next answer.
        token = page.run("ask('/api/judge/begin', {judge: 'Ada', question: 'caption'}).then((turn) => turn.token)")
        page.key("1")
        page.wait("!document.querySelector('#error').hidden")
        assert "judge Ada: expected one open page, found a newer one" in page.text()
        keep(page, "judge-twice", tmp_path)
        assert token and len(Answers(study).all()) == 5

        page.open(f"{base}/judge")
        page.wait("document.querySelectorAll('#questions label').length === 2")
        assert page.run("document.querySelector('#judge').value") == "Ada"
        page.click("#questions label:nth-of-type(2)")
        page.click("#start button.main")
        seen(page, "1 of 9")
        assert page.run("document.querySelectorAll('#left img').length") == 9
        keep(page, "judge-sets", tmp_path)
        page.size(420, 800)
        keep(page, "judge-narrow", tmp_path)
        for number in range(2, 10):
            page.key("2")
            seen(page, f"{number} of 9")
        page.key("2")
        page.wait("!document.querySelector('#end').hidden")
        keep(page, "judge-end", tmp_path)
        assert not [model for model in MODELS if model in page.run("document.documentElement.outerHTML")]
        assert all(url.startswith(base) for url in page.requests()) and len(page.requests()) > 30
        assert [line for line in page.complaints() if "409" not in line] == []


def test_a_person_draws_edits_by_brush_and_reads_what_was_wrong(
    tmp_path: Path, dataset_uri: str, tiny_model: dict[str, Any], picture_folder: Path, one_thread: None
) -> None:
    models = tiny_models(tmp_path / "models", dataset_uri, tiny_model)
    desk = Desk({"base": models["base"], "inpaint": models["inpaint"]}, models["upsampler"], "ema", "cpu")
    finished = "[...document.querySelectorAll('.job')].filter((job) => job.querySelector('.pictures')).length"
    with served({"sample": sampling_routes(desk)}) as base, browser(tmp_path / "profile") as page:
        page.size(1280, 860)
        page.open(f"{base}/sample")
        page.wait("document.querySelectorAll('#model option').length === 2")
        keep(page, "sample-empty", tmp_path)
        page.write("[name=prompt]", "a red apple on a wooden table")
        page.write("[name=steps]", "250")
        page.click("#draw")
        page.wait("document.querySelector('.job .progress > div')?.style.width > '0%'")
        keep(page, "sample-drawing", tmp_path)
        page.click(".job .row button")
        page.wait("document.querySelector('.job').innerText.includes('cancelled')")
        page.write("[name=steps]", "20")
        page.click("#draw")
        page.wait(f"{finished} === 1")

        page.write("[name=steps]", "many")
        page.click("#draw")
        page.wait("document.querySelector('#error').innerText.includes('many')")
        keep(page, "sample-error", tmp_path)
        page.write("[name=steps]", "20")

        page.run("document.querySelector('#model').value = 'inpaint'")
        page.choose_file("#file", picture_folder / "003.png")  # a PPM, whatever its name says
        page.wait("document.querySelector('#error').innerText.includes('no picture that the browser can show')")
        Image.open(picture_folder / "003.png").save(tmp_path / "picture.png")
        page.choose_file("#file", tmp_path / "picture.png")
        page.wait("!document.querySelector('#easel').hidden")
        page.click("#draw")
        page.wait("document.querySelector('#error').innerText.includes('nothing is painted yet')")
        page.drag("#mask", [(0.2, 0.3), (0.4, 0.35), (0.6, 0.3), (0.7, 0.4), (0.3, 0.45), (0.7, 0.5)])
        keep(page, "sample-brush", tmp_path)
        page.click("#draw")
        page.wait(f"{finished} === 2")
        page.run("scrollTo(0, 0)")
        keep(page, "sample-edited", tmp_path)
        assert "a part redrawn" in page.text()

        page.run("document.querySelector('.picture button').click()")  # it appears under the pointer
        page.click(".switch label:nth-of-type(2)")
        page.click("#draw")
        page.wait(f"{finished} === 3")
        assert "a picture varied by 0.6" in page.text()
        page.open(f"{base}/sample")  # what was drawn is still there
        page.wait(f"{finished} === 3 && [...document.images].every((image) => image.complete)")
        keep(page, "sample-results", tmp_path)
        assert all(url.startswith(base) for url in page.requests())
        assert [line for line in page.complaints() if "409" not in line] == []
