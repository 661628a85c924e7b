"""The runs of a record by its logs and its disclosure, and the record that it has to beat."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from tools.leaderboard import read_records, validation_text
from tools.records import TOLERANCE, Record, read_record
from tools.referee.case import Case
from tools.referee.reread import reread
from tools.untrusted import number, text

MOST_RUNS = 1000
NOT_COMPLETED = ("interrupted", "unfinished", "invalid")


@dataclass(frozen=True)
class Runs:
    """What a record ran: seed -> val_bpb, a mean over that seed's runs, of all completed runs and of those with a log;
    the numbers of completed runs without a log and of runs that did not complete; why it would not be ranked."""

    name: str
    scores: dict[int, float]
    logged: dict[int, float]
    num_missing: int = 0
    num_failed: int = 0
    doubts: tuple[str, ...] = ()


def by_seed(runs: list[tuple[int, float]]) -> dict[int, float]:
    """seed -> the mean val_bpb of its runs."""
    return {seed: fmean(score for other, score in runs if other == seed) for seed in sorted({seed for seed, _ in runs})}


def read_runs(record: Record) -> Runs:
    """The runs of a record, by its logs' result lines and by what submission.json discloses beyond them."""
    name, case = text(record.path.name), Case(record.path)
    rows = case.submission.get("all_runs")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    logs = [(log.seed, log.scores["result"][1], text((log.result or {}).get("run_id")))
            for log in case.logs if "result" in log.scores and log.seed is not None]
    if not logs:
        raise ValueError(f"{name} has no log with a result line of the kit in logs/; compare its scores with --scores")
    if len(rows) + len(logs) > MOST_RUNS:
        raise ValueError(f"{name} lists {len(rows) + len(logs)} runs; more than {MOST_RUNS} are not read")
    missing, failed, left = [], 0, list(logs)
    for row in rows:
        seed, score, run_id = row.get("seed"), number(row.get("val_bpb")), text(row.get("run_id"))
        if type(seed) is not int or score is None or not 0 < score < 100 or text(row.get("status")) in NOT_COMPLETED:
            failed += 1
            continue
        same = [log for log in left if log[0] == seed and abs(log[1] - score) < TOLERANCE and log[2] in ("", run_id)]
        if same:
            left.remove(same[0])
        else:
            missing.append((seed, score))
    logged = [log[:2] for log in logs]
    return Runs(name, by_seed(logged + missing), by_seed(logged), len(missing), failed, tuple(record.doubts))


def incumbent(record: Record, records: Path) -> Record | None:
    """The best ranked record of the same track and text; a copy of this very record is not its own rival."""
    if not records.is_dir():
        raise ValueError(f"--records {records} is not a folder; name the one that holds track_*/")
    me, about = record.path, (record.track, validation_text(record))
    others = [other for other in read_records(records) if (other.track, validation_text(other)) == about]
    rivals = [other for other in others if (other.path.parent.name, other.path.name) != (me.parent.name, me.name)]
    return next((other for other in rivals if other.val_bpb is not None and not other.doubts), None)


def read(folder: Path) -> Record:
    """The record in a folder; ValueError if nothing can be compared with it."""
    folder = folder.resolve()
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name a record's, records/<track>/<date>_<name>")
    record = read_record(folder)
    reread(record)
    if not record.track.startswith("track_"):
        raise ValueError(f"{folder} lies in {record.track}, not in a track_ folder; file it with tools.record")
    if not (record.dataset and record.val_bytes):
        raise ValueError(f"{text(folder.name)} does not state its dataset and val_bytes, so nothing compares with it")
    return record


def read_both(folder: Path, against: Path | None, records: Path) -> tuple[Runs, Runs | None]:
    """The runs of a record and of its rival."""
    record = read(folder)
    if against is None:
        rival = incumbent(record, records)
    else:
        rival = read(against)
        for what, mine, its in (("track", record.track, rival.track),
                                ("validation text", validation_text(record)[1], validation_text(rival)[1])):
            if mine != its:
                raise ValueError(f"another {what} cannot be compared: {mine} here, {its} in {text(against.name)}")
        if rival.path == record.path:
            raise ValueError(f"--against {against} is the record itself; name another one")
    return read_runs(record), rival and read_runs(rival)
