"""Reads one training log in the kit's grammar or any of upstream's; what cannot be read is a sentence in `problems`."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tools.untrusted import count, first, load_json, number, read_text, text

NUMBER = r"(-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)"
TRAIN_LOSS = re.compile(rf"\btrain_loss\s*[:=]\s*{NUMBER}")
VAL_LOSS = re.compile(rf"val_loss\s*[:=]\s*{NUMBER}")
VAL_BPB = re.compile(rf"val_bpb\s*[:=]\s*{NUMBER}")
VAL_TOKENS = re.compile(r"(?:\bval_tokens\s?[:=]\s?|\bval_loader:.{0,300}?\btokens:)(\d{1,15})\b")
LIFTED_CAP = re.compile(r"\bforce_?stop\w{0,20}\b(?:['\"]?\s?[:=]\s?['\"]?[1-9]\d*|(?!['\"]?\s?[:=]))", re.I)
CALIBRATION = re.compile(rf"(gptq|hessian|calibrat|self_?gen).{{0,80}}? (?:in|took) {NUMBER}\s?s\b", re.I)
EVAL_TIME = re.compile(rf"\b((?:\w{{0,40}}_)?eval_time|elapsed)\s?[:=]\s?{NUMBER}\s?(ms|s|m)?\b")
COMPILE_TIME = re.compile(rf"\b(?:compil\w* ?warm|warm\w* ?(?:up )?compil).{{0,80}}?\b{NUMBER}\s?s\b", re.I)
TRAIN_TIME = re.compile(rf"\btrain_time\s*[:=]\s*{NUMBER}\s*(ms|s|m)?\b")
STEP = re.compile(r"(?:\[[^\]]{0,40}\]:?\s{0,4})?(?:step\s{0,4}[:=]?\s{0,4})?(\d{1,12})/\d{1,12}\b")
STOP_STEP = re.compile(r"\bstep\s?[:=]\s?(\d{1,12})")
PHASE = re.compile(rf"phase:(\w+)\s+begin_seconds:{NUMBER}\s+end_seconds:{NUMBER}")
SIZE = re.compile(r"(Serialized model|Code size|Total submission size)([^:]{0,40}):\s*(\d[\d,_.]{0,20})\s?([kMG]i?B)?")
SEED = re.compile(r"\bseed\s*[:=]\s*(\d{1,18})\b", re.I)
DATASET = re.compile(r"(?:\bdataset:|datasets/)([\w.+-]{1,80})")
GPU = re.compile(r"\bNVIDIA ((?:GeForce )?(?:RTX )?[A-Z]{0,2}\d{1,4}[\w -]*?)(?:\s{2,}|\s+O(?:n|ff)\b|$)")
NOT_FINAL = re.compile(r"pre_?quant|pre_?ttt|diagnostic|post_?ema|raw|best|running|chunk|progress|baseline|expected")
UNIT_BYTES = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "kiB": 2**10, "MiB": 2**20, "GiB": 2**30}
LOG_BYTES = 4 * 1024 * 1024
LINE_LETTERS = 2_000  # of a line that is not JSON
UNIT_SECONDS = {"ms": 1e-3, None: 1e-3, "s": 1.0, "m": 60.0}
STEP_LINE, UNFINISHED, ROUNDTRIP, SLIDING, TEST_TIME, RESULT = range(6)  # score_rank, weakest evidence first


class Point(NamedTuple):
    """One measurement of a run; a train point has train_loss, a validation point val_loss and val_bpb."""

    step: int
    seconds: float | None
    train_loss: float | None = None  # nats per token
    val_loss: float | None = None
    val_bpb: float | None = None


@dataclass
class Log:
    """A log after reading; None and "" are what it does not say."""

    path: Path
    config: dict = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)  # name -> begin and end seconds
    result: dict | None = None
    scores: dict[str, tuple[float | None, float]] = field(default_factory=dict)  # final line -> val_loss, val_bpb
    diagnostics: dict[str, tuple[float | None, float]] = field(default_factory=dict)  # before quantisation, unfinished
    score_line: str = ""  # where val_bpb was read
    score_rank: int = STEP_LINE
    val_loss: float | None = None
    val_bpb: float | None = None
    seed: int | None = None
    bytes_model: int | None = None
    bytes_code: int | None = None
    bytes_total: int | None = None
    stop_seconds: float | None = None
    stop_step: int | None = None
    cap_seconds: float | None = None  # max_wallclock_seconds
    lifted_cap: str = ""  # the words that let the run go on past its cap
    calibration: dict[str, float] = field(default_factory=dict)  # line after the last step -> seconds
    eval_seconds: dict[str, float] = field(default_factory=dict)  # final line -> seconds
    compile_seconds: float = 0.0  # for scoring, outside its timer
    dataset: str = ""
    val_tokens: int | None = None
    val_bytes: int | None = None
    hardware: str = ""
    sha256: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def steps(self) -> list[Point]:
        return [point for point in self.points if point.train_loss is not None]

    @property
    def val_points(self) -> list[Point]:
        return [point for point in self.points if point.val_bpb is not None]


def read_log(path: Path | str) -> Log:
    """Returns a log. Its score is the first of these that it has:

    1. the kit's result:{json} line;
    2. a line with val_bpb that names test-time training (ttt), then a sliding window, then any other final line
       (..._roundtrip, quantized): each supersedes the next, and the last and most exact line of its name counts;
    3. a diagnostic or pre-quantisation line, then the last validation step; both are also a problem.
    """
    log = Log(Path(path))
    content = read_text(log.path, log.problems, LOG_BYTES)
    log.sha256 = hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()
    for line in filter(str.strip, _body(content)):
        _read_line(log, line.strip())
    _read_result(log)
    _choose_score(log)
    return log


def _body(content: str) -> list[str]:
    """Returns the lines after the source code that early logs begin with, up to the first line of 100 equals signs."""
    lines = content.splitlines()
    ruled = lines.index("=" * 100) if "=" * 100 in lines else 0
    is_source = any(line.startswith(("import ", "from ")) for line in lines[:ruled])
    rest = lines[ruled + 1:] if is_source else lines
    return rest if any(VAL_BPB.search(line) or TRAIN_LOSS.search(line) for line in rest) else lines


def _read_line(log: Log, line: str) -> None:
    """Adds what one line says."""
    if line.startswith(("config:{", "result:{")):
        value, reason = load_json(line[7:])
        if not isinstance(value, dict):
            log.problems.append(f"its {line[:6]} line is cut: {reason}")
        else:
            setattr(log, line[:6], value)  # config or result
        return
    line = line[:LINE_LETTERS]
    if found := PHASE.match(line):
        log.phases[found[1]] = (number(found[2]) or 0.0, number(found[3]) or 0.0)
    elif "stopping_early" in line and (found := STOP_STEP.search(line)):
        log.stop_step, log.stop_seconds = int(found[1]), _seconds(line)
        _read_clock(log, line, "")
    elif found := SIZE.match(line):
        _read_size(log, found[1], found[2].lower(), round((number(found[3]) or 0) * UNIT_BYTES.get(found[4], 1)))
    elif (found := STEP.match(line)) and (TRAIN_LOSS.search(line) or VAL_BPB.search(line)):
        _read_step(log, int(found[1]), line)
    elif found := VAL_BPB.search(line[:400]):
        _read_score(log, line[:400], found)
    else:
        _read_clock(log, line, "")
        _read_setting(log, line)


def _read_score(log: Log, line: str, found: re.Match) -> None:
    label = line[:found.start()].split("val_loss")[0].lower()
    label = re.sub(r"[^\s:=]{1,40}[:=]\s*\d\S*|\[[^\]]*\]|(?<!\S)\d\S*", " ", label)
    label = re.sub(r"[^a-z0-9+]+", "_", label).strip("_")[-60:]
    label = re.sub(r"_(exact|done)$", "", label) or "val_bpb"
    scores = log.diagnostics if NOT_FINAL.search(label) else log.scores
    value = number(found[1]) or 0.0
    if 0 < value < 100 and not ("_exact" not in line and abs(scores.get(label, (0, 0))[1] - value) < 1e-4):
        scores[label] = (_number_in(VAL_LOSS, line), value)
    _read_clock(log, "" if scores is log.diagnostics else line, label)


def _read_clock(log: Log, line: str, label: str) -> None:
    """Adds the seconds of scoring, or of what works on the weights after the last step."""
    if found := EVAL_TIME.search(line):
        seconds = (number(found[2]) or 0.0) * UNIT_SECONDS[found[3] or ("s" if found[1] == "elapsed" else None)]
        if label or found[1] != "eval_time":
            log.eval_seconds[label or found[1]] = seconds
    elif (" in " in line or " took " in line) and (found := CALIBRATION.search(line)):
        log.calibration[line[:80]] = number(found[2]) or 0.0
    elif found := COMPILE_TIME.search(line):
        log.compile_seconds += number(found[1]) or 0.0
    if not log.lifted_cap and (found := LIFTED_CAP.search(line)):
        log.lifted_cap = found[0]


def _number_in(pattern: re.Pattern, line: str) -> float | None:
    found = pattern.search(line)
    return number(found[1]) if found else None


def _seconds(line: str) -> float | None:
    found = TRAIN_TIME.search(line)
    return (number(found[1]) or 0.0) * UNIT_SECONDS[found[2]] if found else None


def _read_size(log: Log, what: str, codec: str, size: int) -> None:
    """Keeps the size that counts: compressed where a log prints both, and never the raw state dict."""
    if what == "Code size" and (log.bytes_code is None or "uncompressed" not in codec):
        log.bytes_code = size
    elif what != "Code size" and codec.strip():
        setattr(log, "bytes_model" if what == "Serialized model" else "bytes_total", size)


def _read_step(log: Log, step: int, line: str) -> None:
    train_loss, val_bpb = _number_in(TRAIN_LOSS, line), _number_in(VAL_BPB, line)
    last = next((point.step for point in log.points[:-100:-1] if point.train_loss is not None), 0)
    if train_loss is not None and step < last:  # a run that was started again: only the last one counts
        for begun in (log.points, log.scores, log.eval_seconds):
            begun.clear()
    log.calibration.clear()
    point = Point(step, _seconds(line), train_loss, _number_in(VAL_LOSS, line), val_bpb)
    if not log.points or log.points[-1] != point:
        log.points.append(point)


def _read_setting(log: Log, line: str) -> None:
    """Adds upstream's settings, `key:value` several to a line or `key: value` alone, and what they tell."""
    if log.seed is None and (found := SEED.search(line)):
        log.seed = int(found[1])
    if not log.dataset and (found := DATASET.search(line)):
        log.dataset = found[1].rstrip(".")
    if log.val_tokens is None and (found := VAL_TOKENS.search(line)):
        log.val_tokens = count(found[1])
    if not log.hardware and (found := GPU.search(line)):
        log.hardware = f"NVIDIA {found[1]}"
    if not log.points and "arch" not in log.config and not line.startswith(("config:", "#")):  # ours is whole
        alone = re.fullmatch(r"([a-z]\w{0,40})\s*[:=]\s+(\S{1,200})", line)
        pairs = [alone.groups()] if alone else re.findall(r"(?:^|\s)([a-z]\w{0,40})[:=]([^\s:=]{1,200})(?=\s|$)", line)
        for key, value in pairs:
            log.config.setdefault(key, value)


def _read_result(log: Log) -> None:
    """Fills what the kit's result and config lines say; they come before anything that was guessed."""
    result = log.result or {}
    for seed in (log.config.get("seed"), result.get("seed")):
        log.seed = log.seed if number(seed) is None else round(number(seed))
    data_path = DATASET.search(text(log.config.get("data_path")))
    log.dataset = text(result.get("dataset")) or log.dataset or (data_path[1] if data_path else "")
    log.val_bytes, log.val_tokens = count(result.get("val_bytes")), count(result.get("val_tokens")) or log.val_tokens
    log.cap_seconds = number(first({**log.config, **result}, "cap_seconds", "max_wallclock_seconds"))
    log.hardware = text(result.get("hardware")) or log.hardware
    if log.hardware.startswith("NVIDIA") and (world_size := number(log.config.get("world_size"))):
        log.hardware = f"{round(world_size)}x {log.hardware}"
    for key in ("bytes_model", "bytes_code", "bytes_total"):
        setattr(log, key, count(result.get(key)) or getattr(log, key))
    if (score := number(result.get("val_bpb"))) is not None and 0 < score < 100:
        log.scores["result"] = (number(result.get("val_loss")), score)
    if result.get("valid") is False:
        log.problems.append(f"the run says it is invalid: {text(result.get('invalid_reasons')) or 'no reason given'}")
    flags = (("partial", "only part of the validation text was scored"), ("interrupted", "interrupted"))
    log.problems += [meaning for flag, meaning in flags if result.get(flag) is True]


def _choose_score(log: Log) -> None:
    """Fills the score, by the order that read_log documents."""
    for line, (val_loss, val_bpb) in log.scores.items():
        rank = SLIDING if re.search("slid|window|stride", line) else ROUNDTRIP
        rank = RESULT if line == "result" else TEST_TIME if "ttt" in line else rank
        if rank >= log.score_rank:
            log.score_rank, log.score_line, log.val_loss, log.val_bpb = rank, line, val_loss, val_bpb
    if log.score_line == "" and log.diagnostics:
        log.score_line, log.score_rank = list(log.diagnostics)[-1], UNFINISHED
        log.val_loss, log.val_bpb = log.diagnostics[log.score_line]
    elif log.score_line == "" and log.val_points:
        last = log.val_points[-1]
        log.score_line, log.val_loss, log.val_bpb = f"step {last.step}", last.val_loss, last.val_bpb
    if log.score_rank < ROUNDTRIP and (log.points or log.diagnostics):
        log.problems.append(f"ends before its final score line; {log.score_line or 'nothing'} is the last score")
