"""The numbered rules of tools/rules.json, the functions that check them, and what one of them finds."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tools.referee.case import Case
from tools.untrusted import text

ROOT = Path(__file__).resolve().parent.parent.parent
RULES = {rule["id"]: rule for rule in json.loads((ROOT / "tools/rules.json").read_text(encoding="utf-8"))}
PARTS: dict[str, list[Callable]] = {rule: [] for rule in RULES}  # rule number -> its functions, as they were imported
MALFORMED = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)
INDENT = " " * 23


class Skip(Exception):
    """A part of a rule cannot be decided here; the message says why."""


@dataclass
class Table:
    """Evidence that a judge can read: rows of words and numbers under a head."""

    title: str
    head: list[str]
    rows: list[list]


@dataclass
class Found:
    """What one part of a rule found; no problem is a pass."""

    detail: str  # the figure, in one line
    problems: list[str] = field(default_factory=list)
    evidence: list[Table] = field(default_factory=list)


@dataclass
class Finding:
    """What a rule found. PASS, FAIL, HOLD (a person must look) or SKIP (not decided here)."""

    rule: str
    title: str
    status: str
    detail: str = ""
    problems: list[str] = field(default_factory=list)
    evidence: list[Table] = field(default_factory=list)
    fix: str = ""

    def __str__(self) -> str:
        first, *more = self.problems or [self.detail]
        to_do = [f"to do: {self.fix}"] if self.fix else []
        return f"\n{INDENT}".join([f"{self.status}  {self.rule}  {self.title:11}  {first}", *more, *to_do])

    def as_json(self) -> dict:
        return asdict(self)


def check(rule: str) -> Callable:
    """Registers a function, Case -> Found, as a part of a rule."""
    assert rule in RULES, rule

    def register(function: Callable) -> Callable:
        PARTS[rule].append(function)
        return function

    return register


def judge(case: Case, rule: str) -> Finding:
    """Returns the finding of one rule: problems of all its parts, else why a part could not be decided."""
    about, details, skipped = RULES[rule], [], []
    finding = Finding(rule, about["title"], "PASS")
    for part in PARTS[rule]:
        try:
            found = part(case)
        except Skip as skip:
            skipped.append(str(skip))
            continue
        except MALFORMED as error:
            found = Found("", [f"a value is missing or malformed: {type(error).__name__} {text(str(error))[:200]}"])
        details += [found.detail] if found.detail else []
        finding.problems += found.problems
        finding.evidence += found.evidence
    finding.detail = "; ".join(details + skipped)
    if finding.problems:
        finding.status, finding.fix = "HOLD" if about["severity"] == "hold" else "FAIL", about["fix"]
    elif skipped or not PARTS[rule]:
        finding.status = "SKIP"
        finding.detail = "; ".join(skipped + details) or "this version does not check it"
    return finding
