"""The rules that need training: an honest script passes on the referee's clock, and each way around it is caught."""

import json
import math
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, result_of, run_script, timed

from data.shards import read_manifest
from tools import pack
from tools.referee import sandbox, short_run, train_data, training
from tools.referee.case import Case, read_data
from tools.referee.rules import RULES, Finding, Found, Skip, judge
from tools.referee.sandbox import Broken
from tools.referee.short_run import Step, settings_of
from train_gpt import Dataset

BAKED = {name: str(value) for name, value in TINY.items() if name not in ("DEVICE", "COMPILE")}
ENDED_BY_STEPS = BAKED | {"ITERATIONS": "12"}
ENDED_BY_CLOCK = BAKED | {"ITERATIONS": "1000000", "MAX_WALLCLOCK_SECONDS": "2"}
EXPORT = '    log.phase("export")\n'


def file_run(folder: Path, data: Path, baked: dict[str, str]) -> Path:
    """A record folder with one run, as far as rules that train look at it."""
    (folder / "logs").mkdir(parents=True)
    (folder / "train_gpt.py").write_text(pack.flatten("gpt", baked))
    settings = dict(DATA_PATH=data, OUT_DIR=folder, RUN_ID="run", DEVICE="cpu", COMPILE=0)
    result_of(run_script(settings, script=folder / "train_gpt.py"))
    shutil.move(folder / "run/train.log", folder / "logs/train_seed1337.log")
    shutil.rmtree(folder / "run")
    return folder


@pytest.fixture(scope="session")
def by_steps(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return file_run(tmp_path_factory.mktemp("by_steps") / "record", data, ENDED_BY_STEPS)


@pytest.fixture(scope="session")
def by_clock(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return file_run(tmp_path_factory.mktemp("by_clock") / "record", data, ENDED_BY_CLOCK)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without bubblewrap."""
    monkeypatch.setattr(sandbox, "bubblewrap_works", lambda: False)


def swap(source: str, old: str, new: str) -> str:
    assert source.count(old) == 1, f"{source.count(old)} times in the script: {old}"
    return source.replace(old, new)


def doctored(record: Path, folder: Path, change: object) -> Path:
    """The record with another script, but with the log of the honest one."""
    copy = Path(shutil.copytree(record, folder / "record"))
    script = copy / "train_gpt.py"
    script.write_text(change(script.read_text()))
    return copy


def findings(case: Case) -> dict[str, Found | str]:
    """What each part that trains found, or why it was skipped."""
    found = {}
    for rule, part in (("P10", training.supervised_clock), ("P15", training.smoke_run), ("P18", training.replay)):
        try:
            found[rule] = part(case)
        except Skip as skip:
            found[rule] = str(skip)
    return found


def problems(folder: Path, data: Path, rule: str) -> str:
    found = findings(Case(folder, read_data(data)))[rule]
    assert isinstance(found, Found), found
    return "; ".join(found.problems)


@timed
def test_an_honest_record_that_heard_the_bell_passes(by_clock, data):
    case = Case(by_clock, read_data(data))
    found = findings(case)
    assert all(isinstance(one, Found) and not one.problems for one in found.values()), found
    run = short_run.short_run(case)
    rows = found["P18"].evidence[0].rows
    assert run.stopped_by_clock and len(rows) > 5 and max(abs(row[4]) for row in rows) < 0.001


def test_an_honest_record_that_ran_out_of_steps_passes(by_steps, data, plain):
    case = Case(by_steps, read_data(data))
    found = findings(case)
    assert all(isinstance(one, Found) and not one.problems for one in found.values()), found
    assert [row[0] for row in found["P18"].evidence[0].rows] == list(range(1, 13))
    assert max(abs(row[4]) for row in found["P18"].evidence[0].rows) < 0.001
    assert judge(case, "P18").status == "PASS"


def test_the_short_check_trains_on_a_made_up_text(by_steps):
    found = findings(Case(by_steps, pre=True))
    assert not found["P10"].problems and not found["P15"].problems
    assert "no --data" in found["P18"]


def test_without_data_nothing_is_trained(by_steps):
    assert all("no --data" in why for why in findings(Case(by_steps)).values())


def slow_clock(source: str) -> str:
    begin, end = source.index("def train(\n"), source.index("def log_score(")
    slow = source[begin:end].replace("time.perf_counter()", "(time.perf_counter() / 2)")
    return source[:begin] + slow.replace('log.phase("validate", start + outcome.seconds)', 'log.phase("validate")') \
        + source[end:]


def calibrates(read: str) -> object:
    """Looks at training data for three seconds after the last step."""
    lines = f"    for turn in range(300):\n        time.sleep(0.01)\n        {read}\n"
    return lambda source: swap(source, EXPORT, lines + EXPORT)


CLOCK = {
    "has a clock at half speed": (slow_clock, "s had passed"),
    "starts its clock late": (
        lambda s: swap(s, "    start = last = time.perf_counter()\n",
                       "    time.sleep(0.6)\n    start = last = time.perf_counter()\n"), "s had passed"),
    "trains past the cap": (
        lambda s: swap(s, "return self.max_wallclock_seconds or math.inf", "return 2 * self.max_wallclock_seconds"),
        "step lines come after the bell"),
    "calibrates on shards that it opens again": (
        calibrates("int(read_shard(dataset.train_files[0])[turn])"), "still read training data"),
    "calibrates on shards that it has open": (
        calibrates("int(loader.tokens[0][turn * len(loader.tokens[0]) // 300])"), "still read training data"),
    "stores late": (lambda s: swap(s, EXPORT, EXPORT + "    time.sleep(1.0)\n"), "is stored"),
}


@timed
@pytest.mark.parametrize("what", CLOCK)
def test_the_clock_catches_a_script_that(by_clock, data, tmp_path, monkeypatch, what):
    change, words = CLOCK[what]
    monkeypatch.setitem(RULES["P10"]["limit"], "export_seconds", 0.9 if what == "stores late" else 60.0)
    assert words in problems(doctored(by_clock, tmp_path, change), data, "P10")


DOWNLOAD = """    import contextlib, subprocess, urllib.request
    with contextlib.suppress(OSError):
        urllib.request.urlopen("http://127.0.0.1:9/weights", timeout=1)
    with contextlib.suppress(OSError):
        subprocess.run(["wget", "http://127.0.0.1:9/weights"])
"""
START = "    Model, _ = load_architecture(arch)\n    dataset, model_config = prepare_run(run, model_config)\n"
SMOKE = {
    "downloads": (lambda s: swap(s, START, DOWNLOAD + START), "tried to reach the network"),
    "lacks a module": (lambda s: swap(s, "import zlib\n", "import zlib\nimport prepare_golf\n"),
                       "in setup it ended with status 1: ModuleNotFoundError: No module named 'prepare_golf'"),
    "crashes as it stores": (lambda s: swap(s, EXPORT, EXPORT + "    raise RuntimeError('no room')\n"),
                             "in export it ended with status 1: RuntimeError: no room"),
    "says no result": (lambda s: swap(s, '    log("result:" + json.dumps(result))\n', ""), "no result:{json}"),
    "does not score": (lambda s: swap(s, "    blob = Path(artifact).read_bytes()\n", "    raise ValueError('no')\n"),
                       "a fresh process does not score with the model.bin that it stored: it ended with status 2"),
    "links its model to another file": (
        lambda s: swap(s, EXPORT, EXPORT + "    os.symlink('/etc/hostname', folder / 'model.bin')\n").replace(
            'store(folder / "model.bin"', 'store(folder / "weights.bin"'),
        "it stored no model.bin" if sandbox.bubblewrap_works() else "write /etc/hostname"),
}


@pytest.mark.parametrize("what", SMOKE)
def test_the_smoke_run_reports_a_script_that(by_steps, data, tmp_path, what):
    change, words = SMOKE[what]
    found = problems(doctored(by_steps, tmp_path, change), data, "P15")
    assert words in found and ("to start 'wget'" in found) == (what == "downloads")


def test_the_replay_catches_a_log_of_another_learning_rate(by_steps, data, tmp_path):
    faster = doctored(by_steps, tmp_path, lambda s: swap(s, "self.lr = run.matrix_lr", "self.lr = 2 * run.matrix_lr"))
    assert "in the log and" in problems(faster, data, "P18")


def test_a_run_on_other_data_is_not_compared(by_steps, data, tmp_path):
    other = Path(shutil.copytree(data, tmp_path / "other"))
    (other / "manifest.json").write_text((other / "manifest.json").read_text() + "\n")
    case = Case(by_steps, read_data(other))
    assert "was not trained on other" in short_run.prepare(case, 1.0).no_replay


def change_log(record: Path, folder: Path, **changes: object) -> Path:
    copy = Path(shutil.copytree(record, folder / "record"))
    log = copy / "logs/train_seed1337.log"
    *lines, last = log.read_text().splitlines()
    result = json.loads(last.removeprefix("result:")) | changes
    log.write_text("\n".join([*lines, "result:" + json.dumps(result)]) + "\n")
    return copy


def test_where_the_device_is_not_here_a_small_batch_is_trained_on_the_cpu(by_steps, data, tmp_path):
    run = short_run.prepare(Case(change_log(by_steps, tmp_path, device="tpu"), read_data(data)), 20.0)
    assert run.device == "cpu" and run.env["TRAIN_BATCH_TOKENS"] == "1024" and "tpu" in run.no_replay


@pytest.mark.parametrize("changes", [dict(steps="many"), dict(train_seconds=None), dict(device=[1]), dict(steps=None)])
def test_a_log_with_mistyped_values_fails_the_rule(by_steps, data, tmp_path, changes):
    found: Finding = judge(Case(change_log(by_steps, tmp_path, **changes), read_data(data)), "P15")
    assert found.status == "FAIL" and "malformed" in found.problems[0]


def test_settings_of_a_log_do_not_reach_the_system():
    hostile = {"ld_preload": "x.so", "pythonwarnings": "ignore::train_gpt.X", "path": "/tmp", "a=b": "c", "seed": 3}
    assert settings_of(hostile | {"matrix_lr": 0.02, "bf16": None, "tie_embeddings": True}) == {
        "MATRIX_LR": "0.02", "BF16": "none", "TIE_EMBEDDINGS": "1"}


def test_data_that_is_too_large_or_not_there_is_a_reason_to_skip(data, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    monkeypatch.setattr(train_data, "DATA_BYTES", 1000)
    with pytest.raises(Skip, match="copies at most 1,000"):
        train_data.judges_files(read_data(copy))
    (copy / "fineweb_train_000000.bin").unlink()
    with pytest.raises(Skip, match=r"train_000000\.bin is not there"):
        train_data.judges_files(read_data(copy))


@pytest.mark.parametrize("vocab_size", [64, 260, 1024])
def test_a_made_up_text_is_a_data_folder_of_the_kit(tmp_path, vocab_size):
    case = SimpleNamespace(random=random.Random)
    made = train_data.make_up_data(tmp_path / "data", vocab_size, 32, case)
    assert read_manifest(tmp_path / "data")["splits"]["train"]["tokens"] >= 1 << 16
    dataset = Dataset(str(tmp_path / "data"), None)
    tokens, num_bytes, _ = dataset.validation(None)
    assert dataset.vocab_size <= vocab_size and np.array_equal(tokens, made.tokens)
    assert num_bytes == np.count_nonzero(tokens != 1)


@pytest.fixture
def box(tmp_path: Path) -> SimpleNamespace:
    """A folder as a submission may leave it, beside one that it must not reach."""
    for name in ("box/data", "judge"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "shard.bin").write_bytes(bytes(100))
    return SimpleNamespace(folder=tmp_path / "box", judge=tmp_path / "judge")


def test_shards_are_emptied_wherever_they_were_moved(box):
    shards = train_data.Shards(box, ["shard.bin"])
    os.rename(box.folder / "data/shard.bin", box.folder / "moved")
    shards.empty_at(math.inf)
    shards.empty()
    shards.close()
    assert (box.folder / "moved").stat().st_size == 0 and (box.judge / "shard.bin").stat().st_size == 100


@pytest.mark.parametrize("way", ["link", "hard link", "folder", "pipe"])
def test_nothing_outside_the_box_is_emptied_through_a(box, way):
    shard, folder = box.folder / "data/shard.bin", box.folder / "data"
    shard.unlink()
    if way == "link":
        shard.symlink_to(box.judge / "shard.bin")
    elif way == "hard link":
        shard.hardlink_to(box.judge / "shard.bin")
    elif way == "pipe":
        os.mkfifo(shard)
    else:
        folder.rmdir()
        folder.symlink_to(box.judge)
    with pytest.raises(Broken, match="changed its data folder"):
        train_data.Shards(box, ["shard.bin"])
    assert (box.judge / "shard.bin").stat().st_size == 100


def step(number: int, loss: float, lr_scale: float | None) -> Step:
    return Step(number, loss, 0.1 * number, lr_scale, 0.0)


def test_losses_are_compared_as_far_as_the_rates_before_them_are_equal():
    logged = [step(1, 7.0, 1.0), step(2, 6.0, 1.0), step(3, 5.5, 1.0), step(4, 5.2, 1.0), step(10, 4.0, 1.0)]
    again = [step(number, 5.0, 1.0 if number < 3 else 0.9) for number in range(1, 11)]
    assert [old.step for old, _ in training.common_steps(logged, again)] == [1, 2, 3]


def test_losses_after_steps_that_the_log_leaves_out_need_equal_rates():
    logged = [step(1, 7.0, 1.0), step(2, 6.0, 1.0), step(10, 4.0, 1.0)]
    again = [step(number, 5.0, 1.0 if number < 8 else 0.9) for number in range(1, 11)]
    assert [old.step for old, _ in training.common_steps(logged, again)] == [1, 2]


def test_a_log_that_states_no_rates_is_compared_all_the_same():
    logged, again = ([step(number, 5.0, scale) for number in (1, 2, 3)] for scale in (None, 1.0))
    assert len(training.common_steps(logged, again)) == 3


def run_with(steps: list[tuple[float, float]], bell: float) -> short_run.ShortRun:
    """A run with (seconds as it says, seconds that had passed) for each step."""
    run = short_run.ShortRun(None, "cpu", bell, {}, status=0)
    run.lines = [(100.0, "phase:warmup begin_seconds:1 end_seconds:2")]
    run.lines += [(100.0 + stamp, f"step:{number}/9 train_loss:5.0 train_time:{1000 * said:.0f}ms")
                  for number, (said, stamp) in enumerate(steps, 1)]
    run.lines += [(run.lines[-1][0], "phase:train begin_seconds:2 end_seconds:9")]
    return run


def test_a_line_that_is_late_alone_is_no_slow_clock():
    assert not training.slow_clock(run_with([(1.0, 1.0), (2.0, 2.9), (3.0, 3.01)], 5.0), 0.25)
    assert training.slow_clock(run_with([(1.0, 1.0), (2.0, 2.9), (3.0, 3.9)], 5.0), 0.25)


def test_a_step_that_is_dropped_may_end_after_the_bell():
    run = run_with([(1.0, 1.0), (2.0, 2.0)], 2.5)
    trained = run.lines.pop()
    run.lines += [(103.0, "dropped_step:3 its gradient was ready at 3000ms, too late for the cap"), (103.0, trained[1])]
    assert training.after_the_bell(run, 0.25) == []
    del run.lines[-2]
    assert "0.50 s after the bell" in training.after_the_bell(run, 0.25)[0]
