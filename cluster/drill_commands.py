"""The command of the fault drills.

Always holds: what cli.py, which adds it, says of every command.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from cluster.console import Json, say, show
from data_pipeline.errors import UsageError

NAMES = "R1, R2, R3, R4, R5, R6, R7, R8, R9, R10, R11, R12 or R13"


def drill(
    names: Annotated[list[str], typer.Argument(metavar="DRILL...", help=f"{NAMES}; docs/drills.md says what each is.")],
    seed: Annotated[int, typer.Option(help="Other faults, at other moments, on other numbers.")] = 0,
    faults: Annotated[
        int | None, typer.Option(min=1, help="How many: kills, points, corruptions or resumes. By default all.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Dataset URI; by default a small one is made, for R4 and R6's cache in any case.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16, of the runs.")] = "fp32",
    outage_s: Annotated[
        float, typer.Option(min=1, help="Of R4, R10: an outage; R4's other faults last a quarter of it.")
    ] = 60,
    as_json: Json = False,
) -> None:
    """Do to a scratch run what happens to real ones, and keep score; exit code 1 unless every promise was kept."""
    from cluster.drills.registry import DRILLS
    from cluster.drills.scoreboard import document, run_all, table_rows
    from cluster.drills.scratch import Wishes, scratch

    for name in names:
        if name not in DRILLS:
            raise UsageError(f"drill {name}", NAMES, repr(name), "correct it")
    if precision not in ("fp32", "bf16"):
        raise UsageError("--precision", "fp32 or bf16", repr(precision), "correct it")
    wishes = Wishes(seed, faults, dataset, precision, outage_s)
    rows = []
    with scratch(wishes, say) as place:
        for row in run_all({name: partial(DRILLS[name].run, place) for name in names}):
            rows.append(row)
            say(f"{row.id} {'passed' if row.passed else 'not passed'}: {DRILLS[row.id].promise}")
            for failure in row.failures:
                say(f"{row.id}: {failure}")
    show(document(rows) if as_json else table_rows(rows), as_json)
    if not all(row.passed for row in rows):
        raise typer.Exit(1)
