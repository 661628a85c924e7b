"""One file that runs alone: the same losses and the same artifact as the repository, settings baked in."""

import re
import subprocess

import pytest
from conftest import TINY, environment, result_of, sys

from tools import pack


def run_alone(script, settings: dict, cwd) -> subprocess.CompletedProcess:
    """The script as its own program, far from the repository."""
    env = {k: v for k, v in environment(settings).items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, script], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("wrap", [lambda source: source, pack.compress], ids=["flat", "compressed"])
def test_a_packed_run_gives_the_same_artifact_with_a_bare_environment(finished, data, tmp_path, wrap):
    result, _, _ = finished
    baked = {name: str(value) for name, value in (TINY | dict(DATA_PATH=data, ITERATIONS=30, OUT_DIR="out")).items()}
    (tmp_path / "train_gpt.py").write_text(wrap(pack.flatten("gpt", baked)))
    packed = result_of(run_alone("train_gpt.py", {}, tmp_path))
    assert packed["artifact_sha256"] == result["artifact_sha256"] and packed["val_bpb"] == result["val_bpb"]
    assert packed["bytes_code"] == (tmp_path / "train_gpt.py").stat().st_size
    assert packed["config_sha256"] == result["config_sha256"]


def test_a_packed_script_holds_one_architecture_and_says_so(tmp_path):
    (tmp_path / "p.py").write_text(pack.flatten("gpt"))
    done = run_alone("p.py", {"ARCH": "mamba"}, tmp_path)
    assert (
        done.returncode == 2 and done.stderr == "error: ARCH=mamba is not in this script, which holds ARCH=gpt alone\n"
    )


def test_compressing_loses_nothing():
    source = pack.flatten("gpt", {"NUM_LAYERS": "3"})
    assert pack.unpack(pack.compress(source)) == source and len(pack.compress(source)) < len(source) / 2


def test_a_damaged_wrapper_is_named():
    with pytest.raises(ValueError, match="the compressed script is damaged"):
        pack.unpack(pack.compress("print(1)").replace("b85decode('", "b85decode('zz"))


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"NUM_LAYRES": "3"}, "Did you mean NUM_LAYERS"),
        ({"BANANAS": "3"}, "BANANAS is not a setting of ARCH=gpt"),
        ({"NUM_LAYERS": "x"}, "must be a whole number"),
        ({"MODEL_DIM": "100"}, "must be a multiple"),
    ],
)
def test_settings_that_a_run_would_refuse_are_not_baked_in(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        pack.check_settings("gpt", settings)


def test_two_files_that_define_one_name_are_refused():
    with pytest.raises(ValueError, match=r"a.py and b.py both define f; rename one"):
        pack.refuse_clashes({"a.py": "def f(): pass", "b.py": "f = 1"})


def test_imports_that_cannot_be_inlined_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be inlined"):
        pack.drop_kit_imports("from architectures.layers import MLP as M", tmp_path / "x.py")


def test_kernels_are_in_the_file_and_run_only_where_there_is_cuda(tmp_path):
    source = pack.flatten("ti_ssm")
    guard = source.index("if torch.cuda.is_available() and importlib.util.find_spec(")
    assert source.index("    @triton.jit") > guard > source.index("def chunked_scan")
    assert not re.search(r"^\s*from architectures", source, flags=re.M)
    (tmp_path / "p.py").write_text(source.replace("torch.cuda.is_available()", "True"))  # as it runs on CUDA
    code = "import p, inspect; print(inspect.getsource(p.scan_forward.fn)); print(p.triton_scan.__name__)"
    env = {k: v for k, v in environment({}).items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "def scan_forward" in done.stdout and "triton_scan" in done.stdout, done.stderr


def test_settings_from_the_environment_leave_out_what_differs_between_runs(monkeypatch):
    for name, value in dict(NUM_LAYERS="3", SEED="4", RUN_ID="x", OUT_DIR="y").items():
        monkeypatch.setenv(name, value)
    assert pack.settings_from_env("gpt") == {"NUM_LAYERS": "3"}
