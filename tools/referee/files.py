"""The rules that a record's own files decide.

Records come from strangers: a value that is missing or of another type is a failure of the rule that needed it, and
comparisons are written so that NaN fails them.
"""

import hashlib
import json
import math
import re
from datetime import date
from itertools import pairwise
from statistics import fmean, stdev

from tools.logs import Log
from tools.referee.case import RESULT, SEED_RESULT, SUBMISSION, Case, config_of, is_plain, mistyped, sha256
from tools.referee.rules import ROOT, RULES, Found, Skip, check
from tools.referee.sandbox import why_not_code
from tools.untrusted import read_text, text

TRACKS = ("10min_16mb", "non_record_16mb")
PHASES = ("setup", "warmup", "train", "validate", "export", "score")
FOLDER = re.compile(r"\d{4}-\d\d-\d\d_[A-Za-z0-9._+-]+")
OWN_FILE = re.compile(r"README\.md|submission\.json|train_gpt\.py|logs/train_seed\d+\.log|model_seed\d+\.bin")
PASSIVE = (".md", ".txt", ".csv", ".json", ".toml", ".log", ".png", ".jpg", ".svg")
SAME_FOR_ALL = ("code_sha256", "config_sha256", "data_sha256", "tokenizer_sha256", "world_size", "device")
IN_BOTH = ("arch", "dataset", "val_bytes", "val_tokens", "params", "cap_seconds", "bytes_code")
NOT_IN_CONFIG_SHA = ("arch", "seed", "run_id", "out_dir", "data_path", "tokenizer_path")


@check("P14")
def layout(case: Case) -> Found:
    said, name, track = case.submission, case.folder.name, case.folder.parent.name
    problems = [] if FOLDER.fullmatch(name) else [f"folder {text(name)} is not <YYYY-MM-DD>_<name>"]
    try:
        date.fromisoformat(name[:10])
    except ValueError:
        problems.append(f"{text(name[:10])} is not a date")
    for file in ("README.md", "submission.json", "train_gpt.py"):
        problems += [] if is_plain(case.folder / file) else [f"{file} is missing"]
    problems += [] if case.logs else ["logs/train_seed<seed>.log is missing"]
    problems += [f"submission.json: {problem}" for problem in mistyped(said, SUBMISSION)]
    if said.get("date") != name[:10]:
        problems.append(f"submission.json: date is {text(said.get('date'))}, the folder says {text(name[:10])}")
    if said.get("track") not in TRACKS or track != f"track_{said.get('track')}":
        problems.append(f"submission.json: track is {text(said.get('track'))}, the folder lies in {text(track)}")
    for key in ("val_loss_std", "val_bpb_std"):
        if said.get(key, "") is not None:
            problems += [f"submission.json: {problem}" for problem in mistyped(said, {key: float})]
    verdict = said.get("verdict")
    if isinstance(verdict, dict) and verdict.get("status") not in ("pass", "fail", "unverified"):
        problems.append("submission.json: verdict has no status pass, fail or unverified")
    by_seed = said.get("seed_results")
    for seed, result in by_seed.items() if isinstance(by_seed, dict) else ():
        problems += [f"submission.json: seed {text(seed)}: {problem}"
                     for problem in mistyped(result, SEED_RESULT | {"log": str})]
    return Found(f"{len(case.logs)} log(s), {len(case.models)} model(s)", problems)


@check("P12")
def uncounted(case: Case) -> Found:
    problems = []
    for path in sorted(case.folder.rglob("*")):
        name = path.relative_to(case.folder).as_posix()
        if (path.is_dir() and not path.is_symlink()) or (OWN_FILE.fullmatch(name) and is_plain(path)):
            continue
        if not is_plain(path):
            problems.append(f"{text(name)} is a link or not a plain file")
        elif path.suffix.lower() not in PASSIVE or path.stat().st_mode & 0o111:
            problems.append(f"{text(name)} is not one of a record's files and may be code that nobody counted")
    return Found("", problems)


@check("P13")
def wrapper(case: Case) -> Found:
    if not is_plain(case.script):
        return Found("", ["train_gpt.py is missing"])
    reason = why_not_code(case.script, ROOT)
    return Found("train_gpt.py compiles", [f"train_gpt.py {reason}"] if reason else [])


@check("P12")
def size(case: Case) -> Found:
    cap, said, results = RULES["P12"]["limit"]["bytes"], case.submission, case.results
    bytes_code = case.script.stat().st_size
    on_disk = {seed: path.stat().st_size for seed, path in case.models.items()}
    in_logs = {result["seed"]: result["bytes_model"] for result in results.values()}
    total = bytes_code + max([*on_disk.values(), *in_logs.values()])
    problems = [] if total <= cap else [f"{total:,} of {cap:,} bytes"]
    for name, result in results.items():
        if result["bytes_code"] != bytes_code:
            problems.append(f"{name}: {result['bytes_code']:,} bytes of code, train_gpt.py has {bytes_code:,} on disk")
        if result["bytes_total"] != result["bytes_code"] + result["bytes_model"]:
            problems.append(f"{name}: bytes_total is {result['bytes_total']:,}, not the sum of code and model")
    for seed, found in on_disk.items():
        if in_logs.get(seed) != found:
            problems.append(f"model_seed{seed}.bin has {found:,} bytes on disk, {in_logs.get(seed, 0):,} in its log")
    stated = {"bytes_code": bytes_code, "bytes_model_max": max(in_logs.values()), "bytes_total": total}
    problems += [f"submission.json: {key} is {text(said.get(key))}, found {value:,}"
                 for key, value in stated.items() if said.get(key) != value]
    return Found(f"{total:,} of {cap:,} bytes", problems)


def problems_of_clock(log: Log, cap: float, slack: float) -> list[str]:
    """Returns where one log's result, phases and step lines disagree about the time, or exceed the cap."""
    result, problems = log.result or {}, []
    if tuple(log.phases) != PHASES:
        return [f"its phases are {text(list(log.phases)) or 'missing'}; they must be {', '.join(PHASES)}"]
    seconds, (begin, end) = result["train_seconds"], log.phases["train"]
    if not (seconds <= cap and end - begin <= cap + slack):
        problems.append(f"trained {max(seconds, end - begin):.3f} s of {cap:.3f} s")
    if not abs(end - begin - seconds) <= slack:
        problems.append(f"its train phase takes {end - begin:.3f} s, its result says {seconds:.3f} s")
    if not all(a <= b for a, b in pairwise(moment for phase in log.phases.values() for moment in phase)):
        problems.append("its phases overlap")
    steps = [(point.step, point.seconds) for point in log.points]
    if not all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(steps)):
        problems.append("its step lines run backwards")
    if not steps or steps[-1][0] != result["steps"] or not abs(steps[-1][1] - seconds) <= 0.002:
        problems.append(f"its last step line is not step {result['steps']} at {seconds:.3f} s")
    return problems


@check("P10")
def train_clock(case: Case) -> Found:
    limit, said, problems = RULES["P10"]["limit"], case.submission, []
    cap = said["cap_seconds"] or math.inf  # 0 is no cap, on the track that has none
    if said["track"] == "10min_16mb":
        cap = min(cap, limit["cap_seconds_10min_16mb"])
    for log in case.logs:
        caps = said["cap_seconds"], log.result["cap_seconds"], config_of(log.path).get("max_wallclock_seconds")
        if len(set(caps)) > 1:
            problems.append(f"{text(log.path.name)}: submission.json, its result and its config state caps {caps}")
        problems += [f"{text(log.path.name)}: {found}" for found in problems_of_clock(log, cap, limit["clock_seconds"])]
    slowest = max(result["train_seconds"] for result in case.results.values())
    return Found(f"{slowest:.3f} of {cap:g} s, the longest of {len(case.logs)} run(s)", problems)


@check("P07")
def arithmetic(case: Case) -> Found:
    tolerance, problems = RULES["P07"]["limit"]["relative"], []
    for log in case.logs:
        result, name = log.result or {}, text(log.path.name)
        by_bytes = result["val_bpb"] * math.log(2) * result["val_bytes"]
        by_tokens = result["val_loss"] * result["val_tokens"]
        for way, found in (("val_bpb x ln 2 x val_bytes", by_bytes), ("val_loss x val_tokens", by_tokens)):
            if not abs(found - result["nats_sum"]) <= tolerance * result["nats_sum"]:
                problems.append(f"{name}: {way} is {found:.9g}, nats_sum is {result['nats_sum']:.9g}")
        for line, (_, val_bpb) in log.scores.items():
            if not abs(val_bpb - result["val_bpb"]) <= 1e-6:
                problems.append(f"{name}: {text(line)} says {val_bpb:.8f}, the result {result['val_bpb']:.8f}")
    return Found(f"val_bpb, val_loss and nats_sum agree in {len(case.logs)} log(s)", problems)


def problems_of_log(case: Case, log: Log) -> list[str]:
    """Returns what makes one log no evidence for this record."""
    lines = [line for line in read_text(log.path, []).splitlines() if line.strip()]
    if [line for line in lines if line.startswith(("config:", "result:"))] != [lines[0], lines[-1]]:
        return ["it must begin with its one config line and end with its one result line"]
    if wrong := mistyped(log.result, RESULT):
        return [f"result: {problem}" for problem in wrong]
    result, config, problems = log.result, config_of(log.path), []
    if log.path.name != f"train_seed{result['seed']}.log" or config.get("seed") != result["seed"]:
        problems.append(f"it is a run of seed {result['seed']}")
    kept = {key: value for key, value in config.items() if key not in NOT_IN_CONFIG_SHA}
    if hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest() != result["config_sha256"]:
        problems.append("its config line is not the one that the run hashed")
    if result["code_sha256"] != sha256(case.script):
        problems.append("it is a run of another script than train_gpt.py")
    model = case.models.get(result["seed"])
    if model is not None and result["artifact_sha256"] != sha256(model):
        problems.append(f"{model.name} is not the artifact of that run")
    if result["partial"] or not result["valid"]:
        problems.append(f"the run says it is invalid: {text(result.get('invalid_reasons'))}")
    return problems


@check("P16")
def logs(case: Case) -> Found:
    problems = [f"{text(log.path.name)}: {found}" for log in case.logs for found in problems_of_log(case, log)]
    results = list(case.results.values())
    if problems or not results:
        return Found("", problems or ["there is no log"])
    for key in ("seed", "artifact_sha256", "nats_sum"):
        if len({result[key] for result in results}) < len(results):
            problems.append(f"two logs have one {key}: they are one run")
    problems += [f"the runs differ in {key}" for key in SAME_FOR_ALL if len({r[key] for r in results}) > 1]
    return Found(f"{len(results)} whole log(s) of one configuration", problems)


@check("P17")
def statistics(case: Case) -> Found:
    said, results = case.submission, list(case.results.values())
    if not results:
        return Found("", ["there is no log"])
    problems = [f"submission.json: {key} is {text(said.get(key))}, {text(name)} says {text(result.get(key))}"
                for name, result in case.results.items() for key in IN_BOTH if said.get(key) != result[key]]
    if sorted(said["seeds"]) != sorted(result["seed"] for result in results):
        problems.append(f"submission.json: seeds are {text(said['seeds'])}; there are {len(results)} logs")
    expected = {str(r["seed"]): {key: r[key] for key in SEED_RESULT} | {"log": f"logs/train_seed{r['seed']}.log"}
                for r in results}
    if said["seed_results"] != expected:
        problems.append("submission.json: seed_results are not what the logs say")
    for key in ("val_loss", "val_bpb"):
        values, tolerance = [result[key] for result in results], RULES["P17"]["limit"]["statistics"]
        if not abs(said[key] - fmean(values)) <= tolerance:
            problems.append(f"submission.json: {key} is {said[key]}, the mean of all logs is {fmean(values)}")
        spread, stated = stdev(values) if len(values) > 1 else None, said[f"{key}_std"]
        if stated != spread and not abs(stated - spread) <= tolerance:
            problems.append(f"submission.json: {key}_std is {stated}, over all logs it is {spread}")
    return Found(f"{len(results)} seed(s), mean {said['val_bpb']:.6f} bits per byte", problems)


@check("P07")
def text_scored(case: Case) -> Found:
    if case.data is None:
        raise Skip("no --data folder to compare with")
    expected = {"data_sha256": case.data.manifest_sha256, "tokenizer_sha256": case.data.tokenizer_sha256,
                "val_tokens": len(case.data.tokens) - 1, "val_bytes": case.data.val_bytes}
    problems = [] if case.results else ["there is no log"]
    for name, result in case.results.items():
        problems += [f"{text(name)}: {key} is {text(result.get(key))}, {case.data.name} has {value}"
                     for key, value in expected.items() if result.get(key) != value]
    return Found(f"all {case.data.val_bytes:,} bytes of {case.data.name}", problems)
