"""The referee: checks a record folder, rule by rule, without believing what it says about itself.

    python -m tools.verify RECORD                                     what the files alone decide, in a second
    python -m tools.verify RECORD --pre                               the check of a minute, before one submits
    python -m tools.verify RECORD --data data/datasets/NAME --shadow data/datasets/OTHER       all of it
    python -m tools.verify RECORD --data FOLDER --write --html report.html --json              keep verdict and evidence
    python -m tools.verify --logs-only FOLDER...                      upstream's record folders, as they are
    python -m tools.verify --self-test [NAME...]                      does it catch the cheats of tests/mutants?

Prints one line per rule of tools/rules.json; records/RULES.md explains them. Exit status: 0 every rule passed; 1 a rule
failed; 2 wrong usage; 3 nothing failed, but something could not be decided here (unverified) or needs a look (hold).
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import tools.referee.parts  # noqa: F401
from tools.referee.case import Case, read_data
from tools.referee.report import page
from tools.referee.rules import ROOT, RULES, Finding, judge
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


def referee_sha256() -> str:
    """Which referee this is: a hash of its rules and its code."""
    digest = hashlib.sha256()
    for path in [ROOT / "tools/rules.json", ROOT / "tools/verify.py", *sorted((ROOT / "tools/referee").glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def verdict(case: Case, findings: list[Finding]) -> dict:
    """Returns what a submission.json keeps of the findings."""
    open_ones = [finding for finding in findings if finding.status != "PASS" and not (
        finding.status == "SKIP" and RULES[finding.rule]["optional"])]
    reasons = [f"{f.rule} {f.title}: {problem}" for f in open_ones for problem in f.problems or [f.detail]]
    parts = [f"{sum(finding.status != 'SKIP' for finding in findings)} of {len(findings)} rules"]
    parts += ["short check"] if case.pre else []
    if case.data:
        parts += [f"data {case.data.name} {case.data.manifest_sha256[:12]}"]
    if case.data or case.pre:
        parts += [isolation(), f"probes {case.probe_seed}"]
    return {"status": status_of(findings), "reasons": reasons, "verified_with": "tools.verify, " + ", ".join(parts),
            "record_sha256": case.record_sha256, "referee_sha256": referee_sha256()}


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


def summary(case: Case, value: dict) -> dict:
    """Returns what the report says of the record and of this examination."""
    said = case.submission
    used = {"record": value["record_sha256"], "referee": value["referee_sha256"], "with": value["verified_with"],
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"}
    about = {key: said.get(key) for key in ("name", "author", "val_bpb")} | {"record": case.folder.name}
    about |= {"status": value["status"], "reasons": value["reasons"], "date": datetime.now(UTC).date().isoformat()}
    return about | {"verified_with": used}


def read_accepted(words: list[str]) -> dict[str, str]:
    """Returns rule -> reason from RULE=REASON; ValueError if that is no rule which holds."""
    for word in words:
        rule, _, reason = word.partition("=")
        if RULES.get(rule, {}).get("severity") != "hold" or not reason.strip():
            holding = ", ".join(rule for rule, about in RULES.items() if about["severity"] == "hold")
            raise ValueError(f"--accept {word} must be RULE=REASON; the rules that hold a record are {holding}")
    return dict(word.split("=", 1) for word in words)


def examine_record(args: argparse.Namespace) -> int:
    """Judges one record, prints and keeps what was asked for, and returns the exit status."""
    case = open_case(
        args.records[0], args.data, shadow=read_data(args.shadow) if args.shadow else None, pre=args.pre,
        seconds=args.seconds, seed=args.probes, say=args.say)
    findings, accepted = [], read_accepted(args.accept)
    for finding in examine(case):
        if finding.status == "HOLD" and finding.rule in accepted:
            seen = f"accepted by the judge: {accepted[finding.rule]}"
            finding = replace(finding, status="PASS", detail="; ".join([*finding.problems, seen]), problems=[], fix="")
        findings.append(finding)
        if not args.json:
            print(finding, flush=True)
    value = verdict(case, findings) | ({"accepted": accepted} if accepted else {})
    if args.write:
        write_verdict(case, value)
    if args.html:
        args.html.write_text(page(summary(case, value), findings), encoding="utf-8")
    if args.json:
        about = {"record": str(args.records[0]), **value, "findings": [finding.as_json() for finding in findings]}
        print(json.dumps(about, indent=2))
    else:
        print(f"{value['status']}: {value['verified_with']}")
    return EXIT_STATUS[value["status"]]


def self_test(args: argparse.Namespace) -> int:
    from tools.referee import selftest  # it needs tests/, which a copy of the tools may lack

    args.names = [str(name) for name in args.records]
    return selftest.main(args)


def examine_logs(args: argparse.Namespace) -> int:
    from tools.referee import logs_only

    report, worst = logs_only.report(args.records)
    print(report)
    return EXIT_STATUS[worst]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", type=Path, metavar="RECORD")
    parser.add_argument("--data", type=Path, help="the judge's data folder, with manifest.json")
    parser.add_argument("--shadow", type=Path, help="another data folder, whose validation text nobody trained on")
    parser.add_argument("--pre", action="store_true", help="the check of a minute before one submits; needs no --data")
    parser.add_argument("--seconds", type=float, default=1800.0, help="limit for scoring one stream (default 1800)")
    parser.add_argument("--probes", type=int, metavar="SEED", help="probe elsewhere than the record's own hash says")
    parser.add_argument("--accept", action="append", default=[], metavar="RULE=REASON",
                        help="a judge has looked at what this rule holds and why it is fine")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the evidence")
    parser.add_argument("--write", action="store_true", help="store the verdict in the record's submission.json")
    parser.add_argument("--logs-only", action="store_true", help="judge folders of any origin by their files")
    parser.add_argument("--self-test", action="store_true", help="judge the referee by tests/mutants")
    parser.add_argument("--seeds", type=int, default=1, help="of the referee, in the self-test (default 1)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="submissions at once, in the self-test")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write the self-test's table between its marks")
    args = parser.parse_args(argv)
    if len(args.records) != 1 and not args.self_test and not (args.logs_only and args.records):
        parser.error("name the folders to read" if args.logs_only else "name one record folder")
    args.say = lambda line: print(f"... {line}", file=sys.stderr, flush=True)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return (self_test if args.self_test else examine_logs if args.logs_only else examine_record)(args)
    except (ValueError, LookupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
