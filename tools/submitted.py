"""Checks what a branch files: one new record folder and nothing else, then the record itself by tools.verify --pre.

    python -m tools.submitted                                      what HEAD adds to origin/main, before a pull request
    python -m tools.submitted --base origin/main --html report.html          and the referee's report as a page
    python -m tools.submitted --base BASE --head COMMIT            for CI: the tools are those of the checkout, BASE;
                                                                   of COMMIT nothing but the record is read

Only what is committed counts. The report goes to $GITHUB_STEP_SUMMARY where there is one. Exit status: 0 nothing
failed, or no record is filed; 1 something failed; 2 wrong usage.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.leaderboard import BEGIN, END, TRACKS, escape
from tools.untrusted import load_json, text

ROOT = Path(__file__).resolve().parent.parent
NOT_RECORDS = ("records/studies/", "records/benchmarks/", "records/RULES.md")  # the kit's own pages and measurements
PLAIN = ("100644", "100755")  # git's modes of files; others are links, also to other repositories
KINDS = {"A": "adds", "D": "deletes", "M": "changes", "T": "changes the kind of"}
SHOWN = 20  # lines of one kind of problem
VERIFY_SECONDS = 1800.0
HEADINGS = {
    "pass": "pass",
    "fail": "FAIL",
    "hold": "held for a judge",
    "unverified": "unverified, nothing failed",
}
MEANING = {
    "pass": "Every rule was checked and none failed.",
    "fail": "Mend what is marked FAIL and push again; this check then runs again.",
    "hold": "Nothing failed, but a rule marked HOLD found something that a judge has to look at.",
    "unverified": "**This is not a verdict.** Nothing failed, but what is marked SKIP was not decided here. A judge "
                  "decides it with the official data: `python -m tools.verify FOLDER --data DATA_FOLDER`.",
}


@dataclass
class Change:
    """What a branch does to one file."""

    kind: str
    path: str
    mode: str = "100644"  # what it is afterwards

    def __str__(self) -> str:
        return f"{KINDS.get(self.kind, 'changes')} {text(self.path)}"


def git(*words: str) -> bytes:
    """The standard output of git in the current folder; ValueError with what it said if it fails."""
    done = subprocess.run(["git", *words], capture_output=True, check=False)
    if done.returncode:
        said = text(done.stderr.decode(errors="replace"))[:300]
        raise ValueError(f"git {words[0]} says: {said or f'status {done.returncode}'}")
    return done.stdout


def commit(name: str) -> str:
    """The hash of a commit by any of its names."""
    try:
        return git("rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}").decode().strip()
    except ValueError as error:
        raise ValueError(f"{text(name)} is no commit of this repository ({error}); fetch it, or name another") from None


def common(base: str, head: str) -> str:
    """The commit from which head went its own way."""
    try:
        return git("merge-base", base, head).decode().strip()
    except ValueError:
        raise ValueError(f"{base[:12]} and {head[:12]} have no common commit here; in a shallow clone run "
                         "git fetch --unshallow") from None


def changes(base: str, head: str) -> list[Change]:
    """What head does to the files of base; a renamed file is one that is deleted and one that is added."""
    words, found = git("diff", "--raw", "--no-renames", "-z", base, head).split(b"\0"), []
    for about, path in zip(words[::2], words[1::2], strict=False):  # ":old_mode new_mode old_hash new_hash A", path
        _, mode, _, _, kind = about.decode().split()
        found.append(Change(kind, os.fsdecode(path), mode))
    return found


def folder_of(path: str) -> str:
    """The record folder that a file lies in, "" if it lies in none."""
    parts = path.split("/")
    return "/".join(parts[:3]) if len(parts) > 3 and parts[0] == "records" and parts[1] in TRACKS else ""


def is_about_records(change: Change) -> bool:
    return change.path.startswith("records/") and not change.path.startswith(NOT_RECORDS)


def without_board(readme: bytes) -> bytes:
    """The README but for what stands between the leaderboard's markers."""
    return re.sub(re.escape(BEGIN.encode()) + b".*" + re.escape(END.encode()), b"", readme, flags=re.DOTALL)


def new_folders(found: list[Change], base: str) -> list[str]:
    """The record folders that the branch adds files to and that base does not have."""
    folders = dict.fromkeys(folder_of(change.path) for change in found if change.kind == "A")
    return [folder for folder in folders if folder and not git("ls-tree", "--full-tree", base, "--", folder)]


def problems_of(found: list[Change], folders: list[str], base: str, head: str) -> list[str]:
    """Why the branch is not one new record folder and nothing else."""
    others, outside = [], []
    for change in found:
        if change.kind == "A" and folder_of(change.path) in folders:
            if change.mode not in PLAIN:
                outside.append(f"{change}, which is a link and not a file")
        elif change == Change("M", "README.md"):
            if without_board(git("show", f"{base}:README.md")) != without_board(git("show", f"{head}:README.md")):
                outside.append("changes README.md outside the leaderboard's table")
        elif folder_of(change.path):
            others.append(f"{change}, which belongs to a record that is already filed")
        elif is_about_records(change):
            outside.append(f"{change}, which lies in no records/<track>/<date>_<name>/; tracks are {', '.join(TRACKS)}")
        else:
            outside.append(f"{change}, which is outside the record's folder")
    problems = []
    for lines in (others, outside):
        problems += lines[:SHOWN] + ([f"and {len(lines) - SHOWN} more of this kind"] if len(lines) > SHOWN else [])
    if len(folders) > 1:
        problems.append(f"adds {len(folders)} records: {', '.join(map(text, folders[:SHOWN]))}; file one at a time")
    if not folders:
        problems.append("adds no new folder records/<track>/<date>_<name>/")
    return problems


def verdict_problem(folder: str, head: str) -> list[str]:
    """A verdict that the record brings along: judges give verdicts, and a board would show this one."""
    try:
        said, _ = load_json(git("show", f"{head}:{folder}/submission.json").decode(errors="replace"))
    except ValueError:
        return []  # the file is missing, which the referee says
    verdict = said.get("verdict") if isinstance(said, dict) else None
    if isinstance(verdict, dict) and verdict.get("status") == "unverified" and not verdict.get("accepted"):
        return []
    return ["brings a verdict of its own; file the submission.json that tools.record wrote, which says unverified"]


@contextmanager
def checked_out(head: str) -> Iterator[Path]:
    """A folder with the files of a commit, without hooks, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="submitted_") as folder:
        tree = Path(folder) / "tree"
        git("-c", "core.hooksPath=/dev/null", "worktree", "add", "--quiet", "--detach", str(tree), head)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def referee(folder: Path, html: Path | None) -> dict:
    """What `tools.verify --pre --json` of this kit says about a record; ValueError if it says nothing."""
    command = [sys.executable, "-m", "tools.verify", str(folder), "--pre", "--json"]
    command += ["--html", str(html.resolve())] if html else []
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=VERIFY_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the referee did not end within {VERIFY_SECONDS:g} seconds") from None
    said, _ = load_json(done.stdout.decode(errors="replace"))
    if done.returncode not in (0, 1, 3) or not isinstance(said, dict):
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"the referee ended with status {done.returncode}: {text(''.join(last))[:300]}")
    return said


def summary(status: str, folders: list[str], problems: list[str], said: dict) -> str:
    """The report as Markdown: verdict, what is wrong with the branch, one row per rule."""
    lines = [f"## Record check: {HEADINGS[status]}", "", escape(", ".join(map(text, folders[:SHOWN])), 400), ""]
    lines += [MEANING[status], ""]
    if problems:
        lines += ["The pull request", "", *(f"- **FAIL** {escape(problem, 400)}" for problem in problems), ""]
    if findings := said.get("findings"):
        lines += ["| | Rule | Found | To do |", "|---|---|---|---|"]
        for found in sorted(findings, key=lambda found: found["status"] not in ("FAIL", "HOLD")):  # else by number
            mark = f"**{found['status']}**" if found["status"] in ("FAIL", "HOLD") else found["status"]
            words = escape("; ".join(found["problems"]) or found["detail"], 600)
            lines.append(f"| {mark} | {found['rule']} {found['title']} | {words} | {escape(found['fix'], 600)} |")
        lines += ["", f"Checked with {escape(said['verified_with'], 400)}. `records/RULES.md` explains every rule."]
    return "\n".join(lines) + "\n"


def publish(report: str) -> None:
    """Appends the report to the job's summary, or prints it where there is none."""
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(report)
    else:
        print(f"\n{report}")


def examine(base: str, head: str, html: Path | None) -> str:
    """Checks a branch, prints one line per finding and publishes the report; returns the verdict."""
    found = changes(base, head)
    if not any(map(is_about_records, found)):
        print("no record in this pull request")
        publish("No record in this pull request: nothing to check.\n")
        return "pass"
    folders = new_folders(found, base)
    problems, said = problems_of(found, folders, base, head), {}
    if len(folders) == 1:
        problems += verdict_problem(folders[0], head)
        try:
            with checked_out(head) as tree:
                said = referee(tree / folders[0], html)
        except ValueError as error:
            problems.append(f"cannot be judged: {error}")
    status = "fail" if problems else said["status"]
    for problem in problems:
        print(f"FAIL  the pull request {problem}")
    failed = [finding for finding in said.get("findings", []) if finding["status"] == "FAIL"]
    for finding in failed:
        print(f"FAIL  {finding['rule']} {finding['title']}: {text('; '.join(finding['problems']))[:1000]}")
    print(f"{HEADINGS[status]}: {text(folders[0]) if len(folders) == 1 else f'{len(folders)} records'}")
    publish(summary(status, folders, problems, said))
    return status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="origin/main", help="the branch that the record is for (default origin/main)")
    parser.add_argument("--head", default="HEAD", help="the commit that files the record (default HEAD)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the referee's report as a page")
    args = parser.parse_args(argv)
    try:
        base, head = commit(args.base), commit(args.head)
        return 1 if examine(common(base, head), head, args.html) == "fail" else 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
