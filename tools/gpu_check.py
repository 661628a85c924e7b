"""Checks on a CUDA machine: kernels against float64 and against attention, every architecture, the step, a run.

    python -m tools.gpu_check [parity|kernels|archs|step|run ...]      tools/gpu_check.sh installs what it needs first

A part whose JSON is there is shown and not repeated; --again repeats it. `archs` and `run` take longer than a call is
to last, and are called again until they have ended.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from architectures import names
from architectures.kernels.cross_entropy import naive_cross_entropy, softcapped_cross_entropy
from architectures.kernels.delta import delta_rule, naive_delta_rule
from architectures.kernels.fused_mlp import naive_relu2_mlp, relu2_mlp
from architectures.kernels.fused_norm import mix_norm, naive_mix_norm
from architectures.kernels.fused_qk import naive_qk_norm_rope, qk_norm_rope
from architectures.kernels.scan import chunked_scan, naive_scan
from architectures.layers import causal_attention
from tools.logs import read_log
from tools.plain_step import compare, interleave, table
from train_gpt import Machine, choose_attention, hardware_name, read_settings, save_atomically

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("parity", "kernels", "archs", "step", "run")
PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0}  # bf16, dense
TOLERANCE = {torch.float32: 4e-3, torch.bfloat16: 2e-2}  # relative, of output and gradients; fp32 products are tf32
WAIT_SECONDS = 420
FIRST = ("mamba", "ti_ssm", "megakernel")  # of the architectures: those that are to be as fast as gpt
UPSTREAM = dict(NUM_LAYERS="9", MODEL_DIM="512", NUM_HEADS="8", NUM_KV_HEADS="4", TRAIN_SEQ_LEN="1024")
UPSTREAM |= dict(VOCAB_SIZE="1024")
LENGTHS = (1024, 2048, 4096, 8192)
SHAPES = ((2, 130, 1, 2, 64, 64), (1, 517, 4, 4, 64, 64), (2, 300, 2, 4, 128, 64), (1, 2048, 2, 2, 32, 64))


def relative_error(found: Tensor, true: Tensor) -> float:
    """|found - true| over |true|, in the root mean square."""
    return ((found.double() - true.double()).norm() / true.double().norm().clamp(min=1e-30)).item()


def errors(fast: Callable, exact: Callable, inputs: list[Tensor]) -> dict[str, float]:
    """Relative errors of a function's output and of its gradients, against another in float64 on the same inputs."""
    results = []
    for function, dtype in ((fast, None), (exact, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    names = ["output", *(f"gradient {i}" for i in range(len(inputs)))]
    return {name: relative_error(a, b) for name, a, b in zip(names, *results, strict=True)}


def scan_inputs(B: int, T: int, G: int, H: int, N: int, P: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v, log_decay with a reset, delta and skip."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, T, G, N, generator=g) / N**0.5 for _ in "qk")
    v, log_decay = torch.randn(B, T, H, P, generator=g), -torch.rand(B, T, H, generator=g)
    log_decay[:, T // 2] = -100.0
    delta, skip = torch.rand(B, T, H, generator=g), torch.randn(H, generator=g)
    return [*(x.to(device, dtype) for x in (q, k, v)), *(x.to(device) for x in (log_decay, delta, skip))]


def delta_inputs(B: int, T: int, G: int, H: int, N: int, P: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Those of the scan without skip, q and k of length 1."""
    q, k, v, log_decay, beta, _skip = scan_inputs(B, T, G, H, N, P, dtype, device)
    return [*(torch.nn.functional.normalize(x, dim=-1) for x in (q, k)), v, log_decay, beta]


def fused_cases(dtype: torch.dtype, device: str) -> dict[str, tuple[Callable, Callable, list[Tensor]]]:
    """By name: a fused kernel and its definition as functions of tensors to one tensor, and inputs."""
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    angles = torch.randn(257, 32, generator=g).to(device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def norm(function: Callable) -> Callable:
        return lambda *x: torch.cat(function(list(x[:-1]), x[-1]), dim=-1)

    def turned(function: Callable) -> Callable:
        return lambda qkv, gain: torch.cat(
            [y.flatten(2) for y in function(qkv, gain, cos.to(qkv.dtype), sin.to(qkv.dtype))], dim=-1
        )

    return {
        "norm": (norm(mix_norm), norm(naive_mix_norm), [*(random(777, 512) for _ in range(5)), random(5, 512)]),
        "mlp": (relu2_mlp, naive_relu2_mlp, [random(777, 200), random(1000, 200) / 14, random(200, 1000) / 32]),
        "qk": (turned(qk_norm_rope), turned(naive_qk_norm_rope), [random(3, 257, 1024), random(8)]),
    }


def parity(device: str, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> dict:
    """Every kernel's output and gradients against float64."""
    rows = []

    def check(what: str, dtype: torch.dtype, *case: object) -> None:
        row = dict(what=what, dtype=str(dtype))
        try:
            found = errors(*case)
            rows.append(row | dict(worst=max(found.values())) | found)
        except Exception as error:  # of a compiler or a device; the other kernels are of interest all the more
            rows.append(row | dict(error=f"{type(error).__name__}: {error}".splitlines()[0]))

    for dtype in (torch.float32, torch.bfloat16):
        for shape in shapes:
            for name, scan, definition, inputs in (
                ("scan", chunked_scan, naive_scan, scan_inputs), ("delta", delta_rule, naive_delta_rule, delta_inputs),
            ):  # fmt: skip
                check(f"{name} {shape}", dtype, scan, definition, inputs(*shape, dtype, device))
        for M, D, V in ((1000, 512, 1024), (777, 384, 8192), (64, 256, 260)):
            h, w = (torch.randn(n, D, generator=torch.Generator().manual_seed(0)).to(device, dtype) for n in (M, V))
            targets = torch.randint(V, (M,), generator=torch.Generator().manual_seed(2)).to(device)
            check(
                f"cross-entropy {(M, D, V)}", dtype,
                lambda h, w, t=targets: softcapped_cross_entropy(h, w, t, 30.0),
                lambda h, w, t=targets: naive_cross_entropy(h, w, t, 30.0), [h, w],
            )  # fmt: skip
        for name, case in fused_cases(dtype, device).items():
            check(f"fused {name}", dtype, *case)
    limits = {str(dtype): limit for dtype, limit in TOLERANCE.items()}
    bad = [row for row in rows if "error" in row or not row["worst"] <= limits[row["dtype"]]]
    notes = [f"FAIL {row['what']} {row['dtype']}: {row.get('error') or round(row['worst'], 4)}" for row in bad]
    return dict(rows=rows, notes=notes or ["ok   every kernel agrees with float64"], ok=not bad)


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of work, its backward pass included, waited for."""
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def other_scans() -> dict[str, Callable]:
    """The scan of flash-linear-attention, where it is installed, as a function of chunked_scan's arguments."""
    if not importlib.util.find_spec("fla"):
        return {}
    from fla.ops.simple_gla import chunk_simple_gla

    return {"chunk_simple_gla": lambda q, k, v, log_decay: chunk_simple_gla(q, k, v, g=log_decay, scale=1.0)[0]}


def kernels(device: str, tokens: int = 65_536, lengths: tuple[int, ...] = LENGTHS, rounds: int = 20) -> dict:
    """Scan and delta rule beside attention, cross-entropy beside the plain one, forward and backward, in turns."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows, raw, others = [], {}, other_scans() if device == "cuda" else {}
    notes = [f"{tokens} tokens, 8 heads of 64, forward and backward"]
    for T in lengths:
        shape = tokens // T, T, 8, 8, 64, 64, dtype, device
        scans = [x.requires_grad_() for x in scan_inputs(*shape)[:4]]
        deltas = [x.requires_grad_() for x in delta_inputs(*shape)]
        q, k, v = (torch.randn(tokens // T, 8, T, 64, device=device, dtype=dtype, requires_grad=True) for _ in "qkv")
        laps = {
            "attention": lambda q=q, k=k, v=v: torch.autograd.grad(causal_attention(q, k, v).sum(), (q, k, v)),
            "scan": lambda x=scans: torch.autograd.grad(chunked_scan(*x).sum(), x),
            "delta": lambda x=deltas: torch.autograd.grad(delta_rule(*x).sum(), x),
        }
        for name, other in others.items():
            try:
                apart = relative_error(other(*scans), chunked_scan(*scans))
                torch.autograd.grad(other(*scans).sum(), scans)
            except Exception as error:  # another's: it may not know this Triton
                notes.append(f"{name} T={T} is left out: {type(error).__name__}: {error}".splitlines()[0])
                continue
            laps[name] = lambda f=other, x=scans: torch.autograd.grad(f(*x).sum(), x)
            notes.append(f"{name} T={T}: relative difference to our scan {apart:.1e}")
        for work in laps.values():
            work()
        raw[f"T={T}"] = interleave({n: lambda w=w: timed(w, device) for n, w in laps.items()}, rounds)
        rows += [row | dict(what=f"{row['what']} T={T}") for row in compare(raw[f"T={T}"], "attention")]
    for V in (1024, 8192):
        h, w = (torch.randn(n, 512, device=device, dtype=dtype, requires_grad=True) for n in (tokens, V))
        targets = torch.randint(V, (tokens,), device=device)
        laps = {
            "eager": lambda h=h, w=w, t=targets: torch.autograd.grad(naive_cross_entropy(h, w, t, 30.0), (h, w)),
            "fused": lambda h=h, w=w, t=targets: torch.autograd.grad(softcapped_cross_entropy(h, w, t, 30.0), (h, w)),
        }
        memory = {}
        for name, work in laps.items():
            work()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                work()
                memory[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
        raw[f"V={V}"] = interleave({n: lambda w=w: timed(w, device) for n, w in laps.items()}, rounds)
        rows += [row | dict(what=f"cross-entropy {row['what']} V={V}", peak_mb=memory.get(row["what"]))
                 for row in compare(raw[f"V={V}"], "eager")]  # fmt: skip
    return dict(rows=rows, raw_seconds=raw, notes=notes, ok=True)


def bench(folder: Path, settings: dict[str, str], *arguments: str, seconds: float | None = None) -> None:
    """A part of tools.bench, which prints its own table and leaves its JSON in the folder; cut off after `seconds`."""
    command = [sys.executable, "-m", "tools.bench", *arguments, "--out", str(folder)]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(command, cwd=ROOT, env=os.environ | settings, check=False, timeout=seconds)


def archs(folder: Path, wanted: list[str], settings: dict[str, str], wait: float) -> dict:
    """Every architecture beside gpt, as many as the time is enough for; the next call goes on with the others."""

    def measured() -> dict[str, dict]:
        files = [json.loads(path.read_text()) for path in sorted(folder.glob("archs_*.json"))]
        return {row["what"]: row for found in files for row in found["rows"]}

    done = measured()
    if left := [name for name in wanted if name not in done]:
        arguments = ("--archs", ",".join(left), "--rounds", "3", "--name", f"after {len(done)}")
        bench(folder, settings, *arguments, seconds=wait)
        if measured().keys() == done.keys():
            stuck = folder / "stuck.txt"
            if stuck.is_file() and stuck.read_text() == left[0]:  # a third call would do the same
                row = dict(what=left[0], error=f"twice not measured within {wait} s, gpt beside it included")
                save_atomically(folder / f"archs_{left[0]}.json", json.dumps(dict(rows=[row])).encode())
            folder.mkdir(parents=True, exist_ok=True)
            stuck.write_text(left[0])
        done = measured()
    left, rows = [name for name in wanted if name not in done], [done[name] for name in wanted if name in done]
    notes = [f"not measured yet, call this part again: {', '.join(left)}"] if left else []
    return dict(settings=settings, rows=rows, notes=notes, unfinished=bool(left), ok=all("n" in row for row in rows))


def step(folder: Path, hardware: str) -> dict:
    """Tokens per second of the kit's step beside the plain one, and its share of the matrix units' peak."""
    _, _, config = read_settings(UPSTREAM)
    attention = choose_attention(config, Machine(torch.device("cuda"), dtype=torch.bfloat16), 64)
    torch.cuda.empty_cache()
    bench(folder, UPSTREAM, "step", "--rounds", "5", "--tokens", "524288")
    files = sorted(folder.glob("step_*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError("tools.bench step left no result; its words are above")
    found = json.loads(files[-1].read_text())
    params = config.num_params() * 6 + 12 * config.num_layers * config.train_seq_len * config.model_dim // 2
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in hardware), None)
    for row in (row for row in found["rows"] if "error" not in row):
        row["mfu"] = peak and row["tokens_per_second"] * params / peak / 1e12
    found["notes"].append(f"attention: {attention}; mfu: 6 operations per parameter and token, causal attention halved")
    return found


def long_run(folder: Path, seconds: int, wait: float) -> dict:
    """Training in a process of its own, begun by the first call, or anew if it died; ok once its result is there."""
    log, holder, process = folder / "run" / "train.log", folder / "pid", None

    def result() -> dict | None:
        return read_log(log).result if log.is_file() else None

    def alive() -> bool:
        if process is not None:
            return process.poll() is None
        with suppress(OSError):  # no process of that number any more; what has ended and is not waited for has no words
            return b"train_gpt.py" in Path("/proc", holder.read_text(), "cmdline").read_bytes()
        return False

    if not (result() or alive()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        env = os.environ | dict(OUT_DIR=str(folder), RUN_ID="run", MAX_WALLCLOCK_SECONDS=str(seconds))
        with (folder / "output.txt").open("w") as output:
            process = subprocess.Popen([sys.executable, str(ROOT / "train_gpt.py")], env=env, cwd=ROOT, stdout=output,
                                       stderr=output, start_new_session=True)  # fmt: skip
        holder.write_text(str(process.pid))
    deadline = time.monotonic() + wait
    while alive() and time.monotonic() < deadline:
        time.sleep(1)
    if not (found := result()):
        said = (folder / "output.txt").read_text().splitlines()[-1:]
        notes = [f"no result yet, call this part again; last line: {said}"]
        return dict(rows=[], notes=notes, unfinished=True, ok=False)
    kept = ("val_bpb", "steps", "step_avg_ms", "train_seconds", "bytes_total", "valid", "dataset", "hardware")
    rows, lines = [{name: found[name] for name in kept}], log.read_text().splitlines()
    return dict(rows=rows, log=lines, notes=[], unfinished=False, ok=found["valid"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "records" / "benchmarks")
    options = parser.parse_args(argv)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{unknown.pop()} is no part; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print("error: gpu_check needs a CUDA device, and PyTorch finds none here", file=sys.stderr)
        return 2
    hardware, ok = hardware_name(Machine(torch.device("cuda"))), True
    slug = re.sub("[^a-z0-9]+", "_", hardware.lower()).strip("_")
    folder, small = ROOT / "runs" / "gpu_check" / slug, UPSTREAM | dict(TRAIN_BATCH_TOKENS="65536")
    order = sorted(names(), key=lambda name: name not in FIRST)
    parts = {
        "parity": lambda: parity("cuda"), "kernels": lambda: kernels("cuda"),
        "archs": lambda: archs(folder / "archs", order, small, WAIT_SECONDS),
        "step": lambda: step(folder / "step", hardware), "run": lambda: long_run(folder / "run", 600, WAIT_SECONDS),
    }  # fmt: skip
    for part in options.parts or PARTS:
        path = options.out / f"gpu_check_{part}_{slug}.json"
        if options.again:
            path.unlink(missing_ok=True)
            shutil.rmtree(folder / part, ignore_errors=True)
        if not path.is_file():
            head = dict(part=part, date=time.strftime("%Y-%m-%d"), hardware=hardware, torch=torch.__version__)
            head |= dict(python=platform.python_version())
            try:
                found = head | parts[part]()
            except Exception as error:  # the other parts are worth having
                traceback.print_exc()
                notes = [f"FAIL {part}: {type(error).__name__}: {error}"]
                found = dict(rows=[], notes=notes, unfinished=True, ok=False)
            if not found.pop("unfinished", False):
                save_atomically(path, json.dumps(found, indent=1).encode() + b"\n")
        else:
            found = json.loads(path.read_text())
        print("\n".join([f"== {part}", table(found["rows"]) if found["rows"] else "", *found["notes"]]))
        ok &= found["ok"]
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
