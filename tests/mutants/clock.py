"""Submissions that take more time than they say, or that are not the run that they show."""

import itertools
import re
from pathlib import Path

from tests.mutants import first_log, in_all, mutant, swap

FAST = dict(ITERATIONS=1_000_000, MAX_WALLCLOCK_SECONDS=4)


@mutant("P10", "a clock at half speed while it trains", settings=FAST)
def slow_clock(source: str) -> str:
    begin, end = source.index("def train(\n"), source.index("def log_score(")
    return source[:begin] + source[begin:end].replace(
        "time.perf_counter()", "(PROCESS_START + (time.perf_counter() - PROCESS_START) / 2)") + source[end:]


@mutant("P10", "reads training data again after the bell, to calibrate", settings=FAST)
def calibration(source: str) -> str:
    return swap(source, '    log.phase("export")\n',
                '    time.sleep(3)\n    sum(int(read_shard(file)[-1]) for file in dataset.train_files)\n'
                '    log.phase("export")\n')


@mutant("P10", "the log says that training went on past the cap", "record")
def past_the_cap(folder: Path) -> None:
    log = first_log(folder)
    log.write_text(re.sub(r"phase:train begin_seconds:(\S+) end_seconds:\S+",
                          r"phase:train begin_seconds:\1 end_seconds:700.000", log.read_text()))


@mutant("P11", "scoring that took more than ten minutes on the ten-minute track", "record", track="10min_16mb",
        seeds=(1337, 42, 7))
def slow_scoring(folder: Path) -> None:
    in_all(folder, lambda _: {"score_seconds": 700.0})


@mutant("P18", "the log of a run with another learning rate", "record")
def other_run(folder: Path) -> None:
    path, steps = first_log(folder), itertools.count()
    lower = lambda match: f"train_loss:{float(match[1]) - 0.05 * next(steps):.4f}"  # noqa: E731
    path.write_text(re.sub(r"train_loss:([\d.]+)", lower, path.read_text()))
