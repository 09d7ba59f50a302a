"""What the answers of a study say: Elo ratings and win rates with 95% intervals, as a table, JSON, CSV and a plot.

Always holds: a function of the answers and a seed; where the answers do not decide the ratings it says so in one line
and gives the win rates alone. Called by `glidepath judge results`.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cluster.judging.answers import Answer
from cluster.judging.study import Item, Study
from data_pipeline.errors import UserError
from trainer.evaluation.elo import Comparisons, Floats, bootstrap, elo, intervals, refuse_undecided, win_rate, wins

RESAMPLES = 2000
SCORE = {"left": 1.0, "tie": 0.5, "right": 0.0}
COUNTS = ("answers", "ties", "judges", "median_ms", "left_share")
ELO_KEYS = ("elo", "elo_low", "elo_high")
INK, MARK = "#1f2328", "#2f5bd0"


def results(study: Study, answers: Sequence[Answer], seed: int = 0) -> dict[str, Any]:
    """{"study", "sha256", "answers", "questions": {question: see `_of_question`}}; questions without answers are left
    out. Raises UserError where there are none at all."""
    if not answers:
        name = f"study {study.store.uri}"
        raise UserError(name, "answers", "none", f"have it judged: glidepath page --study {study.store.uri}")
    asked = {question: [one for one in answers if one.question == question] for question in study.document.questions}
    return {
        "study": study.store.uri,
        "sha256": study.document.sha256,
        "answers": len(answers),
        "questions": {question: _of_question(study, given, seed) for question, given in asked.items() if given},
    }


def _of_question(study: Study, answers: Sequence[Answer], seed: int) -> dict[str, Any]:
    """`models`: a row each, highest rating first; `undecided`: why there are no ratings, else None; `left_share`: of
    the answers that were no tie, which is near one half unless judges prefer a side."""
    names = study.document.models
    comparisons = Comparisons(
        np.array([one.left for one in answers]),
        np.array([one.right for one in answers]),
        np.array([SCORE[one.choice] for one in answers]),
    )
    wins_KK = wins(len(names), comparisons)
    undecided, ratings = _ratings(names, wins_KK, comparisons, seed)
    rows: list[dict[str, Any]] = [
        {"model": name, **ratings[number], **_rate(wins_KK[number].sum(), wins_KK[:, number].sum())}
        for number, name in enumerate(names)
    ]
    rows.sort(key=lambda row: -(row["win_rate"] or 0) if row["elo"] is None else -row["elo"])
    decided = [one for one in answers if one.choice != "tie"]
    return {
        "answers": len(answers),
        "ties": len(answers) - len(decided),
        "judges": len({one.judge for one in answers}),
        "median_ms": median(one.ms for one in answers),
        "left_share": sum(one.choice == "left" for one in decided) / len(decided) if decided else None,
        "undecided": undecided,
        "models": rows,
        "pairs": [
            {"model": first, "against": second, **_rate(wins_KK[i, j], wins_KK[j, i])}
            for i, first in enumerate(names)
            for j, second in enumerate(names)
            if i < j
        ],
    }


def _ratings(
    names: Sequence[str], wins_KK: Floats, comparisons: Comparisons, seed: int
) -> tuple[str | None, list[dict[str, float | None]]]:
    """(why there are none, by model {"elo", "elo_low", "elo_high"}); an end that the answers leave open is None."""
    try:
        refuse_undecided(names, wins_KK)
    except UserError as error:
        return str(error), [dict.fromkeys(ELO_KEYS) for _ in names]
    low, high = intervals(bootstrap(len(names), comparisons, RESAMPLES, seed))
    columns = zip(elo(names, wins_KK), low, high, strict=True)
    return None, [
        {key: float(value) if math.isfinite(value) else None for key, value in zip(ELO_KEYS, row, strict=True)}
        for row in columns
    ]


def _rate(won: float, lost: float) -> dict[str, float | None]:
    count = won + lost
    rate, low, high = win_rate(won, count) if count else (None, None, None)
    return {"win_rate": rate, "win_rate_low": low, "win_rate_high": high, "comparisons": int(count)}


def rows_for_people(document: dict[str, Any]) -> list[dict[str, str]]:
    """A line for each question and model."""
    return [
        {
            "question": question,
            "model": row["model"],
            "Elo": "-" if row["elo"] is None else f"{row['elo']:+.0f}",
            "95%": "-" if row["elo"] is None else f"{_end(row['elo_low'])} … {_end(row['elo_high'])}",
            "wins": "-" if row["win_rate"] is None else f"{row['win_rate']:.1%}",
            "95% ": "-" if row["win_rate"] is None else f"{row['win_rate_low']:.1%} … {row['win_rate_high']:.1%}",
            "comparisons": str(row["comparisons"]),
        }
        for question, found in document["questions"].items()
        for row in found["models"]
    ]


def _end(value: float | None) -> str:
    return "open" if value is None else f"{value:+.0f}"


def flat_metrics(document: dict[str, Any]) -> dict[str, float]:
    """The figures of `results` under names such as elo/caption/MODEL; those that are None are left out."""
    found: dict[str, float] = {}
    for question, about in document["questions"].items():
        found |= {f"{name}/{question}": about[name] for name in COUNTS}
        for row in about["models"]:
            keys = (*ELO_KEYS, "win_rate", "win_rate_low", "win_rate_high")
            found |= {f"{key}/{question}/{row['model']}": row[key] for key in keys}
    return {name: float(value) for name, value in found.items() if value is not None}


def write_results(study: Study, answers: Sequence[Answer], document: dict[str, Any], folder: Path) -> list[str]:
    """`results.json`, `answers.csv` and `elo.png` in `folder`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "results.json": json.dumps(document, indent=1).encode(),
        "answers.csv": answers_csv(study, answers).encode(),
        "elo.png": elo_plot(document),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [str(folder / name) for name in files]


def answers_csv(study: Study, answers: Sequence[Answer]) -> str:
    """A line for each answer, oldest first, with the models' names."""
    text, models = io.StringIO(), study.document.models
    lines = csv.writer(text)
    lines.writerow(["answered_at", "judge", "question", "caption", "item", "left", "right", "choice", "ms"])
    items: dict[str, list[Item]] = {question: study.items(question) for question in study.document.questions}
    for one in answers:
        at = datetime.fromtimestamp(one.answered_at, timezone.utc).isoformat(timespec="milliseconds")
        caption = study.document.captions[items[one.question][one.item].caption].text
        place = [models[one.left], models[one.right], one.choice, one.ms]
        lines.writerow([at, one.judge, one.question, caption, one.item, *place])
    return text.getvalue()


def elo_plot(document: dict[str, Any]) -> bytes:
    """A PNG: each question a panel, each model a mark with its interval; where there is no rating, the win rate."""
    from matplotlib.figure import Figure

    questions = document["questions"]
    models = max(len(found["models"]) for found in questions.values())
    figure = Figure(figsize=(4.2 * len(questions) + 0.6, 1.5 + 0.42 * models), dpi=140)
    panels = figure.subplots(1, len(questions), squeeze=False)[0]
    for axes, (question, found) in zip(panels, questions.items(), strict=True):
        rated = found["undecided"] is None
        rows = [row for row in found["models"] if row["win_rate"] is not None]
        middle, ends = ("elo", ELO_KEYS[1:]) if rated else ("win_rate", ("win_rate_low", "win_rate_high"))
        shown = [value for row in rows for key in (middle, *ends) if (value := row[key]) is not None]
        reach = max(shown) - min(shown) or 1.0
        edges = min(shown) - 0.1 * reach, max(shown) + 0.1 * reach
        for place, row in enumerate(rows):
            low, high = (edge if row[key] is None else row[key] for key, edge in zip(ends, edges, strict=True))
            axes.plot([low, high], [place, place], color=MARK, linewidth=2, solid_capstyle="round", alpha=0.45)
            axes.plot(row[middle], place, "o", color=MARK, markersize=7)
        axes.axvline(0 if rated else 0.5, color=INK, linewidth=0.6, linestyle=(0, (2, 3)))
        axes.set_yticks(range(len(rows)), [row["model"] for row in rows], fontsize=9, color=INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_title(f"{question}, {found['answers']:,} answers", fontsize=10, color=INK, loc="left")
        axes.set_xlabel("Elo, 95% interval" if rated else "win rate, 95% interval (no Elo)", fontsize=8, color=INK)
        axes.tick_params(axis="both", length=0, labelsize=8)
        axes.grid(axis="x", color="#e3e5e8", linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
