"""Filters measured: whom the language filter drops, and what sets icons and single colours apart from photographs.

    python -m benchmarks.filters --corpus FOLDER --web PARQUET

`--corpus`: tars of photographs with English captions; `--web`: a parquet of web captions (column TEXT). Names of emoji
in 14 languages, from the package emoji, stand for captions whose language is known. Writes results/filters.json.
"""

from __future__ import annotations

import argparse
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from emoji import EMOJI_DATA
from emoji.unicode_codes import load_from_json

from benchmarks.measuring import write_result
from data_pipeline import demo, images
from data_pipeline.captions import normalise
from data_pipeline.filters import Facts, FilterSettings, reason_to_drop
from data_pipeline.filters.pixels import deviation, flat_share
from data_pipeline.records import Record

LANGUAGES = ("en", "de", "fr", "es", "pt", "it", "id", "tr", "ru", "ar", "fa", "zh", "ja", "ko")
CONFIDENCES = (0.4, 0.6, 0.8)
QUANTILES = (0.0, 0.001, 0.01, 0.5, 0.99, 0.999, 1.0)
ICONS = 380


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--web", type=Path, required=True)
    arguments = parser.parse_args()
    captions, pictures = [], []
    for name, data in _members(arguments.corpus):
        if name.endswith(".txt"):
            captions.append(normalise(data))
        else:
            pictures.append(_thumbnail(data))
    web = [normalise(text.encode()) for text in pyarrow.parquet.read_table(arguments.web)["TEXT"].to_pylist() if text]
    result = {
        "english_photograph_captions": _dropped(captions),
        "web_captions": _dropped(web),
        "names_of_emoji": {language: _names(language) for language in LANGUAGES},
        "photographs": _figures(pictures),
        "emoji": _figures(_icons()),
    }
    write_result("filters", result)


def _dropped(captions: list[str]) -> dict[str, Any]:
    """How many captions the filter for English drops at each confidence."""
    dropped = {}
    for confidence in CONFIDENCES:
        limits = FilterSettings(preset="none", languages=("en",), language_confidence=confidence).resolved()
        dropped[str(confidence)] = sum(reason_to_drop(Facts(1, 1, 1, text), limits) is not None for text in captions)
    return {"captions": len(captions), "dropped_at_confidence": dropped}


def _names(language: str) -> dict[str, Any]:
    """`_dropped` by length, in characters: less than 20, 20 to 29, 30 or more."""
    if language != "en":
        load_from_json(language)
    names = {about[language].strip(":").replace("_", " ") for about in EMOJI_DATA.values() if language in about}
    groups = {"0": (0, 20), "20": (20, 30), "30": (30, 10**6)}
    return {
        label: _dropped(sorted(name for name in names if first <= len(name) < end))
        for label, (first, end) in groups.items()
    }


def _figures(pictures: Iterable[images.Pixels]) -> dict[str, Any]:
    both = np.array([(deviation(picture), flat_share(picture)) for picture in pictures])
    quantiles = np.quantile(both, QUANTILES, axis=0).round(3).T.tolist()
    return {
        "pictures": len(both),
        **{
            name: dict(zip(map(str, QUANTILES), row, strict=True))
            for name, row in zip(("deviation", "flat"), quantiles, strict=True)
        },
    }


def _members(corpus: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(corpus.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith((".txt", ".jpg")):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield member.name, file.read()


def _thumbnail(data: bytes) -> images.Pixels:
    return images.area_resize(images.centre_crop(images.decode(data, 128)), 64)


def _icons() -> Iterator[images.Pixels]:
    for record, _ in zip(demo.read_slice("heldout", 0), range(ICONS), strict=False):
        assert isinstance(record, Record)
        yield _thumbnail(record.image_bytes)


if __name__ == "__main__":
    main()
