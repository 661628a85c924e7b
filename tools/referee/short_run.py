"""A short training run of the submission in a box, under the referee's own clock: what P10, P15 and P18 look at.

The script gets the settings of one of the record's own runs, a cap of seconds, and a copy of the judge's data folder.
Every line that it says is stamped as it arrives. The clock starts with the line that ends the warm-up, or with the
first step; where it has run out is the bell. A second after the bell, or right after training if that ended before,
the train shards are emptied: who still reads them, mapped or not, breaks. What a script keeps in memory, and what it
reads before the clock starts, cannot be seen from here.

The learning rate of a run that the clock ended depends on the cap, so a short one would train at other rates. It is
given the number of steps that the record's run reached, and the schedule by steps.
"""

import math
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tools.logs import Log
from tools.record_page import as_variable
from tools.referee.case import Case, config_of
from tools.referee.claims import NOT_IN_CONFIG_SHA
from tools.referee.measure import here
from tools.referee.rules import RULES, Skip
from tools.referee.sandbox import Act, Box, Broken, Session, isolation
from tools.referee.train_data import Shards, TrainingData, judges_files, make_up_data, open_inside
from tools.untrusted import load_json, number, text

RUN = "_short_run"  # where a case keeps it
RUN_ID = "referee"
CAP_SECONDS = 20.0, 8.0  # of training: whole and short check
START_SECONDS, SCORE_SECONDS = 180.0, 120.0  # that a run may take besides: to its first step, and to score a little
AFTER_BELL, AFTER_TRAINING = 1.0, 0.5  # seconds until the shards are emptied; a loader may have a batch in hand
MODEL_BYTES = 1 << 28
FEWEST_STEPS = 3  # a run of fewer says little; where the clock allows no more, it is made once more with a later bell
LATER = 3  # times the cap
VAL_TOKENS = 2048
FEW_TOKENS = 1024  # of a batch, where a CPU stands in for the record's device
LOG_LINES = 1000  # with a hundred letters each, a tenth of what a box may say
NO_SETTING = re.compile(r"LD_|GLIBC_|MALLOC_|PYTHON|(GCONV_PATH|LOCPATH|NLSPATH|PATH|HOME|TMPDIR)$")
STEP = re.compile(r"step:(\d{1,12})/\d{1,12} train_loss:(\S+) train_time:(\d{1,12})ms(?:.* lr_scale:(\d+\.?\d*))?")
PHASE = re.compile(r"phase:(\w+) ")
STARTS = re.compile(r"phase:warmup |step:\d+/\d+ train_loss:")


class Step(NamedTuple):
    """One step line."""

    step: int
    train_loss: float
    seconds: float  # since the start, as the line says
    lr_scale: float | None
    stamp: float  # when the line came


@dataclass
class ShortRun:
    """What was asked for and what happened. Moments are those of time.monotonic()."""

    log: Log  # of the record's run with the same seed
    device: str
    cap: float
    env: dict[str, str]
    no_replay: str = ""  # why its losses cannot be compared with the log's
    lines: list[tuple[float, str]] = field(default_factory=list)
    emptied: float | None = None
    ended: float = 0.0
    status: int | None = None  # None: it was ended by the referee
    ending: str = ""  # in words
    stored: float | None = None  # when model.bin was last changed
    not_scored: str = ""  # why the model.bin that it stored is none
    acts: list[Act] = field(default_factory=list)

    @cached_property
    def steps(self) -> list[Step]:
        return steps_of(self.lines)

    @property
    def began(self) -> float:
        return next((stamp for stamp, line in self.lines if STARTS.match(line)), math.inf)

    @property
    def bell(self) -> float:
        return self.began + self.cap

    def phase_ended(self, name: str) -> float | None:
        return next((stamp for stamp, line in self.lines if line.startswith(f"phase:{name} ")), None)

    @property
    def training_over(self) -> float:
        """When data may no longer be read: the bell, or the end of training if that is announced before."""
        return min(self.bell, self.phase_ended("train") or math.inf)

    @property
    def stopped_by_clock(self) -> bool:
        return any(line.startswith("stopping_early: wallclock_cap ") for _, line in self.lines)

    @cached_property
    def result(self) -> dict | None:
        last = next((line for _, line in reversed(self.lines) if line.startswith("result:")), "")
        value = load_json(last.removeprefix("result:"))[0] if last else None
        return value if isinstance(value, dict) else None


def steps_of(lines: list[tuple[float, str]]) -> list[Step]:
    found = [(stamp, STEP.match(line)) for stamp, line in lines]
    return [Step(int(m[1]), math.nan if (loss := number(m[2])) is None else loss, int(m[3]) / 1000,
                 float(m[4]) if m[4] else None, stamp) for stamp, m in found if m]


def settings_of(config: dict) -> dict[str, str]:
    """The environment that gives a run the settings of a log's config line, and nothing that a system listens to."""
    names = {name: name.upper() for name in config if name not in NOT_IN_CONFIG_SHA}
    return {variable: as_variable(config[name]) for name, variable in names.items()
            if re.fullmatch(r"[A-Z][A-Z0-9_]{0,60}", variable) and not NO_SETTING.match(variable)}


def prepare(case: Case, longest: float) -> ShortRun:
    """The run that is to be started, of a seed that has a log; its cap is at most `longest` seconds."""
    if case.data is None and not case.pre:
        raise Skip("no --data folder to train on")
    logs = [log for log in case.logs if log.result and type(log.result.get("seed")) is int]
    if not logs:
        raise Skip("no log says with which seed it was trained")
    log = case.random("training").choice(logs)
    result, config = log.result, config_of(log.path)
    if case.data and not case.data.vocab_size <= config["vocab_size"]:
        raise Skip(f"{case.data.name} has {case.data.vocab_size:,} tokens, the record's model {config['vocab_size']:,}")
    device = result["device"] if result["device"] in here() else "cpu"
    by_clock = result["steps"] < config["iterations"]  # then shorter than that run, so that it hears the bell
    cap = max(1.0, min(longest, result["train_seconds"] / 2)) if by_clock else longest
    found = ShortRun(log, device, cap, settings_of(config))
    if case.data is None:
        found.no_replay = "no --data folder to train on"
    elif device != result["device"]:
        found.no_replay = f"the record was trained on {text(result['device'])}, which is not here"
    elif result["data_sha256"] != case.data.manifest_sha256:
        found.no_replay = f"the record was not trained on {case.data.name}"
    expected = min(result["steps"], cap * result["steps"] / max(result["train_seconds"], 0.001))
    every = 1 if expected <= LOG_LINES else max(int(config["train_log_every"]), int(expected / LOG_LINES))
    found.env |= {"DATA_PATH": "data", "OUT_DIR": "runs", "RUN_ID": RUN_ID, "SEED": str(result["seed"]),
                  "DEVICE": device, "MAX_WALLCLOCK_SECONDS": f"{cap:g}", "WARMUP_STEPS": "2",
                  "TRAIN_LOG_EVERY": str(every), "VAL_MAX_TOKENS": str(VAL_TOKENS), "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        found.env["COMPILE"] = "0"
    if device != result["device"]:
        batch = str(config["train_seq_len"] * max(1, FEW_TOKENS // config["train_seq_len"]))
        found.env |= {"TRAIN_BATCH_TOKENS": batch, "MICRO_BATCH_TOKENS": batch, "BF16": "none"}
    elif by_clock and config.get("schedule") == "time":
        found.env |= {"SCHEDULE": "steps", "ITERATIONS": str(result["steps"])}
    return found


def watch(box: Box, run: ShortRun, shards: Shards) -> None:
    """Stamp every line of a run until it has ended, and take its data away when time is up; Broken says how."""
    export_seconds = RULES["P10"]["limit"]["export_seconds"]
    deadline = box.started + START_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        line = box.line(left).decode(errors="replace")
        run.lines.append((time.monotonic(), line))
        if run.began < math.inf and STARTS.match(line):
            deadline = run.bell + export_seconds + SCORE_SECONDS
            shards.empty_at(run.bell + AFTER_BELL)
        if line.startswith("phase:train "):
            shards.empty_at(run.lines[-1][0] + AFTER_TRAINING)
    raise Broken("it did not end in time")


def take_model(box: Box, run: ShortRun, path: Path) -> None:
    """Copies out the artifact of a run that has ended."""
    try:
        file = open_inside(box.folder, "runs", RUN_ID, "model.bin", flags=os.O_RDONLY)
    except OSError as error:
        run.not_scored = f"it stored no model.bin in its folder: {text(error.strerror or str(error))}"
        return
    with os.fdopen(file, "rb") as source, path.open("wb") as copy:
        about = os.fstat(file)
        run.stored = about.st_ctime - (time.time() - time.monotonic())  # a program can set st_mtime
        if about.st_size > MODEL_BYTES:
            run.not_scored = f"its model.bin has {about.st_size:,} bytes"
            return
        shutil.copyfileobj(source, copy)


def start(case: Case, run: ShortRun, data: TrainingData, model: Path) -> None:
    files = {"train_gpt.py": case.script} | {f"data/{name}": path for name, path in data.files.items()}
    case.say(f"training for {run.cap:g} s, seed {run.env['SEED']} on {run.device} ({isolation()})")
    with Box(files, [], run.env, START_SECONDS + run.cap + SCORE_SECONDS, processes=run.device == "cuda") as box:
        try:
            shards = Shards(box, data.train)
            try:
                watch(box, run, shards)
            finally:
                shards.close()
                run.emptied = shards.emptied
        except Broken as broken:
            run.ended, run.ending, run.status = time.monotonic(), str(broken), box.process.poll()
        if run.status is not None:
            take_model(box, run, model)
        run.acts = box.acts()
    if run.stored is not None and not run.not_scored and run.status in (0, 3):
        try:
            with Session(case.script, model, SCORE_SECONDS, run.device) as session:
                session.score(data.tokens[: VAL_TOKENS // 8 + 1])
        except Broken as broken:
            run.not_scored = f"a fresh process does not score with the model.bin that it stored: {broken}"


def attempt(case: Case, longest: float) -> ShortRun:
    run = prepare(case, longest)
    with tempfile.TemporaryDirectory() as folder:
        if case.data is None:
            config = config_of(run.log.path)
            data = make_up_data(Path(folder) / "data", config["vocab_size"], config["train_seq_len"], case)
        else:
            data = judges_files(case.data)
        start(case, run, data, Path(folder) / "model.bin")
    return run


def short_run(case: Case) -> ShortRun:
    """The run of a case; it is made once. Skip where there is nothing to train on."""
    if RUN not in case.__dict__:
        run = attempt(case, CAP_SECONDS[case.pre])
        if run.status in (0, 3) and len(run.steps) < FEWEST_STEPS and run.stopped_by_clock:
            run = attempt(case, LATER * CAP_SECONDS[case.pre])
        case.__dict__[RUN] = run
    return case.__dict__[RUN]
