"""Filing runs as a record: what is written, and what is refused."""

import functools
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


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp() / "packed_runs"
    folder.mkdir(exist_ok=True)
    return folder


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
    assert file_runs(copied[0], copied[1][:1], tmp_path / "records") == 0
    assert "one seed" in capsys.readouterr().out
    said = json.loads(next(tmp_path.glob("records/*/*/submission.json")).read_text())
    assert said["val_bpb_std"] is None


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
