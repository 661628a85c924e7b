"""Run a study, a small TOML file that names architectures, settings and seeds, and report what it found.

    python -m tools.ablate records/studies/wikitext2/study.toml             what is missing, then the report
    python -m tools.ablate records/studies/wikitext2/study.toml --report    the report of what is there
    python -m tools.ablate records/studies/wikitext2/study.toml --measure   step times, memory and operations alone
    python -m tools.ablate records/studies/wikitext2/study.toml --list      what would be run

tools/study/plan.py says what may stand in the file. A study that was stopped goes on where it was, and with the code
that it began with: code/ has a packed script of each architecture. Processes beside each other share the runs. Beside
study.toml it writes runs/, logs/, measures/, plan.json, runs.csv, results.md, results_table.tex,
statistics_summary.json, significance_tests.json, figures/ and README.md. Artifacts stay in runs/studies/, which git
ignores.
"""

import argparse
import json
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from tools.study.design import Design
from tools.study.measure import measure
from tools.study.page import write_report
from tools.study.plan import ROOT, Run, load_study
from tools.study.runner import do_missing, result_path
from train_gpt import save_atomically


def do_all(runs: list[Run], design: Design, words: str) -> list[str]:
    """Do what is missing of these runs under a progress bar; what failed."""
    folder = design.study.folder
    missing = [run for run in runs if not result_path(run, folder).is_file()]
    with tqdm(total=len(runs), initial=len(runs) - len(missing), desc=words, unit="run", smoothing=0.1) as bar:

        def tell(run: Run, said: str) -> None:
            bar.write(f"{run.key}: {said}")
            bar.update()

        return do_missing(missing, folder, ROOT / "runs" / "studies" / folder.name, tell)


def do_runs(design: Design, only: list[str] | None) -> list[str]:
    """Do the runs of these groups, then those that they showed to be needed; what failed."""
    done, failures = set(), []
    while runs := [run for run in design.runs(only) if run.key not in done]:
        failures += do_all(runs, design, "runs")
        done |= {run.key for run in runs}
    return failures


def measure_missing(design: Design, rounds: int, only: Collection[str] | None = None) -> list[str]:
    """File what a step of each arm costs, in turns with its group's baseline, unless it is there; what failed."""
    failures: list[str] = []
    for group in design.study.groups:
        if only is not None and group.name not in only:
            continue
        own = [arm for arm in group.arms if design.timed(group, arm) == (group, arm)]
        missing = {arm.name for arm in own if not design.measure_path(group, arm).is_file()}
        if not missing:
            continue
        arms = {arm.name: arm for arm in own if arm.name in missing | {group.baseline}}
        settings = {name: (arm.arch, design.measured_settings(group, arm)) for name, arm in arms.items()}
        for name, costs in measure(settings, group.baseline, rounds, failures.append).items():
            if name in missing:  # by what is filed, steps may have been counted
                path = design.measure_path(group, arms[name])
                path.parent.mkdir(parents=True, exist_ok=True)
                save_atomically(path, json.dumps(asdict(costs), indent=1).encode() + b"\n")
    return failures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, metavar="STUDY.toml")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--measure", action="store_true", help="measure step times alone; wants a quiet machine")
    parser.add_argument("--list", action="store_true", help="print the runs and whether they are done")
    parser.add_argument("--group", action="append", help="only this group (repeatable)")
    parser.add_argument("--rounds", type=int, default=30, help="of timing (default 30)")
    options = parser.parse_args(argv)
    try:
        study = load_study(options.study)
        if unknown := set(options.group or []) - {group.name for group in study.groups}:
            raise ValueError(f'no group is named "{unknown.pop()}"; there are {[group.name for group in study.groups]}')
        design, failures = Design(study), []
        if options.measure:
            failures = measure_missing(design, options.rounds, options.group)
        elif options.list:
            for run in [*design.tuning(), *design.runs(options.group)]:
                done = result_path(run, study.folder).is_file()
                print("done   " if done else "missing", run.key)
            return 0
        elif not options.report:
            failures = do_all(design.tuning(), design, "tuning")
            others = {group.name for group in study.groups if not options.group or group.name in options.group}
            if not failures:
                clocks = design.clocks(options.group)
                failures += measure_missing(design, options.rounds, clocks)
                failures += do_runs(design, options.group)
                others -= clocks  # an arm that took no step takes none now
            failures += measure_missing(design, options.rounds, others)
        save_atomically(study.folder / "plan.json", json.dumps(design.plan(), indent=1).encode() + b"\n")
        for path in write_report(study.folder):
            print(f"written: {path}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for failure in dict.fromkeys(failures):
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
