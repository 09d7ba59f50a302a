"""The aesthetic score: ratings as AVA has them, a ridge in closed form, and files that do not belong together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from sklearn.linear_model import Ridge

from data_pipeline.errors import UserError
from data_pipeline.manifests import sha256_of
from trainer.evaluation.feature_networks import Float32, Identity
from trainer.evaluation.linear_probe import (
    Probe,
    ProbeSettings,
    aesthetic_scores,
    fit_probe,
    read_ava,
    ridge,
    write_features,
)
from trainer.recipes.recipe import Pixels

CLIP = Identity("clip", "a" * 64, "clip", "clip.pt")


class MeanColour:
    """A network that is its own proof: features are what is known of the pictures."""

    identity = CLIP

    def features(self, pictures: Sequence[Pixels] | Pixels) -> Float32:
        return np.array([[*picture.mean(axis=(0, 1)), 99] for picture in pictures], np.float32)


def ava_line(number: int, id_: int, mean: float) -> str:
    """210 ratings on the two whole numbers around a mean."""
    low = int(mean)
    counts = [0] * 10
    counts[low] = round(210 * (mean - low))
    counts[low - 1] = 210 - counts[low]
    return " ".join(map(str, [number, id_, *counts, 1, 22, 1396]))


@pytest.fixture
def files(tmp_path: Path) -> ProbeSettings:
    """300 plain pictures, rated the better the redder, of which 50 have no rating."""
    rng = np.random.default_rng(0)
    pictures = np.broadcast_to(rng.integers(0, 256, (300, 1, 1, 3), dtype=np.uint8), (300, 4, 4, 3))
    ids = rng.permutation(10_000)[:300]
    write_features(tmp_path / "ava.safetensors", MeanColour(), ids.tolist(), iter(np.array_split(pictures, 7)))
    lines = [
        ava_line(number, id_, 3 + 5 * float(picture[0, 0, 0]) / 255 + rng.normal() * 0.2)
        for number, (id_, picture) in enumerate(zip(ids[:250], pictures, strict=False), 1)
    ]
    (tmp_path / "AVA.txt").write_text("\n".join(lines))
    digest = sha256_of(tmp_path / "ava.safetensors")
    return ProbeSettings(features=tmp_path / "ava.safetensors", sha256=digest, ratings=tmp_path / "AVA.txt")


def test_ratings_are_the_means_of_avas_counts(tmp_path: Path) -> None:
    (tmp_path / "AVA.txt").write_text("1 953619 0 1 5 17 38 36 15 6 5 1 1 22 1396\n2 7 0 0 0 0 0 0 0 0 0 3 0 0 0\n")
    found = read_ava(tmp_path / "AVA.txt")  # the first line is the dataset's own
    assert found == {953619: pytest.approx((2 + 15 + 68 + 190 + 216 + 105 + 48 + 45 + 10) / 124), 7: 10.0}


def test_the_ridge_is_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(60, 9)) + 3, rng.normal(size=60) + 5
    weights, bias = ridge(x, y, 0.05)
    expected = Ridge(alpha=0.05 * 60).fit(x, y)  # its loss is a sum over pictures
    np.testing.assert_allclose(weights, expected.coef_, rtol=1e-8)
    assert bias == pytest.approx(expected.intercept_)


def test_a_probe_tells_pictures_apart_as_people_did(files: ProbeSettings) -> None:
    probe = fit_probe(files, CLIP)
    assert isinstance(probe, Probe) and 200 < probe.rated < 250 and probe.correlation > 0.9
    red, blue = (np.broadcast_to(np.array(rgb, np.uint8), (1, 4, 4, 3)) for rgb in ((220, 90, 90), (30, 90, 90)))
    better, worse = (aesthetic_scores(probe, MeanColour().features(picture), CLIP)[0] for picture in (red, blue))
    assert better > worse + 1


def test_files_that_do_not_belong_together_are_refused_in_one_line(files: ProbeSettings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ava.safetensors: expected sha256 0{12}, found [0-9a-f]{12}; "):
        fit_probe(files.model_copy(update={"sha256": "0" * 64}), CLIP)
    other = Identity("noised-clip", "b" * 64, "area", "run")
    with pytest.raises(UserError, match="expected features by noised-clip-bbbbbbbb, found those by clip-aaaaaaaa; "):
        fit_probe(files, other)
    with pytest.raises(UserError, match=r"AVA.txt: line 2: expected 15 numbers.*, found 'not ratings'; "):
        bad = tmp_path / "bad" / "AVA.txt"
        bad.parent.mkdir()
        bad.write_text(ava_line(1, 1, 5.5) + "\nnot ratings")
        fit_probe(files.model_copy(update={"ratings": bad}), CLIP)
    with pytest.raises(UserError, match="with ratings, found 0 in both files; "):
        strange = tmp_path / "strange.txt"
        strange.write_text(ava_line(1, 999_999, 5.5))
        fit_probe(files.model_copy(update={"ratings": strange}), CLIP)
    with pytest.raises(UserError, match="expected features and ids with the network's name"):
        safetensors.numpy.save_file({"x": np.zeros(3)}, plain := tmp_path / "plain.safetensors")
        fit_probe(files.model_copy(update={"features": plain, "sha256": sha256_of(plain)}), CLIP)
