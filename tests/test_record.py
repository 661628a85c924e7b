"""Filing runs as a record: what is written, and what is refused."""

import functools
import hashlib
import json
import re
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

import pytest
from conftest import TINY, result_of, run_script

from architectures.gpt import Config
from tools import pack, record
from tools.records import read_record
from tools.referee.case import config_of
from tools.referee.rules import RULES
from train_gpt import RunConfig, from_env

BAKED = {name: str(value) for name, value in TINY.items() if name not in ("DEVICE", "COMPILE")} | {"ITERATIONS": "12"}


@functools.cache
def packed_runs(data: Path, folder: Path) -> tuple[Path, list[Path]]:
    """A packed script and the folders of two runs of it, made once for all tests of records and of the referee."""
    script = folder / "packed.py"
    script.write_text(pack.flatten("gpt", BAKED))
    common = dict(DATA_PATH=data, OUT_DIR=folder, DEVICE="cpu", LOGIT_SOFTCAP=25, OMP_NUM_THREADS=1)
    with ThreadPoolExecutor() as pool:
        settings = [common | dict(RUN_ID=seed, SEED=seed) for seed in (1337, 42)]
        list(map(result_of, pool.map(functools.partial(run_script, script=script), settings)))
    return script, [folder / "1337", folder / "42"]


@functools.cache
def filed_record(data: Path, folder: Path) -> Path:
    script, runs = packed_runs(data, folder)
    assert file_runs(script, runs, folder / "records") == 0
    return next((folder / "records/track_non_record_16mb").iterdir())


def file_runs(script: Path, runs: list[Path], out: Path, *more: str, name: str = "tiny") -> int:
    words = ["--name", name, "--author", "Ada", "--github-id", "ada", "--blurb", "Very small.", "--out", str(out)]
    return record.main([*map(str, runs), "--script", str(script), *words, *more])


@pytest.fixture
def copied(data: Path, workshop: Path, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A script and its two runs, free to be spoiled."""
    script, runs = packed_runs(data, workshop)
    return script, [Path(shutil.copytree(run, tmp_path / run.name)) for run in runs]


@pytest.fixture
def filed(data: Path, workshop: Path) -> Path:
    return filed_record(data, workshop)


def change_result(log: Path, **changes: object) -> None:
    *lines, last = log.read_text().splitlines()
    result = json.loads(last.removeprefix("result:")) | changes
    log.write_text("\n".join([*lines, "result:" + json.dumps(result)]) + "\n")


def test_record_states_mean_and_sample_deviation_over_its_logs(filed, copied):
    said = json.loads((filed / "submission.json").read_text())
    logs = [(run / "train.log").read_text().splitlines()[-1] for run in copied[1]]
    scores = [json.loads(line.removeprefix("result:"))["val_bpb"] for line in logs]
    assert said["val_bpb"] == pytest.approx(mean(scores), abs=1e-12)
    assert said["val_bpb_std"] == pytest.approx(stdev(scores), abs=1e-12)
    assert said["bytes_code"] == (filed / "train_gpt.py").stat().st_size
    assert said["verdict"]["status"] == "unverified"


def test_record_holds_unchanged_logs_script_and_first_artifact(filed, copied):
    script, (first, second) = copied
    assert (filed / "train_gpt.py").read_bytes() == script.read_bytes()
    assert (filed / "model_seed1337.bin").read_bytes() == (first / "model.bin").read_bytes()
    assert (filed / "logs/train_seed42.log").read_bytes() == (second / "train.log").read_bytes()
    assert sorted(path.name for path in filed.parent.parent.iterdir()) == ["track_non_record_16mb"]


def test_leaderboard_reads_the_record_without_a_doubt(filed):
    found = read_record(filed)
    assert found.doubts == [] and found.num_seeds == 2 and found.arch == "gpt"


def test_readme_command_sets_what_the_script_does_not(filed, data):
    line = next(line for line in (filed / "README.md").read_text().splitlines() if "SEED=42" in line)
    *settings, python, script = shlex.split(line)
    assert python == "python" and script == f"records/track_non_record_16mb/{filed.name}/train_gpt.py"
    settings = dict(setting.split("=", 1) for setting in settings)
    assert settings["DATA_PATH"] == f"data/datasets/{data.name}" and settings["LOGIT_SOFTCAP"] == "25.0"
    assert not set(BAKED) & set(settings)
    again = {}
    for config in (RunConfig, Config):
        again |= asdict(from_env(config, BAKED | settings))
    trained = config_of(filed / "logs/train_seed42.log")
    free = ("arch", "data_path", "out_dir", "run_id")
    assert again | {key: trained[key] for key in free} == trained


def test_one_seed_is_filed_with_a_warning(copied, tmp_path, capsys):
    shutil.rmtree(copied[1][1])
    assert file_runs(copied[0], copied[1][:1], tmp_path / "records") == 0
    assert "one seed" in capsys.readouterr().out
    said = json.loads(next(tmp_path.glob("records/*/*/submission.json")).read_text())
    assert said["val_bpb_std"] is None


def all_runs_of(out: Path) -> dict[str, dict]:
    said = json.loads(next(out.glob("*/*/submission.json")).read_text())
    return {row["run_id"]: row for row in said["all_runs"]}


def another_run(runs: list[Path], name: str, **changes: object) -> Path:
    """A folder beside the runs with a log like theirs, but for its settings and some values of its result."""
    folder = Path(shutil.copytree(runs[1], runs[1].with_name(name)))
    log = folder / "train.log"
    config = config_of(log) | {"run_id": name} | {key: changes[key] for key in ("seed",) if key in changes}
    lines = log.read_text().splitlines()
    log.write_text("\n".join(["config:" + json.dumps(config), *lines[1:]]) + "\n")
    change_result(log, run_id=name, **changes)
    return folder


def test_record_refuses_to_leave_out_a_finished_run(copied, tmp_path, capsys):
    script, runs = copied
    another_run(runs, "e", seed=3)
    assert file_runs(script, runs, tmp_path / "records") == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'e'} is another finished run of this configuration; name it too" in error
    assert error.count("\n") == 1 and not list(tmp_path.glob("records/**/*.json"))


def test_record_lists_runs_that_do_not_count(copied, tmp_path):
    script, runs = copied
    cut_result([runs[0], another_run(runs, "unfinished", seed=3)])
    another_run(runs, "stopped", seed=4, interrupted=True)
    another_run(runs, "broken", seed=5, valid=False)
    another_run(runs, "again")
    assert file_runs(script, runs, tmp_path / "records") == 0
    rows = all_runs_of(tmp_path / "records")
    assert {name: row["status"] for name, row in rows.items()} == {
        "1337": "scored", "42": "scored", "unfinished": "unfinished", "stopped": "interrupted", "broken": "invalid",
        "again": "repeated",
    }
    assert rows["unfinished"]["val_bpb"] is None and rows["unfinished"]["seed"] == 3
    assert rows["42"]["val_bpb"] == rows["again"]["val_bpb"] > 0
    page = next(tmp_path.glob("records/*/*/README.md")).read_text()
    assert "| unfinished | 3 |  | unfinished |" in page and "| stopped | 4 |" in page


OTHER_EXPERIMENTS = {"settings": ("matrix_lr", 0.02), "data": ("data_path", "elsewhere/other")}


@pytest.mark.parametrize("what", OTHER_EXPERIMENTS)
def test_record_leaves_out_runs_with_other(copied, tmp_path, what):
    script, runs = copied
    other = another_run(runs, "e", seed=3) / "train.log"
    key, value = OTHER_EXPERIMENTS[what]
    config, lines = config_of(other), other.read_text().splitlines()
    other.write_text("\n".join(["config:" + json.dumps(config | {key: value}), *lines[1:]]) + "\n")
    assert file_runs(script, runs, tmp_path / "records") == 0
    assert set(all_runs_of(tmp_path / "records")) == {"1337", "42"}


def test_record_leaves_out_runs_of_another_script(copied, tmp_path):
    script, runs = copied
    another_run(runs, "e", seed=3, code_sha256="0" * 64)
    assert file_runs(script, runs, tmp_path / "records") == 0
    assert set(all_runs_of(tmp_path / "records")) == {"1337", "42"}


def test_record_of_a_compressed_script_has_a_readable_copy(copied, tmp_path):
    script, runs = copied
    packed = tmp_path / "compressed.py"
    packed.write_text(pack.compress(script.read_text()))
    size, code = packed.stat().st_size, hashlib.sha256(packed.read_bytes()).hexdigest()
    for run in runs:
        bytes_model = (run / "model.bin").stat().st_size
        change_result(run / "train.log", bytes_code=size, bytes_total=size + bytes_model, code_sha256=code)
    assert file_runs(packed, runs, tmp_path / "records") == 0
    folder = next(tmp_path.glob("records/*/*"))
    assert (folder / "train_gpt_readable.py").read_bytes() == script.read_bytes()
    assert "train_gpt_readable.py" in (folder / "README.md").read_text()
    assert json.loads((folder / "submission.json").read_text())["bytes_code"] == size


def test_record_warns_of_what_a_judge_has_to_look_at(copied, tmp_path, capsys):
    script, runs = copied
    for run in runs:
        change_result(run / "train.log", pre_quant_val_bpb=99.0)
    assert file_runs(script, runs, tmp_path / "records") == 0
    assert "warning: a judge has to look at P25 plausible" in capsys.readouterr().out


def test_an_interrupted_run_is_filed_only_on_demand(copied, tmp_path, capsys):
    script, runs = copied
    change_result(runs[0] / "train.log", interrupted=True)
    assert file_runs(script, runs, tmp_path / "records") == 1
    assert file_runs(script, runs, tmp_path / "records", "--allow-interrupted") == 0
    assert "Interrupted by hand: seed 1337" in next(tmp_path.glob("records/*/*/README.md")).read_text()


def cut_result(runs: list[Path]) -> None:
    lines = (runs[1] / "train.log").read_text().splitlines()
    (runs[1] / "train.log").write_text("\n".join(lines[:-1]))


SPOILT = {
    "no result line": cut_result,
    "scored part of": lambda runs: change_result(runs[1] / "train.log", partial=True),
    "is invalid: size": lambda runs: change_result(runs[1] / "train.log", valid=False, invalid_reasons=["size"]),
    "differ in config_sha256": lambda runs: change_result(runs[1] / "train.log", config_sha256="0"),
    "differ in data_sha256": lambda runs: change_result(runs[1] / "train.log", data_sha256="0"),
    "is not a run of": lambda runs: change_result(runs[1] / "train.log", code_sha256="0"),
    "data folder with a manifest": lambda runs: change_result(runs[1] / "train.log", data_sha256=None),
    "seed 1337 is there twice": lambda runs: change_result(runs[1] / "train.log", seed=1337),
    "not the artifact": lambda runs: (runs[1] / "model.bin").write_bytes(b"other"),
    "has no model.bin": lambda runs: (runs[1] / "model.bin").unlink(),
    "P11 eval clock": lambda runs: change_result(runs[1] / "train.log", score_seconds=99.0),
    "P07 identity": lambda runs: change_result(runs[1] / "train.log", nats_sum=1.0),
}


@pytest.mark.parametrize("sentence", SPOILT)
def test_record_refuses_a_spoilt_run_and_writes_nothing(copied, tmp_path, capsys, sentence):
    SPOILT[sentence](copied[1])
    assert file_runs(*copied, tmp_path / "records") == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not list(tmp_path.glob("records/**/*.json")) and not list(tmp_path.glob("records/.*"))


def test_record_refuses_what_is_over_the_cap(copied, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(RULES["P12"]["limit"], "bytes", 50_000)
    assert file_runs(*copied, tmp_path / "records") == 1
    assert re.search(r"P12 size: [\d,]+ of 50,000 bytes", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["Tiny", "two words", "../up", ""])
def test_record_refuses_a_name_that_is_no_folder_name(copied, tmp_path, capsys, name):
    assert file_runs(*copied, tmp_path / "records", name=name) == 1
    assert "a-z" in capsys.readouterr().err


def test_record_never_replaces_another(copied, tmp_path, capsys):
    assert file_runs(*copied, tmp_path / "records") == 0
    assert file_runs(*copied, tmp_path / "records") == 1
    assert "exists" in capsys.readouterr().err


def test_ten_minute_track_needs_three_seeds(copied, tmp_path, capsys):
    assert file_runs(*copied, tmp_path / "records", "--track", "10min_16mb") == 1
    assert "needs 3 seeds" in capsys.readouterr().err
