"""The answers of a study, in sqlite: several judges at once, each going on where they stopped.

Always holds: an answer is a committed row before the judge sees the next pictures; a row counts once, however often a
page sends it; of the pages that one judge has open the newest speaks, and the others are told so. Each call is a
connection of its own, so threads and processes may share the file. Called by the page and by the results.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cluster.judging.policy import Judged, Shown, next_shown
from cluster.judging.study import Study
from data_pipeline.config import state_folder
from data_pipeline.errors import UserError

WAIT_S = 10.0  # for another judge's answer to be written
LONGEST_MS = 24 * 3600 * 1000
NAME_CHARACTERS = 64
Choice = Literal["left", "right", "tie"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS study (sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY, judge TEXT NOT NULL, question TEXT NOT NULL, item INTEGER NOT NULL,
    "left" INTEGER NOT NULL, "right" INTEGER NOT NULL, choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie')),
    ms INTEGER NOT NULL, answered_at REAL NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS once ON answers (judge, question, item, min("left", "right"), max("left", "right"));
CREATE TABLE IF NOT EXISTS pages (
    judge TEXT PRIMARY KEY, token TEXT NOT NULL, question TEXT NOT NULL, item INTEGER, "left" INTEGER, "right" INTEGER,
    turn TEXT
);
"""


@dataclass(frozen=True)
class Answer:
    """One row. `ms`: from the moment the pictures were seen to the choice; `answered_at`: seconds since 1970."""

    judge: str
    question: str
    item: int
    left: int
    right: int
    choice: Choice
    ms: int
    answered_at: float


@dataclass(frozen=True)
class Turn:
    """What a judge's page shows: `shown` under a name of its own, None once all is answered."""

    token: str
    question: str
    turn: str
    shown: Shown | None
    answered: int


def answers_file(study: Study) -> Path:
    """Beside a study in a folder; in the state folder for one in a bucket, since sqlite needs a disk."""
    beside = study.store.local_path("study.json")
    if beside is not None:
        return beside.with_name("answers.sqlite")
    return state_folder() / "judging" / study.document.sha256[:16] / "answers.sqlite"


class Answers:
    """The answers of one study."""

    def __init__(self, study: Study) -> None:
        """Raises UserError for a file of another study, or one that is no database."""
        self._study, self.path = study, answers_file(study)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._database() as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.executescript(SCHEMA)
        with self._database(write=True) as database:
            sha256 = study.document.sha256
            [stated] = database.execute("SELECT sha256 FROM study").fetchone() or [None]
            if stated is None:
                database.execute("INSERT INTO study VALUES (?)", [sha256])
            elif stated != sha256:
                name, found = f"answers {self.path}", f"of study {stated[:12]}"
                raise UserError(name, f"answers of study {sha256[:12]}", found, "move the file away, or the study")

    @contextmanager
    def _database(self, write: bool = False) -> Iterator[sqlite3.Connection]:
        """A connection; with `write` one transaction that nobody else writes beside. Raises UserError."""
        try:
            with closing(sqlite3.connect(self.path, timeout=WAIT_S, isolation_level=None)) as database:
                if write:
                    database.execute("BEGIN IMMEDIATE")
                yield database
                if write:
                    database.execute("COMMIT")  # without it, closing rolls back
        except sqlite3.Error as error:
            name, expected = f"answers {self.path}", "a database that can be read and written"
            raise UserError(name, expected, str(error), "see that nothing holds it, or move it away") from None

    def all(self) -> list[Answer]:
        """Every answer, oldest first."""
        with self._database() as database:
            rows = database.execute(
                'SELECT judge, question, item, "left", "right", choice, ms, answered_at FROM answers ORDER BY id'
            )
            return [Answer(*row) for row in rows]

    def begin(self, judge: str, question: str) -> Turn:
        """A page of a judge is open now, and any before it is not. Raises UserError for an unusable name or another
        question."""
        if judge != judge.strip() or not judge.isprintable() or not 0 < len(judge) <= NAME_CHARACTERS:
            expected = f"1 to {NAME_CHARACTERS} printable characters"
            raise UserError("name of a judge", expected, repr(judge[:80]), "choose another one")
        if question not in self._study.document.questions:
            expected = " or ".join(self._study.document.questions)
            raise UserError("question", expected, repr(question[:80]), "choose one of these")
        with self._database(write=True) as database:
            return self._turn(database, judge, question, secrets.token_hex(8))

    def answer(self, judge: str, token: str, turn: str, choice: Choice, ms: int) -> Turn:
        """Take an answer to what the page shows and say what comes next; the same again changes nothing.

        Raises UserError for a page that is not the judge's newest, and for an answer to nothing that was asked.
        """
        if choice not in get_args(Choice) or not 0 <= ms <= LONGEST_MS:
            expected = f"left, right or tie within {LONGEST_MS} ms"
            raise UserError("answer", expected, f"{choice!r} after {ms} ms", "choose again")
        with self._database(write=True) as database:
            page = database.execute(
                'SELECT token, question, item, "left", "right", turn FROM pages WHERE judge = ?', [judge]
            ).fetchone()
            if page is None or page[0] != token:
                raise UserError(
                    f"judge {judge}", "one open page", "a newer one", "go on there, or reload this one to go on here"
                )
            question, *place, current = page[1:]
            shown = None if place[0] is None else Shown(*place)
            if turn != current or shown is None:  # sent again: the page gets once more what came of it
                return Turn(token, question, current, shown, len(self._judged(database, question, judge)))
            database.execute(
                'INSERT INTO answers (judge, question, item, "left", "right", choice, ms, answered_at) '
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [judge, question, *shown, choice, ms, time.time()],
            )
            return self._turn(database, judge, question, token)

    def _turn(self, database: sqlite3.Connection, judge: str, question: str, token: str) -> Turn:
        """What the judge is to see now, noted as the judge's open page."""
        judged = self._judged(database, question)
        document = self._study.document
        items = len(self._study.items(question))
        shown = next_shown(len(document.models), items, judged, judge, document.seed)
        answered = sum(one.judge == judge for one in judged)
        # By the count: the same answer sent twice finds the next turn's name and is not taken for an answer to it.
        turn = f"{question}-{answered}"
        columns = [judge, token, question, *(shown or (None, None, None)), turn]
        database.execute("INSERT OR REPLACE INTO pages VALUES (?, ?, ?, ?, ?, ?, ?)", columns)
        return Turn(token, question, turn, shown, answered)

    def _judged(self, database: sqlite3.Connection, question: str, judge: str | None = None) -> list[Judged]:
        """What was answered of a question, by one judge or by all."""
        rows = database.execute('SELECT judge, item, "left", "right" FROM answers WHERE question = ?', [question])
        return [Judged(name, Shown(*shown)) for name, *shown in rows if judge in (None, name)]
