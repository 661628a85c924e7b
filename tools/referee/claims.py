"""P17 and P25: what a record concludes from its logs, which runs it shows, and claims that are too good.

A record must show every run of its configuration: tools.record finds them, for a claim that is chosen among many runs
is better than the model.
"""

import hashlib
from pathlib import Path
from statistics import fmean, stdev

from tools.logs import read_log
from tools.records import Record, read_record
from tools.referee.case import RESULT, SEED_RESULT, Case, config_of, mistyped, sha256
from tools.referee.rules import RULES, Found, Table, check
from tools.untrusted import number, text

SAME_FOR_ALL = ("code_sha256", "config_sha256", "data_sha256", "tokenizer_sha256", "world_size", "device",
                "cap_seconds")
NOT_IN_CONFIG_SHA = ("arch", "seed", "run_id", "out_dir", "data_path", "tokenizer_path")
IN_BOTH = ("arch", "dataset", "val_bytes", "val_tokens", "params", "cap_seconds", "bytes_code")
NAMED_RUN = {"run_id": str, "seed": int, "status": str}
STATUSES = ("scored", "repeated", "interrupted", "unfinished", "invalid")
MOST_RUNS = 1000
SMALL_SEED = 1_000_000  # nobody searches below
NUM_DERIVED = 16


def seeds_of(code_sha256: str, num_seeds: int = NUM_DERIVED) -> list[int]:
    """Seeds that a script cannot choose: 31-bit numbers that follow from the hash of its code."""
    digests = [hashlib.sha256(f"{code_sha256} {i}".encode()).digest() for i in range(num_seeds)]
    return [int.from_bytes(digest[:4]) >> 1 for digest in digests]


def configuration(config: dict) -> dict:
    """The settings of a run but for its seed and its places."""
    return {key: value for key, value in config.items() if key == "arch" or key not in NOT_IN_CONFIG_SHA}


def status_of_run(result: dict | None, named: dict[int, dict]) -> str:
    """What became of a run that is not one of the named, which are given by seed; "" for another experiment's."""
    if result is None:
        return "unfinished"
    if any(result.get(key) != next(iter(named.values()))[key] for key in SAME_FOR_ALL):
        return ""
    if mistyped(result, RESULT) or result["partial"] or not result["valid"]:
        return "invalid"
    return "interrupted" if result["interrupted"] else "repeated" if result["seed"] in named else "scored"


def all_runs(named: list[tuple[Path, dict]]) -> list[dict]:
    """Every run beside these, (folder, result) each, that has their configuration, code and data.

    ValueError if one of another seed is whole and not among them. An unfinished log does not tell its code, so there
    the settings and the name of the data decide. A seed that was run again is listed, for a record has one run of each.
    """
    (first, result), by_seed = named[0], {found["seed"]: found for _, found in named}
    wanted = configuration(config_of(first / "train.log"))
    rows = [{"run_id": text(found.get("run_id")), "seed": found["seed"], "val_bpb": found["val_bpb"],
             "status": "scored"} for _, found in named]
    taken = {folder.resolve() for folder, _ in named}
    beside = {path.parent.resolve(): path.parent for folder, _ in named for path in folder.parent.glob("*/train.log")}
    for place, folder in sorted(beside.items()):
        config = {} if place in taken else config_of(folder / "train.log")
        same_data = Path(text(config.get("data_path"))).name == result["dataset"]
        if not (config and same_data and configuration(config) == wanted):
            continue
        found = read_log(folder / "train.log").result
        status = status_of_run(found, by_seed)
        if status == "scored":
            raise ValueError(f"{folder} is another finished run of this configuration; name it too: every run of a "
                             "configuration is disclosed")
        seed = (found or {}).get("seed", config.get("seed"))
        rows += [{"run_id": text(config.get("run_id")) or text(folder.name), "seed": seed if type(seed) is int else -1,
                  "val_bpb": number((found or {}).get("val_bpb")), "status": status}] if status else []
    return rows


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
        if stated != spread and not (type(stated) is type(spread) is float and abs(stated - spread) <= tolerance):
            problems.append(f"submission.json: {key}_std is {stated}, over all logs it is {spread}")
    return Found(f"{len(results)} seed(s), mean {said['val_bpb']:.6f} bits per byte", problems)


@check("P17")
def disclosure(case: Case) -> Found:
    """The runs that the record lists are those of its logs, and others that it does not count."""
    rows = case.submission.get("all_runs")
    if rows is None:  # older records do not have it
        return Found("runs that it does not count: not stated")
    if not isinstance(rows, list) or len(rows) > MOST_RUNS:
        return Found("", [f"submission.json: all_runs must be a list of at most {MOST_RUNS} runs"])
    problems = [f"submission.json: all_runs: {problem}" for row in rows for problem in mistyped(row, NAMED_RUN)][:10]
    if problems:
        return Found("", problems)
    logs = {(text(r.get("run_id")), r["seed"], r["val_bpb"]): text(name) for name, r in case.results.items()}
    scored = [(row["run_id"], row["seed"], row.get("val_bpb")) for row in rows if row["status"] == "scored"]
    problems += [f"run {text(run_id)} of seed {seed} is called scored with {text(val_bpb)}; no log says so"
                 for run_id, seed, val_bpb in scored if (run_id, seed, val_bpb) not in logs]
    problems += [f"{name} is not in all_runs" for key, name in logs.items() if key not in scored]
    problems += [f"run {text(row['run_id'])} has status {text(row['status'])}; there are {', '.join(STATUSES)}"
                 for row in rows if row["status"] not in STATUSES]
    if len(set(scored)) < len(scored):
        problems.append("all_runs names a run twice")
    table = Table("runs of the configuration", ["run", "seed", "val_bpb", "status"],
                  [[text(row["run_id"]), row["seed"], number(row.get("val_bpb")), text(row["status"])]
                   for row in rows[:200]])
    return Found(f"{len(rows)} run(s) disclosed, {len(scored)} scored", problems[:20], [table])


def ranked_beside(case: Case) -> list[Record]:
    """The records beside this one, of its track, that were ranked on its validation text when it was filed."""
    said, found = case.submission, []
    for folder in sorted(case.folder.parent.iterdir()):
        if folder.is_dir() and folder.resolve() != case.folder.resolve():
            record = read_record(folder)
            same_text = (record.dataset, record.val_bytes) == (said["dataset"], said["val_bytes"])
            counts = same_text and record.val_bpb is not None and not record.doubts
            found += [record] if counts and record.date <= said["date"] else []
    return found


@check("P25")
def plausible(case: Case) -> Found:
    """A judge must look at what is better than its like. The first record on a text has no like, and a worse one is
    not too good. The lowest credible val_bpb is that of English web text; a text that repeats itself can be below."""
    limit, said, problems = RULES["P25"]["limit"], case.submission, []
    val_bpb, name = said["val_bpb"], text(said["dataset"])
    if not val_bpb >= limit["val_bpb"]:
        problems.append(f"{val_bpb:.4f} bits per byte is below {limit['val_bpb']}, where all scores of English text "
                        f"were wrong so far; if {name} is another kind of text, the README should say so")
    others = ranked_beside(case)
    best = min(others, key=lambda record: record.val_bpb, default=None)
    if best and best.val_bpb - val_bpb > limit["gain_bpb"]:
        problems.append(f"{best.val_bpb - val_bpb:.4f} bits per byte better than {text(best.path.name)}, the best so "
                        f"far on {name}; more than {limit['gain_bpb']} at once is to be explained")
    code, rows = sha256(case.script), []
    for log, result in case.results.items():
        before, after = number(result.get("pre_quant_val_bpb")), number(result.get("pre_ttt_val_bpb"))
        after = result["val_bpb"] if after is None else after  # what was learned while scoring is another gain
        gain = None if before is None else before - after
        rows.append([text(log), result["seed"], before, after])
        if gain is not None and gain > limit["quantised_gain_bpb"]:
            problems.append(f"{text(log)}: {gain:.4f} bits per byte better after quantisation than before")
        if abs(result["seed"]) > SMALL_SEED and result["seed"] not in seeds_of(code):
            problems.append(f"{text(log)}: seed {result['seed']} looks searched for; take a small one, or one that "
                            f"follows from the code, such as {seeds_of(code)[0]}")
    scores = {result["seed"]: result["val_bpb"] for result in case.results.values()}
    if len(scores) > 1 and not stdev(scores.values()) >= limit["std_bpb"]:
        problems.append(f"{len(scores)} seeds differ by a deviation of {stdev(scores.values()):.2g} bits per byte, "
                        f"less than {limit['std_bpb']}")
    runs = said.get("all_runs") if isinstance(said.get("all_runs"), list) else []
    for run in (run for run in runs if isinstance(run, dict) and run.get("status") == "repeated"):
        again = number(run.get("val_bpb"))
        if again is None or again - scores.get(run.get("seed"), again) > limit["std_bpb"]:
            problems.append(f"seed {text(run.get('seed'))} was run again and scored {text(run.get('val_bpb'))}, worse "
                            "than the run that counts")
    beside = f"{len(others)} other record(s) on {name}" if others else f"the first record on {name}"
    tables = [Table("before and after quantisation", ["log", "seed", "before", "after"], rows[:200])]
    tables += [Table("records beside it", ["record", "val_bpb"],
                     [[text(record.path.name), record.val_bpb] for record in others[:200]])] if others else []
    return Found(f"{val_bpb:.4f} bits per byte, {beside}", problems[:20], tables)
