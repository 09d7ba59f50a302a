"""A comparison of runs for the eye: one PNG, or one page that needs nothing but itself, light or dark as its reader.

Always holds: the page runs no script and loads nothing; text of a run is escaped, and pictures are decoded and encoded
anew before they are shown. Called by `glidepath runs compare`; what it draws is cluster/comparison.py's document.
"""

from __future__ import annotations

import html
import importlib.util
import io
import logging
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from PIL import Image

from cluster.comparison import cell, headings, sections
from cluster.corpus_report import POLICY, inline
from data_pipeline.errors import UserError
from data_pipeline.images import ImageError, Pixels, decode
from trainer.tracking.runs import Grid, RunHistory

log = logging.getLogger(__name__)

# A run's colour on white paper and on black; with more runs they come again, dashed.
COLOURS = ("#2456a6", "#b3382c", "#2a7f62", "#6a4c93", "#a86f0a", "#4b5563")
DARK_COLOURS = ("#7fabf2", "#f08f81", "#5fc9a3", "#bb9ee2", "#e3b252", "#a9b3c1")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
INK, RULE = "#1d2129", "#d9dde3"
AXES = (("images", "images"), ("gpu_hours", "GPU-hours"))
FEW_POINTS = 40  # are marked each
LONG_TEXT = 16  # characters
LOG_FROM = 20.0  # times the lowest value: a loss that falls so far is drawn on a logarithmic scale
PANEL = (5.6, 3.1)  # inches
RC: Any = {"svg.fonttype": "none", "svg.hashsalt": "glidepath", "font.size": 9}

Pictures = Mapping[tuple[str, int], Pixels]  # (weights, number of the run) -> its grid
Document = Mapping[str, Any]


def refuse_without_matplotlib() -> None:
    """Raise UserError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("runs compare", "package matplotlib", "not installed", "pip install matplotlib")


def read_grids(grids: Sequence[Document], histories: Sequence[RunHistory]) -> dict[tuple[str, int], Pixels]:
    """The grids of a comparison that can be had, RGB uint8 [H, W, 3]; what is missing or broken is said."""
    found = {}
    for row in grids:
        for number, (images, key) in enumerate(zip(row["images"], row["keys"], strict=True)):
            png = histories[number].picture(Grid(images, row["weights"], key)) if key else None
            try:
                if png is not None:
                    found[row["weights"], number] = decode(png)
            except ImageError as error:
                log.warning("left out %s: %s", key, error)
    return found


def panels(document: Document) -> list[tuple[str, str, str]]:
    """(metric, axis, its label) of each panel: of every metric one over images and, if any run has it, GPU-hours. A
    metric with a single point in every run, as evaluations of one checkpoint are, stands in the table alone."""
    return [
        (name, axis, label)
        for name, curves in document["curves"].items()
        for axis, label in AXES
        if any(curve and len(curve[axis] or ()) > 1 for curve in curves)
    ]


def draw_panel(axes: Any, document: Document, name: str, axis: str, label: str) -> None:
    """The curves of a metric: as logged behind, smoothed in front."""
    from matplotlib.ticker import EngFormatter

    ends = []
    for number, curve in enumerate(document["curves"][name]):
        if not curve or not curve[axis]:
            continue
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        xs, raw, smooth = curve[axis], curve["values"], curve["smoothed"]
        ends += [min(raw), max(raw)]
        mark = {"marker": "o", "markersize": 3.5} if len(xs) <= FEW_POINTS else {}
        if raw != smooth:
            axes.plot(xs, raw, color=colour, linewidth=0.7, alpha=0.3)
        axes.plot(xs, smooth, dash, color=colour, linewidth=1.6, **mark)
    if min(ends) > 0 and max(ends) > LOG_FROM * min(ends):
        axes.set_yscale("log")
    if axis == "images":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(label, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    axes.locator_params(axis="x", nbins=6)
    axes.margins(x=0.02)
    axes.grid(color=RULE, linewidth=0.7)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(RULE)


def comparison_png(document: Document, pictures: Pictures) -> bytes:
    """Every panel, two in a row, then the grids side by side."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    heads, drawn, runs = headings(document["runs"]), panels(document), len(document["runs"])
    rows = [grid for grid in document["grids"] if any((grid["weights"], n) in pictures for n in range(runs))]
    curve_rows = -(-len(drawn) // 2)
    tall = [PANEL[1]] * curve_rows + [_grid_height(grid, pictures, runs) for grid in rows]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(2 * PANEL[0], sum(tall) + 0.5), dpi=110, layout="constrained")
        parts: Any = figure.subfigures(len(tall), 1, height_ratios=tall, squeeze=False)[:, 0] if tall else []
        for place, part in enumerate(parts[:curve_rows]):
            for axes, panel in zip_longest(part.subplots(1, 2), drawn[2 * place : 2 * place + 2]):
                if panel is None:  # of an odd number the last has nobody beside it
                    axes.set_axis_off()
                    continue
                draw_panel(axes, document, *panel)
                axes.set_title(_plain(panel[0]), fontsize=9, color=INK)
        for part, grid in zip(parts[curve_rows:], rows, strict=True):
            for number, axes in enumerate(part.subplots(1, runs, squeeze=False)[0]):
                axes.set_axis_off()
                if (pixels := pictures.get((grid["weights"], number))) is not None:
                    axes.imshow(pixels, interpolation="antialiased")
                    about = f"{heads[number]}: {grid['weights']} weights, {grid['images'][number]:,} images"
                    axes.set_title(_plain(about), fontsize=9, color=INK)
        lines = [
            Line2D([], [], color=COLOURS[n % len(COLOURS)], linestyle=DASHES[n // len(COLOURS) % len(DASHES)])
            for n in range(runs)
        ]
        figure.legend(
            lines, [_plain(head) for head in heads], loc="outside upper left", ncols=min(runs, 6), frameon=False
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _grid_height(grid: Document, pictures: Pictures, runs: int) -> float:
    """Inches for a row of grids as wide as the figure, and their titles."""
    shapes = [pixels.shape for (weights, _), pixels in pictures.items() if weights == grid["weights"]]
    return 2 * PANEL[0] / runs * max(height / width for height, width, _ in shapes) + 0.4


def _plain(text: str) -> str:
    """Text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")


def panel_svg(document: Document, name: str, axis: str, label: str) -> str:
    """A panel as an <svg> for the page, whose colours are the page's."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        figure = Figure(figsize=PANEL, layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        draw_panel(axes, document, name, axis, label)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    svg = _bare(re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL))
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--run-{number})")
    return svg.replace(INK, "currentColor").replace(RULE, "var(--line)")


def _bare(svg: str) -> str:
    """Without its own size and what only a file of its own needs."""
    head, rest = svg.split(">", 1)
    kept = re.search(r'viewBox="[^"]*"', head)
    assert kept is not None
    return f'<svg {kept[0]} role="img">{rest}'


# ------------------------------------------------------------------------------------------------------------ the page

STYLE = """
:root { color-scheme: light dark; --paper: #f5f6f8; --card: #fff; --ink: #1d2129; --quiet: #626a76; --line: #d9dde3;
        LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171b; --card: #1d2026; --ink: #e4e7ec; --quiet: #9aa3b0; --line: #363b44; DARK } }
* { box-sizing: border-box; }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
       max-width: 1400px; padding: 1.5rem clamp(.8rem, 3vw, 2rem) 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .5rem; }
p { margin: .2rem 0 .6rem; } .quiet { color: var(--quiet); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; position: sticky; top: 0; z-index: 1; padding: .5rem 0;
      background: var(--paper); }
.run { display: inline-flex; align-items: center; gap: .45rem; font-weight: 600; overflow-wrap: anywhere; }
.run svg { flex: none; width: 22px; height: 10px; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; max-width: 100%;
          width: fit-content; }
table { border-collapse: collapse; }
th, td { padding: .28rem .8rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 400; position: sticky; left: 0; background: var(--card); min-width: 7.5rem; max-width: 46vw;
           overflow-wrap: anywhere; }
thead th, td { text-align: right; } thead .run { justify-content: flex-end; overflow-wrap: normal; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { white-space: normal; min-width: 5.5rem; max-width: 44ch; overflow-wrap: anywhere; }
.panels, .grids { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem;
         max-width: 700px; min-width: 0; }
figcaption { margin-bottom: .4rem; overflow-wrap: anywhere; }
figure > svg { display: block; width: 100%; height: auto; }
figure > img { display: block; width: 100%; border-radius: 4px; }
.none { aspect-ratio: 2; display: grid; place-items: center; border: 1px dashed var(--line); border-radius: 4px; }
summary { cursor: pointer; font-size: 1.1rem; font-weight: 600; margin: 2.2rem 0 .6rem; }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1><p class="quiet">{about}</p>
<nav aria-label="Runs">{legend}</nav>
{body}
</body></html>
"""


def comparison_html(document: Document, pictures: Pictures) -> bytes:
    """The page, UTF-8, with curves and pictures inside it."""
    heads = headings(document["runs"])
    marks = [_mark(number, head) for number, head in enumerate(heads)]
    runs, settings, *figures, newest = sections(document)
    smoothing = document["smoothing_images"]
    parts = [
        _table(runs.title, runs.lines, marks),
        _table(settings.title, settings.lines, marks) if settings.lines else "<h2>Settings</h2><p>All the same.</p>",
        _curves(document),
        *(_table(section.title, section.lines, marks) for section in figures if section.lines),
        *(_grids(grid, marks, pictures) for grid in document["grids"]),
        f"<details><summary>{newest.title}</summary>{_rows(newest.lines, marks)}</details>",
    ]
    colours = (" ".join(f"--run-{n}: {c};" for n, c in enumerate(of_theme)) for of_theme in (COLOURS, DARK_COLOURS))
    style = STYLE
    for theme, names in zip(("LIGHT", "DARK"), colours, strict=True):
        style = style.replace(theme, names)
    about = "GPU-hours: what each update took times the workers it had. Values at equal images or GPU-hours are those "
    about += f"of the curves, smoothed over {cell(smoothing)} images." if smoothing else "of the curves as logged."
    page = PAGE.format(
        policy=html.escape(POLICY),
        title=html.escape(" and ".join([", ".join(heads[:-1]), heads[-1]])),
        style=style,
        about=about,
        legend="".join(marks),
        body="".join(parts),
    )
    return page.encode()


def _mark(number: int, head: str) -> str:
    """A run's name behind a piece of its line."""
    dash = ("", "6 3", "2 3", "6 2 2 2")[number // len(COLOURS) % len(DASHES)]
    line = f'<path d="M0 5H22" stroke="var(--run-{number % len(COLOURS)})" stroke-width="3" stroke-dasharray="{dash}"/>'
    return f'<span class="run"><svg viewBox="0 0 22 10" aria-hidden="true">{line}</svg>{html.escape(head)}</span>'


def _table(title: str, lines: Sequence[tuple[str, Sequence[Any]]], marks: Sequence[str]) -> str:
    return f"<h2>{title}</h2>{_rows(lines, marks)}"


def _rows(lines: Sequence[tuple[str, Sequence[Any]]], marks: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{mark}</th>' for mark in marks)
    rows = []
    for name, values in lines:
        cells = "".join(f"<td{_kind(value)}>{html.escape(cell(value))}</td>" for value in values)
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    table = f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _kind(value: Any) -> str:
    """Of a table's cell: long text may break, numbers never."""
    return ' class="text"' if len(cell(value)) > LONG_TEXT else ""


def _curves(document: Document) -> str:
    figures = (
        f"<figure><figcaption>{html.escape(name)}</figcaption>{panel_svg(document, name, axis, label)}</figure>"
        for name, axis, label in panels(document)
    )
    return f'<h2>Curves</h2><div class="panels">{"".join(figures)}</div>'


def _grids(grid: Document, marks: Sequence[str], pictures: Pictures) -> str:
    figures = []
    for number, (mark, images) in enumerate(zip(marks, grid["images"], strict=True)):
        pixels = pictures.get((grid["weights"], number))
        shown = (
            f'<img src="{_png(pixels)}" alt="grid of samples">'
            if pixels is not None
            else '<div class="none">none</div>'
        )
        after = f" after {images:,} images" if images is not None else ""
        figures.append(f"<figure><figcaption>{mark}{after}</figcaption>{shown}</figure>")
    return f'<h2>Samples, {html.escape(grid["weights"])} weights</h2><div class="grids">{"".join(figures)}</div>'


def _png(pixels: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return inline(buffer.getvalue(), "png")
