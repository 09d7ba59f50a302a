"""What a person sees: progress bars and tables on stderr, one JSON document or a few lines on stdout.

Always holds: stdout carries the result only, so that `--json` can be piped; bars appear only when stderr is a terminal.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Config = Annotated[str, typer.Argument(help="A YAML file, or the name of a preset.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]

stderr = Console(stderr=True)
FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, or one's share of it
UNUSABLE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # mostly a path that was given
PIPED_WIDTH = 400  # a row stays one line when piped; only a terminal folds long cells
stdout = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar to call with (done, total, note). Without a terminal it stays silent: the logs tell."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=stderr, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(what, total=None, note="")
        yield lambda done, total, note: bar.update(task, completed=done, total=total, note=note)


def failure_line(error: OSError) -> str:
    """What failed and how, in one line, of an error of a disk or a store."""
    if isinstance(error, UNUSABLE) and error.filename:
        return f"{error.filename}: expected a path that can be used, found {error.strerror}; check it and its rights"
    line = f"{error.filename or 'input or output'}: {error.strerror or error}"
    return f"{line}; make room, and the same command goes on" if error.errno in FULL else line


def say(text: str) -> None:
    """A line for people, on stderr."""
    stderr.print(text, highlight=False, markup=False, soft_wrap=True)


def show(document: Any, as_json: bool) -> None:
    """The result: JSON for scripts, else aligned lines."""
    if as_json:
        print(json.dumps(document), flush=True)  # `page` goes on after it
    elif isinstance(document, list):
        stdout.print(table(document))
    else:
        lines = list(_flat(document))
        width = max((len(name) for name, _ in lines), default=0)
        for name, value in lines:
            print(f"{name:<{width}}  {value}")


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Rows of equal keys as a table; numbers to the right."""
    made = Table(box=None, pad_edge=False)
    for name in rows[0] if rows else ():
        made.add_column(name, justify="right" if isinstance(rows[0][name], (int, float)) else "left", overflow="fold")
    for row in rows:
        made.add_row(*(_text(value) for value in row.values()))
    return made


def _flat(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in document.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


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
