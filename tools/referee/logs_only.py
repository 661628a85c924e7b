"""Judges a record folder of any origin from its files alone, upstream's as they are: nothing in it runs.

    python -m tools.verify --logs-only FOLDER...      one block of findings per folder, under the rules' own numbers

Only the rules that logs, JSON and scripts can decide appear. What is measured another way than the claim is a FAIL,
what a person has to look at is a HOLD, and what the files do not say is a SKIP.
"""

import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import stdev

from tools.logs import ROUNDTRIP, Log
from tools.referee.logs_folder import Folder, found, read_folder, skipped
from tools.referee.logs_numbers import eval_clock, identity, size, train_clock, wrapper
from tools.referee.rules import MALFORMED, RULES, Finding, Table
from tools.untrusted import first, number, text

FOLDER = re.compile(r"\d{4}-\d\d-\d\d_[A-Za-z0-9._+-]+")
FIELDS = ("author", "github_id", "name", "date", "val_bpb")  # what all readable records have in common
SEEDS_NEEDED = 3  # in the ten-minute track
LARGEST_PLAIN_SEED = 1_000_000  # nobody searches below
WORST = ("fail", "hold", "unverified", "pass")


def layout(folder: Folder) -> Finding:
    name, day, problems = text(folder.path.name), text(folder.path.name)[:10], []
    if not FOLDER.fullmatch(folder.path.name):
        problems.append(f"folder {name} is not <YYYY-MM-DD>_<name> in letters, digits and . _ + -")
    try:
        date.fromisoformat(day)
    except ValueError:
        problems.append(f"{day} is not a date")
    there = {file.name for file in folder.record.files if file.parent == folder.path}
    problems += [f"{file} is missing" for file in ("README.md", "submission.json", "train_gpt.py") if file not in there]
    if "submission.json" in there and not folder.said:
        problems.append("submission.json is not a JSON object with a field in it")
    elif folder.said:
        problems += [f"submission.json has no {key}" for key in FIELDS if folder.said.get(key) in (None, "")]
        if number(folder.said.get("val_bpb", 1.0)) is None:
            problems.append(f"submission.json: val_bpb is {text(folder.said['val_bpb']) or 'not a number'}")
        if not (said_day := text(folder.said.get("date"))).startswith(day) and said_day:
            problems.append(f"submission.json: date is {said_day[:30]}, the folder says {day}")
        said_track = re.sub(r"\W|_", "", text(folder.said.get("track")).lower())
        if said_track and folder.track and said_track not in re.sub(r"\W|_", "", folder.track.lower()):
            problems.append(f"submission.json: track is {text(folder.said['track'])}, the folder is in {folder.track}")
    return found("P14", f"{len(there)} file(s), {len(folder.logs)} log(s)", problems)


def of_rule(rule: str, lines: list[str]) -> list[str]:
    return [line.removeprefix(f"{rule} ") for line in lines if line.startswith(rule)]


def logs(folder: Folder) -> Finding:
    problems, exact, holds = of_rule("P16", folder.record.problems), {}, []
    for log in folder.logs:
        final = (log.val_loss, log.val_bpb)
        if log.score_rank >= ROUNDTRIP and log.val_loss and final in exact and round(log.val_bpb, 5) != log.val_bpb:
            problems.append(f"{exact[final]} and {text(log.path.name)} have one score to the last digit: one run")
        exact.setdefault(final, text(log.path.name))
    seeds = {log.seed if log.seed is not None else text(log.path.stem) for log in folder.logs
             if log.score_rank >= ROUNDTRIP}
    if folder.is_ten_minutes and len(seeds) < SEEDS_NEEDED:
        problems.append(f"whole logs of {len(seeds)} seed(s), the track needs {SEEDS_NEEDED}")
    several = [note for note in folder.record.notes if note.startswith("several logs")]
    holds += [f"{note}; a judge has to know which of them is the run" for note in dict.fromkeys(several)]
    table = Table("logs", ["file", "seed", "last score line", "val_bpb"],
                  [[folder.named(log.path), log.seed, text(log.score_line), log.val_bpb] for log in folder.logs])
    return found("P16", f"{len(folder.logs)} log(s) of {len(seeds)} seed(s)", problems, holds, [table])


def statistics(folder: Folder) -> Finding:
    record = folder.record
    problems = of_rule("P17", [*record.problems, *record.notes])
    if record.val_bpb is None:
        return skipped("P17", "nothing states a score")
    if not folder.logs and not problems:
        return skipped("P17", f"{record.val_bpb:.4f} is claimed; there is no log to compare it with")
    table = Table("seeds", ["seed", "val_bpb", "val_loss", "log"],
                  [[text(seed), one.val_bpb, one.val_loss, one.log] for seed, one in record.seeds.items()])
    spread = f", deviation {record.val_bpb_std:.6f}" if record.val_bpb_std is not None else ""
    return found("P17", f"{record.val_bpb:.6f} bits per byte{spread}", problems, [], [table])


def quantised_gain(log: Log) -> float:
    """Bits per byte by which one way of scoring is better after quantisation than before; 0 if the log lacks one."""
    others = [score for line, (_, score) in log.scores.items() if re.search("slid|window|stride|ttt|^result$", line)]
    after = [score for line, (_, score) in log.scores.items() if score not in others] + [
        score for line, (_, score) in log.diagnostics.items() if re.search(r"quantized|roundtrip", line)
        and not re.search(r"pre_?quant", line)]
    before = [score for line, (_, score) in log.diagnostics.items() if re.search("pre_?quant|post_?ema", line)]
    return before[-1] - max(after) if before and after else 0.0


def plausible(folder: Folder) -> Finding:
    limit, record, holds = RULES["P25"]["limit"], folder.record, []
    if record.val_bpb is None:
        return skipped("P25", "nothing states a score")
    if record.val_bpb < limit["val_bpb"]:
        holds.append(f"{record.val_bpb:.4f} bits per byte is below {limit['val_bpb']}, where all scores of English "
                     "text were wrong so far")
    scores = [seed.val_bpb for seed in record.seeds.values() if seed.val_bpb is not None]
    spread = stdev(scores) if len(scores) > 1 else number(first(folder.said, "val_bpb_std"))
    if spread is not None and spread < limit["std_bpb"]:
        holds.append(f"{max(len(scores), 1)} seed(s) differ by a deviation of {spread:.2g}, below {limit['std_bpb']}")
    for log in folder.logs:
        if (gain := quantised_gain(log)) > limit["quantised_gain_bpb"]:
            holds.append(f"{text(log.path.name)}: {gain:.4f} bits per byte better after quantisation than before")
        if log.seed is not None and log.seed > LARGEST_PLAIN_SEED:
            holds.append(f"{text(log.path.name)}: seed {log.seed} looks searched for")
    return found("P25", f"{record.val_bpb:.4f} bits per byte", [], holds)


CHECKS: dict[str, Callable[[Folder], Finding]] = {
    "P07": identity, "P10": train_clock, "P11": eval_clock, "P12": size, "P13": wrapper, "P14": layout, "P16": logs,
    "P17": statistics, "P25": plausible,
}


def judge(folder: Folder, rule: str) -> Finding:
    try:
        return CHECKS[rule](folder)
    except (*MALFORMED, RecursionError) as error:
        return found(rule, "", [f"a value is malformed: {type(error).__name__} {text(str(error))[:200]}"])


def examine(path: Path) -> list[Finding]:
    """Returns one finding per rule that the files of a folder can decide, in the order of the rules' numbers."""
    folder = read_folder(path)
    return [judge(folder, rule) for rule in CHECKS]


def status_of(findings: list[Finding]) -> str:
    """Returns fail, hold, unverified (the files do not say it) or pass."""
    statuses = {finding.status for finding in findings}
    return "fail" if "FAIL" in statuses else "hold" if "HOLD" in statuses else (
        "unverified" if "SKIP" in statuses else "pass")


def report(folders: list[Path]) -> tuple[str, str]:
    """Returns (a block of lines for each folder, the worst status of them)."""
    blocks, statuses = [], ["pass"]
    for path in folders:
        if not Path(path).is_dir():
            blocks.append(f"{text(str(path))}\nfail: it is not a folder; name record folders")
            statuses.append("fail")
            continue
        findings = examine(Path(path))
        statuses.append(status_of(findings))
        broken = [finding.rule for finding in findings if finding.status in ("FAIL", "HOLD")]
        blocks.append("\n".join([text(str(path)), *map(str, findings),
                                 f"{statuses[-1]}: {', '.join(broken) or 'nothing found'}; nothing was run"]))
    return "\n\n".join(blocks), min(statuses, key=WORST.index)
