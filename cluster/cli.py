"""The command line. Each command reads its configuration, calls one function, shows its result.

Always holds: exit code 0, 1 (failed) or 2 (usage); with `--json` stdout is one JSON document, with `error` on failure;
errors are one line. Heavy imports stay inside the commands, so that `--help` and usage errors are quick.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.console import progress_bar, say, show
from data_pipeline.config import find_config, read_values, state_folder
from data_pipeline.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Glidepath: the training system for GLIDE.")
corpus_app = typer.Typer(no_args_is_help=True, help="Corpus to Arrow shards.")
checkpoints_app = typer.Typer(no_args_is_help=True, help="Checkpoints of a run.")
app.add_typer(corpus_app, name="corpus")
app.add_typer(checkpoints_app, name="checkpoints")

Config = Annotated[str, typer.Argument(help="A YAML file, or the name of a preset.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Run = Annotated[str, typer.Argument(help="A run's store URI, or its name in the state folder.")]


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C. An exception, so that `finally` ends the workers; not one that a library handles."""


def main() -> None:
    """The console script."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; its exit code."""
    try:
        return app(args=arguments, standalone_mode=False) or 0
    except UserError as error:
        return _fail(str(error), error.exit_code, arguments)
    except typer.TyperException as error:
        return _fail(" ".join(str(error).split()) or "expected a command, found none", 2, arguments)
    except OSError as error:
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 1, arguments)
    except (typer.Abort, Interrupted):
        return _fail("interrupted; the same command goes on from what is committed", 1, arguments)


def _fail(message: str, code: int, arguments: list[str]) -> int:
    if "--json" in arguments:
        print(json.dumps({"error": message}))
    say(f"error: {message}")
    return code


@corpus_app.command("build")
def corpus_build(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Build a corpus into Arrow shards."""
    from cluster.training import build_swept

    corpus = load_corpus_config(config, overrides)
    with progress_bar("corpus") as bar:
        summary = build_swept(corpus, lambda stage, done, total: bar(done, total, stage))
    show(summary, as_json)


@corpus_app.command("inspect")
def corpus_inspect(dataset: Annotated[str, typer.Argument(help="Dataset URI.")], as_json: Json = False) -> None:
    """Rows, shards, bytes and the funnel of a dataset."""
    from data_pipeline.build import inspect_dataset

    show(inspect_dataset(dataset), as_json)


@corpus_app.command("verify")
def corpus_verify(dataset: Annotated[str, typer.Argument(help="Dataset URI.")], as_json: Json = False) -> None:
    """Read every byte of a dataset and name each bad part."""
    from data_pipeline.shards import verify_dataset

    bad = [{"part": b.part, "expected": b.expected, "found": b.found} for b in verify_dataset(dataset)]
    report_verification(bad, as_json)


@app.command()
def plan(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Parameters, checkpoint size and batch cutting of a training configuration; no GPU needed."""
    from trainer.plan import plan as make_plan

    show(make_plan(load_train_config(config, overrides)), as_json)


@app.command()
def train(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train here, with a local worker group; the same command again goes on where it stopped."""
    from cluster.training import train_run

    settings = load_train_config(config, overrides)
    with progress_bar(settings.run) as bar:

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] == "progress":
                note = f"loss {event['loss']:.4f}  {event['images_per_s']:.1f} images/s"
                bar(event["images"], settings.images, note)

        summary = train_run(settings, on_event)
    show(summary, as_json)


@checkpoints_app.command("list")
def checkpoints_list(run: Run, as_json: Json = False) -> None:
    """Committed checkpoints of a run, newest first."""
    from trainer.checkpoint.inspect import list_checkpoints

    show(list_checkpoints(run_store(run)), as_json)


@checkpoints_app.command("verify")
def checkpoints_verify(run: Run, as_json: Json = False) -> None:
    """Read every byte of every checkpoint of a run and name each bad part."""
    from trainer.checkpoint.inspect import verify_checkpoints

    report_verification(verify_checkpoints(run_store(run)), as_json)


@app.command()
def sample(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint URI, or a run (then its newest).")],
    prompt: Annotated[list[str], typer.Option(help="What to draw; may be given several times.")],
    upsampler: Annotated[str | None, typer.Option(help="Checkpoint URI or run of an upsampler.")] = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is the caption alone.")] = 3.0,
    spacing: Annotated[str, typer.Option(help="Sampling steps of the base model, such as 50 or 10,10,3,2,2.")] = "50",
    sampler: Annotated[str, typer.Option(help="ddim or ancestral.")] = "ddim",
    seed: Annotated[int, typer.Option(help="Equal seeds give equal pictures.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("samples"),
    as_json: Json = False,
) -> None:
    """Draw pictures from a trained model: one PNG per prompt, and a grid."""
    from cluster.drawing import draw_to_folder
    from data_pipeline.config import parse
    from trainer.config import SamplingSettings

    values = {"guidance_scale": guidance, "spacing": spacing, "sampler": sampler}
    settings = parse(SamplingSettings, values, "sample")
    models = [
        model if "checkpoints/images-" in model else run_store(model) for model in (checkpoint, upsampler) if model
    ]
    show(draw_to_folder(models, prompt, settings, seed, out), as_json)


@app.command()
def demo(as_json: Json = False) -> None:
    """The whole road on a small real corpus: build, train, kill, resume, upsample, sample, judge."""
    from cluster.demo import run_demo

    show(run_demo(), as_json)


def load_train_config(name: str, overrides: list[str] | None) -> Any:
    """The training configuration of a file or preset with overrides. Raises UsageError."""
    from trainer.recipes import parse_train_config

    return parse_train_config(read_values(find_config("train", name), overrides or ()), name)


def load_corpus_config(name: str, overrides: list[str] | None) -> Any:
    """The corpus configuration of a file or preset with overrides, its output resolved. Raises UsageError."""
    from data_pipeline.build import CorpusConfig, resolve_output
    from data_pipeline.config import parse

    path = find_config("corpus", name)
    return resolve_output(parse(CorpusConfig, read_values(path, overrides or ()), name), path.stem)


def run_store(run: str) -> str:
    """The store URI of a run given by URI or by name. Raises UserError if there is no such run."""
    from data_pipeline.storage import open_store
    from trainer.checkpoint.attempts import newest_attempt

    for store in (open_store(run), open_store(str(state_folder() / "runs" / run))):
        if newest_attempt(store):
            return store.uri
    raise UserError(
        f"run {run}", f"a run's store, or a name in {state_folder() / 'runs'}", "neither", "check the URI or the name"
    )


def report_verification(bad: list[dict[str, Any]], as_json: bool) -> None:
    """Show what `verify` found; exit code 1 if anything is bad."""
    lines = [f"{part['part']}: expected {part['expected']}, found {part['found']}" for part in bad]
    for line in lines:
        say(f"bad: {line}")
    if as_json:
        show({"ok": not bad, "bad": bad} | ({"error": lines[0]} if bad else {}), True)
    else:
        show({"ok": not bad, "bad parts": len(bad)}, False)
    if bad:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
