"""docs/adding-a-recipe.md, done as it says: its code trains, learns, resumes to the bit and draws."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from cluster.cli import run as glidepath
from data_pipeline.errors import UsageError
from data_pipeline.storage import LocalStore
from trainer.checkpoint.manifest import Manifest, committed, read_manifest
from trainer.engine.group import Group
from trainer.recipes import RECIPES, parse_train_config
from trainer.run import prepare_run, train

Values = Callable[..., dict[str, Any]]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding-a-recipe.md"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's module, under the name that the page gives it."""
    *code, named = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "rectified_flow.py").write_text("\n\n".join(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("rectified_flow")
    for name, entry in eval(f"{{{named}}}", vars(module)).items():
        monkeypatch.setitem(RECIPES, name, entry)
    yield
    del sys.modules["rectified_flow"]


def test_the_recipe_of_the_page_trains_resumes_to_the_bit_and_draws(
    recipe: None, train_values: Values, tiny_model: dict[str, Any], dataset_uri: str, tmp_path: Path, one_thread: None
) -> None:
    (preset,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    settings = yaml.safe_load(preset.replace("1e-3", "0.001"))
    heldout = {"dataset": dataset_uri, "images": 8}
    changes = {name: settings[name] for name in ("recipe", "lr", "ema", "caption_dropout", "samples")}
    changes["samples"]["sampling"]["spacing"] = 4
    changes |= {"model": tiny_model | settings["model"], "heldout": heldout}

    events: list[dict[str, Any]] = []

    def manifest(run: str, *ends: int) -> Manifest:
        for images in ends:
            values = train_values(run, **changes, images=images, checkpoint={"every_images": 48})
            config = parse_train_config(values, "test")
            train(config.model_dump(mode="json"), prepare_run(config), Group(), events.append)
        store = LocalStore(Path(values["store"]))
        return read_manifest(store, committed(store)[0].manifest_key)

    through = manifest("through", 96)
    (ended,) = [event for event in events if event.get("heldout_at_0")]
    assert ended["heldout"]["total"] < 0.95 * ended["heldout_at_0"]["total"] and ended["samples"]
    assert [part.digest for part in manifest("resumed", 48, 96).parts] == [part.digest for part in through.parts]

    store = train_values("through")["store"]
    command = ["sample", store, "--prompt", "a red square", "--prompt", "a dog", "--spacing", "4"]
    assert glidepath([*command, "--out", str(tmp_path / "both")]) == 0
    assert glidepath([*command[:2], *command[4:], "--first-number", "1", "--out", str(tmp_path / "one")]) == 0
    both, one = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("both/0001.png", "one/0001.png"))
    assert one.std() > 0 and abs(both - one).max() <= 1

    with pytest.raises(UsageError, match=r"model\.learned_variance false"):
        parse_train_config(train_values(**changes | {"model": tiny_model}), "test")
