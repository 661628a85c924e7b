"""Writes the report of an examination: one page that stands alone, with the evidence, to read and to link to."""

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

from tools.referee.rules import RULES
from tools.untrusted import number, text

OPEN = ("FAIL", "HOLD")
SHOWN_ROWS = 12  # longer tables are folded
NAMES = ("seed", "token", "line")  # columns of whole numbers that count nothing
ORDER = ("FAIL", "HOLD", "SKIP", "PASS")
USED = {"folder": "folder", "with": "examined with", "machine": "machine", "record": "sha256 of the record",
        "referee": "sha256 of the referee"}


def words(value: object) -> str:
    """A value from anywhere as escaped text: numbers to six digits, what is absent as a dash."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**18 else escape(str(value)[:40])
    if isinstance(value, float):
        return f"{value:.6g}"
    return escape(text(value) or "–")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def table_html(table: dict) -> str:
    """One table of evidence; a column is set as numbers if it has some and no words."""
    rows, head = [list(row) for row in table["rows"]], list(table["head"])
    numeric = [any(is_number(row[i]) for row in rows if i < len(row))
               and all(row[i] is None or is_number(row[i]) for row in rows if i < len(row)) for i in range(len(head))]
    classes = [' class="num"' if counts else "" for counts in numeric]
    top = "".join(f"<th{css}>{words(name)}</th>" for name, css in zip(head, classes, strict=True))
    shown = [(lambda value: words(value).replace(",", "")) if name in NAMES and counts else words
             for name, counts in zip(head, numeric, strict=True)]
    lines = ["".join(f"<td{css}>{show(value)}</td>" for value, css, show in zip(row, classes, shown, strict=False))
             for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    whole = f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    caption = f'<p class="caption">{words(table["title"])}</p>'
    if not rows:
        return f"{caption}<p>none</p>"
    if len(rows) <= SHOWN_ROWS:
        return caption + whole
    return f"{caption}<details><summary>{len(rows):,} rows</summary>{whole}</details>"


def limit_words(rule: dict) -> str:
    """The limit of a rule in the words of rules.json."""
    return rule["limit_words"].format(**{name: words(value) for name, value in (rule["limit"] or {}).items()})


def section_html(finding: dict) -> str:
    """What one rule is about, what it found and what to do."""
    rule, status = RULES[finding["rule"]], finding["status"]
    problems = "".join(f'<li class="problem">{words(problem)}</li>' for problem in finding["problems"])
    parts = [f"<p>{words(finding['detail'])}</p>" if finding["detail"] else "",
             f"<ul>{problems}</ul>" if problems else "",
             f"<p><b>To do.</b> {words(finding['fix'])}</p>" if finding["fix"] else "",
             *map(table_html, finding["evidence"]),
             f'<p class="why"><b>Checked.</b> {words(rule["checks"])} <b>Limit.</b> {words(limit_words(rule))}. '
             f'<b>Why.</b> {words(rule["why"])} <b>It happened.</b> {words(rule["case"])}</p>']
    return (f'<section id="{finding["rule"]}"><details{" open" * (status in OPEN)}><summary>'
            f'<span class="status {status}">{status}</span><h2>{finding["rule"]} {words(finding["title"])}</h2>'
            f'</summary><div class="body">{"".join(parts)}</div></details></section>')


def overview_html(findings: Iterable[dict]) -> str:
    """One row per rule, which leads to its section."""
    rows = []
    for finding in findings:
        found = words((finding["problems"] or [finding["detail"]])[0])
        more = f" and {len(finding['problems']) - 1} more" if len(finding["problems"]) > 1 else ""
        rows.append(f'<tr><td><a href="#{finding["rule"]}">{finding["rule"]} {words(finding["title"])}</a></td>'
                    f'<td>{found}{more}</td><td class="status {finding["status"]}">{finding["status"]}</td></tr>')
    head = "<thead><tr><th>Rule</th><th>Found</th><th></th></tr></thead>"
    return f'<div class="scroll"><table class="overview">{head}<tbody>{"".join(rows)}</tbody></table></div>'


def facts_html(about: dict) -> str:
    """What was examined, with what and where."""
    used = about.get("verified_with")
    if not isinstance(used, dict):
        used = {"with": used, "record": about.get("record_sha256"), "referee": about.get("referee_sha256")}
    used = {"folder": about.get("record")} | used
    named = {name: used.get(key) for key, name in USED.items()} | {key: used[key] for key in used if key not in USED}
    return "".join(f"<dt>{words(key)}</dt><dd>{words(value)}</dd>" for key, value in named.items() if value)


def lead_html(about: dict) -> str:
    """Who claims what, and when that was examined, as far as it is known."""
    score = number(about.get("val_bpb"))
    claim = "no score claimed" if score is None else f"{score:.6f} bits per byte claimed"
    who = words(about["author"]) if about.get("author") else ""
    when = f"examined on {words(about['date'])}" if about.get("date") else ""
    return ", ".join(filter(None, [who, claim if "val_bpb" in about else "", when]))


def page(about: dict, findings: list) -> str:
    """The report. about has record, name, author, val_bpb, status, reasons, date and verified_with, a dict of words;
    findings are Finding objects. Both may be what `tools.verify --json` prints, which names the record by its folder
    and has verified_with as one line beside record_sha256 and referee_sha256."""
    found = [finding if isinstance(finding, dict) else finding.as_json() for finding in findings]
    status = about["status"] if about["status"] in ("pass", "fail", "hold") else "unverified"
    reasons = "".join(f"<li>{words(reason)}</li>" for reason in about["reasons"])
    name = about.get("name") or Path(text(about.get("record"))).name
    body = [f"<h1>{words(name)}</h1>",
            f'<p class="lead">{lead_html(about)}</p>',
            f'<div class="verdict {status}"><b class="{status}">{status}</b>',
            f"<ul>{reasons}</ul>" if reasons else "Every rule was checked and none failed.", "</div>",
            f"<dl>{facts_html(about)}</dl>", overview_html(found),
            *(section_html(finding) for finding in sorted(found, key=lambda one: ORDER.index(one["status"])))]
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    parts = {"title": words(f"{name}: {status}"), "body": "\n".join(body)}
    return re.sub(r"{{(title|body)}}", lambda match: parts[match[1]], template)  # once: words may look like a mark
