"""A study: pictures of several models for the same captions, and what people are asked about them.

Always holds: all pictures have one size and are stored under a digest of their pixels, without the text that says who
drew them; `study.json` appears last and never changes. Called by the commands `judge` and `page`.

A study's place, a folder or a bucket, holds `study.json` and `pictures/<id>.png`.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from PIL import Image
from pydantic import Field

from data_pipeline.config import Settings, parse
from data_pipeline.errors import UsageError, UserError
from data_pipeline.images import ImageError, Pixels, decode
from data_pipeline.manifests import commit, read
from data_pipeline.storage import ObjectNotFound, ObjectStore, open_store
from trainer.pictures import png_bytes

STUDY = "study.json"
QUESTIONS = {  # GLIDE, section 5.1; of diversity unCLIP, section 5.2
    "photorealism": "Which picture is more photorealistic?",
    "caption": "Which picture matches the caption better?",
    "diversity": "Which set of pictures is more diverse?",
}
DIVERSITY = "diversity"
GRID_SIDES = (4, 3, 2)  # pictures along a side of a set for diversity: the largest that all models have pictures for
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # also part of a metric's name
SAMPLE = re.compile(r"\d{4,}\.png")  # of `glidepath sample`, without its grid and what an upsampler enlarged

Question = Literal["photorealism", "caption", "diversity"]


class Caption(Settings):
    """`pictures`: by model, ids of its pictures; the k-th ones are shown beside each other."""

    text: str
    pictures: tuple[tuple[str, ...], ...]


class StudyDocument(Settings):
    """`study.json`. `pixels`: height and width of every picture."""

    version: Literal[1]
    sha256: str
    seed: int
    questions: Annotated[tuple[Question, ...], Field(min_length=1)]
    models: Annotated[tuple[str, ...], Field(min_length=2)]
    pixels: tuple[int, int]
    captions: Annotated[tuple[Caption, ...], Field(min_length=1)]


class Item(NamedTuple):
    """What one comparison is about: a caption, and which of its pictures, the same for every model."""

    caption: int
    pictures: range


@dataclass(frozen=True)
class Study:
    """An opened study."""

    store: ObjectStore
    document: StudyDocument

    def items(self, question: str) -> list[Item]:
        """All items of a question, in the order of their numbers."""
        counts = [min(map(len, caption.pictures)) for caption in self.document.captions]
        if question == DIVERSITY:
            return [Item(number, range(side**2)) for number, count in enumerate(counts) if (side := grid_side(count))]
        return [Item(number, range(k, k + 1)) for number, count in enumerate(counts) for k in range(count)]

    def pictures(self, item: Item, model: int) -> list[str]:
        """Ids of what is shown of a model, by its number."""
        own = self.document.captions[item.caption].pictures[model]
        return [own[k] for k in item.pictures]

    def ids(self) -> frozenset[str]:
        """Of all its pictures."""
        return frozenset(picture for caption in self.document.captions for own in caption.pictures for picture in own)

    def png(self, picture: str) -> bytes:
        """A picture of the study. Raises UserError where it is gone."""
        try:
            return self.store.get(picture_key(picture))
        except ObjectNotFound:
            name = f"study {self.store.uri}"
            raise UserError(name, f"picture {picture}", "nothing there", "make the study again elsewhere") from None


def picture_key(picture: str) -> str:
    return f"pictures/{picture}.png"


def grid_side(count: int) -> int:
    """Pictures along a side of a set out of `count` pictures; 0 for too few."""
    return next((side for side in GRID_SIDES if side**2 <= count), 0)


def open_study(uri: str) -> Study:
    """The study in a place. Raises UserError if there is none or it is damaged."""
    store = open_store(uri)
    document = read(store, STUDY)
    if document is None:
        raise UserError(
            f"study {uri}", STUDY, "none there", "make one: glidepath judge new STUDY --model NAME=FOLDER …"
        )
    return Study(store, parse(StudyDocument, document, f"study {uri}"))


def make_study(uri: str, folders: Mapping[str, str], questions: Sequence[str], seed: int) -> Study:
    """Copy the models' samples into a new study. `folders`: by model, a folder or bucket of `glidepath sample`.

    Captions that a model lacks are left out. Raises UserError for fewer than two models, pictures of mixed size or
    without a prompt, no caption in common, and a place that holds another study.
    """
    _check(folders, questions)
    store, size = open_store(uri), None
    store.check()
    drawn: dict[str, dict[str, list[str]]] = {}
    for model, folder in folders.items():
        drawn[model] = {}
        for name, prompt, pixels in samples_in(folder):
            if size and pixels.shape[:2] != size:
                expected, found = (f"{width} x {height} px" for height, width in (size, pixels.shape[:2]))
                raise UserError(f"picture {name}", f"{expected}, as before it", found, "compare pictures of one size")
            size = size or pixels.shape[:2]
            drawn[model].setdefault(prompt, []).append(_stored(store, pixels))
    assert size
    document = {
        "version": 1,
        "seed": seed,
        "questions": list(questions),
        "models": list(folders),
        "pixels": list(size),
        "captions": [
            {"text": prompt, "pictures": [drawn[model][prompt] for model in folders]}
            for prompt in _common(drawn, questions)
        ],
    }
    commit(store, STUDY, document)
    return open_study(uri)


def _check(folders: Mapping[str, str], questions: Sequence[str]) -> None:
    if len(folders) < 2:
        raise UsageError("judge new", "two models or more", f"{len(folders)}", "add --model NAME=FOLDER")
    for name in folders:
        if not MODEL_NAME.fullmatch(name):
            expected = "letters, digits, dots, dashes and underscores, 64 at most"
            raise UsageError("--model", expected, repr(name), "choose another name")
    for question in questions:
        if question not in QUESTIONS:
            raise UsageError("--question", " or ".join(QUESTIONS), repr(question), "correct it")


def samples_in(folder: str) -> Iterator[tuple[str, str, Pixels]]:
    """(name, prompt, pixels uint8 [H, W, 3]) of every sample, by number. Raises UserError."""
    store = open_store(folder)
    keys = sorted((info.key for info in store.list() if SAMPLE.fullmatch(info.key)), key=lambda key: int(key[:-4]))
    if not keys:
        raise UserError(f"samples {folder}", "pictures such as 0000.png", "none", "draw some: glidepath sample --out …")
    for key in keys:
        data, name = store.get(key), f"{store.uri}/{key}"
        try:
            pixels = decode(data)
        except ImageError as error:
            raise UserError(f"picture {name}", "a picture file", str(error), "draw it again") from None
        prompt = Image.open(io.BytesIO(data)).info.get("prompt")
        if not isinstance(prompt, str):
            expected = "the prompt in its metadata, as glidepath sample writes it"
            raise UserError(f"picture {name}", expected, "none", "draw it with glidepath sample")
        yield name, prompt, pixels


def _stored(store: ObjectStore, pixels: Pixels) -> str:
    """The id of a picture, which is stored under it with nothing but its pixels."""
    picture = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:20]
    if not store.exists(picture_key(picture)):
        store.put(picture_key(picture), [png_bytes(Image.fromarray(pixels), {})])
    return picture


def _common(drawn: Mapping[str, Mapping[str, list[str]]], questions: Sequence[str]) -> list[str]:
    """Prompts that every model has pictures of, in the first one's order. Raises UserError for none, and where no
    prompt has enough pictures to judge diversity by."""
    first, *others = drawn.values()
    prompts = [prompt for prompt in first if all(prompt in other for other in others)]
    if not prompts:
        raise UserError(f"samples of {', '.join(drawn)}", "captions in common", "none", "draw the same prompts")
    most = max(min(len(pictures[prompt]) for pictures in drawn.values()) for prompt in prompts)
    if DIVERSITY in questions and not grid_side(most):
        expected = f"{GRID_SIDES[-1] ** 2} pictures of a caption from every model, to judge diversity by"
        raise UserError(f"samples of {', '.join(drawn)}", expected, f"{most}", "draw more, or ask another --question")
    return prompts
