"""Writes the leaderboard's page, tools/board.html filled with tables and plots; all words in it come from strangers."""

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tools.plots import NARROW_WIDTH, Mark, curve_plot, size_plot
from tools.records import CAP_BYTES, Record

NUM_COLOURS = 7  # --c0 to --c6 in board.html
CURVES = (640, 420), (NARROW_WIDTH, 400)  # width, height
SIZES = (450, 420), (NARROW_WIDTH, 340)
NUMBERS = ("Score", "Size")
HEADS = "".join(f'<th tabindex="0" class="{"num" if head in NUMBERS else ""}">{head}</th>'
                for head in ("", "Run", "Score", "Author", "Hardware", "Size", "Date", "Status"))


@dataclass
class Section:
    """The records scored on one validation text: the ranking of each track, and those that are not ranked."""

    title: str
    ranked: dict[str, list[Record]]
    doubted: list[Record]


def is_held(record: Record) -> bool:
    """Whether nothing is wrong with it but that a judge has to look."""
    return record.verdict == "hold" and not record.problems


def page(found: list[Section], link: Callable[[Path], str]) -> str:
    """Returns the whole page; `link` turns a file's path into a URL."""
    template = Path(__file__).with_name("board.html").read_text(encoding="utf-8")
    body = "".join(section_html(section, f"s{index}", link) for index, section in enumerate(found))
    nothing = "<section><p>No records yet: the first one can be yours.</p></section>"
    return template.replace("{{sections}}", body or nothing)


def marks_of(section: Section, name: str) -> list[Mark]:
    """Returns a letter and a colour for every record with a score, the ranked ones first."""
    ranked = sorted((record for track in section.ranked.values() for record in track), key=lambda one: one.val_bpb)
    marks = []
    for index, record in enumerate([*ranked, *(record for record in section.doubted if record.val_bpb is not None)]):
        letter = (string.ascii_uppercase + string.ascii_lowercase)[index:index + 1] or "·"
        colour = f"c{index}" if index < min(NUM_COLOURS, len(ranked)) else "other"
        marks.append(Mark(record, f"{name}.{index}", letter, colour + (" out" if index >= len(ranked) else "")))
    return marks


def section_html(section: Section, name: str, link: Callable[[Path], str]) -> str:
    marks = marks_of(section, name)
    best = next((mark.record for mark in marks if "out" not in mark.classes), None)
    lead = f'<span class="best">{best.val_bpb:.4f}</span>bits per byte, {escape(best.author)}' if best else ""
    parts = [f'<section id="{name}"><div class="lead"><h2>{escape(section.title)}</h2><div>{lead}</div></div>']
    mark_of = {id(mark.record): mark for mark in marks}
    for title, records in section.ranked.items():
        rows = "\n".join(row_html(record, mark_of[id(record)], link) for record in records)
        table = f"<table><thead><tr>{HEADS}</tr></thead><tbody>{rows}</tbody></table>"
        parts.append(f"<h3>{escape(title)}</h3>{table}" if records else "")
    parts.append(charts_html(marks, name))
    for title, wanted in (("Held for a judge", True), ("Not ranked", False)):
        members = [record for record in section.doubted if is_held(record) == wanted]
        items = "\n".join(doubted_html(record, mark_of.get(id(record)), link) for record in members)
        parts.append(f'<h3>{title}</h3><ul class="doubted">{items}</ul>' if members else "")
    return "\n".join(parts) + "</section>\n"


def run_html(record: Record, link: Callable[[Path], str]) -> str:
    return f'<a href="{escape(link(record.path / "README.md"))}">{escape(record.name)}</a>'


def badge_html(mark: Mark | None) -> str:
    return f'<span class="badge {mark.classes}">{mark.letter}</span>' if mark else ""


def author_html(record: Record) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,39}", record.github_id):
        return escape(record.author)
    return f'<a href="https://github.com/{record.github_id}">{escape(record.author)}</a>'


def row_html(record: Record, mark: Mark, link: Callable[[Path], str]) -> str:
    spread = f"± {record.val_bpb_std:.4f}, " if record.val_bpb_std is not None and record.num_seeds > 1 else ""
    seeds = f"{record.num_seeds} seed{'s' if record.num_seeds > 1 else ''}"
    size = record.bytes_total or 0
    bar = f'{size:,}<span class="bar"><i style="width:{min(100, 100 * size / CAP_BYTES):.1f}%"></i></span>'
    notes, kind = escape("; ".join([record.verdict, *record.notes[:3]])), record.verdict.split()[0]
    return (f'<tr data-key="{mark.key}"><td class="at" data-value="{mark.letter}">{badge_html(mark)}</td>'
            f'<td class="run">{run_html(record, link)}<div class="blurb">{escape(record.blurb)}</div></td>'
            f'<td class="num points" data-value="{record.val_bpb}"><div class="score">{record.val_bpb:.4f}'
            f"<small>{spread}{seeds}</small></div></td>"
            f'<td class="rest">{author_html(record)}</td><td class="rest">{escape(record.hardware)}</td>'
            f'<td class="num rest{" size" if size else ""}" data-value="{size}">{bar if size else ""}</td>'
            f'<td class="rest date">{escape(record.date)}</td>'
            f'<td class="rest"><span class="chip {kind}" title="{notes}">{record.verdict}</span></td></tr>')


def doubted_html(record: Record, mark: Mark | None, link: Callable[[Path], str]) -> str:
    claimed = f"{record.val_bpb:.4f} claimed" if record.val_bpb is not None else "no score"
    doubts = "".join(f"<li>{escape(doubt)}</li>" for doubt in record.doubts)
    key = f' data-key="{mark.key}"' if mark else ""
    about = escape(", ".join(filter(None, [record.author, record.hardware, record.date])))
    return (f'<li{key}>{badge_html(mark)} <span class="run">{run_html(record, link)}</span> {claimed} '
            f'<span class="small">{about}</span><ul>{doubts}</ul></li>')


def charts_html(marks: list[Mark], name: str) -> str:
    """Returns both plots, each drawn once for wide and once for narrow screens so that its words stay readable."""
    times, steps = ("".join(curve_plot(marks, against, *size) for size in CURVES) for against in ("seconds", "step"))
    sizes = "".join(size_plot(marks, *size) for size in SIZES)
    shown = {"time": bool(times), "steps": not times}
    toggle = "".join(f'<input type="radio" name="{name}x" id="{name}{axis}" class="by-{axis}"{" checked" * on}>'
                     f'<label for="{name}{axis}">{axis}</label>'
                     for axis, on in shown.items())
    figures = [figure("Learning curves", toggle, "Training loss in bits per byte, mean and range over seeds, on a "
                      "logarithmic axis; the letter marks the final score.", times + steps),
               figure("Size and score", "", "Artifact in MB, code included; a hollow letter is not ranked.", sizes)]
    return f'<div class="charts">{"".join(figures)}</div>' if any(figures) else ""


def figure(title: str, toggle: str, caption: str, plots: str) -> str:
    head = f"<figcaption>{title} <span>{toggle}</span></figcaption><p>{caption}</p>"
    return f"<figure>{head}\n{plots}</figure>\n" if plots else ""
