"""Writes records/RULES.md, the rules for people, from tools/rules.json and tools/failures.json.

    python -m tools.rules                              rewrite records/RULES.md
    python -m tools.rules --check                      for CI: write nothing, exit 1 if it is out of date
    python -m tools.rules --out /tmp/RULES.md          write it elsewhere; --rules and --failures read other files

A limit stands once, as a number in tools/rules.json; "limit_words" says it in a sentence with a {name} for each number.
"""

import argparse
import json
import math
import re
import sys
from decimal import Decimal
from pathlib import Path

from tools.leaderboard import difference
from tools.record import SEEDS_NEEDED

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ("title", "checks", "limit_words", "why", "case", "who", "legal", "illegal", "fix")
NEEDS = {
    "files": "the record's files",
    "data": "the judge's data",
    "score": "what the submission scores",
    "train": "how the submission trains",
    "self-test": "the kit's own tests",
}
UPSTREAM = "https://github.com/openai/parameter-golf"
REFERENCE = re.compile(r"(?<![\w/`])((?:[\w.-]+/[\w.-]+)?)#(\d+)\b")  # owner/name#123 or #123
LABEL = re.compile(r"(\[([\w./-]*)#(\d+)\])")

INTRODUCTION = """# The rules

Whoever competes here can check every rule before filing, and whoever judges gets a reason with every verdict:

```bash
python -m tools.verify FOLDER --pre                 # the short check, before filing; a pull request runs it too
python -m tools.verify FOLDER --data DATA_FOLDER    # the whole of it, as a judge does
```

The referee never imports a submission. It reads the record's files, hands token files to `python train_gpt.py score
model.bin` in a closed box and gets nats back, and lets the script train for a short time under its own clock. Where it
looks follows from a hash of the record itself: nobody can know it before filing, and anybody can repeat it after.

| Verdict | Meaning |
|---|---|
| pass | every rule was checked and none failed |
| **fail** | a rule was broken; the line says which, by how much and what to do |
| hold | nothing failed, but something stands out and a person has to look |
| unverified | nothing failed, but something could not be decided on this machine: a SKIP line says what |

A verdict that you think is wrong: open an issue "Dispute a verdict" with the rule's number and the evidence.

Numbers such as [#1719] are records, issues and reviews of [openai/parameter-golf], where these things happened. They
are named for what can be learnt from them, not for blame.

Contents: [the numbered rules](#the-numbered-rules) · [what the rules are against](#what-the-rules-are-against) ·
[the competition](#the-competition): size, time, seeds, what is legal
"""

COMPETITION = """## The competition

What the numbered rules do not say by themselves.

**Size.** {cap_bytes} bytes, decimal: `train_gpt.py` and the largest `model.bin`, as they lie on disk. The tokenizer and
the data are not counted.

**Training time.** {train_seconds} s in track `10min_16mb`, which is meant for 8 H100s. The clock runs from the first
batch to the last update and never pauses. All that reads training data or changes weights because of data, calibration
included, lies inside. Compiling and warming up on random tokens lie outside, and so do rounding and storing.

**Scoring time.** Another {score_seconds} s in that track, from the start of a clean process to the last score.

**Tracks.** `10min_16mb` needs {seeds_10min} seeds. `non_record_16mb` has the same cap of bytes but any hardware and any
time, which the record states; {seeds_non_record} seed is enough there, and negative results are welcome.

**A new best score** needs at least {seeds_10min} seeds whose mean is {margin} nats per byte ({margin_bits} bits per
byte) below the best record's, at p < {p} in a one-sided test of its seeds against that record's seeds. Less is a tie,
which is listed too.

**All runs of a configuration are disclosed**, failed and unlucky ones as well. The score is the mean over all seeds,
never the best of them. Trying other configurations, with runs of their own, is free; choosing among seeds is not.

**The validation text** is fixed and scored whole: every token once, from left to right, divided by the number of bytes
of the raw text. No weight is trained on it before the run is scored, nothing of it is stored, and nothing about a token
is decided by looking at later ones.

Legal, though it may look suspicious:

- sliding windows of any length, if every token is scored exactly once, in a window that is fixed in advance;
- training at test time, score first: a chunk's scores are written out, then `observe` learns from that chunk;
- a state that is carried over the whole text, if the record declares it;
- mixtures with n-gram or cache models, if whole distributions are mixed, with weights that depend on the past alone;
- other tokenizers, or bytes, if the tokens give back every byte of the text;
- compressed scripts that anyone can unpack.

Illegal, however it is done:

- a probability for the true token that is not one entry of a distribution over all tokens;
- a second pass over tokens that were scored, or the better of several scores;
- network, other programs, training data or files outside the record's folder while scoring;
- packages other than those in the kit's requirements, if they carry code, data or capability that nobody counted.

**Filing.** One pull request adds one new folder `records/<track>/<date>_<name>/`, written by `python -m tools.record`,
and changes nothing else but the leaderboard's table. `python -m tools.submitted --base origin/main` checks that. Of two
records with the same idea the one whose pull request was opened first comes first.

**A rule changes** by a pull request to `tools/rules.json` together with a submission that breaks it and must be caught.
It holds for records that are filed after it.
"""

RULE = """### {id} {title}

{checks}

- **Limit:** {limit}.
- **Why:** {why}
- **It happened:** {case}
- **Who checks:** {who}.
- **Legal:** {legal}
- **Illegal:** {illegal}
- **To do:** {fix}
{hold}"""
HOLD = "\nWhat it finds is no verdict: the record is held until a judge has looked.\n"


def words(value: object) -> str:
    """Returns a number as people write it: 16,000,000 and 0.00001, but 1e-9."""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float) and (value == 0 or abs(value) >= 1e-6):
        digits = f"{Decimal(repr(value)):,f}"
        return digits.rstrip("0").rstrip(".") if "." in digits else digits
    return re.sub(r"e-0*", "e-", str(value))


def limit_of(rule: dict) -> str:
    """Returns the limit as a sentence; ValueError if the sentence leaves out one of its numbers or names another."""
    limit, sentence = rule["limit"] or {}, rule["limit_words"]
    named = set(re.findall(r"{(\w+)}", sentence))
    if named != set(limit):
        raise ValueError(f"tools/rules.json: {rule['id']} limit_words names {sorted(named)}, but its limit has "
                         f"{sorted(limit)}; write a {{name}} for each number")
    return sentence.format_map({key: words(value) for key, value in limit.items()})


def linked(sentence: str) -> str:
    """Returns the sentence with each #123 and owner/name#123 as a label that `targets` resolves."""
    return REFERENCE.sub(r"[\g<0>]", sentence)


def targets(page: str, rules: list[dict]) -> str:
    """Returns where the labels of the page lead, as the lines that end a Markdown file."""
    found = {f"[{rule['id']}]": f"#{rule['id'].lower()}-{rule['title'].replace(' ', '-')}" for rule in rules}
    found["[openai/parameter-golf]"] = UPSTREAM
    for label, repository, number in sorted(set(LABEL.findall(page)), key=lambda found: (found[1], int(found[2]))):
        home = f"https://github.com/{repository}" if repository else UPSTREAM
        found[label] = f"{home}/issues/{number}"
    return "\n".join(f"{label}: {target}" for label, target in found.items()) + "\n"


def check_texts(rules: list[dict], failures: dict[str, str]) -> None:
    """Raises ValueError if a text is missing or a failure is unknown."""
    for rule in rules:
        for key in TEXTS:
            if not rule.get(key):
                raise ValueError(f"tools/rules.json: {rule['id']} has no {key!r}; write one or two short sentences")
        if unknown := sorted(set(rule["failures"]) - set(failures)):
            raise ValueError(f"tools/rules.json: {rule['id']} names {unknown[0]}, which tools/failures.json lacks")
        if rule["needs"] not in NEEDS:
            raise ValueError(f"tools/rules.json: {rule['id']} needs {rule['needs']!r}, not one of {', '.join(NEEDS)}")


def rules_of(rules: list[dict]) -> str:
    """Returns the table of contents and one section per rule."""
    lines = ["## The numbered rules", "", "| Rule | Decided by | If it is broken |", "|---|---|---|"]
    for rule in rules:
        outcome = "hold" if rule["severity"] == "hold" else "fail"
        needs = NEEDS[rule["needs"]] + (", if the judge has the data" if rule["optional"] else "")
        lines.append(f"| [{rule['id']}] {rule['title']} | {needs} | {outcome} |")
    sections = []
    for rule in rules:
        hold = HOLD if rule["severity"] == "hold" else ""
        sections.append(linked(RULE.format(**rule | {"limit": limit_of(rule), "hold": hold})))
    return "\n".join([*lines, "", "\n".join(sections)])


def failures_of(rules: list[dict], failures: dict[str, str]) -> str:
    """Returns the table of the ways to be wrong and the rules that catch each."""
    lines = ["## What the rules are against", "", "Ways in which real records were wrong, the most frequent first.", ""]
    lines += ["| Class | What it is | Caught by |", "|---|---|---|"]
    for failure, name in failures.items():
        catching = [f"[{rule['id']}] {rule['title']}" for rule in rules if failure in rule["failures"]]
        if not catching:
            raise ValueError(f"tools/failures.json: no rule of tools/rules.json is against {failure}")
        lines.append(f"| {failure} | {name} | {', '.join(catching)} |")
    return "\n".join([*lines, ""])


def render(rules: list[dict], failures: dict[str, str]) -> str:
    """Returns the text of RULES.md."""
    check_texts(rules, failures)
    limits = {rule["id"]: rule["limit"] for rule in rules}
    competition = COMPETITION.format(
        cap_bytes=words(limits["P12"]["bytes"]), train_seconds=words(limits["P10"]["cap_seconds_10min_16mb"]),
        score_seconds=words(limits["P11"]["seconds_10min_16mb"]), seeds_10min=SEEDS_NEEDED["10min_16mb"],
        seeds_non_record=SEEDS_NEEDED["non_record_16mb"], margin=words(limits["P17"]["margin_nats"]),
        p=words(limits["P17"]["margin_p"]), margin_bits=f"{limits['P17']['margin_nats'] / math.log(2):.4f}")
    written = "<!-- Written by python -m tools.rules from tools/rules.json and tools/failures.json; edit those. -->\n"
    page = "\n".join([written + INTRODUCTION, rules_of(rules), failures_of(rules, failures), competition])
    return f"{page}\n{targets(page, rules)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", type=Path, default=ROOT / "tools/rules.json", metavar="FILE")
    parser.add_argument("--failures", type=Path, default=ROOT / "tools/failures.json", metavar="FILE")
    parser.add_argument("--out", type=Path, default=ROOT / "records/RULES.md", metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file is out of date")
    args = parser.parse_args(argv)
    try:
        rules, failures = (json.loads(path.read_text(encoding="utf-8")) for path in (args.rules, args.failures))
        new = render(rules, failures)
        old = args.out.read_bytes().decode("utf-8", "replace") if args.out.is_file() else ""
        if args.check and old != new:
            print(f"FAIL {args.out}: out of date, {difference(old, new)}; run python -m tools.rules")
            return 1
        if old != new:
            args.out.write_bytes(new.encode("utf-8"))
        print(f"ok   {args.out}: {'written' if old != new else 'up to date'}")
        return 0
    except (ValueError, LookupError, OSError) as error:
        print(f"FAIL {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
