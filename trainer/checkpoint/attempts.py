"""Attempts: who may write to a run's store. Each start of a run takes the next number, and a higher one ends the lower.

Always holds: a number is taken by put-if-absent, so two drivers never share one; a writer looks for a higher attempt
before it commits.
"""

from __future__ import annotations

import json
import re
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage import ObjectStore, canonical_json

ATTEMPTS = "attempts/"
_RECORD = re.compile(r"attempts/(\d{5,})\.json")


class Superseded(UserError):
    """A newer attempt of this run exists; this one must stop without committing."""


def take_attempt(store: ObjectStore, record: dict[str, Any]) -> int:
    """The next attempt's number (from 1), now ours; `record` (JSON) is kept in it."""
    attempt = newest_attempt(store) + 1
    while not store.put_if_absent(record_key(attempt), canonical_json({"attempt": attempt, **record})):
        attempt += 1
    return attempt


def newest_attempt(store: ObjectStore) -> int:
    """The highest attempt so far, 0 if none."""
    return max((number_of(info.key) for info in store.list(ATTEMPTS)), default=0)


def number_of(key: str) -> int:
    """The attempt whose record has this key; 0 for a file that is none."""
    match = _RECORD.fullmatch(key)
    return int(match[1]) if match else 0


def read_record(store: ObjectStore, key: str) -> dict[str, Any]:
    """An attempt's record. Raises UserError if it is damaged."""
    try:
        record = json.loads(store.get(key))
        record["config"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{store.uri}/{key}", "an attempt's JSON record", "other bytes", "restore it") from None
    return dict(record)


def first_record_key(store: ObjectStore) -> str | None:
    """Key of the run's first attempt, whose record holds the configuration that the run began with."""
    return next((info.key for info in store.list(ATTEMPTS) if number_of(info.key)), None)


def run_of(store: ObjectStore) -> str | None:
    """The name of the run whose store this is; None before its first attempt. Raises UserError."""
    key = first_record_key(store)
    return read_record(store, key)["config"].get("run") if key else None


def record_key(attempt: int) -> str:
    return f"{ATTEMPTS}{attempt:05d}.json"
