"""The curves of a sweep as the papers draw them: what guidance and steps trade of quality against diversity.

Always holds: a panel is drawn for each pair of figures that the sweep has, a line for each number of steps, a point for
each guidance scale, named beside it. Called by evaluation.

Sources: Nichol et al. 2021 (GLIDE), figure 5: precision and recall, Inception Score and FID, CLIP score and FID.
The last panel is ours: guided pictures may score lower with every caption, and yet better with their own.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

PAIRS = (  # x, y
    ("recall", "precision", "Recall", "Precision"),
    ("inception_score", "fid", "Inception Score", "FID"),
    ("clip_score", "fid", "CLIP score (cosine)", "FID"),
    ("clip_score_margin", "fid", "CLIP score above shuffled captions", "FID"),
)
COLOURS = ("#2456a6", "#b3382c", "#2a7f62", "#6a4c93", "#c98a1b", "#4b5563")
NOTE_OFFSET = (5, 4)  # points, of a scale from its mark


def curves_png(rows: Sequence[dict[str, Any]], title: str) -> bytes | None:
    """A PNG of rows of {"spacing", "guidance_scale", metric/network: value}; None if they have no pair of figures."""
    from matplotlib.figure import Figure

    panels = [panel for panel in ((first(rows, x), first(rows, y), lx, ly) for x, y, lx, ly in PAIRS) if all(panel)]
    if not panels:
        return None
    figure = Figure(figsize=(5 * len(panels), 4.6), dpi=110)
    for number, (x, y, label_x, label_y) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        for place, spacing in enumerate(dict.fromkeys(row["spacing"] for row in rows)):
            line = sorted((row for row in rows if row["spacing"] == spacing), key=lambda row: row["guidance_scale"])
            colour = COLOURS[place % len(COLOURS)]
            xs, ys = [row[x] for row in line], [row[y] for row in line]
            axes.plot(xs, ys, "o-", color=colour, markersize=4, linewidth=1.4, label=f"{spacing} steps")
            for row in line:
                note = f"{row['guidance_scale']:g}"
                axes.annotate(note, (row[x], row[y]), NOTE_OFFSET, textcoords="offset points", fontsize=7, color=colour)
        axes.set_xlabel(f"{label_x}\n{x.partition('/')[2]}", fontsize=9)
        axes.set_ylabel(f"{label_y}\n{y.partition('/')[2]}", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.margins(0.12)
        axes.locator_params(axis="x", nbins=6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e6eb", linewidth=0.7)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{title}: guidance scale at each point", fontsize=9)
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def first(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """The full name of a metric by the first network that has it; empty where none does."""
    return next((name for name in rows[0] if name.partition("/")[0] == metric), "")
