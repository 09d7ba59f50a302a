"""What tests of the local pages share: a study of drawn pictures, and the app on a real server."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter
from PIL import Image

from cluster.pages.app import make_app
from cluster.pages.serving import listen, server_of
from trainer.engine.group import Group
from trainer.pictures import png_bytes
from trainer.recipes import parse_train_config
from trainer.run import prepare_run, train

# By model its hue. Names that nothing else on a page could hold.
MODELS = {"zebrafish-cfg": 0.0, "quokka-clip": 0.35, "axolotl-plain": 0.7}
CAPTIONS = [
    "a hedgehog using a calculator",
    "a boat in the canals of Venice, “at dusk”",
    "<b>a red cube</b> & a sphere",
]


def drawn(hue: float, seed: int, side: int = 64) -> Image.Image:
    """A picture that differs by model and seed: waves in a hue."""
    y, x = np.mgrid[:side, :side] / side
    rng = np.random.default_rng(seed)
    wave = np.sin(2 * np.pi * (x * rng.uniform(1, 3) + rng.random())) + np.cos(2 * np.pi * y * rng.uniform(1, 3))
    hsv = np.stack([np.full_like(x, hue) + 0.05 * wave, np.full_like(x, 0.55), 0.62 + 0.18 * wave], axis=-1)
    return Image.fromarray((hsv.clip(0, 1) * 255).astype(np.uint8), "HSV").convert("RGB")


def tiny_models(folder: Path, dataset_uri: str, tiny_model: dict[str, Any]) -> dict[str, str]:
    """The stores of a base model, one for inpainting and an upsampler, each a large update away from its start."""
    upsampling = {**tiny_model, "image_size": 32, "low_resolution": 16, "attention_resolutions": []}
    kinds: dict[str, dict[str, Any]] = {
        "base": {"recipe": "glide_base", "model": tiny_model, "caption_dropout": 0.2},
        "inpaint": {"recipe": "inpaint_base", "model": {**tiny_model, "inpaint": True}, "caption_dropout": 0.2},
        "upsampler": {"recipe": "glide_upsampler", "model": upsampling},
    }
    for name, changes in kinds.items():
        values = {"run": name, "store": str(folder / name), "dataset": dataset_uri, "images": 8, "batch": 8}
        config = parse_train_config({**values, "lr": 0.04, "ema": 0.5, **changes}, name)
        train(config.model_dump(mode="json"), prepare_run(config), Group(), lambda event: None)
    return {name: str(folder / name) for name in kinds}


def sample_folders(root: Path, pictures: int = 4, side: int = 64, captions: list[str] = CAPTIONS) -> dict[str, str]:
    """By model, a folder as `glidepath sample` leaves it; the metadata names the model's checkpoint."""
    folders = {}
    for model, hue in MODELS.items():
        folder = root / model
        folder.mkdir(parents=True)
        for number in range(pictures * len(captions)):
            prompt = captions[number // pictures]
            about = {"prompt": prompt, "number": str(number), "checkpoint": f"s3://runs/{model}"}
            (folder / f"{number:04d}.png").write_bytes(png_bytes(drawn(hue, number, side), about))
        (folder / "grid.png").write_bytes(b"not of the study")
        folders[model] = str(folder)
    return folders


@contextmanager
def served(pages: Mapping[str, APIRouter]) -> Iterator[str]:
    """The address of the app on a free port of loopback, by the server that `glidepath page` runs."""
    with listen(0) as listener:
        server = server_of(make_app(pages))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def fetch(url: str, body: Any = None, headers: Mapping[str, str] | None = None) -> tuple[int, bytes, Mapping[str, str]]:
    """(status, body, headers) of a request; with `body` a POST of JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read(), lowered(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), lowered(error.headers)


def lowered(headers: Message) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def ask(url: str, body: Any = None) -> Any:
    """What the page's scripts get from the server."""
    status, answer, _ = fetch(url, body)
    assert status == 200, answer
    return json.loads(answer)


def refusal(url: str, body: Any) -> str:
    """The one line of a refused request."""
    status, answer, _ = fetch(url, body)
    assert status in (409, 413, 422), (status, answer)
    line = json.loads(answer)["error"]
    assert "\n" not in line
    return str(line)
