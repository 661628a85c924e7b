"""What several test files need: a small real text as a data folder, and a way to run the script as a user does."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run_forked

import train_gpt

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    NUM_LAYERS=2, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2, TRAIN_SEQ_LEN=32, TRAIN_BATCH_TOKENS=512, WARMUP_STEPS=1
)
TINY |= dict(ITERATIONS=8, COMPILE=0, DEVICE="cpu", TRAIN_LOG_EVERY=1)
# For what depends on the clock: a machine that others use too may stand still for a moment, but not three times.
timed = pytest.mark.flaky(reruns=2)
SETTINGS = {f.upper() for f in train_gpt.RunConfig.__dataclass_fields__} | set(TINY) | {"ARCH", "VOCAB_SIZE"}


@pytest.fixture(autouse=True, scope="session")
def quiet_torch() -> None:
    torch.manual_seed(0)
    # Tiny models are faster so, and threads of two programs that share a core wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


def write_bytes_data(folder: Path, train: bytes, val: bytes) -> Path:
    """A data folder of one train and one validation document, a byte a token (upstream's byte260 ids)."""
    folder.mkdir(parents=True)
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_offset": 4, "byte_count": 256}
    tokenizer = json.dumps({"tokenizer_type": "pure_byte", "config": ids, "vocab_size": 260}).encode()
    (folder / "tokenizer.json").write_bytes(tokenizer)
    sha = hashlib.sha256(tokenizer).hexdigest()
    about = {"kind": "byte260", "file": "tokenizer.json", "sha256": sha, "vocab_size": 260, "bos_id": 1}
    manifest = {"format": 1, "name": folder.name, "tokenizer": about, "splits": {}}
    for split, text in (("train", train), ("val", val)):
        tokens = np.concatenate(([1], np.frombuffer(text, dtype=np.uint8).astype(np.int64) + 4))
        path = write_shard(folder / f"fineweb_{split}_000000.bin", tokens)
        shard = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "tokens": len(tokens)}
        manifest["splits"][split] = {"shards": [shard], "documents": 1, "tokens": len(tokens), "bytes": len(text)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_shard(path: Path, tokens: np.ndarray) -> Path:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens).astype("<u2").tobytes())
    return path


@pytest.fixture(scope="session")
def text() -> bytes:
    """Real English: the language reference inside every Python installation."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> Path:
    return write_bytes_data(tmp_path_factory.mktemp("data") / "topics_bytes", text[:300_000], text[300_000:310_000])


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs and the record lie that the tests of records and of the referee share."""
    folder = tmp_path_factory.getbasetemp() / "packed_runs"
    folder.mkdir(exist_ok=True)
    return folder


def environment(settings: dict) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return kept | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in settings.items()}


def run_script(
    settings: dict, *args: str, script: Path = ROOT / "train_gpt.py", given: str = "", start: bool = False
) -> subprocess.CompletedProcess:
    """`python train_gpt.py ARGS` with these settings and no others; start: not as a fork, but as a user starts it."""
    if not start:
        return run_forked([script, *args], environment(settings), ROOT, 300, given)
    command = [sys.executable, str(script), *args]
    return subprocess.run(
        command, env=environment(settings), cwd=ROOT, input=given, capture_output=True, text=True, timeout=300
    )


def result_of(done: subprocess.CompletedProcess) -> dict:
    """The result line of a finished run."""
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1].removeprefix("result:"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[dict, Path, list[str]]:
    """(result, folder, log lines) of one ordinary run."""
    out = tmp_path_factory.mktemp("finished")
    done = run_script(TINY | dict(DATA_PATH=data, OUT_DIR=out, RUN_ID="a", ITERATIONS=30))
    return result_of(done), out / "a", (out / "a/train.log").read_text().splitlines()
