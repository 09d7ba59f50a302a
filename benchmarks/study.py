"""What docs/study.sh needs besides commands: a judge that is a program, and what is kept of the study for its page.

    python benchmarks/study.py photographs --clip CHECKPOINT DATASET...
    python benchmarks/study.py judge PAGE.json --clip CHECKPOINT
    python benchmarks/study.py pages PAGE.json --compared HTML --out FOLDER
    python benchmarks/study.py keep HOME

`photographs` scores real pictures with their own captions and with others': what the CLIP can tell at best. `judge`
answers the judging page over HTTP, as a person's browser does: it sees the two pictures and the caption, and
chooses the picture with the higher cosine by a noised CLIP. `pages` takes screenshots of the judging page, the sampling
page and the page of compared runs; it needs Chromium. `keep` writes `benchmarks/results/study/` and the study's
pictures in `docs/pictures/`. Called by docs/study.sh.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline.images import Pixels
from data_pipeline.loader import Column, read_rows
from data_pipeline.shards import open_dataset
from trainer.evaluation.clip_score import NoisedClipScorer
from trainer.evaluation.feature_networks import (
    FeatureNetwork,
    NoisedClipNetwork,
    NoisedClipSettings,
    load_network,
)
from trainer.evaluation.figures import clip_scores
from trainer.run import dataset_uri

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURES = ROOT / "benchmarks" / "results" / "study", ROOT / "docs" / "pictures"
SCORED_SIDE = 64  # of the pictures that the scorer takes
SIDES = ("left", "right")
MODELS = ("without", "with", "with-guided")  # folders of samples
COLUMNS, SHOWN_PX = 10, 96  # 32 px, each as a square of nine
WINDOW = (1200, 800)
DRAWN_WITHIN_S = 300.0  # pictures on the sampling page
COMPARED_PX = 1740  # of the page of compared runs: down to its curves
WIDEST, TALLEST, COLOURS = 1000, 1740, 128  # of a kept picture
PROMPT = "A brown dog in running on grass ."  # as a person wrote it for a training picture


def main() -> None:
    arguments = argparse.ArgumentParser()
    commands = arguments.add_subparsers(dest="command", required=True)
    scoring = commands.add_parser("photographs")
    scoring.add_argument("datasets", nargs="+")
    scoring.add_argument("--clip", required=True)
    judging = commands.add_parser("judge")
    judging.add_argument("page", type=Path, help="what `glidepath page --json` wrote")
    judging.add_argument("--clip", required=True)
    showing = commands.add_parser("pages")
    showing.add_argument("page", type=Path)
    showing.add_argument("--compared", type=Path, required=True)
    showing.add_argument("--out", type=Path, required=True)
    keeping = commands.add_parser("keep")
    keeping.add_argument("home", type=Path)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    if options.command == "photographs":
        network = load_network(NoisedClipSettings(kind="noised-clip", checkpoint=options.clip), "cpu")
        print(json.dumps({dataset: photographs(dataset, network) for dataset in options.datasets}))
    elif options.command == "judge":
        judge(json.loads(options.page.read_text())["address"], NoisedClipScorer(options.clip))
    elif options.command == "pages":
        pages(json.loads(options.page.read_text())["address"], options.compared, options.out)
    else:
        keep(options.home)


def photographs(uri: str, network: FeatureNetwork) -> dict[str, float]:
    """The CLIP scores of a dataset's real pictures, as `glidepath evaluate` takes those of drawn ones."""
    assert isinstance(network, NoisedClipNetwork)
    dataset = open_dataset(dataset_uri(uri))
    rows = {shard: np.arange(count, dtype=np.int64) for shard, count in enumerate(dataset.shard_rows)}
    images, captions = [], []
    for shard, numbers in rows.items():
        columns = [Column("base", "image64"), Column("base", "caption")]
        found = read_rows(dataset, columns, np.full_like(numbers, shard), numbers)
        images.append(network.features(found["image64"].reshape(-1, SCORED_SIDE, SCORED_SIDE, 3)))
        captions += found["caption"]
    pictures, texts = np.concatenate(images), network.text_features(captions)
    return clip_scores(pictures, texts, captions)


def judge(address: str, scorer: NoisedClipScorer) -> None:
    """Answer the question `caption` until every comparison is answered; the same again goes on."""
    turn = ask(f"{address}/api/judge/begin", {"judge": "noised-clip", "question": "caption"})
    while not turn["done"]:
        began = time.monotonic()
        shown = np.stack([scored_pixels(fetch(f"{address}{turn[side][0]}")) for side in SIDES])
        left, right = scorer([turn["caption"]] * len(SIDES), shown)["clip_similarity"]
        choice = "tie" if left == right else SIDES[int(right > left)]
        about = {"judge": "noised-clip", "token": turn["token"], "turn": turn["turn"], "choice": choice}
        turn = ask(f"{address}/api/judge/answer", {**about, "ms": int(1000 * (time.monotonic() - began))})
    print(f"{turn['answered']} comparisons answered")


def scored_pixels(png: bytes) -> Pixels:
    """uint8 [64, 64, 3]: every pixel of a smaller picture as a square, which the scorer's area filter undoes."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    return np.asarray(picture.resize((SCORED_SIDE, SCORED_SIDE), Image.Resampling.NEAREST))


def fetch(url: str, body: Any = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


def ask(url: str, body: Any) -> Any:
    return json.loads(fetch(url, body))


def pages(address: str, compared: Path, out: Path) -> None:
    """Screenshots of the pages with what the study left on them."""
    sys.path.insert(0, str(ROOT / "tests"))
    import browser

    browser.DEADLINE_S = DRAWN_WITHIN_S
    with TemporaryDirectory() as profile, browser.browser(Path(profile)) as page:
        page.size(*WINDOW)
        page.open(f"{address}/judge")
        page.wait("document.querySelectorAll('#questions label').length === 1")
        page.write("#judge", "a person")
        page.click("#start button.main")
        page.wait("!document.querySelector('#stage').hidden && document.querySelector('#left img')?.complete")
        page.screenshot(out / "judging-page.png")
        page.open(f"{address}/sample")
        page.wait("document.querySelectorAll('#model option').length === 1")
        page.write("[name=prompt]", PROMPT)
        page.write("[name=steps]", "20")
        page.click("#draw")
        page.wait("document.querySelector('.job .pictures') && [...document.images].every((one) => one.complete)")
        page.screenshot(out / "sampling-page.png")
        page.open(compared.resolve().as_uri())
        page.run("[...document.querySelectorAll('tr')].find((row) => row.innerText.startsWith('store'))?.remove()")
        page.size(WINDOW[0], COMPARED_PX)
        page.screenshot(out / "comparing-page.png")


def keep(home: Path) -> None:
    """The documents that the commands printed, without this machine's paths, and the pictures, made small."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for path in sorted((home / "figures").glob("*.json")):
        (RESULTS / path.name).write_text(path.read_text().replace(str(home.resolve()), "HOME"))
    drawn_grid(home / "samples").save(home / "figures" / "grids.png")
    for path in sorted((home / "figures").glob("*.png")):
        picture = Image.open(path).convert("RGB")
        picture.thumbnail((WIDEST, TALLEST), Image.Resampling.LANCZOS)
        picture.quantize(COLOURS).save(PICTURES / f"study-{path.name}", optimize=True)


def drawn_grid(samples: Path) -> Image.Image:
    """What each model, a row, drew for the first captions, a column each."""
    grid = Image.new("RGB", (COLUMNS * SHOWN_PX, len(MODELS) * SHOWN_PX))
    for row, model in enumerate(MODELS):
        for column in range(COLUMNS):
            picture = Image.open(samples / model / f"{column:04d}.png").resize(
                (SHOWN_PX, SHOWN_PX), Image.Resampling.NEAREST
            )
            grid.paste(picture, (column * SHOWN_PX, row * SHOWN_PX))
    return grid


if __name__ == "__main__":
    main()
