"""`glidepath status RUN`: what became of a run's attempts, whether it runs now, and how well its time was used.

Always holds: nothing is written, and a run that is being trained is not disturbed. Figures of an attempt whose driver
was killed are those of its last sign of life, up to ten seconds old. Called by the command line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from cluster.lease import Beat, is_here, lives, read_beat
from data_pipeline.errors import UserError
from data_pipeline.storage import ObjectStore
from trainer.checkpoint.attempts import ATTEMPTS, newest_attempt, number_of, read_record, record_key
from trainer.checkpoint.manifest import newest_committed
from trainer.quarantine import read_skipped
from trainer.stop import AttemptEnd, read_end

Row = dict[str, Any]
MEASURED = ("workers", "began_at", "seconds", "from_images", "images")
WHY = ("cause", "error", "rank", "node")
LOST = "driver lost"  # no record of its end, and nobody who drives it


def run_status(store: ObjectStore, pause: Callable[[float], object] = time.sleep) -> dict[str, Any]:
    """The document of `status RUN --json`. A driver on another machine is watched for up to two of its intervals.

    Raises UserError for a store without attempts, or with damaged records.
    """
    newest = newest_attempt(store)
    if not newest:
        raise UserError(f"run store {store.uri}", "a run's", "no attempts in it", "check the URI")
    record = read_record(store, record_key(newest))
    numbers = sorted(filter(None, (number_of(info.key) for info in store.list(ATTEMPTS))))
    ends = {number: read_end(store, number) for number in numbers}
    beats = {number: read_beat(store, number) for number in numbers if ends[number] is None}
    beat = beats.get(newest)
    alive = beat is not None and lives(store, beat, pause)
    if alive:
        beat = beats[newest] = read_beat(store, newest) or beat
    name = newest_committed(store)
    rows = [_row(number, ends[number], beats.get(number), alive and number == newest) for number in numbers]
    _count_unrecorded(rows, name.position if name else 0)
    return {
        "run": record["config"].get("run"),
        "store": store.uri,
        "images": max((row["images"] or 0 for row in rows[-1:]), default=0),
        "of_images": record["config"].get("images"),
        "checkpoint": name.uri(store) if name else None,
        "driver": _driver(beat, alive),
        "goodput": goodput(rows),
        "attempts": rows,
        "skipped": read_skipped(store),
    }


def goodput(rows: Sequence[Row]) -> float | None:
    """Share of the drivers' time that went into steps that counted; None before there is any."""
    known = [row for row in rows if row["seconds"] and row["counted_s"] is not None]
    total_s = sum(row["seconds"] for row in known)
    return round(sum(row["counted_s"] for row in known) / total_s, 4) if total_s else None


def _row(number: int, ended: AttemptEnd | None, beat: Beat | None, runs: bool) -> Row:
    """One attempt. `counted_s` of one without a record is that of all its steps, until `_count_unrecorded`."""
    if ended is not None:
        document = asdict(ended)
        return {key: document[key] for key in ("attempt", "outcome", *MEASURED, *WHY, "position", "counted_s")}
    figures = beat.figures if beat else {}
    row = {"attempt": number, "outcome": "runs" if runs else LOST}
    row |= {key: figures.get(key) for key in MEASURED} | dict.fromkeys(WHY)
    return row | {"position": None, "counted_s": figures.get("steps_s")}


def _count_unrecorded(rows: Sequence[Row], committed_images: int) -> None:
    """Of attempts whose driver was lost, count the steps that the next attempt did not take again, at their mean
    time."""
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        if row["outcome"] != LOST:
            continue
        again_from = following["from_images"] if following else None
        row["position"] = committed_images if again_from is None else again_from
        if row["counted_s"] is None or row["from_images"] is None:
            continue
        kept, taken = row["position"] - row["from_images"], row["images"] - row["from_images"]
        row["counted_s"] = round(row["counted_s"] * min(1.0, max(0.0, kept / taken)), 3) if taken > 0 else 0.0


def _driver(beat: Beat | None, alive: bool) -> dict[str, Any] | None:
    """Who drives the newest attempt, or did and is gone; None once that has ended."""
    if beat is None:
        return None
    return {"alive": alive, "host": beat.host, "pid": beat.pid, "here": is_here(beat)}


def attempt_rows(document: dict[str, Any]) -> list[Row]:
    """The attempts for people."""
    return [
        {
            "attempt": str(row["attempt"]),
            "began": (row["began_at"] or "-").replace("+00:00", "Z"),
            "workers": _cell(row["workers"]),
            "from": _cell(row["from_images"]),
            "to": _cell(row["images"]),
            "kept": _cell(row["position"]),
            "seconds": "-" if row["seconds"] is None else f"{row['seconds']:,.0f}",
            "ended": row["outcome"],
            "cause": row["cause"] or "-",
            "where": _where(row),
            "why": row["error"] or "-",
        }
        for row in document["attempts"]
    ]


def skipped_rows(document: dict[str, Any]) -> list[Row]:
    """What was not trained on, for people."""
    return [
        {
            "skipped": row["kind"],
            "from": f"{row['begin']:,}",
            "to": f"{row['end']:,}",
            "what": " ".join(filter(None, (row["part"], row["dataset"][:12], row["shard"]))) or "-",
            "why": row["reason"],
        }
        for row in document["skipped"]
    ]


def summary_lines(document: dict[str, Any]) -> dict[str, str]:
    """The run for people."""
    driver, goodput_ = document["driver"], document["goodput"]
    if driver is None:
        runs = "no: its newest attempt has ended"
    elif driver["alive"]:
        runs = f"yes: process {driver['pid']} on {driver['host']}"
    else:
        runs = f"no: its driver is gone (process {driver['pid']} on {driver['host']}); the same command goes on"
    return {
        "run": document["run"],
        "store": document["store"],
        "runs": runs,
        "images": f"{document['images']:,} of {document['of_images']:,}",
        "checkpoint": document["checkpoint"] or "none",
        "goodput": "-" if goodput_ is None else f"{goodput_:.1%} of its drivers' time went into steps that count",
        "skipped": f"{len(document['skipped'])}, listed below" if document["skipped"] else "nothing",
    }


def _where(row: Row) -> str:
    rank = None if row["rank"] is None else f"rank {row['rank']}"
    node = None if row["node"] is None else f"node {row['node'][:12]}"
    return " ".join(filter(None, (rank, node))) or "-"


def _cell(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
