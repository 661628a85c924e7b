"""Files runs as a record: one folder with README.md, submission.json, the packed script, logs and the artifact.

    python -m tools.record runs/a runs/b runs/c --script packed.py --name x --author Ada --github-id ada --blurb "..."
    python -m tools.record RUN ... --track 10min_16mb --out records --date 2026-11-22     another track, place, day
    python -m tools.record RUN ... --allow-interrupted                                    a run that was stopped by hand

RUN is the folder of one seed's run of the packed script: `python -m tools.pack gpt -o packed.py`, `python packed.py`.
All numbers are taken from the logs. Runs of the same configuration that lie beside a RUN are disclosed: a finished one
of another seed must be named too, the rest is listed. A folder that fails a rule of tools.verify is not written.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from statistics import fmean, stdev

from tools.logs import read_log
from tools.pack import unpack
from tools.record_page import Run, readme
from tools.referee.case import RESULT, SEED_RESULT, config_of, mistyped, sha256
from tools.referee.claims import SAME_FOR_ALL, all_runs
from tools.referee.code import READABLE
from tools.referee.files import TRACKS
from tools.referee.rules import RULES
from tools.untrusted import text
from tools.verify import verify

SEEDS_NEEDED = {"10min_16mb": RULES["P17"]["limit"]["seeds_10min_16mb"], "non_record_16mb": 1}


def read_run(folder: Path, allow_interrupted: bool) -> Run:
    """Returns a finished run; ValueError says why it cannot be part of a record."""
    for file in ("train.log", "model.bin"):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}; name the folder of a finished run")
    log = read_log(folder / "train.log")
    if log.result is None:
        raise ValueError(f"{folder}: its log has no result line, so the run did not finish; train again")
    if wrong := mistyped(log.result, RESULT):
        no_data = "; a record needs a data folder with a manifest" if wrong[0].startswith("data_sha256") else ""
        raise ValueError(f"{folder}: in its result line {wrong[0]}{no_data}")
    result = log.result
    if result["interrupted"] and not allow_interrupted:
        raise ValueError(f"{folder} was interrupted; train again, or file it as it is with --allow-interrupted")
    if result["partial"]:
        raise ValueError(f"{folder} scored part of the validation text; train again without VAL_MAX_TOKENS")
    if not result["valid"]:
        raise ValueError(f"{folder} is invalid: {text(result.get('invalid_reasons'))}")
    if sha256(folder / "model.bin") != result["artifact_sha256"]:
        raise ValueError(f"{folder}: model.bin is not the artifact that its log is about; train again")
    return Run(folder, config_of(log.path), result)


def check_together(runs: list[Run], script: Path, track: str) -> None:
    """Raises ValueError if the runs are not different seeds of one experiment with this script."""
    for run in runs:
        if run.result["code_sha256"] != sha256(script):
            raise ValueError(f"{run.folder} is not a run of {script}; pack first (`python -m tools.pack "
                             f"{run.result['arch']} -o packed.py`), then train with `python packed.py`")
        for key in SAME_FOR_ALL:
            if run.result[key] != runs[0].result[key]:
                raise ValueError(f"{run.folder} and {runs[0].folder} differ in {key}; seeds of a record differ in the "
                                 "seed alone")
    seeds = [run.result["seed"] for run in runs]
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ValueError(f"seed {twice[0]} is there twice; name one run of each seed")
    if len(runs) < SEEDS_NEEDED[track]:
        raise ValueError(f"track {track} needs {SEEDS_NEEDED[track]} seeds, there are {len(runs)}; train more")


def submission(runs: list[Run], args: argparse.Namespace) -> dict:
    """Returns the content of submission.json."""
    results = [run.result for run in runs]
    losses, scores = [r["val_loss"] for r in results], [r["val_bpb"] for r in results]
    spread = stdev if len(runs) > 1 else lambda values: None
    said = {key: getattr(args, key) for key in ("author", "github_id", "name", "blurb", "date", "track")}
    said |= {"arch": results[0]["arch"], "val_loss": fmean(losses), "val_bpb": fmean(scores),
             "val_loss_std": spread(losses), "val_bpb_std": spread(scores), "seeds": [r["seed"] for r in results]}
    said["seed_results"] = {str(r["seed"]): {key: r[key] for key in SEED_RESULT}
                            | {"log": f"logs/train_seed{r['seed']}.log"} for r in results}
    said |= {"bytes_code": results[0]["bytes_code"], "bytes_model_max": max(r["bytes_model"] for r in results),
             "bytes_total": max(r["bytes_total"] for r in results)}
    said |= {key: results[0][key] for key in ("cap_seconds", "dataset", "val_bytes", "val_tokens", "params")}
    said["all_runs"] = all_runs([(run.folder, run.result) for run in runs])
    said |= {key: "; ".join(dict.fromkeys(r[key] for r in results)) for key in ("hardware", "torch")}
    return said | {"verdict": {"status": "unverified", "reasons": [], "verified_with": ""}}


@contextmanager
def built_beside(folder: Path) -> Iterator[Path]:
    """Yields an empty folder of the same name and track; it moves to its place only if all goes well."""
    if folder.exists():
        raise ValueError(f"{folder} exists; choose another --name or --date")
    workshop = folder.parent.parent / f".{folder.name}.partial-{os.getpid()}"
    build = workshop / folder.parent.name / folder.name
    try:
        build.mkdir(parents=True)
        yield build
        folder.parent.mkdir(exist_ok=True)
        build.rename(folder)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def record(args: argparse.Namespace) -> tuple[Path, list[str]]:
    """Files the runs; returns the record's folder and what a judge will have to look at."""
    if not re.fullmatch(r"[a-z0-9_.-]+", args.name):
        raise ValueError(f"--name {args.name} must be made of a-z, 0-9, _ . and -")
    args.author, args.github_id, args.blurb = text(args.author), text(args.github_id), text(args.blurb)
    if not (args.author and args.github_id and args.blurb):
        raise ValueError("--author, --github-id and --blurb must not be empty")
    date.fromisoformat(args.date)
    runs = [read_run(folder, args.allow_interrupted) for folder in args.runs]
    check_together(runs, args.script, args.track)
    said, place = submission(runs, args), f"track_{args.track}/{args.date}_{args.name}"
    with built_beside(args.out / place) as build:
        (build / "logs").mkdir()
        shutil.copyfile(args.script, build / "train_gpt.py")
        shutil.copyfile(runs[0].folder / "model.bin", build / f"model_seed{said['seeds'][0]}.bin")
        for run in runs:
            shutil.copyfile(run.folder / "train.log", build / f"logs/train_seed{run.result['seed']}.log")
        (build / "submission.json").write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        packed = args.script.read_text(encoding="utf-8")
        source = unpack(packed)
        if source != packed:
            (build / READABLE).write_bytes(source.encode())
        page = readme(runs, said, source, f"records/{place}", compressed=source != packed)
        (build / "README.md").write_text(page, encoding="utf-8")
        findings = verify(build)
        for finding in findings:
            if finding.status == "FAIL":
                raise ValueError(f"{finding.rule} {finding.title}: {finding.problems[0]}. {finding.fix}")
    held = [f"{finding.rule} {finding.title}: {problem}" for finding in findings if finding.status == "HOLD"
            for problem in finding.problems]
    return args.out / place, held


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--script", required=True, type=Path, help="the packed script that made the runs")
    for name in ("--name", "--author", "--github-id", "--blurb"):
        parser.add_argument(name, required=True)
    parser.add_argument("--track", choices=TRACKS, default="non_record_16mb")
    parser.add_argument("--out", type=Path, default=Path("records"))
    parser.add_argument("--date", default=datetime.now(UTC).date().isoformat(), metavar="YYYY-MM-DD")
    parser.add_argument("--allow-interrupted", action="store_true")
    args = parser.parse_args(argv)
    try:
        folder, held = record(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for problem in held:
        print(f"warning: a judge has to look at {problem}")
    if len(args.runs) == 1:
        print("warning: one seed says nothing about the spread; a claim needs three")
    print(f"{folder}: now `python -m tools.verify {folder} --data data/datasets/...` measures the score again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
