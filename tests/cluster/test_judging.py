"""Judging by people: studies, the page over HTTP, several judges, and what the results say."""

from __future__ import annotations

import csv
import json
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages_case import CAPTIONS, MODELS, ask, fetch, refusal, sample_folders, served
from PIL import Image

from cluster.cli import run
from cluster.judging.answers import Answers
from cluster.judging.study import Study, make_study, open_study
from cluster.pages.judging import judging_routes
from data_pipeline.errors import UserError
from trainer.pictures import png_bytes

QUESTIONS = ("photorealism", "caption", "diversity")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(str(tmp_path / "study"), sample_folders(tmp_path / "samples"), QUESTIONS, seed=3)


def judge_all(base: str, judge: str, question: str, models: dict[str, str], better: list[str]) -> list[dict[str, Any]]:
    """Answer everything like somebody who prefers models in the order of `better`; what was shown."""
    seen, turn = [], ask(f"{base}/api/judge/begin", {"judge": judge, "question": question})
    while not turn["done"]:
        seen.append(turn)
        left, right = (better.index(models[turn[side][0]]) for side in ("left", "right"))
        choice = "tie" if turn["answered"] == 4 else "left" if left < right else "right"
        given = {"judge": judge, "token": turn["token"], "turn": turn["turn"], "choice": choice, "ms": 700}
        turn = ask(f"{base}/api/judge/answer", given)
    return seen


def owners(study: Study) -> dict[str, str]:
    """Which model drew the picture at an address: what no page can know."""
    return {
        f"/picture/{picture}": model
        for caption in study.document.captions
        for model, pictures in zip(study.document.models, caption.pictures, strict=True)
        for picture in pictures
    }


def test_a_study_holds_each_models_pictures_of_the_common_captions_without_what_names_the_model(
    study: Study, tmp_path: Path
) -> None:
    assert study.document.models == tuple(MODELS) and [c.text for c in study.document.captions] == CAPTIONS
    assert [len(study.items(question)) for question in QUESTIONS] == [12, 12, 3]
    assert len(study.pictures(study.items("diversity")[1], 2)) == 4
    for number, model in enumerate(MODELS):
        stored = study.store.local_path(f"pictures/{study.pictures(study.items('caption')[5], number)[0]}.png")
        original = tmp_path / "samples" / model / "0005.png"
        assert stored and not Image.open(stored).info and Image.open(original).info["prompt"] == CAPTIONS[1]
        np.testing.assert_array_equal(np.asarray(Image.open(stored)), np.asarray(Image.open(original)))
    again = make_study(str(tmp_path / "study"), sample_folders(tmp_path / "again"), QUESTIONS, seed=3)
    assert again.document == study.document  # the same command again is no other study
    with pytest.raises(UserError, match=r"study\.json"):
        make_study(str(tmp_path / "study"), sample_folders(tmp_path / "more"), QUESTIONS, seed=4)


def test_samples_that_cannot_be_compared_are_refused_in_one_line(tmp_path: Path) -> None:
    folders = sample_folders(tmp_path / "samples", pictures=2)
    first, second, third = folders

    def refused(match: str, chosen: dict[str, str], questions: tuple[str, ...] = ("caption",)) -> None:
        with pytest.raises(UserError, match=match) as found:
            make_study(str(tmp_path / "study"), chosen, questions, 0)
        assert "\n" not in str(found.value) and not (tmp_path / "study" / "study.json").exists()

    refused(
        "expected 4 pictures of a caption from every model, to judge diversity by, found 2", folders, ("diversity",)
    )
    refused("expected two models or more, found 1", {first: folders[first]})
    refused("expected photorealism or caption or diversity, found 'beauty'", folders, ("beauty",))
    refused("expected letters, .* found 'a/b'", {"a/b": folders[first], "c": folders[second]})
    refused(r"expected pictures such as 0000\.png, found none", {first: folders[first], "c": str(tmp_path / "no")})
    other = sample_folders(tmp_path / "other", captions=["another prompt"])
    refused("expected captions in common, found none", {first: folders[first], "c": other[first]})
    larger = sample_folders(tmp_path / "larger", side=128)
    refused(r"0000\.png: expected 64 x 64 px, as before it, found 128 x 128 px", folders | {third: larger[third]})
    (Path(folders[second]) / "0001.png").write_bytes(png_bytes(Image.new("RGB", (64, 64)), {}))
    refused(r"0001\.png: expected the prompt in its metadata", folders)
    (Path(folders[second]) / "0001.png").write_bytes(b"GIF89a, cut")
    refused(r"0001\.png: expected a picture file", folders)


def test_judges_answer_blind_balanced_and_never_twice_and_go_on_where_they_stopped(study: Study) -> None:
    models, order = owners(study), list(MODELS)
    with served({"judge": judging_routes(study)}) as base:
        questions = ask(f"{base}/api/judge")
        assert [(q["question"], q["comparisons"]) for q in questions] == list(zip(QUESTIONS, (36, 36, 9), strict=True))
        turn = ask(f"{base}/api/judge/begin", {"judge": "Ada", "question": "caption"})
        for _ in range(7):
            given = {"judge": "Ada", "token": turn["token"], "turn": turn["turn"], "choice": "right", "ms": 900}
            turn = ask(f"{base}/api/judge/answer", given)
            repeated = ask(f"{base}/api/judge/answer", given)  # a page that heard no answer sends it again
            assert repeated == turn
    with served({"judge": judging_routes(study)}) as base:  # another process, another day
        seen = judge_all(base, "Ada", "caption", models, order)
        assert seen[0]["answered"] == 7 and len(seen) == 36 - 7
        judge_all(base, "Ada", "diversity", models, order)
    answers = [one for one in Answers(study).all() if one.question == "caption"]
    pairs = [(one.item, *sorted((one.left, one.right))) for one in answers]
    assert len(set(pairs)) == len(pairs) == 36
    assert sorted(Counter((first, second) for _, first, second in pairs).values()) == [12, 12, 12]
    assert sorted(Counter((one.left, one.right) for one in answers).values()) == [6] * 6
    assert len(Answers(study).all()) == 36 + 9


def test_nothing_that_a_page_gets_names_a_model_or_a_place(study: Study, tmp_path: Path) -> None:
    with served({"judge": judging_routes(study)}) as base:
        turn = ask(f"{base}/api/judge/begin", {"judge": "Ada", "question": "diversity"})
        assert len(turn["left"]) == len(turn["right"]) == 4
        paths = ["/", "/judge", "/static/judge.js", "/static/page.js", "/static/style.css", "/static/icon.svg"]
        answers = [fetch(base + path) for path in [*paths, "/api/judge", *turn["left"], *turn["right"]]]
        assert {status for status, _, _ in answers} == {200}
        sent = b"".join(body + json.dumps(headers).encode() for _, body, headers in answers) + json.dumps(turn).encode()
        for name in [*MODELS, "s3://", str(tmp_path)]:
            assert name.encode() not in sent
        script = b"".join(body for _, body, _ in answers[:6])
        assert b"http://" not in script.replace(b"http://www.w3.org/2000/svg", b"") and b"https://" not in script
        hidden = ("/picture/0123", "/picture/..%2Fstudy.json", "/static/../app.py", "/study.json", "/sample", "/docs")
        for path in hidden:
            assert fetch(base + path)[0] == 404
        assert "default-src 'self'" in answers[0][2]["content-security-policy"]


def test_other_sites_wrong_requests_and_a_page_opened_twice_are_refused_in_one_line(study: Study) -> None:
    with served({"judge": judging_routes(study)}) as base:
        begin, answer = f"{base}/api/judge/begin", f"{base}/api/judge/answer"
        ada = {"judge": "Ada", "question": "caption"}
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            assert fetch(begin, ada, headers)[0] == 403
        assert fetch(begin, ada, {"Origin": base})[0] == 200
        assert "printable" in refusal(begin, {**ada, "judge": " "})
        assert "photorealism or caption or diversity" in refusal(begin, {**ada, "question": "beauty"})
        assert refusal(begin, {"judge": "Ada"}).startswith("question: ")

        first, second = ask(begin, ada), ask(begin, ada)  # two tabs
        given = {"judge": "Ada", "turn": first["turn"], "choice": "left", "ms": 5}
        line = refusal(answer, {**given, "token": first["token"]})
        assert line.startswith("judge Ada: expected one open page, found a newer one; go on there, or reload")
        assert ask(answer, {**given, "token": second["token"]})["answered"] == 1
        assert "choice" in refusal(answer, {**given, "token": second["token"], "choice": "both"})
        assert "ms" in refusal(answer, {**given, "token": second["token"], "ms": -1})
    assert len(Answers(study).all()) == 1


def test_judges_at_the_same_time_lose_no_answer(study: Study) -> None:
    models, errors = owners(study), []
    with served({"judge": judging_routes(study)}) as base:

        def judge(name: str) -> None:
            try:
                judge_all(base, name, "photorealism", models, list(MODELS))
            except Exception as error:  # noqa: BLE001  (shown by the assertion below)
                errors.append(error)

        threads = [threading.Thread(target=judge, args=[name]) for name in ("Ada", "Grace", "Mary")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    answers = Answers(study).all()
    assert Counter(one.judge for one in answers) == dict.fromkeys(("Ada", "Grace", "Mary"), 36)
    assert len({(one.judge, one.item, *sorted((one.left, one.right))) for one in answers}) == 3 * 36


def test_results_rate_the_models_and_say_where_answers_decide_nothing(study: Study, cli: Any, tmp_path: Path) -> None:
    uri = study.store.uri
    code, document, _ = cli("judge", "results", uri)
    assert code == 1 and document["error"].startswith(f"study {uri}: expected answers, found none; have it judged:")
    best, middle, worst = MODELS
    with served({"judge": judging_routes(study)}) as base:
        judge_all(base, "Ada", "caption", owners(study), [best, middle, worst])
        judge_all(base, "Grace", "caption", owners(study), [middle, best, worst])
        judge_all(base, "Mary", "caption", owners(study), [best, worst, middle])
        judge_all(base, "Ada", "photorealism", owners(study), [best, middle, worst])

    code, document, errors = cli("judge", "results", uri, "--out", str(tmp_path / "out"))
    assert code == 0
    caption = document["questions"]["caption"]
    assert [row["model"] for row in caption["models"]] == [best, middle, worst]
    assert (caption["answers"], caption["ties"], caption["judges"]) == (108, 3, 3)
    assert abs(sum(row["elo"] for row in caption["models"])) < 1e-6
    assert all(row["elo_low"] < row["elo"] < row["elo_high"] for row in caption["models"])
    assert sum(row["win_rate"] * row["comparisons"] for row in caption["models"]) == pytest.approx(108)
    assert cli("judge", "results", uri)[1]["questions"] == document["questions"]  # seeded

    photorealism = document["questions"]["photorealism"]
    assert "rating of" in photorealism["undecided"] and "minus infinity" in errors
    assert all(row["elo"] is None and row["win_rate"] is not None for row in photorealism["models"])
    assert "diversity" not in document["questions"]

    rows = list(csv.DictReader((tmp_path / "out" / "answers.csv").open()))
    assert len(rows) == 144 and {row["left"] for row in rows} == set(MODELS)
    assert {row["caption"] for row in rows} == set(CAPTIONS)
    assert Image.open(tmp_path / "out" / "elo.png").size[0] > 600
    assert json.loads((tmp_path / "out" / "results.json").read_text())["answers"] == 144


def test_the_commands_make_a_study_and_refuse_a_page_without_anything_to_show(cli: Any, tmp_path: Path) -> None:
    models = [f"--model={name}={folder}" for name, folder in sample_folders(tmp_path / "samples").items()]
    code, made, _ = cli("judge", "new", str(tmp_path / "made"), *models, "--question", "diversity", "--seed", "5")
    assert code == 0 and made["comparisons"] == {"diversity": 9} and made["pictures"] == 36 and made["px"] == "64x64"
    assert open_study(str(tmp_path / "made")).document.seed == 5
    assert cli("judge", "new", str(tmp_path / "other"), "--model", "nameless")[0] == 2
    assert run(["page"]) == 2 and cli("judge", "results", "any", "--tracking", "a-folder")[0] == 2
    assert cli("judge", "new", str(tmp_path / "other"), *models, models[0])[0] == 2
    assert "make one: glidepath judge new" in cli("judge", "results", str(tmp_path / "none"))[1]["error"]


def test_the_page_is_served_on_loopback_until_a_signal_and_a_port_in_use_is_refused(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "cluster.cli", "page", "--study", study.store.uri, "--port", "0", "--json"]
    page = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert page.stdout
        document = json.loads(page.stdout.readline())
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)", document["address"])
        assert found and document["pages"] == ["judge"] and fetch(f"{found[0]}/judge")[0] == 200
        assert run(["page", "--study", study.store.uri, "--port", found[1]]) == 1
        assert f"port {found[1]} of 127.0.0.1: expected a free port" in capsys.readouterr().err
        with socket.socket() as elsewhere:  # not on the machine's other addresses
            assert elsewhere.connect_ex(("127.0.0.2", int(found[1]))) != 0
    finally:
        page.terminate()
        assert page.wait(60) == 0
    assert page.stdout.read() == ""  # one document


def test_answers_of_another_study_are_not_mixed_in(study: Study, tmp_path: Path) -> None:
    path = Answers(study).path
    other = make_study(str(tmp_path / "other"), sample_folders(tmp_path / "more"), ("caption",), seed=4)
    path.replace(tmp_path / "other" / "answers.sqlite")
    with pytest.raises(UserError, match=r"expected answers of study .*, found of study"):
        Answers(other)
    (tmp_path / "study" / "answers.sqlite").write_bytes(b"no database, and long enough to be looked at" * 99)
    with pytest.raises(UserError, match="expected a database"):
        Answers(study)


def test_the_answers_of_a_study_without_a_folder_lie_in_the_state_folder(
    study: Study, state_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(study.store), "local_path", lambda self, key: None)  # as a bucket answers
    answers = Answers(study)
    turn = answers.begin("Ada", "caption")
    answers.answer("Ada", turn.token, turn.turn, "left", 5)
    assert answers.path.is_relative_to(state_folder) and len(Answers(study).all()) == 1
