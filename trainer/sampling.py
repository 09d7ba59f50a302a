"""Sampling for people: pictures from prompts, through a base model, a CLIP that chooses among candidates, an upsampler.

Always holds: a picture depends on the seed, its position, its prompt and what is given with it, not on what is drawn
beside it (but for the last digit of a float: a matrix product of another batch adds up in another order, which is one
level of 255 here and there); what passes between the stages is 8-bit. Called by the command line, the demo and the
training run for its grids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from data_pipeline.draws import Draws, key64
from data_pipeline.tokenizer import encode_batch
from trainer.clip_guide import ClipGuide, longest_tokens
from trainer.config import SamplingSettings
from trainer.diffusion.steps import Gradient
from trainer.recipes.glide import GlideConfig
from trainer.recipes.recipe import Given, Pixels, Recipe, Watch
from trainer.weights import Trained

BATCH = 16
CANDIDATE_STRIDE = 2**32  # positions from one candidate of a prompt to its next: more prompts than are ever drawn

# The release's notebook draws its upsampler unguided, by DDIM in 27 steps, from slightly weaker noise.
RELEASED_UPSAMPLING = SamplingSettings(
    guidance_scale=1.0, spacing="fast27", sampler="ddim", eta=0.0, noise_temperature=0.997
)

Progress = Callable[[int, int, str], None]  # sampling steps done, their number, which stage
Bool = NDArray[np.bool_]


def unwatched(done: int, total: int, note: str) -> None:
    pass


@dataclass(frozen=True)
class Sampler:
    """One model and how pictures are drawn from it. `guide` makes a batch's gradient of its prompts."""

    recipe: Recipe
    modules: Mapping[str, nn.Module]
    settings: SamplingSettings
    seed: int
    batch: int = BATCH
    guide: Callable[[Sequence[str]], Gradient] | None = None

    def draw(
        self,
        prompts: Sequence[str],
        positions: NDArray[np.int64],
        given: Given = Given(),  # noqa: B008  (frozen)
        progress: Progress = unwatched,
        note: str = "",
    ) -> Pixels:
        """uint8 [n, H, W, 3] for n prompts, positions [n] and, where given, n pictures and masks."""
        begins = range(0, len(prompts), self.batch)
        drawn = []
        for done, begin in enumerate(begins):
            part = slice(begin, begin + self.batch)
            conditions = self.recipe.conditions(prompts[part], _cut(given, part))
            draws = Draws(self.seed, positions[part])
            gradient = self.guide(prompts[part]) if self.guide else None
            watch = _counted(progress, done, len(begins), note)
            drawn.append(self.recipe.sample(self.modules, conditions, draws, self.settings, gradient, watch))
        return np.concatenate(drawn)


def _cut(given: Given, part: slice) -> Given:
    return Given(
        low_res=None if given.low_res is None else given.low_res[part],
        image=None if given.image is None else given.image[part],
        mask=None if given.mask is None else given.mask[part],
    )


def _counted(progress: Progress, batches_done: int, batches: int, note: str) -> Watch:
    """`progress` over all batches; the first step of a batch tells how many it has, whatever the spacing."""
    steps = 0

    def watch(step_index: int) -> None:
        nonlocal steps
        steps = max(steps, step_index + 1)
        progress(batches_done * steps + steps - step_index, batches * steps, note)

    return watch


def draw_images(
    recipe: Recipe,
    modules: Mapping[str, nn.Module],
    prompts: Sequence[str],
    settings: SamplingSettings,
    seed: int,
    progress: Progress = unwatched,
) -> Pixels:
    """uint8 [n, H, W, 3] for n prompts at the positions 0 to n - 1."""
    sampler = Sampler(recipe, modules, settings, seed)
    return sampler.draw(prompts, np.arange(len(prompts), dtype=np.int64), progress=progress)


class Edit(NamedTuple):
    """A picture to start from, uint8 [s, s, 3], for every prompt, and where it stays as it is: bool [s, s]."""

    picture: Pixels
    known: Bool | None = None

    def given(self, count: int) -> Given:
        """It for `count` prompts, without copies."""
        known = None if self.known is None else np.broadcast_to(self.known, (count, *self.known.shape))
        return Given(image=np.broadcast_to(self.picture, (count, *self.picture.shape)), mask=known)


class Drawn(NamedTuple):
    """Pictures of n prompts. `base` is what the upsampler enlarged; without one it is `images`."""

    images: Pixels  # [n, H, W, 3]
    base: Pixels  # [n, h, w, 3]
    chosen: NDArray[np.int64]  # [n], the candidate that `base` shows
    scores: NDArray[np.float64] | None  # [n, candidates], by the noised CLIP


@dataclass(frozen=True)
class Pipeline:
    """A base model and what stands behind it."""

    base: Sampler
    upsampler: Sampler | None = None
    judge: ClipGuide | None = None
    candidates: int = 1  # of every prompt; the judge's favourite goes on

    def draw(
        self, prompts: Sequence[str], first_number: int = 0, edit: Edit | None = None, progress: Progress = unwatched
    ) -> Drawn:
        """Prompt i has the number `first_number` + i; its candidate c the position c · CANDIDATE_STRIDE + that.

        Raises UserError for a picture that is smaller than what is drawn.
        """
        numbers = np.arange(first_number, first_number + len(prompts), dtype=np.int64)
        positions = (np.arange(self.candidates)[None, :] * CANDIDATE_STRIDE + numbers[:, None]).ravel()
        repeated = [prompt for prompt in prompts for _ in range(self.candidates)]
        given = edit.given(len(repeated)) if edit else Given()
        every = self.base.draw(repeated, positions, given, progress, "base")
        scores = None if self.judge is None else self._scores(self.judge, every, repeated)
        # Of equal scores the first: nothing but the pictures decides.
        chosen = np.zeros(len(prompts), np.int64) if scores is None else scores.argmax(axis=1)
        base = every.reshape(len(prompts), self.candidates, *every.shape[1:])[np.arange(len(prompts)), chosen]
        return Drawn(self._enlarged(base, prompts, numbers, edit, progress), base, chosen, scores)

    def _scores(self, judge: ClipGuide, images: Pixels, prompts: Sequence[str]) -> NDArray[np.float64]:
        found = [
            judge.scores(images[begin : begin + self.base.batch], prompts[begin : begin + self.base.batch])
            for begin in range(0, len(prompts), self.base.batch)
        ]
        return np.concatenate(found).reshape(-1, self.candidates)

    def _enlarged(
        self,
        base: Pixels,
        prompts: Sequence[str],
        numbers: NDArray[np.int64],
        edit: Edit | None,
        progress: Progress,
    ) -> Pixels:
        if self.upsampler is None:
            return base
        given = Given(low_res=base)
        if edit and edit.known is not None:  # what is known is known at the high resolution as well
            given = replace(edit.given(len(prompts)), low_res=base)
        # By prompt number alone, whichever candidate was chosen.
        return self.upsampler.draw(prompts, numbers, given, progress, "upsampler")


def upsampling_sampler(upsampler: Trained, settings: SamplingSettings, seed: int, batch: int = BATCH) -> Sampler:
    """The second stage of a seed, whose noise is not the first's: equal keys would begin with the base's numbers."""
    return Sampler(upsampler.recipe, upsampler.modules, settings, key64("upsampler", seed), batch)


def two_stage(
    base: Trained, upsampler: Trained, prompts: Sequence[str], settings: SamplingSettings, seed: int
) -> tuple[Pixels, Pixels]:
    """(base pictures, upsampled pictures), the upsampler by the release's settings."""
    pipeline = Pipeline(
        Sampler(base.recipe, base.modules, settings, seed), upsampling_sampler(upsampler, RELEASED_UPSAMPLING, seed)
    )
    drawn = pipeline.draw(prompts)
    return drawn.base, drawn.images


def cut_prompts(
    prompts: Sequence[str], first_number: int, models: Mapping[str, Trained], judge: ClipGuide | None
) -> Iterator[str]:
    """A line for every prompt of which a model reads the beginning only, told once for models of equal context."""
    contexts: dict[int, list[str]] = {}
    for name, trained in models.items():
        if isinstance(trained.config, GlideConfig):  # the CLIP has another tokenizer
            contexts.setdefault(trained.config.model.text_context, []).append(name)
    first: dict[str, int] = {}
    for number, prompt in enumerate(prompts, first_number):
        first.setdefault(prompt, number)
    for prompt, number in first.items():
        found = int(encode_batch([prompt], longest_tokens(prompt))[1][0])
        for context, names in contexts.items():
            if found > context:
                yield _cut_line(number, prompt, context, found, " and ".join(names))
        if judge and (found := judge.tokens_of(prompt)) > judge.context:
            yield _cut_line(number, prompt, judge.context, found, "clip")


def _cut_line(number: int, prompt: str, context: int, found: int, models: str) -> str:
    start = prompt if len(prompt) <= 40 else f"{prompt[:40]}…"
    return f"prompt {number} {start!r}: expected at most {context} tokens, found {found}; {models} read the beginning"
