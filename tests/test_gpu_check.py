"""tools.gpu_check, as far as a machine without CUDA can try it."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

from tools import gpu_check


def test_kernels_agree_with_float64_and_a_wrong_one_does_not():
    found = gpu_check.parity("cpu", shapes=((1, 130, 1, 2, 16, 32),))
    assert found["ok"] and len(found["rows"]) == 16 and all(0 < row["worst"] < 0.02 for row in found["rows"])
    wrong = gpu_check.errors(lambda x: x * 1.1, lambda x: x, [torch.ones(3)])
    assert wrong == {"output": pytest.approx(0.1), "gradient 0": pytest.approx(0.1)}


def test_kernels_are_timed_in_turns_with_what_they_replace():
    found = gpu_check.kernels("cpu", tokens=256, lengths=(64, 128), rounds=2)
    assert [row["what"] for row in found["rows"][:6]] == [
        f"{name} T={T}" for T in (64, 128) for name in ("attention", "scan", "delta")
    ]
    assert all(row["n"] == 2 and row["min_ms"] > 0 for row in found["rows"]) and len(found["rows"]) == 10


def test_a_long_run_goes_on_between_two_calls(data, tmp_path, monkeypatch):
    for name, value in (TINY | dict(DATA_PATH=data, VAL_MAX_TOKENS=500)).items():
        monkeypatch.setenv(name, str(value))
    first = gpu_check.long_run(tmp_path / "folder", seconds=600, wait=0)
    assert first["unfinished"] and "call this part again" in first["notes"][0]
    second = gpu_check.long_run(tmp_path / "folder", seconds=600, wait=120)
    assert second["rows"][0]["steps"] == 8 and second["log"][-1].startswith("result:") and not second["unfinished"]


def test_a_run_that_died_says_why_and_is_begun_anew(data, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", "nowhere")
    assert "DATA_PATH=nowhere is not a folder" in gpu_check.long_run(tmp_path, seconds=600, wait=120)["notes"][0]
    for name, value in (TINY | dict(DATA_PATH=data, VAL_MAX_TOKENS=500)).items():
        monkeypatch.setenv(name, str(value))
    assert gpu_check.long_run(tmp_path, seconds=600, wait=120)["rows"][0]["steps"] == 8


def test_architectures_that_one_call_has_no_time_for_are_left_to_the_next(tmp_path):
    settings = {name: str(value) for name, value in TINY.items()} | dict(VOCAB_SIZE="64", COMPILE="0")
    first = gpu_check.archs(tmp_path, ["gpt", "shared"], settings, wait=0.1)
    assert first["unfinished"] and not first["rows"]
    assert first["notes"] == ["not measured yet, call this part again: gpt, shared"]
    gpu_check.archs(tmp_path, ["gpt"], settings, wait=120)
    both = gpu_check.archs(tmp_path, ["gpt", "shared"], settings, wait=120)
    assert not both["unfinished"] and both["ok"] and [row["what"] for row in both["rows"]] == ["gpt", "shared"]
    assert len(list(tmp_path.glob("archs_*.json"))) == 2


def test_an_architecture_that_two_calls_had_no_time_for_does_not_keep_the_others_waiting(tmp_path):
    settings = {name: str(value) for name, value in TINY.items()} | dict(VOCAB_SIZE="64", COMPILE="0")
    for rows in (0, 1):
        found = gpu_check.archs(tmp_path, ["gpt", "shared"], settings, wait=0.1)
        assert found["unfinished"] and [row["what"] for row in found["rows"]] == ["gpt"][:rows]
    found = gpu_check.archs(tmp_path, ["gpt", "shared"], settings, wait=120)
    assert found["rows"][0]["error"].startswith("twice not measured within 0.1 s") and not found["ok"]
    assert found["rows"][1]["what"] == "shared" and "n" in found["rows"][1] and not found["unfinished"]


def test_what_fails_is_a_row_and_a_note_and_costs_the_rest_nothing(tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(gpu_check, "relu2_mlp", refuse)
    found = gpu_check.parity("cpu", shapes=((1, 65, 1, 2, 16, 32),))
    bad = [row for row in found["rows"] if "error" in row]
    assert [row["what"] for row in bad] == 2 * ["fused mlp"] and not found["ok"] and len(found["rows"]) == 16
    assert found["notes"][0] == "FAIL fused mlp torch.float32: RuntimeError: no such instruction"
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "hardware_name", lambda machine: "1x test")
    monkeypatch.setattr(gpu_check, "parity", refuse)
    monkeypatch.setattr(gpu_check, "kernels", lambda device: dict(rows=[], notes=["kernels ran"], ok=True))
    assert gpu_check.main(["parity", "kernels", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "FAIL parity: RuntimeError: no such instruction" in said and "kernels ran" in said
    assert [path.name for path in tmp_path.glob("*.json")] == ["gpu_check_kernels_1x_test.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_it_says_so_in_a_sentence():
    for python, sentence in (
        (sys.executable, "gpu_check needs a CUDA device, and PyTorch finds none here"),
        ("/bin/false", "/bin/false has no PyTorch; name one that has in PYTHON"),
    ):
        env = os.environ | {"PYTHON": python}
        done = subprocess.run([ROOT / "tools/gpu_check.sh"], env=env, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr == f"error: {sentence}\n"
