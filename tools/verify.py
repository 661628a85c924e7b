"""The referee: checks a record folder, rule by rule, without believing what it says about itself.

    python -m tools.verify records/track_non_record_16mb/2026-11-22_gpt                  what the files alone decide
    python -m tools.verify RECORD --data data/datasets/wikitext2_sp1024                  and the score, measured again
    python -m tools.verify RECORD --data FOLDER --write --json                           keep the verdict in the record

Prints one line per rule of tools/rules.json. Exit status: 0 every rule passed; 1 a rule failed; 2 wrong usage;
3 unverified: nothing failed, but something could not be decided here.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import tools.referee.files
import tools.referee.probes
import tools.referee.scores  # noqa: F401  each registers its rules
from tools.referee.case import Case, read_data
from tools.referee.rules import RULES, Finding, judge
from tools.referee.sandbox import isolation

EXIT_STATUS = {"pass": 0, "fail": 1, "hold": 3, "unverified": 3}


def examine(case: Case) -> Iterator[Finding]:
    """Yields one finding per rule, in the order of their numbers."""
    if not case.folder.is_dir():
        raise ValueError(f"{case.folder} is not a folder; pass a record folder such as records/track_.../<date>_<name>")
    for rule, about in RULES.items():
        if about["needs"] != "self-test":
            yield judge(case, rule)


def open_case(folder: Path | str, data: Path | str | None = None, **options: object) -> Case:
    """Returns a record ready to be examined; data is the judge's data folder, options are those of Case."""
    return Case(Path(folder).resolve(), read_data(Path(data)) if data else None, **options)


def verify(folder: Path | str, data: Path | str | None = None, **options: object) -> list[Finding]:
    """Returns the findings on a record. Without data, the rules that need it are skipped."""
    return list(examine(open_case(folder, data, **options)))


def status_of(findings: list[Finding]) -> str:
    """Returns fail, hold, unverified (nothing failed, but something could not be decided) or pass."""
    decided = [finding for finding in findings if finding.status != "SKIP" or not RULES[finding.rule]["optional"]]
    found = {finding.status for finding in decided}
    return "fail" if "FAIL" in found else "hold" if "HOLD" in found else "unverified" if "SKIP" in found else "pass"


def verdict(case: Case, findings: list[Finding]) -> dict:
    """Returns what a submission.json keeps of the findings."""
    open_ones = [finding for finding in findings if finding.status != "PASS"]
    reasons = [f"{f.rule} {f.title}: {problem}" for f in open_ones for problem in f.problems or [f.detail]]
    parts = [f"{len(findings)} rules"]
    if case.data:
        parts += [f"data {case.data.name} {case.data.manifest_sha256[:12]}", isolation(), f"probes {case.probe_seed}"]
    return {"status": status_of(findings), "reasons": reasons, "verified_with": "tools.verify, " + ", ".join(parts)}


def write_verdict(case: Case, value: dict) -> None:
    """Puts the verdict into submission.json, whole or not at all."""
    path = case.folder / "submission.json"
    if not case.submission:
        raise ValueError(f"{path} is not a JSON object, so it cannot keep the verdict")
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=case.folder, delete=False) as file:
        json.dump(case.submission | {"verdict": value}, file, indent=2, ensure_ascii=False)
        file.write("\n")
    os.chmod(file.name, path.stat().st_mode)
    os.replace(file.name, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--data", type=Path, help="the judge's data folder, with manifest.json")
    parser.add_argument("--seconds", type=float, default=1800.0, help="limit for scoring one stream (default 1800)")
    parser.add_argument("--shadow", type=Path, help="another data folder, whose validation text nobody trained on")
    parser.add_argument("--pre", action="store_true", help="the check of a minute before one submits; needs no --data")
    parser.add_argument("--probes", type=int, metavar="SEED", help="repeat the probes of an earlier verdict")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--write", action="store_true", help="store the verdict in the record's submission.json")
    args = parser.parse_args(argv)
    say: Callable[[str], None] = lambda line: print(f"... {line}", file=sys.stderr, flush=True)  # noqa: E731
    options = {} if args.probes is None else {"seed": args.probes}
    try:
        options |= {"pre": args.pre, "seconds": args.seconds, "say": say}
        options |= {"shadow": read_data(args.shadow)} if args.shadow else {}
        case, findings = open_case(args.record, args.data, **options), []
        for finding in examine(case):
            findings.append(finding)
            if not args.json:
                print(finding, flush=True)
        value = verdict(case, findings)
        if args.write:
            write_verdict(case, value)
    except (ValueError, LookupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"record": str(args.record), **value, "findings": [f.as_json() for f in findings]}, indent=2))
    else:
        print(f"{value['status']}: {value['verified_with']}")
    return EXIT_STATUS[value["status"]]


if __name__ == "__main__":
    sys.exit(main())
