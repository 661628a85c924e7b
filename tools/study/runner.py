"""Does the runs of a study that are missing, one at a time on a CPU and one per GPU, and files each as JSON and log."""

import fcntl
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from tools.logs import read_log
from tools.pack import flatten, settings_of
from tools.study.plan import ROOT, Run
from train_gpt import Dataset, read_shard, save_atomically

SHOWN_LINES = 8  # of a run that failed
KEPT = (
    "steps", "val_bpb", "val_loss", "pre_quant_val_bpb", "params", "bytes_model", "bytes_code", "train_seconds",
    "mean_lr_scale", "step_avg_ms", "tokens_seen", "code_sha256", "data_sha256", "hardware", "torch", "val_tokens",
    "val_bytes",
)  # fmt: skip


GATES = """
import json, pathlib, runpy, sys, torch
script, artifact = sys.argv[1:]
model, _, _ = runpy.run_path(script)["load_artifact"](pathlib.Path(artifact).read_bytes(), torch.device("cpu"))
gates = model.gates() if getattr(model, "time", None) is not None and hasattr(model, "gates") else None
levels = torch.tensor([0.1, 0.5, 0.9])
print(json.dumps(gates and {name: torch.quantile(gate, levels, dim=1).T.tolist() for name, gate in gates.items()}))
"""  # in a process of its own: a second set of operators and defaults must not meet the kit's


class RunFailed(Exception):
    """A run that ended without a result; the words are its last lines."""


def data_path(name: str) -> Path:
    """The data folder of that name, or at that path."""
    path = Path(name) if "/" in name else ROOT / "data" / "datasets" / name
    if not (path / "manifest.json").is_file():
        raise ValueError(f'the study needs the data "{name}", and {path} has no manifest.json; see data/README.md')
    return path


def script_of(arch: str, folder: Path) -> Path:
    """The study's own script of an architecture, packed when first needed: a study ends with the code it began."""
    path = folder / "code" / f"{arch}.py"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_atomically(path, flatten(arch).encode())
    return path.resolve()


def train_bpb(script: Path, folder: Path, data: Path) -> float:
    """Bits per byte of the training text, by the artifact in `folder`, which the script made."""
    shards = sorted(data.glob("fineweb_train_*.bin"))
    if len(shards) != 1:
        raise ValueError(f"the training text of {data} is in {len(shards)} shards; train_score wants a small text")
    request = json.dumps({"tokens": str(shards[0].resolve()), "nats": str((folder / "train.nats").resolve())})
    command = [sys.executable, str(script), "score", "model.bin"]
    done = subprocess.run(command, cwd=folder, input=request, text=True, capture_output=True, check=False)
    if done.returncode or "error" in json.loads(done.stdout.splitlines()[-1]):
        raise RunFailed(f"scoring the training text failed: {(done.stderr or done.stdout).strip()}")
    nats = np.fromfile(folder / "train.nats", dtype="<f4")
    tokens = np.array(read_shard(shards[0]))
    counted = int(Dataset(str(data), None).bytes_of.count(tokens).sum())
    return float(nats.sum(dtype=np.float64) / np.log(2) / counted)


def gate_quantiles(script: Path, artifact: Path) -> dict[str, list] | None:
    """By gate group, per layer, the 10th, 50th and 90th percentile of its gates; None for a model without gates."""
    done = subprocess.run([sys.executable, "-c", GATES, script, artifact], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunFailed(f"reading the gates of {artifact} failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


def result_path(run: Run, folder: Path) -> Path:
    """Where the result of a run of the study in `folder` is filed once it is done."""
    return folder / "runs" / f"{run.key}.json"


def do_run(run: Run, folder: Path, scratch: Path, gpu: int | None = None) -> dict:
    """Train once; leaves logs/<key>.log and runs/<key>.json in `folder`, the artifact in `scratch`."""
    data = data_path(run.data)
    out = scratch / run.key
    if out.exists():  # left by a run that was killed
        for path in out.iterdir():
            path.unlink()
    own = {"ARCH": run.arch, "DATA_PATH": str(data), "OUT_DIR": str(scratch), "RUN_ID": run.key}
    # What a study does not set is the kit's default, whatever the caller's shell has.
    env = {name: value for name, value in os.environ.items() if name not in settings_of(run.arch)}
    env |= run.settings | own | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    script = script_of(run.arch, folder)
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = read_log(out / "train.log") if (out / "train.log").is_file() else None
    if log is None or log.result is None:
        last = done.stdout.splitlines()[-SHOWN_LINES:]
        raise RunFailed("\n    ".join([f"{run.key} ended with status {done.returncode}:", *last]))
    if log.result.get("interrupted"):
        raise RunFailed(f"{run.key} was interrupted after {log.result['steps']} steps; ask for the study again")
    row = {"key": run.key, "arch": run.arch, "seed": run.seed, "data": run.data, "settings": run.settings}
    row |= {"log": f"logs/{run.key}.log"} | {name: log.result.get(name) for name in KEPT}
    row["curve"] = [[p.step, p.train_loss, p.seconds] for p in log.steps]
    row["val_curve"] = [[p.step, p.val_bpb] for p in log.val_points]
    row["train_bpb"] = train_bpb(script, out, data) if run.train_score else None
    row["gates"] = gate_quantiles(script, out / "model.bin")
    save_atomically(folder / "logs" / f"{run.key}.log", (out / "train.log").read_bytes())
    save_atomically(result_path(run, folder), json.dumps(row).encode() + b"\n")
    return row


@contextmanager
def claimed(path: Path, wait: bool) -> Iterator[bool]:
    """Whether the lock at path is this process's own for the while; it is free again when its owner ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def do_missing(runs: list[Run], folder: Path, scratch: Path, tell: Callable[[Run, str], None]) -> list[str]:
    """Do the runs that are not filed yet, in their order; what failed, in words. A failure does not stop the others."""
    for path in (folder / "runs", folder / "logs", scratch):
        path.mkdir(parents=True, exist_ok=True)
    free: queue.Queue = queue.Queue()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else [None]
    for gpu in gpus:
        free.put(gpu)
    failures, elsewhere, lock = [], [], threading.Lock()

    def work(run: Run, wait: bool = False) -> None:
        gpu = free.get()
        try:
            with claimed(scratch / f"{run.key}.lock", wait) as mine:
                if not mine:  # another process has it: last of all, see what became of it
                    elsewhere.append(run)
                elif result_path(run, folder).is_file():
                    tell(run, "is there")
                else:
                    row = do_run(run, folder, scratch, gpu)
                    tell(run, f"{row['val_bpb']:.4f} bits per byte in {row['steps']} steps")
        except (RunFailed, ValueError, OSError) as error:
            with lock:
                failures.append(f"{run.key}: {error}")
            tell(run, f"failed: {str(error).splitlines()[0]}")
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(len(gpus)) as pool:
        list(pool.map(work, runs))
    for run in elsewhere:
        work(run, wait=True)
    return failures
