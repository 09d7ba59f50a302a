"""Attempts: who may write to a run's store. Each start of a run takes the next number, and a higher one ends the lower.

Always holds: a number is taken by put-if-absent, so two drivers never share one; a writer looks for a higher attempt
before it commits.
"""

from __future__ import annotations

from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage import ObjectStore, canonical_json

ATTEMPTS = "attempts/"


class Superseded(UserError):
    """A newer attempt of this run exists; this one must stop without committing."""


def take_attempt(store: ObjectStore, record: dict[str, Any]) -> int:
    """The next attempt's number (from 1), now ours; `record` (JSON) is kept in it."""
    attempt = newest_attempt(store) + 1
    while not store.put_if_absent(_key(attempt), canonical_json({"attempt": attempt, **record})):
        attempt += 1
    return attempt


def newest_attempt(store: ObjectStore) -> int:
    """The highest attempt so far, 0 if none."""
    return max((number_of(info.key) for info in store.list(ATTEMPTS)), default=0)


def number_of(key: str) -> int:
    """The attempt whose record has this key."""
    return int(key[len(ATTEMPTS) : -len(".json")])


def first_record_key(store: ObjectStore) -> str | None:
    """Key of the run's first attempt, whose record holds the configuration that the run began with."""
    return next((info.key for info in store.list(ATTEMPTS)), None)


def _key(attempt: int) -> str:
    return f"{ATTEMPTS}{attempt:05d}.json"
