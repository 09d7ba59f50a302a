"""The desk of the sampling page: jobs that one thread draws, one after the other.

Always holds: models are loaded once and kept; a job's folder holds what `glidepath sample` would have written; what
fails is the job, in one line, and never the thread. Called by the sampling page's routes.
"""

from __future__ import annotations

import base64
import binascii
import logging
import queue
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.drawing import DrawSettings, check_spacing, device_of, draw_to_folder, load_part, model_uris, part_config
from cluster.find_run import checkpoint_or_run
from data_pipeline.config import Settings, parse, state_folder
from data_pipeline.errors import UserError
from trainer.config import Fraction, SamplerName
from trainer.weights import Trained

log = logging.getLogger(__name__)

WAITING = 8  # jobs behind the one that is drawn
LOOK_S = 0.5  # how soon a desk without jobs sees that it is closed
KEPT = 50  # jobs that the page lists; their files stay
State = Literal["waiting", "drawing", "done", "failed", "cancelled"]


class Wish(Settings):
    """What the page asks for. `image` and `mask`: PNG files as base64; the mask is white where it is drawn anew."""

    model: str
    prompt: Annotated[str, Field(max_length=2000)]
    guidance: Annotated[float, Field(ge=-50, le=50)] = 3.0
    steps: Annotated[str, Field(max_length=40, coerce_numbers_to_str=True)] = "50"
    sampler: SamplerName = "ddim"
    pictures: Annotated[int, Field(ge=1, le=16)] = 4
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0
    enlarge: bool = False
    strength: Fraction = 1.0
    image: str | None = None
    mask: str | None = None


@dataclass
class Job:
    """A wish and what became of it. Written by the thread that draws, read by all."""

    id: str
    wish: Wish
    settings: DrawSettings
    folder: Path
    state: State = "waiting"
    done: int = 0
    steps: int = 0
    note: str = ""
    error: str = ""
    warnings: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    cancelled: bool = False


class Cancelled(Exception):
    """The person no longer wants it."""


class Desk:
    """Models by name, and the jobs of this process."""

    def __init__(self, models: Mapping[str, str], upsampler: str | None, weights: str, device: str) -> None:
        """Raises UserError for what is no checkpoint of a base model, or no upsampler."""
        self.upsampler = checkpoint_or_run(upsampler) if upsampler else None
        self.models = {name: checkpoint_or_run(uri) for name, uri in models.items()}
        self._configs = {name: part_config(uri, "base") for name, uri in self.models.items()}
        self.sides = {name: config.model.image_size for name, config in self._configs.items()}
        self.enlarged_side = part_config(self.upsampler, "upsampler").model.image_size if self.upsampler else None
        self._common = {"weights": weights, "device": device}
        self._folder = state_folder() / "page"
        self._loaded: dict[tuple[str, str], Trained] = {}
        self._jobs: dict[str, Job] = {}
        self._waiting: queue.Queue[Job] = queue.Queue(WAITING)
        for uri in self.models.values():
            parse(DrawSettings, {"checkpoint": uri, **self._common}, "page")
        self._closed = threading.Event()
        self._drawing = threading.Thread(target=self._draw_all, name="sampling-page", daemon=True)
        self._drawing.start()

    def jobs(self) -> list[Job]:
        """Newest first."""
        return list(reversed(self._jobs.values()))

    def job(self, name: str) -> Job | None:
        return self._jobs.get(name)

    def ask(self, wish: Wish) -> Job:
        """Take a wish. Raises UserError for one that cannot be drawn, and where too many wait."""
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        folder = self._folder / name
        job = Job(name, wish, self._settings(wish, folder), folder)
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            raise UserError("sampling page", f"at most {WAITING} waiting", "as many", "wait for one of them") from None
        self._jobs[name] = job
        for old in list(self._jobs)[:-KEPT]:
            self._jobs.pop(old, None)  # another request may be taking it out as well
        return job

    def cancel(self, job: Job) -> None:
        """It ends at its next sampling step, or is not begun."""
        job.cancelled = True

    def close(self) -> None:
        """Nothing is drawn any more; returns once the sampling step under way has ended. A process that ends while its
        thread is inside torch is aborted by the C++ runtime."""
        self._closed.set()
        self._drawing.join()

    def _settings(self, wish: Wish, folder: Path) -> DrawSettings:
        """What to draw; the given files lie in the folder then. Raises UserError."""
        if not wish.prompt.strip():
            raise UserError("prompt", "what to draw", "nothing", "write some words")
        if wish.model not in self.models:
            raise UserError("model", " or ".join(self.models), repr(wish.model[:80]), "choose one of these")
        if wish.enlarge and not self.upsampler:
            raise UserError("enlarging", "an upsampler", "none", "start the page with --upsampler")
        check_spacing("steps", wish.steps, self._configs[wish.model].diffusion.steps)
        given = {name: text for name in ("image", "mask") if (text := getattr(wish, name))}
        files = {name: _file(folder / f"{name}.png", text) for name, text in given.items()}
        base = {"guidance_scale": wish.guidance, "spacing": wish.steps, "sampler": wish.sampler}
        base |= {"strength": wish.strength}
        values: dict[str, Any] = {"checkpoint": self.models[wish.model], "base": base, "seed": wish.seed}
        values |= {"upsampler": self.upsampler if wish.enlarge else None, **files, **self._common}
        return parse(DrawSettings, values, "settings")

    def _draw_all(self) -> None:
        while not self._closed.is_set():
            try:
                job = self._waiting.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            try:
                self._draw(job)
                job.state = "done"
            except Cancelled:
                job.state = "cancelled"
            except UserError as error:
                job.error, job.state = str(error), "failed"
            except Exception as error:
                # The next wish is still to be drawn; this one's page says what the log has in full.
                log.exception("sampling page: job %s", job.id)
                job.error, job.state = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "failed"

    def _draw(self, job: Job) -> None:
        def progress(done: int, total: int, note: str) -> None:
            if job.cancelled or self._closed.is_set():
                raise Cancelled
            job.done, job.steps, job.note = done, total, note.partition(" of ")[0]

        progress(0, 0, "")
        job.state = "drawing"
        prompts = [job.wish.prompt.strip()] * job.wish.pictures
        drawn = draw_to_folder(job.settings, prompts, job.folder, progress, job.warnings.append, self._load)
        job.pictures = [Path(path).name for path in drawn["images"]]

    def _load(self, settings: DrawSettings) -> dict[str, Trained]:
        """As `load_models`, each once."""
        for part, uri in model_uris(settings).items():
            if (part, uri) not in self._loaded:
                model = load_part(uri, part, settings.weights)
                for module in model.modules.values():
                    module.to(device_of(settings))
                self._loaded[part, uri] = model
        return {part: self._loaded[part, uri] for part, uri in model_uris(settings).items()}


def named_models(given: Sequence[str]) -> dict[str, str]:
    """Checkpoints by the name that the page shows: NAME=URI, or the URI, then also its name. Raises UserError."""
    found: dict[str, str] = {}
    for text in given:
        name, separator, uri = text.partition("=")
        if not separator or "/" in name:
            name, uri = text, text
        if name in found:
            raise UserError(f"--checkpoint {name}", "each name once", "it twice", "write another name: NAME=URI")
        found[name] = uri
    return found


def _file(path: Path, text: str) -> Path:
    """A file out of its base64. Raises UserError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_bytes(base64.b64decode(text, validate=True))
    except binascii.Error as error:
        raise UserError(path.stem, "base64", str(error), "choose the picture again") from None
    return path
