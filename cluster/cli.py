"""The command line. Each command reads its configuration, calls one function, shows its result.

Always holds: exit code 0, 1 (failed) or 2 (usage); with `--json` stdout is one JSON document, with `error` on failure;
errors are one line. Heavy imports stay inside the commands, so that `--help` and usage errors are quick.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from cluster.checkpoint_commands import checkpoints_app
from cluster.console import Config, Json, Overrides, failure_line, progress_bar, say, show
from cluster.corpus_commands import corpus_app, load_corpus_config, show_corpus_plan
from cluster.drill_commands import drill
from cluster.evaluate_commands import evaluate, features, load_evaluate_config
from cluster.find_run import Run, checkpoint_or_run, run_store
from cluster.imports import quick_imports
from cluster.judge_commands import judge_app
from cluster.manifest_commands import manifests
from cluster.model_commands import models_app
from cluster.page_commands import page
from cluster.runs_commands import runs_app
from cluster.signals import end_on_signals, stop_on_signals
from data_pipeline.config import find_config, read_values
from data_pipeline.errors import UsageError, UserError

INTERRUPTED = 130  # what typer makes of an interrupt
MOST_PAIRS = 1e18  # they are numbered in 64 bits

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Glidepath: the training system for GLIDE.")
submit_app = typer.Typer(no_args_is_help=True, help="The same work as a job on a Ray cluster.")
submit_corpus_app = typer.Typer(no_args_is_help=True, help="Corpus to Arrow shards, as a job.")
app.add_typer(corpus_app, name="corpus")
app.add_typer(submit_app, name="submit")
submit_app.add_typer(submit_corpus_app, name="corpus")
app.add_typer(checkpoints_app, name="checkpoints")
app.add_typer(runs_app, name="runs")
app.add_typer(judge_app, name="judge")
app.add_typer(models_app, name="models")
app.command()(drill)
app.command()(evaluate)
app.command()(features)
app.command()(manifests)
app.command()(page)

Address = Annotated[str | None, typer.Option(help="Ray dashboard; by default $RAY_API_SERVER_ADDRESS.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return once the job is submitted.")]


def main() -> None:
    """The console script."""
    end_on_signals()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; its exit code."""
    try:
        code: int = app(args=arguments, standalone_mode=False) or 0
    except UserError as error:
        return _fail(str(error), error.exit_code, arguments)
    except typer.TyperException as error:
        return _fail(refusal_line(error), 2, arguments)
    except OSError as error:
        return _fail(failure_line(error), 1, arguments)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    if code == INTERRUPTED:
        return _fail("interrupted; the same command goes on from what is committed", 1, arguments)
    return code


def refusal_line(error: typer.TyperException) -> str:
    """What the parser refuses, in one line. Typer's own text of a bad value names neither the option nor the value."""
    if isinstance(error, typer.BadParameter) and error.param and isinstance(error.__cause__, ValidationError):
        invalid = error.__cause__.errors()[0]
        option, expected = error.param.opts[0], invalid["msg"].removeprefix("Input should be ")
        return str(UsageError(option, expected, repr(invalid["input"]), "correct the value"))
    return " ".join(str(error).split()) or "expected a command, found none"


def _fail(message: str, code: int, arguments: list[str]) -> int:
    if "--json" in arguments:
        print(json.dumps({"error": message}))
    say(f"error: {message}")
    return code


@app.command()
def up(
    cpus: Annotated[
        int | None, typer.Option(min=0, help="Ray's logical CPUs; 0 means those of the machine. Kept for later.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Start Ray, MLflow and an S3 server on this machine, on loopback; what runs stays, data persist."""
    from cluster import stack

    with progress_bar("stack") as bar:
        rows = stack.up(cpus, bar)
    script = stack.stack_folder() / "env"
    if as_json:
        show({"services": rows, "source": str(script), "env": stack.environment()}, True)
    else:
        show(for_people(rows), False)
        print(f"source {script}")


@app.command()
def down(as_json: Json = False) -> None:
    """End what `up` started, with all jobs; data stay."""
    from cluster import stack

    ended = stack.down()
    show({"ended": ended if as_json else ", ".join(ended) or "nothing ran"}, as_json)


@app.command()
def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's store URI, or its name; without: the local stack.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What of the local stack runs, and where; exit code 1 unless all of it is healthy. Of a run: its attempts and how
    they ended, whether a driver lives, and how much of the time counted."""
    if run is not None:
        show_run(run, as_json)
        return
    from cluster import stack

    rows = stack.status()
    sick = [f"{row['service']} is {row['state']}" for row in rows if row["state"] != "healthy"]
    if as_json:
        show({"services": rows} | ({"error": ", ".join(sick)} if sick else {}), True)
    else:
        show(for_people(rows), False)
    if sick:
        say(f"error: {', '.join(sick)}; `glidepath up` starts what is missing")
        raise typer.Exit(1)


def show_run(run: str, as_json: bool) -> None:
    """`status RUN`."""
    from cluster.status_run import attempt_rows, run_status, skipped_rows, summary_lines
    from data_pipeline.storage import open_store

    document = run_status(open_store(run_store(run)))
    if as_json:
        show(document, True)
    else:
        show(summary_lines(document), False)
        show(attempt_rows(document), False)
        if document["skipped"]:
            show(skipped_rows(document), False)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    gpu: Annotated[
        str, typer.Option(help="h200, h100, a100-80, a100-40, l40s or b200; as many as there are workers.")
    ] = "h200",
    utilisation: Annotated[float, typer.Option(help="Share of the GPU's peak that the arithmetic reaches.")] = 0.5,
    upload: Annotated[float, typer.Option(help="Each worker's GB/s to the store, for checkpoints.")] = 0.5,
    pairs: Annotated[
        float, typer.Option(min=1, max=MOST_PAIRS, help="Of a corpus: pictures with captions, such as 1e9.")
    ] = 1e8,
    as_json: Json = False,
) -> None:
    """Parameters, FLOPs, memory per GPU, images/s, GPU-days and checkpoint size; no GPU needed. Of a corpus
    configuration: storage, core-hours, tasks and manifests, from a sample of its input."""
    from data_pipeline.corpus_plan import is_corpus

    if is_corpus(config):
        show_corpus_plan(config, overrides, round(pairs), as_json)
        return
    from cluster.work import STOP_WAIT_S
    from trainer.plan.hardware import named_cluster
    from trainer.plan.planning import plan as make_plan

    planned = make_plan(load_train_config(config, overrides), named_cluster(gpu, utilisation, upload))
    if planned["stop_s"] > STOP_WAIT_S:
        say(f"warning: a stop may take {planned['stop_s']:.0f} s to save, and Ray waits {STOP_WAIT_S} s for a job")
    if as_json:
        show(planned, True)
    else:
        choices = planned.pop("choices")
        show(planned, False)
        show(choices, False)


@app.command()
def train(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train here, with a local worker group; the same command again goes on where it stopped. SIGTERM or Ctrl-C has it
    saved and ended, a second one ends it at once."""
    with stop_on_signals() as stop:  # around the imports too, which take seconds
        with quick_imports():
            from cluster.training import train_run

        settings = load_train_config(config, overrides)
        with progress_bar(settings.run) as bar:

            def on_event(event: dict[str, Any]) -> None:
                if event["event"] == "progress":
                    note = f"loss {event['loss']:.4f}  {event['images_per_s']:.1f} images/s"
                    bar(event["images"], settings.images, note)

            summary = train_run(settings, on_event, stop)
        show(summary, as_json)


@submit_app.command("train")
def submit_train(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    no_wait: NoWait = False,
    as_json: Json = False,
) -> None:
    """Train as a Ray job; the same again after it ended goes on. Waits for it; Ctrl-C leaves it running."""
    settings = load_train_config(config, ["launcher.kind=ray", *(overrides or ())])
    with quick_imports():
        from cluster.work import training_work

    submit_work(training_work(settings), address, no_wait, as_json)


@submit_corpus_app.command("build")
def submit_corpus_build(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    no_wait: NoWait = False,
    as_json: Json = False,
) -> None:
    """Build a corpus as a Ray job. Waits for it; Ctrl-C leaves it running."""
    settings = load_corpus_config(config, ["executor.kind=ray", *(overrides or ())])
    from cluster.work import corpus_work

    submit_work(corpus_work(settings, Path(config).stem), address, no_wait, as_json)


@submit_app.command("evaluate")
def submit_evaluate(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    no_wait: NoWait = False,
    as_json: Json = False,
) -> None:
    """Evaluate as a Ray job, beside training. Waits for it; Ctrl-C leaves it running."""
    settings = load_evaluate_config(config, overrides)
    from cluster.evaluation_job import evaluation_work

    submit_work(evaluation_work(settings, Path(config).stem), address, no_wait, as_json)


def submit_work(work: Any, address: str | None, no_wait: bool, as_json: bool) -> None:
    """Start a job and, unless `no_wait`, show its log and its summary."""
    with quick_imports():
        from cluster.submit import Cluster, address_of

    cluster = Cluster(address_of(address))
    submission_id = cluster.submit(work)
    say(f"job {submission_id} on {cluster.address}")
    started = {"submission_id": submission_id, "address": cluster.address}
    if no_wait:
        show(started, as_json)
        return
    try:
        show(cluster.follow(submission_id), as_json)
    except KeyboardInterrupt:
        say(f"left: the job goes on; to save and stop it: ray job stop {submission_id} --address {cluster.address}")
        show(started | {"detached": True}, as_json)


@app.command()
def stop(run: Run, as_json: Json = False) -> None:
    """Have a run save at its next step and end; waits for that."""
    from dataclasses import asdict

    from cluster.stopping import stop_run
    from data_pipeline.storage import open_store

    uri = run_store(run)
    say(f"asked {uri} to save and end")
    show({"run": run} | asdict(stop_run(open_store(uri), run)), as_json)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A released state dict; for clip the folder of its two files.")],
    kind: Annotated[str, typer.Option(help="base, upsample, base-inpaint, upsample-inpaint or clip.")],
    out: Annotated[str, typer.Option(help="Store URI of the new run that holds the checkpoint.")],
    arguments: Annotated[
        str, typer.Option(help="The release's constructor arguments where they differ: JSON, or a file of it.")
    ] = "{}",
    as_json: Json = False,
) -> None:
    """Make a checkpoint of OpenAI's released weights: to sample from, or as the parent of a fine-tune."""
    from trainer.interop.arguments import known_kind
    from trainer.interop.importer import import_release, read_json

    show(import_release(known_kind(kind), read_json(arguments), file, out), as_json)


@app.command()
def sample(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint URI, models:/NAME@ALIAS, or a run (then its newest).")],
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; may be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of further prompts, one per line.")] = None,
    upsampler: Annotated[str | None, typer.Option(help="Checkpoint URI or run of an upsampler.")] = None,
    clip: Annotated[str | None, typer.Option(help="Checkpoint URI or run of a noised CLIP to pull and judge.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture to alter (--strength) or to fill in (--mask).")] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="Mask of that picture: white or transparent where it is drawn anew, black where it stays."),
    ] = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is the caption alone.")] = 3.0,
    clip_guidance: Annotated[float, typer.Option(help="How strongly the CLIP pulls; 0: it judges only.")] = 2.0,
    best_of: Annotated[int, typer.Option(help="Pictures of each prompt, of which the CLIP chooses one.")] = 1,
    strength: Annotated[float, typer.Option(help="Noise on --image: 0 leaves it as it is, 1 nothing of it.")] = 1.0,
    spacing: Annotated[str, typer.Option(help="Sampling steps of the base model, such as 50 or 10,10,3,2,2.")] = "50",
    sampler: Annotated[str, typer.Option(help="ddim, ancestral, dpm++ or dpm++sde.")] = "ddim",
    eta: Annotated[float, typer.Option(help="Noise of ddim: 0 none, 1 as much as ancestral.")] = 0.0,
    clip_denoised: Annotated[
        str, typer.Option(help="Clipping of predicted pictures: static, dynamic or none.")
    ] = "static",
    clip_percentile: Annotated[float, typer.Option(help="Of dynamic clipping.")] = 0.995,
    noise_temperature: Annotated[float, typer.Option(help="Factor on the initial noise.")] = 1.0,
    upsampler_guidance: Annotated[float, typer.Option(help="As --guidance.")] = 1.0,
    upsampler_spacing: Annotated[str, typer.Option(help="As --spacing.")] = "fast27",
    upsampler_sampler: Annotated[str, typer.Option(help="As --sampler.")] = "ddim",
    upsampler_temperature: Annotated[float, typer.Option(help="As --noise-temperature.")] = 0.997,
    upsampler_low_res_level: Annotated[
        float, typer.Option(help="Noise on what it enlarges, 0 to 1, for one that was trained with some.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal pictures.")] = 0,
    first_number: Annotated[int, typer.Option(help="Number of the first prompt; a picture depends on its own.")] = 0,
    weights: Annotated[str, typer.Option(help="ema or master.")] = "ema",
    batch: Annotated[int, typer.Option(help="Pictures drawn together; changes memory and time only.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("samples"),
    as_json: Json = False,
) -> None:
    """Draw pictures from a trained model: one PNG per prompt with its settings inside, and a grid."""
    from cluster.drawing import DrawSettings, draw_to_folder
    from data_pipeline.config import parse

    uris = {
        name: checkpoint_or_run(model)
        for name, model in (("checkpoint", checkpoint), ("upsampler", upsampler), ("clip", clip))
        if model
    }
    base = {"guidance_scale": guidance, "spacing": spacing, "sampler": sampler, "eta": eta, "strength": strength}
    base |= {"clip": clip_denoised, "clip_percentile": clip_percentile, "noise_temperature": noise_temperature}
    enlarging = {"guidance_scale": upsampler_guidance, "spacing": upsampler_spacing, "sampler": upsampler_sampler}
    enlarging |= {"noise_temperature": upsampler_temperature, "low_res_level": upsampler_low_res_level}
    values = {"base": base, "enlarging": enlarging, "clip_guidance": clip_guidance, "best_of": best_of, "seed": seed}
    values |= {"image": image, "mask": mask, "first_number": first_number, "weights": weights, "batch": batch}
    settings = parse(DrawSettings, {**uris, **values, "device": device}, "sample")
    texts = all_prompts(prompt, prompts)
    with progress_bar("sample") as bar:
        drawn = draw_to_folder(settings, texts, out, bar, lambda line: say(f"warning: {line}"))
    show(drawn, as_json)


def all_prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """The prompts of the command line, then the lines of the file that are not blank. Raises UsageError for none."""
    lines: list[str] = []
    if file:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError as error:
            raise UsageError(f"--prompts {file}", "UTF-8", error.reason, "save the file as UTF-8") from None
    found = [*(given or ()), *(line for line in lines if line)]
    if not found:
        raise UsageError("sample", "--prompt, or --prompts with a file of them", "no prompt", "say what to draw")
    return found


@app.command()
def demo(as_json: Json = False) -> None:
    """The whole road on a small real corpus: build, train, kill, resume, upsample, sample, judge."""
    from cluster.demo import run_demo

    show(run_demo(), as_json)


def for_people(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows of the stack as text: a process id is a name, not an amount."""
    return [{name: "-" if value is None else str(value) for name, value in row.items()} for row in rows]


def load_train_config(name: str, overrides: list[str] | None) -> Any:
    """The training configuration of a file or preset with overrides. Raises UsageError."""
    with quick_imports():
        from trainer.recipes import parse_train_config

    return parse_train_config(read_values(find_config("train", name), overrides or ()), name)


if __name__ == "__main__":
    main()
