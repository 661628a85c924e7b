"""The referee's rules on logs, clocks and claims: an honest record passes, and each way of breaking one is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_record import change_result, filed_record

from tools import pack, verify
from tools.referee.claims import seeds_of
from tools.referee.rules import Finding

FILE_RULES = ("P07", "P10", "P11", "P12", "P13", "P14", "P16", "P17", "P22", "P25")


@pytest.fixture
def record(data: Path, tmp_path: Path, workshop: Path) -> Path:
    """A record that is free to be spoilt."""
    honest = filed_record(data, workshop)
    return Path(shutil.copytree(honest, tmp_path / honest.parent.name / honest.name))


def judged(folder: Path, rule: str) -> Finding:
    return verify.judge(verify.open_case(folder), rule)


def problems(folder: Path, rule: str) -> str:
    return "; ".join(judged(folder, rule).problems)


def first_log(folder: Path) -> Path:
    return folder / "logs/train_seed1337.log"


def edit(path: Path, pattern: str, new: str) -> None:
    """The file with the first match of the pattern replaced."""
    content, count = re.subn(pattern, new, path.read_text(), count=1, flags=re.M)
    assert count, pattern
    path.write_text(content)


def said(folder: Path) -> dict:
    return json.loads((folder / "submission.json").read_text())


def change_json(folder: Path, **changes: object) -> None:
    (folder / "submission.json").write_text(json.dumps(said(folder) | changes))


def end_of(folder: Path, phase: str) -> float:
    return float(re.search(rf"phase:{phase} .*end_seconds:(\S+)", first_log(folder).read_text())[1])


def lengthen(phase: str, seconds: float) -> Callable[[Path], None]:
    """A change of the first log: the phase ends later, and so all that follows begins later."""

    def spoil(folder: Path) -> None:
        end = end_of(folder, phase)
        move = lambda moment: f"{float(moment) + (seconds if float(moment) >= end else 0.0):.3f}"  # noqa: E731
        log = first_log(folder)
        moved = re.sub(r"^(phase:\w+ begin_seconds:)(\S+)( end_seconds:)(\S+)$",
                       lambda m: m[1] + move(m[2]) + m[3] + move(m[4]), log.read_text(), flags=re.M)
        log.write_text(moved)

    return spoil


def compress(folder: Path, copy: str | None = None) -> str:
    """Compresses the script in place, with a readable copy; returns what it was."""
    script = folder / "train_gpt.py"
    source = script.read_text()
    script.write_text(pack.compress(source))
    (folder / "train_gpt_readable.py").write_text(source if copy is None else copy)
    return source


@pytest.mark.parametrize("rule", FILE_RULES)
def test_an_honest_record_passes_the_files_part_of(record, rule):
    found = judged(record, rule)
    assert found.problems == [] and found.status in ("PASS", "SKIP") and found.detail


def test_a_record_may_keep_the_verdict_that_a_judge_must_look(record):
    change_json(record, verdict={"status": "hold", "reasons": [], "verified_with": ""})
    assert judged(record, "P14").status == "PASS"


BROKEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a long export": (lengthen("export", 300.0), "P10", "belongs before the bell"),
    "a long pause before the export": (lengthen("validate", 300.0), "P10", "between the bell and the export"),
    "seconds in no phase": (
        lambda f: edit(first_log(f), r"phase:train begin_seconds:\S+ end_seconds:\S+", "phase:train begin_seconds:0.5 "
                       "end_seconds:0.6"), "P10", "phases overlap"),
    "a slow score": (
        lambda f: (lengthen("score", 700.0)(f), change_result(first_log(f), score_seconds=700.0),
                   change_json(f, track="10min_16mb")), "P11", "scored in 700.0 s of 600 s"),
    "score seconds that no phase has": (
        lambda f: change_result(first_log(f), score_seconds=9.0), "P11", "its score phase takes"),
    "a loss that is no number": (
        lambda f: edit(first_log(f), r"^(step:3/\d+ train_loss:)\S+", r"\1nan"), "P16", "step 3 has loss nan"),
    "another number of iterations": (
        lambda f: edit(first_log(f), r"^step:3/12", "step:3/500"), "P16", "step 3 is one of 500"),
    "another world size": (
        lambda f: edit(first_log(f), r"world_size:1 ", "world_size:8 "), "P16", "it was begun with"),
    "a stop that the result does not know": (
        lambda f: edit(first_log(f), r"^phase:train", "stopping_early: wallclock_cap train_time:5ms step:12/12\n"
                       "phase:train"), "P16", "1 line(s) stopping_early"),
    "a run that ended early without a word": (
        lambda f: change_result(first_log(f), steps=7), "P16", "0 line(s) stopping_early"),
    "a setting that lifts the cap": (
        lambda f: edit(first_log(f), r'"seed": ', '"force_stop_step": 4945, "seed": '), "P16", "the cap is no setting"),
    "a variable that lifts the cap": (
        lambda f: edit(f / "train_gpt.py", r"^import math$", 'import math\nSTOP = "FORCE_STOP_STEP"'), "P16",
        "train_gpt.py says FORCE_STOP_STEP"),
    "another cap in one seed": (lambda f: change_result(first_log(f), cap_seconds=1.0), "P16", "differ in cap_seconds"),
    "a copy of a script that is readable": (
        lambda f: (f / "train_gpt_readable.py").write_text("pass"), "P12", "train_gpt_readable.py is not one of"),
    "no copy of a compressed script": (
        lambda f: (compress(f), (f / "train_gpt_readable.py").unlink()), "P13", "train_gpt_readable.py is missing"),
    "another copy of a compressed script": (
        lambda f: compress(f, "pass\n"), "P13", "is not the text inside train_gpt.py"),
    "a scored run without a log": (
        lambda f: change_json(f, all_runs=[*said(f)["all_runs"], {"run_id": "x", "seed": 3, "val_bpb": 1.0,
                                                                  "status": "scored"}]), "P17", "no log says so"),
    "a log that is not disclosed": (
        lambda f: change_json(f, all_runs=said(f)["all_runs"][1:]), "P17", "train_seed1337.log is not in all_runs"),
    "a status that there is not": (
        lambda f: change_json(f, all_runs=[*said(f)["all_runs"], {"run_id": "x", "seed": 3, "status": "lost"}]),
        "P17", "has status lost"),
    "a list of runs that is none": (lambda f: change_json(f, all_runs="none"), "P17", "must be a list"),
    "a run that is no object": (lambda f: change_json(f, all_runs=[7]), "P17", "not an object"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_verify_fails_a_record_with(record, what):
    spoil, rule, words = BROKEN[what]
    spoil(record)
    found = judged(record, rule)
    assert found.status == "FAIL" and words in "; ".join(found.problems)


def test_seconds_between_two_phases_are_a_problem(record):
    for phase in ("validate", "export", "score"):
        begin, end = re.search(rf"phase:{phase} begin_seconds:(\S+) end_seconds:(\S+)",
                               first_log(record).read_text()).groups()
        edit(first_log(record), rf"phase:{phase} begin_seconds:\S+ end_seconds:\S+",
             f"phase:{phase} begin_seconds:{float(begin) + 50:.3f} end_seconds:{float(end) + 50:.3f}")
    assert "50.000 s between train and validate are in no phase" in problems(record, "P10")


def test_a_run_that_was_stopped_by_its_cap_passes(record):
    log, config = first_log(record), re.compile(r'"iterations": 12,')
    steps = json.loads(log.read_text().splitlines()[-1].removeprefix("result:"))
    log.write_text(config.sub('"iterations": 99,', re.sub(r"^(step:\d+)/12", r"\1/99", log.read_text(), flags=re.M)))
    stop = f"stopping_early: wallclock_cap train_time:{1000 * steps['train_seconds']:.0f}ms step:12/99"
    edit(log, r"^phase:train", f"{stop}\nphase:train")
    assert "stop" not in problems(record, "P16") and "step " not in problems(record, "P16")
    edit(log, "step:12/99\nphase", "step:11/99\nphase")
    assert "it stopped at step 11" in problems(record, "P16")


def test_a_record_without_a_list_of_runs_says_so(record):
    listed = said(record)
    del listed["all_runs"]
    (record / "submission.json").write_text(json.dumps(listed))
    found = judged(record, "P17")
    assert found.status == "PASS" and "not stated" in found.detail


def test_a_repeated_run_that_was_worse_is_held(record):
    again = said(record)["all_runs"][0] | {"run_id": "again", "status": "repeated"}
    change_json(record, all_runs=[*said(record)["all_runs"], again])
    assert problems(record, "P25") == ""
    change_json(record, all_runs=[*said(record)["all_runs"], again | {"val_bpb": again["val_bpb"] + 0.01}])
    assert "worse than the run that counts" in problems(record, "P25")


HELD = {
    "a score too low for text": (lambda f: change_json(f, val_bpb=0.9), "below 0.95"),
    "a model that is better quantised": (
        lambda f: change_result(first_log(f), pre_quant_val_bpb=99.0), "better after quantisation"),
    "seeds that do not differ": (
        lambda f: [change_result(log, val_bpb=2.0) for log in f.glob("logs/*.log")], "differ by a deviation of 0"),
    "a seed that was searched for": (
        lambda f: change_result(first_log(f), seed=2884431328), "seed 2884431328 looks searched for"),
}


@pytest.mark.parametrize("what", HELD)
def test_a_judge_has_to_look_at_a_claim_with(record, what):
    spoil, words = HELD[what]
    spoil(record)
    found = judged(record, "P25")
    assert found.status == "HOLD" and words in "; ".join(found.problems)


def test_a_seed_that_follows_from_the_code_is_never_held(record):
    code = json.loads(first_log(record).read_text().splitlines()[-1].removeprefix("result:"))["code_sha256"]
    seeds = seeds_of(code, 3)
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**31 for seed in seeds) and max(seeds) > 1_000_000
    change_result(first_log(record), seed=max(seeds))
    assert problems(record, "P25") == ""


def beside(record: Path, name: str, better: float, **changes: object) -> Path:
    """A record in the same track whose every score is lower by `better`."""
    other = Path(shutil.copytree(record, record.with_name(f"2026-01-01_{name}")))
    for log in other.glob("logs/*.log"):
        result = json.loads(log.read_text().splitlines()[-1].removeprefix("result:"))
        change_result(log, val_bpb=result["val_bpb"] - better)
        edit(log, r"(_exact val_loss:\S+ val_bpb:)\S+", rf"\g<1>{result['val_bpb'] - better:.8f}")
    seeds = {seed: row | {"val_bpb": row["val_bpb"] - better} for seed, row in said(other)["seed_results"].items()}
    change_json(other, val_bpb=said(other)["val_bpb"] - better, seed_results=seeds, **changes)
    return other


def test_only_a_leap_over_the_best_record_on_the_same_text_is_held(record):
    worse, better = beside(record, "worse", -0.3), beside(record, "better", 0.01)
    assert "1 other" not in judged(record, "P25").detail and problems(record, "P25") == ""  # 0.01 behind the best
    assert problems(worse, "P25") == ""
    shutil.rmtree(better)
    assert "0.3000 bits per byte better than 2026-01-01_worse" in problems(record, "P25")


NO_RIVALS = {
    "it failed verification": {"verdict": {"status": "fail", "reasons": ["P01"], "verified_with": ""}},
    "it is on another text": {"dataset": "elsewhere"},
}


@pytest.mark.parametrize("why", NO_RIVALS)
def test_a_record_is_no_measure_of_a_leap_if(record, why):
    beside(record, "worse", -0.3, **NO_RIVALS[why])
    found = judged(record, "P25")
    assert found.problems == [] and "the first record on" in found.detail
