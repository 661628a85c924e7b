"""Measure the kit on this machine: a table here, every raw repetition in records/benchmarks/<part>_<machine>.json.

    python -m tools.bench                            step: tokens per second against a plain fp32 step, choice by choice
    python -m tools.bench archs|startup|prepare|cap  every architecture; start-up and failures; tokenizing; the clock
    python -m tools.bench lengths --arch mamba       how the time of a step grows with the length of the sequence
    python -m tools.bench artifacts                  bytes of each architecture's submission at its defaults
    python -m tools.bench --archs ti_mlp,ti_ssm      some: parameters, bytes, step time beside gpt's, memory, operations
    python -m tools.bench --kernels                  every Triton kernel compiled for Hopper, without a GPU
    python -m tools.bench scan                       on CPU: the scan beside attention, the streamed loss beside eager
    python -m tools.bench --against SCRIPT           another script that reads upstream's variables, in turns with ours
    BF16=0 python -m tools.bench --layers 9 --dim 512 --heads 8 --kv-heads 4 --seq-len 1024 --tokens 65536

What is compared runs in turns (A B A B ...), for machines are noisy. `speed`: the median over the rounds of the base's
time over the row's; 2 is twice as fast. Settings without an option here are environment variables, as in training.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import torch

from architectures import load_architecture
from tools.costs import measure_archs, measure_artifacts, measure_lengths
from tools.gpu_check import kernels as compare_kernels
from tools.hopper import discover, measure_kernels
from tools.logs import Log, read_log
from tools.plain_step import compare, interleave, measure_step, table
from train_gpt import Machine, RunConfig, hardware_name, pick_device, read_settings, save_atomically

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "train_gpt.py"
ROUNDS = {
    "step": 10, "archs": 5, "startup": 5, "prepare": 3, "against": 2, "cap": 20, "kernels": 1, "scan": 10,
    "lengths": 10, "artifacts": 1,
}  # fmt: skip
LENGTHS = (512, 1024, 2048, 4096)
SHAPE = {  # option: (its setting, the value where neither option nor environment has one; --against has none of these)
    "--arch": ("ARCH", "gpt"), "--layers": ("NUM_LAYERS", "4"), "--dim": ("MODEL_DIM", "128"),
    "--heads": ("NUM_HEADS", "4"), "--kv-heads": ("NUM_KV_HEADS", "2"), "--seq-len": ("TRAIN_SEQ_LEN", "256"),
    "--tokens": ("TRAIN_BATCH_TOKENS", "8192"),
}  # fmt: skip


def settings_in(env: dict[str, str]) -> dict[str, str]:
    """What of an environment are settings; of paths the last name alone, which is what another machine can compare."""
    _, Config = load_architecture(env.get("ARCH", "gpt"))
    known = {"ARCH", *(f.name.upper() for f in (*fields(RunConfig), *fields(Config)))} - {"OUT_DIR", "RUN_ID"}
    found = {name: env[name] for name in sorted(known & env.keys())}
    return found | {name: Path(found[name]).name for name in ("DATA_PATH", "TOKENIZER_PATH") if name in found}


def run_script(script: Path, env: dict[str, str], folder: Path) -> tuple[Log, list[tuple[float, str]]]:
    """(log, (time, line) of all that came out) of a script run to its end; the log is its output, or logs/*.txt."""
    env = env | {name: str(Path(env[name]).resolve()) for name in ("DATA_PATH", "TOKENIZER_PATH") if name in env}
    command, pipe = [sys.executable, str(script)], dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = subprocess.Popen(command, cwd=folder, env=env, text=True, errors="replace", **pipe)
    timed = [(time.perf_counter(), line.rstrip("\n")) for line in process.stdout]
    lines = [line for _, line in timed]
    if (status := process.wait()) not in (0, 3):  # 3: train_gpt.py doubts its score, which is not asked for
        raise ValueError("\n    ".join([f"{script.name} ended with status {status}. Its last lines:", *lines[-8:]]))
    (folder / "output.txt").write_text("\n".join(lines))
    logs = [read_log(path) for path in (folder / "output.txt", *sorted(folder.glob("logs/*.txt")))]
    return next((log for log in logs if log.steps), logs[0]), timed


def cap_row(cap: float, log: Log, lines: list[tuple[float, str]]) -> dict:
    """What a capped run did with its time, by its log, and by the clock of who read its lines (outside_seconds)."""
    if "train" not in log.phases or not log.stop_step:
        raise ValueError(f"the cap of {cap} s did not stop its run after at least a step; raise ITERATIONS")
    begin, end = log.phases["train"]
    began = next(t for t, line in lines if line.startswith("phase:warmup"))  # written as training begins
    ended = next(t for t, line in lines if line.startswith("stopping_early"))
    step_seconds, unused = log.stop_seconds / log.stop_step, cap - (end - begin)
    return {
        "cap": cap, "train_seconds": end - begin, "outside_seconds": ended - began, "last_step_end": log.stop_seconds,
        "steps": log.stop_step, "step_seconds": step_seconds, "unused": unused, "unused_steps": unused / step_seconds,
    }  # fmt: skip


def cap_verdict(rows: list[dict]) -> dict:
    late = [row["cap"] for row in rows if row["unused"] < 0]
    mean = fmean(row["unused_steps"] for row in rows)
    notes = [
        f"{'FAIL' if late else 'ok  '} {len(late)} of {len(rows)} runs ended after the cap {late or ''}".rstrip(),
        f"{'ok  ' if mean < 1.5 else 'FAIL'} unused on average: {mean:.2f} steps, to be below 1.5",
    ]
    return dict(rows=rows, notes=notes, ok=not late and mean < 1.5)


def measure_cap(env: dict[str, str], caps: list[float], found: dict, save: Callable[[dict], None]) -> dict:
    """Capped runs, those that `found` has already left out; saved after each, so that an interrupted series goes on."""
    if "DATA_PATH" not in env:
        raise ValueError("cap trains on real data: name a prepared folder with --data")
    env = dict(ITERATIONS="10_000_000", WARMUP_STEPS="3", TRAIN_LOG_EVERY="1000", VAL_MAX_TOKENS="4096") | env
    settings = settings_in(env)
    if found.get("settings", settings) != settings:
        raise ValueError("the runs that are there had other settings; use those, or name another folder with --out")
    rows = found.get("rows", [])
    for cap in caps:
        if cap not in [row["cap"] for row in rows]:
            with tempfile.TemporaryDirectory() as folder:
                own = dict(MAX_WALLCLOCK_SECONDS=str(cap), OUT_DIR=folder)
                rows.append(cap_row(cap, *run_script(TRAIN, env | own, Path(folder))))
            rows.sort(key=lambda row: row["cap"])
        found = dict(settings=settings) | cap_verdict(rows)
        save(found)
    return found


def startup_cases(folder: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """By name, arguments for Python and changes to the environment: two imports, then everything that must fail."""
    from data.prepare import parse_options, prepare  # what it needs, a machine that only times steps may not have

    (text := folder / "text").write_text("all work and no play\n" * 1000)
    (other := folder / "other").write_text("makes dull text\n" * 1000)
    options = ["--tokenizer", "byte260", "--out", str(folder), "--name", "tiny", "--processes", "1"]
    with redirect_stdout(None):
        data = prepare(parse_options(["--text", str(text), "--val-text", str(other), *options]))
    holed = shutil.copytree(data, folder / "holed", ignore=shutil.ignore_patterns("fineweb_train_*"))
    (folder / "other.json").write_text((data / "tokenizer.json").read_text() + "\n")
    failures = {
        "misspelt setting": {"NUM_LAYRES": "12"},
        "no data folder": {"DATA_PATH": "nowhere"},
        "missing shard": {"DATA_PATH": str(holed)},
        "another tokenizer": {"TOKENIZER_PATH": str(folder / "other.json")},
        "vocabulary too small": {"VOCAB_SIZE": "100"},
        "batch too small": {"TRAIN_BATCH_TOKENS": "8"},
    }
    imports = {word: (["-c", word], {"PYTHONPATH": str(ROOT)}) for word in ("import torch", "import train_gpt")}
    return imports | {name: ([str(TRAIN)], {"DATA_PATH": str(data)} | change) for name, change in failures.items()}


def measure_startup(env: dict[str, str], rounds: int) -> dict:
    """Seconds until train_gpt.py can be used, and until it has said what is wrong: one sentence and exit status 2."""
    said = {}
    with tempfile.TemporaryDirectory() as folder:
        cases = startup_cases(Path(folder))

        def lap(name: str) -> float:
            arguments, changes = cases[name]
            start = time.perf_counter()
            done = subprocess.run([sys.executable, *arguments], env=env | changes, cwd=folder, capture_output=True)
            seconds = time.perf_counter() - start
            words = (done.stdout + done.stderr).decode().strip().replace(folder + "/", "")
            said[name] = dict(exit=done.returncode, says=words)
            return seconds

        seconds = interleave({name: lambda name=name: lap(name) for name in cases}, rounds)
    rows = [row | said[row["what"]] for row in compare(seconds, "import torch")]
    bad = [row["what"] for row in rows[:2] if row["exit"] != 0]
    bad += [row["what"] for row in rows[2:] if row["exit"] != 2 or not re.fullmatch("error: [^\n]+", row["says"])]
    notes = [f"{'FAIL' if bad else 'ok  '} each failure is one sentence and exit status 2, except: {bad or 'none'}"]
    return dict(settings=settings_in(env), raw_seconds=seconds, rows=rows, notes=notes, ok=not bad)


def measure_prepare(documents: Path | None, rounds: int) -> dict:
    """Documents per second of data.prepare against a plain loop, with a tokenizer trained on the same documents."""
    from data.prepare import benchmark
    from data.sources import Source
    from data.tokenizers import train_tokenizer

    source = Source("jsonl", (str(documents),)) if documents else Source("pydocs")
    texts = list(source.documents())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.model"
        tokenizer.write_bytes(train_tokenizer(texts, 1024))
        rows = [benchmark(texts, tokenizer) for _ in range(rounds)]
    notes = [f"median speedup {median(row['speedup'] for row in rows):.2f} of {rounds} runs, each of several rounds"]
    return dict(settings=dict(documents=source.identity(), vocab_size=1024), rows=rows, notes=notes, ok=True)


def settled_seconds(log: Log) -> list[float]:
    """Seconds per step between neighbouring log lines, without the first third of the run and its first ten steps."""
    points = [p for p in log.steps if p.seconds is not None and p.step >= max(10, log.steps[-1].step / 3)]
    if len(points) < 2:
        raise ValueError("fewer than two later lines say step:N/M train_loss:... train_time:...ms; raise ITERATIONS")
    return [(b.seconds - a.seconds) / (b.step - a.step) for a, b in pairwise(points)]


def measure_against(script: Path, env: dict[str, str], rounds: int) -> dict:
    """Time per step of another script and of ours, each by its own log, on one environment."""
    if not script.is_file():
        raise ValueError(f"--against {script} is not a file")
    env = dict(ITERATIONS="60", TRAIN_LOG_EVERY="10", VAL_LOSS_EVERY="0", MAX_WALLCLOCK_SECONDS="0") | env
    raw, losses = {"theirs": [], "ours": []}, {}

    def lap(name: str, path: Path) -> float:
        with tempfile.TemporaryDirectory() as folder:
            log, _ = run_script(path.resolve(), env | {"OUT_DIR": folder}, Path(folder))
        raw[name].append(settled_seconds(log))
        losses[name] = log.steps[-1].train_loss
        return median(raw[name][-1])

    seconds = interleave({"theirs": lambda: lap("theirs", script), "ours": lambda: lap("ours", TRAIN)}, rounds)
    milli_tokens = 1000 * int(env.get("TRAIN_BATCH_TOKENS", RunConfig.train_batch_tokens))
    rows = compare(seconds, "theirs")
    rows = [r | dict(tokens_per_second=milli_tokens / r["median_ms"], train_loss=losses[r["what"]]) for r in rows]
    notes = [f"n runs of each; the time of a run is the median of {len(raw['ours'][0])} stretches between log lines"]
    return dict(script=script.name, settings=settings_in(env), raw_seconds=raw, rows=rows, notes=notes, ok=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=sorted(ROUNDS.keys() - {"against"}), default="step")
    parser.add_argument("--against", type=Path, metavar="SCRIPT")
    parser.add_argument("--archs", metavar="A,B", help="the part archs, for these architectures alone, or all")
    parser.add_argument("--kernels", action="store_true", help="the part kernels")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"default {ROUNDS}; of cap: runs")
    parser.add_argument("--data", dest="DATA_PATH", metavar="FOLDER", help="for cap and --against")
    parser.add_argument("--documents", type=Path, metavar="JSONL", help="for prepare; default Python's documentation")
    parser.add_argument("--out", type=Path, default=ROOT / "records" / "benchmarks", metavar="FOLDER")
    parser.add_argument("--name", default="", metavar="WORD", help="part of the file's name, for a second table")
    parser.add_argument("--vocab", dest="VOCAB_SIZE", metavar="N", help="default that of the data, or 1024")
    for option, (name, value) in SHAPE.items():
        parser.add_argument(option, dest=name, metavar="X", help=f"{name}; default {value}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    asked = dict(against=options.against, archs=options.archs, kernels=options.kernels)
    part = next((name for name, value in asked.items() if value), options.part)
    archs = None if options.archs in (None, "all") else options.archs.split(",")
    rounds = options.rounds or ROUNDS[part]
    given = {name: value for name, value in vars(options).items() if name.isupper() and value}
    env = ({} if part in ("against", "artifacts") else dict(SHAPE.values())) | os.environ | given
    caps = [round(5 + 55 * i / max(1, rounds - 1), 1) for i in range(rounds)]
    try:
        hardware = hardware_name(Machine(pick_device(env.get("DEVICE"))))
        machine = dict(hardware=hardware, threads=torch.get_num_threads(), python=platform.python_version())
        head = dict(part=part, date=time.strftime("%Y-%m-%d"), machine=machine, torch=torch.__version__)
        words = re.sub("[^a-z0-9]+", "_", f"{options.name} {hardware}".lower()).strip("_")
        path = options.out / f"{part}_{words}.json"

        def save(found: dict) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_atomically(path, json.dumps(head | found, indent=1).encode() + b"\n")

        parts = {
            "step": lambda: measure_step(*read_settings(env), rounds),
            "archs": lambda: measure_archs(env, rounds, archs, save),
            "artifacts": lambda: measure_artifacts(env),
            "startup": lambda: measure_startup(env, rounds),
            "prepare": lambda: measure_prepare(options.documents, rounds),
            "against": lambda: measure_against(options.against, env, rounds),
            "kernels": lambda: measure_kernels(discover()),
            "scan": lambda: compare_kernels("cpu", 4096, LENGTHS, rounds),
            "lengths": lambda: measure_lengths(env, rounds, env["ARCH"], LENGTHS),
            "cap": lambda: measure_cap(env, caps, json.loads(path.read_text()) if path.exists() else {}, save),
        }
        found = parts[part]()
        save(found)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([table(found["rows"]), *found["notes"], f"written: {path}"]))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
