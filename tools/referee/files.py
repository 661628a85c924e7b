"""The rules on layout, sizes, clocks and logs that a record's own files decide.

Records come from strangers: a value that is missing or of another type is a failure of the rule that needed it, and
comparisons are written so that NaN fails them.
"""

import hashlib
import json
import math
import re
from datetime import date
from itertools import pairwise

from tools.logs import Log
from tools.referee.case import RESULT, SEED_RESULT, SUBMISSION, Case, config_of, is_plain, mistyped, sha256
from tools.referee.claims import NOT_IN_CONFIG_SHA, SAME_FOR_ALL
from tools.referee.rules import RULES, Found, Skip, Table, check
from tools.untrusted import number, read_text, text

TRACKS = ("10min_16mb", "non_record_16mb")
PHASES = ("setup", "warmup", "train", "validate", "export", "score")
FOLDER = re.compile(r"\d{4}-\d\d-\d\d_[A-Za-z0-9._+-]+")
VALIDATIONS = 2  # validation after the bell scores what is scored again later, perhaps uncompiled
SAME_SECONDS = 1.0  # that two clocks around the same work may differ by
VERDICTS = ("pass", "fail", "hold", "unverified")
ANNOUNCED = re.compile(r"model_params:\d+ \| world_size:(\d{1,9}) \| seed:(\d{1,18})$")
STEP = re.compile(r"step:(\d{1,12})/(\d{1,12}) (?:train|val)_loss:(\S*)")
STOP = re.compile(r"stopping_early: (\S+) train_time:\d+ms step:\d+/(\d{1,12})$")
LIFTED_CAP = re.compile(r"\b\w{0,40}?(FORCE_?STOP|(IGNORE|NO|SKIP|DISABLE)_(WALLCLOCK_)?CAP)(?![A-Z])\w*")


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
    if isinstance(verdict, dict) and verdict.get("status") not in VERDICTS:
        problems.append(f"submission.json: verdict has no status {', '.join(VERDICTS)}")
    by_seed = said.get("seed_results")
    for seed, result in by_seed.items() if isinstance(by_seed, dict) else ():
        problems += [f"submission.json: seed {text(seed)}: {problem}"
                     for problem in mistyped(result, SEED_RESULT | {"log": str})]
    return Found(f"{len(case.logs)} log(s), {len(case.models)} model(s)", problems)


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


def problems_of_clock(log: Log, cap: float, slack: float, export_seconds: float) -> list[str]:
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
    for (before, (_, last)), (after, (first, _)) in pairwise(log.phases.items()):
        if not first - last <= slack:
            problems.append(f"{first - last:.3f} s between {before} and {after} are in no phase")
    took = {phase: last - first for phase, (first, last) in log.phases.items()}
    if not took["export"] <= export_seconds:
        problems.append(f"its export takes {took['export']:.1f} s of {export_seconds:g} s; what needs more time "
                        "belongs before the bell")
    if not took["validate"] <= VALIDATIONS * took["score"] + export_seconds:
        problems.append(f"{took['validate']:.1f} s pass between the bell and the export, scoring takes "
                        f"{took['score']:.1f} s")
    steps = [(point.step, point.seconds) for point in log.points]
    if not all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(steps)):
        problems.append("its step lines run backwards")
    if not steps or steps[-1][0] != result["steps"] or not abs(steps[-1][1] - seconds) <= 0.002:
        problems.append(f"its last step line is not step {result['steps']} at {seconds:.3f} s")
    return problems


@check("P10")
def train_clock(case: Case) -> Found:
    limit, said, problems, rows = RULES["P10"]["limit"], case.submission, [], []
    slack, export_seconds = limit["clock_seconds"], limit["export_seconds"]
    cap = said["cap_seconds"] or math.inf  # 0 is no cap, on the track that has none
    if said["track"] == "10min_16mb":
        cap = min(cap, limit["cap_seconds_10min_16mb"])
    for log in case.logs:
        caps = said["cap_seconds"], log.result["cap_seconds"], config_of(log.path).get("max_wallclock_seconds")
        if len(set(caps)) > 1:
            problems.append(f"{text(log.path.name)}: submission.json, its result and its config state caps {caps}")
        problems += [f"{text(log.path.name)}: {found}" for found in problems_of_clock(log, cap, slack, export_seconds)]
        rows += [[text(log.path.name), text(phase), *moments] for phase, moments in log.phases.items()]
    slowest = max(result["train_seconds"] for result in case.results.values())
    return Found(f"{slowest:.3f} of {cap:g} s, the longest of {len(case.logs)} run(s)", problems,
                 [Table("phases of the runs", ["log", "phase", "begin, s", "end, s"], rows[:200])])


@check("P11")
def stated_eval_clock(case: Case) -> Found:
    limit, ten_minutes, problems = RULES["P11"]["limit"], case.submission["track"] == "10min_16mb", []
    cap = limit["seconds_10min_16mb"] if ten_minutes else math.inf
    for log in case.logs:
        seconds, (begin, end) = log.result["score_seconds"], log.phases.get("score", (math.nan, math.nan))
        if not 0 <= seconds <= cap:
            problems.append(f"{text(log.path.name)}: scored in {seconds:.1f} s of {cap:g} s")
        if not abs(end - begin - seconds) <= SAME_SECONDS:
            problems.append(f"{text(log.path.name)}: its score phase takes {end - begin:.3f} s, its result says "
                            f"{seconds:.3f} s")
    slowest = max(result["score_seconds"] for result in case.results.values())
    return Found(f"{slowest:.1f} s, says the slowest of {len(case.logs)} run(s)", problems)


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


def problems_of_lines(lines: list[str], log: Log, config: dict) -> list[str]:
    """Returns where the lines between config and result tell of another run, or of one that was no training."""
    result, problems = log.result, []
    for line in lines:
        if (found := ANNOUNCED.match(line)) and found.groups() != (str(result["world_size"]), str(result["seed"])):
            problems.append(f"it was begun with {text(line[-60:])}, its result says world_size {result['world_size']}, "
                            f"seed {result['seed']}")
        if found := STEP.match(line):
            loss = number(found[3])
            if loss is None or loss < 0:
                problems.append(f"step {found[1]} has loss {text(found[3])[:20]}")
            if found[2] != str(config.get("iterations")):
                problems.append(f"step {found[1]} is one of {found[2]}, its config says {config.get('iterations')}")
    stops = [found for line in lines if (found := STOP.match(line))]
    if bool(stops) != (result["steps"] != config.get("iterations")) or len(stops) > 1:
        problems.append(f"it has {len(stops)} line(s) stopping_early, its result {result['steps']} of "
                        f"{text(config.get('iterations'))} steps")
    elif stops:
        if log.stop_step != result["steps"] or not abs(log.stop_seconds - result["train_seconds"]) <= 0.002:
            problems.append(f"it stopped at step {log.stop_step} after {log.stop_seconds:.3f} s, its result says step "
                            f"{result['steps']} after {result['train_seconds']:.3f} s")
        if (stops[0][1] == "interrupted") != result["interrupted"] or stops[0][2] != str(config.get("iterations")):
            problems.append(f"its result does not fit {text(stops[0][0])[:100]}")
        if stops[0][1] == "wallclock_cap" and not result["cap_seconds"]:
            problems.append("it was stopped by a cap that it did not have")
    return list(dict.fromkeys(problems))[:10]


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
    problems += [f"it has a setting {text(key)}: the cap is no setting" for key in config
                 if LIFTED_CAP.match(key.upper())]
    return problems + problems_of_lines(lines[1:-1], log, config)


@check("P16")
def logs(case: Case) -> Found:
    problems = [f"{text(log.path.name)}: {found}" for log in case.logs for found in problems_of_log(case, log)]
    results = list(case.results.values())
    if not results or any(mistyped(result, RESULT) for result in results):
        return Found("", problems or ["there is no log"])
    for key in ("seed", "artifact_sha256", "nats_sum"):
        if len({result[key] for result in results}) < len(results):
            problems.append(f"two logs have one {key}: they are one run")
    problems += [f"the runs differ in {key}" for key in SAME_FOR_ALL if len({r[key] for r in results}) > 1]
    if found := LIFTED_CAP.search(case.source):
        problems.append(f"train_gpt.py says {text(found[0])[:60]}: the cap is no setting")
    return Found(f"{len(results)} whole log(s) of one configuration", problems)


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
