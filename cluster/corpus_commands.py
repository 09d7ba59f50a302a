"""The commands of a corpus: build, look at, check, give away, add to, plan.

Always holds: what cli.py, which adds them, says of every command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.console import Config, Json, Overrides, report_verification, show
from data_pipeline.config import find_config, read_values

corpus_app = typer.Typer(no_args_is_help=True, help="Corpus to Arrow shards.")


@corpus_app.command("build")
def corpus_build(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Build a corpus into Arrow shards."""
    from cluster.progress import build_progress
    from cluster.training import build_swept

    corpus = load_corpus_config(config, overrides)
    with build_progress() as progress:
        summary = build_swept(corpus, progress)
    show(summary, as_json)


@corpus_app.command("inspect")
def corpus_inspect(
    dataset: Annotated[str, typer.Argument(help="Dataset URI.")],
    out: Annotated[Path | None, typer.Option(help="Folder for a page with plots and contact sheets.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Of each reason, on the page.")] = 24,
    as_json: Json = False,
) -> None:
    """Rows, shards, bytes and the funnel of a dataset; with --out a page with plots, kept and dropped pictures."""
    from data_pipeline.build import summary
    from data_pipeline.shards import open_dataset

    opened = open_dataset(dataset)
    document = summary(opened)
    table = [{"reason": name, "rows": count} for name, count in funnel_lines(document["funnel"])]
    if out is not None:
        from cluster.corpus_report import funnel_rows, make_folder, write_report
        from data_pipeline.inspect import inspect

        make_folder(out)
        inspection = inspect(opened, pictures)
        document |= {"report": write_report(opened, inspection, out)}
        table = funnel_rows(inspection)
    if as_json:
        show(document, True)
        return
    show({name: value for name, value in document.items() if name not in ("funnel", "report")}, False)
    show(table, False)
    if out is not None:
        print(f"page {out / 'index.html'}")


def funnel_lines(funnel: dict[str, Any]) -> list[tuple[str, int]]:
    """What came in, what each reason took, most first, and what went out."""
    dropped = sorted(funnel["dropped"].items(), key=lambda item: -item[1])
    return [("in", funnel["in"]), *dropped, ("out", funnel["out"])]


@corpus_app.command("export")
def corpus_export(
    dataset: Annotated[str, typer.Argument(help="Dataset URI.")],
    out: Annotated[str, typer.Option(help="Store URI of a folder that takes this export alone.")],
    shard_rows: Annotated[int | None, typer.Option(min=1, help="Rows in a tar; by default as in the shards.")] = None,
    executor: Annotated[str, typer.Option(help="inline or ray.")] = "inline",
    workers: Annotated[int, typer.Option(min=1, help="Tars written at once.")] = 1,
    as_json: Json = False,
) -> None:
    """Write a dataset as webdataset tars: jpg, txt and json of each row. The same again goes on where it stopped."""
    from cluster.executors import executor_of
    from cluster.progress import build_progress
    from data_pipeline.export import export_webdataset

    with executor_of(executor_settings(executor, workers)) as chosen, build_progress() as progress:
        summary = export_webdataset(dataset, out, shard_rows, chosen, progress)
    show(summary, as_json)


@corpus_app.command("enrich")
def corpus_enrich(
    dataset: Annotated[str, typer.Argument(help="Dataset URI.")],
    family: Annotated[str, typer.Argument(help="tokens_clip or labels.")],
    labels: Annotated[str | None, typer.Option(help="For labels: a csv or parquet with columns id and label.")] = None,
    executor: Annotated[str, typer.Option(help="inline or ray.")] = "inline",
    workers: Annotated[int, typer.Option(min=1, help="Shards made at once.")] = 1,
    as_json: Json = False,
) -> None:
    """Add a family of columns to a dataset, which keeps its id. The same again goes on where it stopped."""
    from cluster.progress import build_progress
    from cluster.training import enrich_alone

    with build_progress() as progress:
        summary = enrich_alone(dataset, family, labels, executor_settings(executor, workers), progress)
    show(summary, as_json)


@corpus_app.command("sweep")
def corpus_sweep(
    output: Annotated[str, typer.Argument(help="URI of a build's output.")], as_json: Json = False
) -> None:
    """Remove what killed builds left in an output. A build does it by itself in a folder, but not in a bucket, where
    it cannot know whether another one runs: only call this while none does."""
    from cluster.training import sweep_output

    show({"output": output, "removed": sweep_output(output)}, as_json)


@corpus_app.command("verify")
def corpus_verify(dataset: Annotated[str, typer.Argument(help="Dataset URI.")], as_json: Json = False) -> None:
    """Read every byte of a dataset and name each bad part."""
    from data_pipeline.shards import verify_dataset

    bad = [{"part": b.part, "expected": b.expected, "found": b.found} for b in verify_dataset(dataset)]
    report_verification(bad, as_json)


def show_corpus_plan(config: str, overrides: list[str] | None, pairs: int, as_json: bool) -> None:
    """`glidepath plan` of a corpus."""
    from data_pipeline.corpus_plan import plan_corpus

    corpus = load_corpus_config(config, overrides)
    if corpus.scorers or corpus.filters.scores:
        from cluster.scorers import check_scorers  # heavy

        check_scorers(corpus)
    planned = plan_corpus(corpus, pairs)
    if as_json:
        show(planned, True)
        return
    planned["not_counted"] = ", ".join(planned["not_counted"]) or None
    groups = {name: planned.pop(name) for name, value in list(planned.items()) if isinstance(value, dict)}
    show(planned, False)
    for name, values in groups.items():
        print()
        show([{name: key, "value": str(value)} for key, value in values.items()], False)


def executor_settings(kind: str, workers: int) -> Any:
    """Where a command runs that reads no configuration. Raises UsageError."""
    from data_pipeline.config import parse
    from data_pipeline.corpus import ExecutorSettings

    return parse(ExecutorSettings, {"kind": kind, "workers": workers}, "--executor")


def load_corpus_config(name: str, overrides: list[str] | None) -> Any:
    """The corpus configuration of a file or preset with overrides, its output resolved. Raises UsageError."""
    from data_pipeline.build import CorpusConfig, resolve_output
    from data_pipeline.config import parse

    path = find_config("corpus", name)
    return resolve_output(parse(CorpusConfig, read_values(path, overrides or ()), name), path.stem)
