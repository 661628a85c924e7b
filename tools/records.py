"""Reads a record folder, the kit's or upstream's: bad content becomes a sentence in `problems`, never an exception.

A problem makes a score doubtful (no score, logs that say otherwise, over the cap); a note is only worth knowing.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev, stdev

from tools.logs import Log, Point, read_log
from tools.untrusted import count, first, load_json, number, plain_files, read_text, text

CAP_BYTES = 16_000_000
MAX_LOGS, MAX_LOG_BYTES, MAX_JSON, MAX_JSON_BYTES = 64, 32 * 1024 * 1024, 16, 1024 * 1024
TOLERANCE = 1e-4  # bits per byte; many files round to four decimals
SCORE_KEYS = ("val_bpb", "mean_val_bpb", "val_bpb_mean", "mean_bpb", "bpb")
SIZE_KEYS = ("bytes_total", "total_bytes", "artifact_bytes_max", "artifact_bytes", "artifact_size_bytes")
OTHER_QUANTITY = re.compile(r"pre_?quant|baseline|delta|std|sota|leaderboard|threshold|vs_|gain|improve|gap|target")
NOT_EVIDENCE = re.compile(r"ablat|baseline|control|smoke|sweep|superseded|(^|/)\.", re.I)


@dataclass
class SeedResult:
    """One seed of a record, as its log prints it or, without a log, as submission.json states it."""

    val_bpb: float | None = None
    val_loss: float | None = None
    bytes_total: int | None = None
    log: str = ""


@dataclass
class Record:
    """A record folder after reading; None and "" are what could not be found."""

    path: Path
    track: str
    name: str
    author: str = ""
    github_id: str = ""
    date: str = ""  # YYYY-MM-DD
    blurb: str = ""
    val_bpb: float | None = None  # what submission.json claims or, without a claim, the mean over the logs
    val_bpb_std: float | None = None  # sample standard deviation (n-1) over the seeds
    val_loss: float | None = None
    seeds: dict[str, SeedResult] = field(default_factory=dict)
    bytes_total: int | None = None
    bytes_code: int | None = None
    hardware: str = ""
    arch: str = ""
    dataset: str = ""
    val_bytes: int | None = None
    verdict: str = "unverified"  # pass, fail, hold or unverified
    verdict_reasons: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)  # all plain files, whatever they are
    logs: list[Log] = field(default_factory=list)  # every different one; several may be of one seed
    curves: dict[str, list[Point]] = field(default_factory=dict)  # by seed
    bpb_per_nat: float | None = None  # turns this record's nats per token into bits per byte
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def doubts(self) -> list[str]:
        """Why it is not ranked; an empty list ranks it."""
        why = {"fail": "failed verification", "hold": "held for a judge"}.get(self.verdict)
        return [f"{why}: {reason}" for reason in self.verdict_reasons or ["no reason given"] if why] + self.problems

    @property
    def num_seeds(self) -> int:
        return sum(seed.val_bpb is not None for seed in self.seeds.values()) or max(len(self.seeds), 1)


def read_record(path: Path | str) -> Record:
    """Returns what a record folder says about itself, its claim compared with its own logs."""
    path = Path(path)
    record = Record(path, text(path.parent.name), re.sub(r"^\d{4}-\d\d-\d\d_", "", text(path.name)))
    record.files = plain_files(path, record.problems)
    data = _read_submission(record)
    logs = _read_logs(record, data)
    _describe(record, data, logs)
    _fill_sizes(record, data, logs)
    _fill_score(record, data, logs)
    _fill_validation_text(record, data, logs)
    return record


def _read_submission(record: Record) -> dict:
    """Returns the first JSON object of the folder that has a score, submission.json before any other file."""
    files = [file for file in record.files if file.suffix == ".json" and file.parent == record.path]
    files.sort(key=lambda file: (file.name != "submission.json", not file.name.startswith("submission"), file.name))
    parsed = []
    for file in files[:MAX_JSON]:
        content, reason = load_json(read_text(file, record.problems, MAX_JSON_BYTES))
        if isinstance(content, dict):
            parsed.append((file.name, content))
        elif file.name.startswith("submission"):
            record.problems.append(f"{text(file.name)} is not a JSON object: {reason or type(content).__name__}")
    name, data = next((found for found in parsed if _score(found[1]) is not None), parsed[0] if parsed else ("", {}))
    if name and name != "submission.json":
        record.notes.append(f"read from {text(name)}")
    elif not files:
        record.problems.append("no submission.json")
    return data


def _read_logs(record: Record, data: dict) -> dict[str, Log]:
    """Returns one log per seed; of several for a seed, the one whose final line is the strongest."""
    files = [file for file in record.files if file.suffix.lower() in (".log", ".txt")]
    main = [file for file in files if not NOT_EVIDENCE.search(str(file.relative_to(record.path)))] or files
    if sum(file.stat().st_size for file in main) > MAX_LOG_BYTES:
        record.problems.append(f"P16 its logs have more than {MAX_LOG_BYTES:,} bytes; they were not read")
        main = []
    logs, seen = {}, {}
    for file in main[:MAX_LOGS]:
        log, name = read_log(file), text(file.name)
        if not log.points and not log.scores and log.result is None:
            continue
        if (twin := seen.setdefault(log.sha256, file)) != file:
            record.problems.append(f"P16 {text(twin.name)} and {name} are the same log")
            continue
        record.logs.append(log)
        named = next((str(int(digits)) for digits in re.findall(r"(?i)(?:seed[_-]?|_s)(\d{1,18})", file.stem)), "")
        if named and log.seed is not None and named != str(log.seed):
            record.problems.append(f"P16 {name} is a run of seed {log.seed}")
        seed = named or text(file.stem if log.seed is None else log.seed)
        if seed in logs:
            record.notes.append(f"several logs of seed {seed}")
        if seed not in logs or log.score_rank >= logs[seed].score_rank:
            logs[seed] = log
    if listed := set(_stated_seeds(data)) & set(logs):  # a folder may keep logs of other experiments
        logs = {seed: log for seed, log in logs.items() if seed in listed}
    record.problems += [f"P16 {text(log.path.name)} {problem}" for log in logs.values() for problem in log.problems]
    record.problems += [] if logs else ["P16 no log"]
    record.curves = {seed: log.points for seed, log in logs.items() if log.points}
    return logs


def _score(data: dict) -> float | None:
    """Returns the bits per byte that a JSON object claims, under a known name or any other that ends in bpb."""
    others = [key for key in data if key.endswith("bpb") and not OTHER_QUANTITY.search(key)]
    nested = [data[key] for key in ("results", "metrics", "final", "scores") if isinstance(data.get(key), dict)]
    found = [number(data.get(key)) for key in (*SCORE_KEYS, *others)]
    return next((value for value in [*found, *map(_score, nested)] if value is not None and 0 < value < 100), None)


def _stated_seeds(data: dict) -> dict[str, SeedResult]:
    """Returns seed -> result from `seed`, a list of seeds, a list of runs, a dict by seed, or these inside another."""
    seeds = _seeds_in([data.get("seed")], 0)
    for key in ("seeds", "seed_results", "per_seed", "per_seed_results", "runs"):
        for seed, result in _seeds_in(data.get(key), 0).items():
            seeds[seed] = result if result.val_bpb is not None else seeds.get(seed, result)
    return seeds


def _seeds_in(value: object, depth: int) -> dict[str, SeedResult]:
    seeds, pairs = {}, value.items() if isinstance(value, dict) else []
    if isinstance(value, list):
        pairs = [(item.get("seed"), item) if isinstance(item, dict) else (item, None) for item in value]
    for key, inner in pairs:
        match = re.fullmatch(r"(?:seed[_ -]?)?(\d{1,18})", text(key), re.I)
        if match and isinstance(inner, dict):
            size, log = first(inner, "bytes_total", "artifact_bytes", "total_bytes"), text(inner.get("log"))
            seeds[str(int(match[1]))] = SeedResult(_score(inner), number(inner.get("val_loss")), count(size), log)
        elif match:
            seeds[str(int(match[1]))] = SeedResult(number(inner))
        elif isinstance(inner, dict | list) and depth < 4:
            seeds.update(_seeds_in(inner, depth + 1))
    return seeds


def _describe(record: Record, data: dict, logs: dict[str, Log]) -> None:
    """Fills the words."""
    record.name = text(first(data, "name", "run_name")) or record.name
    record.author, record.github_id = text(first(data, "author", "authors", "github_id")), text(data.get("github_id"))
    record.blurb = text(first(data, "blurb", "technique_summary", "summary", "description", "notes"))
    record.date = (re.findall(r"\d{4}-\d\d-\d\d", f"{text(data.get('date'))} {text(record.path.name)}") or [""])[0]
    hardware, arch = first(data, "hardware", "gpu", "gpu_config"), first(data, "arch", "architecture")
    record.hardware = text(hardware) or next((log.hardware for log in logs.values() if log.hardware), "")
    record.arch = text(arch) or next((text(log.result.get("arch")) for log in logs.values() if log.result), "")
    verdict = data.get("verdict") if isinstance(data.get("verdict"), dict) else {"status": data.get("verdict")}
    status, reasons = text(verdict.get("status")).lower(), verdict.get("reasons") or []
    record.verdict = status if status in ("pass", "fail", "hold") else "unverified"
    record.verdict_reasons = [text(reason) for reason in (reasons if isinstance(reasons, list) else [reasons])]


def _fill_sizes(record: Record, data: dict, logs: dict[str, Log]) -> None:
    """Fills the bytes, of the largest seed."""
    sizes = [each.bytes_total or 0 for each in [*_stated_seeds(data).values(), *logs.values()]]
    record.bytes_total = max([count(first(data, *SIZE_KEYS)) or 0, *sizes]) or None
    coded = [log.bytes_code for log in logs.values() if log.bytes_code] or [None]
    record.bytes_code = count(first(data, "bytes_code", "code_bytes")) or coded[0]
    if record.bytes_total and record.bytes_total > CAP_BYTES:
        record.problems.append(f"P12 {record.bytes_total:,} bytes is {record.bytes_total - CAP_BYTES:,} over the cap")


def _fill_score(record: Record, data: dict, logs: dict[str, Log]) -> None:
    """Fills the score and its spread over the seeds."""
    claim, stated = _score(data), _stated_seeds(data)
    values = _agree(record, claim, {seed: log for seed, log in logs.items() if log.val_bpb is not None})
    told = {seed: result.val_bpb for seed, result in stated.items() if result.val_bpb is not None}
    means = {key: number(data[key]) for key in data if re.search("mean.*bpb|bpb.*mean", key)}
    for name, mean in (means | ({"the mean of its seeds": fmean(told.values())} if told else {})).items():
        if claim is not None and mean is not None and abs(mean - claim) > TOLERANCE:
            record.problems.append(f"P17 submission.json says {claim:.4f}, but {text(name)} is {mean:.4f}")
    if logs and len(stated) > len(values):
        record.problems.append(f"P17 {len(stated)} seeds are listed, {len(values)} log(s) have a score")
    for seed in stated | values:
        said, log = stated.get(seed, SeedResult()), logs.get(seed, Log(Path()))
        if seed in told and log.scores and all(abs(pair[1] - told[seed]) > TOLERANCE for pair in log.scores.values()):
            record.problems.append(f"P17 seed {seed}: submission.json says {told[seed]:.4f}, its log {log.val_bpb:.4f}")
        record.seeds[seed] = SeedResult(values.get(seed, said.val_bpb), said.val_loss or log.val_loss,
                                        said.bytes_total or log.bytes_total, said.log or text(log.path.name))
    found = [result.val_bpb for result in record.seeds.values() if result.val_bpb is not None]
    losses = [log.val_loss for log in logs.values() if log.val_loss]
    record.val_bpb = claim if claim is not None else fmean(values.values()) if values else None
    record.val_loss = number(first(data, "val_loss", "mean_val_loss")) or (fmean(losses) if losses else None)
    said_std = number(first(data, "val_bpb_std", "std_val_bpb", "std_bpb"))
    record.val_bpb_std = stdev(found) if len(found) > 1 else said_std
    if len(found) > 1 and said_std and abs(pstdev(found) - said_std) < 0.05 * said_std < abs(stdev(found) - said_std):
        record.notes.append(f"P17 its val_bpb_std is the population's; over a sample it is {stdev(found):.5f}")
    pairs = [(log.val_bpb, log.val_loss) for log in logs.values() if log.val_bpb and (log.val_loss or 0) > 0.01]
    record.bpb_per_nat = pairs[0][0] / pairs[0][1] if pairs else None


def _agree(record: Record, claim: float | None, logs: dict[str, Log]) -> dict[str, float]:
    """Returns seed -> val_bpb of the final line whose mean is the claim, or else of each log's own score line."""
    values = {seed: log.val_bpb for seed, log in logs.items()}
    mean = fmean(values.values()) if values else 0.0
    if claim is None:
        record.problems.append("no score in submission.json" + (f"; {mean:.4f} is from its logs" if values else ""))
        return values
    lines = set.intersection(*(set(log.scores) for log in logs.values())) if logs else set()
    for line in ["result"] if "result" in lines else sorted(lines):
        by_line = {seed: log.scores[line][1] for seed, log in logs.items()}
        if abs(fmean(by_line.values()) - claim) <= TOLERANCE:  # a log prints many scores; one kind must be the claim
            return by_line
    if values:
        best = ", its best seed" if len(values) > 1 and abs(min(values.values()) - claim) <= TOLERANCE else ""
        record.problems.append(f"P17 submission.json says {claim:.4f}{best}; {len(values)} log(s) have mean {mean:.4f}")
    return values


def _fill_validation_text(record: Record, data: dict, logs: dict[str, Log]) -> None:
    """Fills what the score was measured on; records compare only where this is the same."""
    names = {log.dataset for log in logs.values() if log.dataset}
    sizes = {size for size in (count(data.get("val_bytes")), *(log.val_bytes for log in logs.values())) if size}
    record.dataset, record.val_bytes = text(data.get("dataset")) or min(names, default=""), min(sizes, default=None)
    if len(names) > 1 or len(sizes) > 1:
        record.problems.append("P07 its logs and submission.json were not scored on one validation text")
