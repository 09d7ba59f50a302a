"""The report of `corpus inspect --out`: plots, contact sheets and one page about a dataset, for people.

Always holds: the page needs nothing but itself (its pictures are inside it, it runs no script and loads nothing); text
from a corpus is escaped, and its pictures are decoded and encoded anew before they are shown. Called by the command
line.

    index.html   funnel.png  histograms.png  kept.png  dropped-<reason>.png  figures.json

A reason may name a column of the corpus, so what no file name or address may hold stands there as in an URL.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.build import summary
from data_pipeline.errors import UserError
from data_pipeline.images import ImageError, decode
from data_pipeline.inspect import KEPT, Example, Histogram, Inspection
from data_pipeline.shards import Dataset

THUMB = 160  # px, the longer side
CELL_TEXT_LINES = 4
SHEET_COLUMNS = 8
PASSES = {"broken": "#b3382c", "filtered": "#c98a1b", "judged": "#6a4c93"}  # pass -> colour of its bars
KEPT_COLOUR, ALL_COLOUR = "#2a7f62", "#c9ced6"
LANGUAGES_SHOWN = 16


def make_folder(folder: Path) -> None:
    """What can be refused before a corpus is looked through. Raises UserError for a folder that cannot be made, and
    without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("corpus report", "package matplotlib", "not installed", "pip install matplotlib")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = "a file" if folder.is_file() else error.strerror or str(error)
        raise UserError(f"report {folder}", "a folder, or nothing", found, "choose another --out") from None


def write_report(dataset: Dataset, inspection: Inspection, folder: Path) -> list[str]:
    """Write the report's files into `folder`, which `make_folder` made; their paths, the page first."""
    thumbs = {id(example): thumbnail(example.picture) for shown in inspection.examples.values() for example in shown}
    winners = {id(example): thumbnail(example.winner) for shown in inspection.examples.values() for example in shown}
    plots = {"funnel.png": funnel_plot(inspection), "histograms.png": histogram_plot(inspection.histograms)}
    sheets = {
        ("kept.png" if reason == KEPT else f"dropped-{quoted(reason)}.png"): contact_sheet(shown, thumbs)
        for reason, shown in inspection.examples.items()
        if any(thumbs[id(example)] for example in shown)  # the page lists the others
    }
    page = render_page(dataset, inspection, plots, thumbs, winners)
    figures = json.dumps(inspection.to_json(), indent=1).encode()
    files = {"index.html": page.encode(), **plots, **sheets, "figures.json": figures}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [str(folder / name) for name in files]


def funnel_rows(inspection: Inspection) -> list[dict[str, Any]]:
    """The funnel as a table: what came in, what each reason took, in the order of the passes, and what went out."""
    funnel = inspection.funnel
    order = {name: place for place, name in enumerate(PASSES)}
    dropped = sorted(funnel["dropped"].items(), key=lambda item: (order[inspection.passes[item[0]]], -item[1]))
    rows, left = [{"rows": funnel["in"], "pass": "", "reason": "in", "left": funnel["in"]}], funnel["in"]
    for reason, count in dropped:
        left -= count
        rows.append({"rows": count, "pass": inspection.passes[reason], "reason": reason, "left": left})
    rows.append({"rows": funnel["out"], "pass": "", "reason": "out", "left": left})
    return [row | {"share": f"{row['rows'] / max(1, funnel['in']):.2%}"} for row in rows]


def quoted(reason: str) -> str:
    """A reason as a file's name and as an anchor of the page."""
    return quote(reason, safe="")


def thumbnail(data: bytes | None) -> Image.Image | None:
    """At most THUMB pixels a side, whole; None where there is no picture that can be decoded."""
    if data is None:
        return None
    try:
        image = Image.fromarray(decode(data, THUMB))
    except ImageError:
        return None
    image.thumbnail((THUMB, THUMB))
    return image


def contact_sheet(examples: Sequence[Example], thumbs: Mapping[int, Image.Image | None]) -> bytes:
    """A PNG of examples with their captions."""
    import matplotlib

    # It has most scripts but not Chinese, Japanese and Korean, which the page shows in the browser's fonts.
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 10)
    margin, text_height = 8, 13 * CELL_TEXT_LINES
    columns = min(SHEET_COLUMNS, max(1, len(examples)))
    rows = max(1, -(-len(examples) // columns))
    size = (columns * (THUMB + margin) + margin, rows * (THUMB + text_height + margin) + margin)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for number, example in enumerate(examples):
        x = margin + number % columns * (THUMB + margin)
        y = margin + number // columns * (THUMB + text_height + margin)
        thumb = thumbs[id(example)]
        if thumb is None:
            pen.rectangle((x, y, x + THUMB, y + THUMB), outline="#b0b0b0")
            pen.multiline_text((x + 6, y + 6), _wrapped(example.detail or "no picture", 24, 8), "#8a8a8a", font)
        else:
            sheet.paste(thumb, (x + (THUMB - thumb.width) // 2, y + (THUMB - thumb.height) // 2))
        pen.multiline_text((x, y + THUMB + 2), _wrapped(example.caption, 26, CELL_TEXT_LINES), "black", font)
    return _png(sheet)


def _wrapped(text: str, width: int, lines: int) -> str:
    printable = "".join(letter if letter.isprintable() else " " for letter in text[: width * lines * 2])
    return "\n".join(textwrap.wrap(printable, width, max_lines=lines, placeholder=" …"))


def funnel_plot(inspection: Inspection) -> bytes:
    """A PNG: rows left after each reason, and what it took."""
    from matplotlib.figure import Figure

    rows = funnel_rows(inspection)
    figure = Figure(figsize=(9, 0.9 + 0.3 * len(rows)), dpi=110)
    axes = figure.subplots()
    for place, row in enumerate(rows):
        taken = row["rows"] if row["pass"] else 0
        axes.barh(place, row["left"], color=KEPT_COLOUR if row["reason"] == "out" else ALL_COLOUR)
        axes.barh(place, taken, left=row["left"], color=PASSES.get(row["pass"], ALL_COLOUR))
        axes.annotate(f" {row['rows']:,}  {row['share']}", (row["left"] + taken, place), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["reason"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(1, rows[0]["rows"]))
    axes.set_xlabel("rows left (grey), taken (broken red, filtered amber, judged violet), out (green)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return _saved(figure)


def histogram_plot(histograms: Mapping[str, Histogram]) -> bytes:
    """A PNG: all measured rows behind those that are kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), dpi=110)
    for axes, (name, histogram) in zip(figure.subplots(2, 2).flat, histograms.items(), strict=True):
        shown = slice(0, LANGUAGES_SHOWN if name.startswith("language") else None)
        places = np.arange(len(histogram.labels[shown]))
        axes.bar(places, histogram.all[shown], 0.9, color=ALL_COLOUR, label="all")
        axes.bar(places, histogram.kept[shown], 0.9, color=KEPT_COLOUR, label="kept")
        axes.set_xticks(places, histogram.labels[shown], rotation=60, fontsize=8)
        axes.set_xlim(-0.6, max(8, len(places)) - 0.4)
        axes.set_title(name, fontsize=10)
        axes.tick_params(axis="y", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    return _saved(figure)


def _saved(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------ the page

STYLE = """
:root { color-scheme: light; --ink: #1d2129; --quiet: #6b7280; --line: #e3e6eb; --card: #fff; }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: #f5f6f8; margin: 0 auto; max-width: 1500px;
       padding: 1.5rem 2rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
h2 small, .quiet { color: var(--quiet); font-weight: 400; font-size: .85rem; }
code { font: 12px ui-monospace, monospace; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .2rem .9rem; } a { color: #2456a6; text-decoration: none; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: .8rem 0; }
.facts b { display: block; font-size: 1.25rem; font-weight: 600; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.plots img { max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
th, td { padding: .22rem .7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.detail { overflow-wrap: anywhere; max-width: 60ch; }
.dot { display: inline-block; width: .6rem; height: .6rem; border-radius: 50%; margin-right: .4rem; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(172px, 1fr)); gap: .7rem; }
.sheet.wide { grid-template-columns: repeat(auto-fill, minmax(344px, 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 6px; }
figure .pictures { display: flex; gap: 6px; justify-content: center; min-height: 160px; align-items: center; }
figure img { max-width: 160px; max-height: 160px; display: block; }
figure .none { width: 160px; height: 160px; box-sizing: border-box; border: 1px dashed #b9bfca; border-radius: 4px;
               color: var(--quiet); font-size: 11px; padding: 8px; overflow: hidden; overflow-wrap: anywhere; }
figcaption { font-size: 12px; margin-top: 5px; overflow-wrap: anywhere; }
figcaption .text { max-height: 6.2em; overflow: auto; unicode-bidi: isolate; }
figcaption .quiet { font-size: 11px; display: block; }
"""

# Nothing is loaded and nothing runs, whatever a caption says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<title>Dataset {short}</title><style>{style}</style></head><body>
<h1>Dataset {short}</h1><div class="quiet"><code>{uri}</code></div>
<div class="facts">{facts}</div>
<nav>{links}</nav>
<h2 id="funnel">Funnel</h2><div class="plots">{table}<img src="{funnel}" alt="rows left after each reason"></div>
<h2 id="histograms">What came in, and what is kept</h2>
<div class="plots"><img src="{histograms}" alt="histograms"></div>
{sheets}
{quarantine}
</body></html>
"""


def render_page(
    dataset: Dataset,
    inspection: Inspection,
    plots: Mapping[str, bytes],
    thumbs: Mapping[int, Image.Image | None],
    winners: Mapping[int, Image.Image | None],
) -> str:
    """The page as text, with every picture inside it."""
    said = summary(dataset)
    facts = {
        "rows": f"{said['rows']:,}",
        "came in": f"{inspection.funnel['in']:,}",
        "shards": f"{said['shards']:,}",
        "bytes": f"{said['bytes']:,}",
        "quarantined": f"{said['quarantined']:,}",
        "input units": f"{len(dataset.manifest['units']):,}",
        "families": ", ".join(dataset.families()),
    }
    shown = {row["reason"]: row for row in funnel_rows(inspection)}
    order = [KEPT, *(reason for reason in shown if reason in inspection.examples)]
    sheets = [_sheet(reason, shown.get(reason), inspection.examples[reason], thumbs, winners) for reason in order]
    return PAGE.format(
        policy=html.escape(POLICY),
        style=STYLE,
        short=html.escape(dataset.id[:12]),
        uri=html.escape(said["uri"]),
        facts="".join(f"<div><b>{html.escape(value)}</b>{name}</div>" for name, value in facts.items()),
        links="".join(
            f'<a href="#{quoted(name)}">{html.escape(name)}</a>'
            for name in (*order, *(["quarantine"] if inspection.quarantine else []))
        ),
        table=_table(list(shown.values())),
        funnel=inline(plots["funnel.png"], "png"),
        histograms=inline(plots["histograms.png"], "png"),
        sheets="\n".join(sheets),
        quarantine=_quarantine(inspection.quarantine, said["quarantined"]),
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ['<table><tr><th>reason</th><th>pass</th><th class="n">rows</th><th class="n">share</th></tr>']
    for row in rows:
        dot = f'<span class="dot" style="background:{PASSES[row["pass"]]}"></span>' if row["pass"] else ""
        lines.append(
            f"<tr><td>{dot}{html.escape(row['reason'])}</td><td>{row['pass']}</td>"
            f'<td class="n">{row["rows"]:,}</td><td class="n">{row["share"]}</td></tr>'
        )
    return "".join([*lines, "</table>"])


def _sheet(
    reason: str,
    row: Mapping[str, Any] | None,
    examples: Sequence[Example],
    thumbs: Mapping[int, Image.Image | None],
    winners: Mapping[int, Image.Image | None],
) -> str:
    title = "Kept" if row is None else f"Dropped: {reason}"
    of = "the first rows of the dataset, which is shuffled" if row is None else f"{len(examples)} of {row['rows']:,}"
    heading = f'<h2 id="{quoted(reason)}">{html.escape(title)} <small>{of}</small></h2>'
    if not any(thumbs[id(example)] for example in examples):
        return heading + _list(examples)
    wide = " wide" if any(winners[id(example)] for example in examples) else ""
    cards = "".join(_card(example, thumbs[id(example)], winners[id(example)]) for example in examples)
    return f'{heading}<div class="sheet{wide}">{cards}</div>'


def _list(examples: Sequence[Example]) -> str:
    """For those without pictures."""
    names = ("key", "caption", "detail")
    rows = [(example.key, example.caption, example.detail) for example in examples]
    return _text_table(names, rows)


def _card(example: Example, thumb: Image.Image | None, winner: Image.Image | None) -> str:
    facts = [f"{example.width} × {example.height}"] if example.width and example.height else []
    if example.lost_to:
        facts.append(f"lost to {example.lost_to:016x}")
    if example.distance is not None and example.distance >= 0:
        facts.append(f"{example.distance} bits differ")
    facts += [example.detail] if example.detail and thumb else []
    name = f"{example.key} · " if example.key else ""
    about = html.escape(f"{name}{example.id:016x}" + "".join(f" · {fact}" for fact in facts))
    missing = html.escape(example.detail or "no picture that can be decoded, or its input is gone or another")
    picture = f'<img src="{_thumb(thumb)}" alt="">' if thumb else f'<div class="none">{missing}</div>'
    other = f'<img src="{_thumb(winner)}" alt="the one that stays" title="the one that stays">' if winner else ""
    text = html.escape(example.caption) or "<i>no caption</i>"
    return (
        f'<figure><div class="pictures">{picture}{other}</div><figcaption><div class="text" dir="auto">{text}</div>'
        f'<span class="quiet">{about}</span></figcaption></figure>'
    )


def _quarantine(rows: Sequence[Mapping[str, str]], count: int) -> str:
    if not rows:
        return ""
    names = ("reason", "key", "detail", "unit")
    lines = sorted((row["reason"], row["key"], row["detail"], row["unit"]) for row in rows)
    title = f'<h2 id="quarantine">Quarantined <small>{len(rows)} of {count:,}</small></h2>'
    return title + _text_table(names, lines)


def _text_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = ("".join(f'<td class="detail" dir="auto">{html.escape(cell)}</td>' for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _thumb(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return inline(buffer.getvalue(), "jpeg")


def inline(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
