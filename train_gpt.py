"""Train a small language model inside a time budget, store it inside a byte budget, score it in bits per byte.

    python train_gpt.py                       train on this machine; every setting is an environment variable
    ARCH=gpt SEED=42 torchrun --standalone --nproc_per_node=8 train_gpt.py
    python train_gpt.py score model.bin       score token streams: requests on stdin, one JSON line each,
                                              {"tokens": shard, "nats": file to write, a float32 per target}
Reads top to bottom: settings, machine, tokens and batches, score, optimizers, schedule, artifact, training, main.
"""

import contextlib
import copy
import ctypes
import dataclasses
import difflib
import gc
import glob
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import queue
import shutil
import signal
import struct
import sys
import sysconfig
import threading
import time
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import get_args

PROCESS_START = time.perf_counter()
gc.disable()  # collecting while torch is imported costs a quarter of the time to the first error message

import numpy as np  # noqa: E402  the process clock starts before the slow imports
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import (  # noqa: E402
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

# BEGIN KIT IMPORT: tools.pack puts the files themselves in place of these lines.
from architectures import load_architecture  # noqa: E402
from architectures.layers import (  # noqa: E402
    MAX_BLOCKED_SEQ_LEN,
    LanguageModel,
    ModelConfig,
    causal_attention,
    is_control,
)

# END KIT IMPORT

gc.enable()
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
MEMORY_SHARE = 0.6  # of what is free, for what a forward keeps; logits, gradients and optimizers take of the rest
KEPT_COMPILED = 0.55  # of what eager on CPU keeps for backward: gpt's graph for a GPU, in bf16, 129 of 237 kB a token
CALIBRATION_ROWS_TOKENS = 16_384  # that GPTQ looks at in one pass, which is not compiled
BYTE_CAP = 16_000_000  # of the artifact and the script together, decimal

# -----------------------------------------------------------------------------
# Settings. Every field is an environment variable of the same name in capitals; the architecture's Config adds its own.


@dataclass
class RunConfig:
    """One training run. Names and defaults are upstream's where upstream has them."""

    data_path: str = "./data/datasets/fineweb10B_sp1024"
    tokenizer_path: str | None = None  # the manifest's own; needed only for shards without a manifest
    out_dir: str = "runs"
    run_id: str | None = None  # folder under OUT_DIR: train.log and model.bin
    seed: int = 1337  # of the initial weights and of the order of the data

    iterations: int = 20_000
    max_wallclock_seconds: float = 600.0  # hard cap on training, validation in between included; 0 = off
    train_batch_tokens: int = 524_288  # per optimizer step, over all ranks
    micro_batch_tokens: int | None = None  # per rank and backward pass; by the device's memory
    warmup_steps: int = 20  # on random tokens, outside the clock, undone afterwards
    warmdown_iters: int = 1200
    warmdown_max_fraction: float = 0.7  # of the run: a short or slow run must not train at a starved rate
    schedule: str = "time"  # the rate falls as the first of steps and clock runs out; "steps": with steps alone
    train_log_every: int = 200
    val_loss_every: int = 0  # 0 = after training only: the clock does not stop for validation

    embed_lr: float = 0.6  # untied embedding
    head_lr: float = 0.008
    tied_embed_lr: float = 0.05
    matrix_lr: float = 0.04  # Muon; the update has unit spectral norm, so this is a step size
    scalar_lr: float = 0.04
    muon_momentum: float = 0.95
    muon_backend_steps: int = 5
    muon_polynomial: str = "polar"  # express; "jordan": upstream's fixed coefficients
    muon_row_norm: bool = False  # every output channel of the update has norm 1 before it is orthogonalised
    muon_momentum_warmup_start: float = 0.85
    muon_momentum_warmup_steps: int = 500
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip_norm: float = 0.0  # 0 = off
    muon_wd: float = 0.0  # decay of matrices, at every step by this times the rate; smaller weights also code better
    embed_wd: float = 0.0  # the same of embeddings and an untied head
    min_lr: float = 0.0  # at the warmdown's end, of the base rates
    ema_decay: float = 0.0  # of an average of the weights, which is then what is stored; 0 = off, else near 0.99
    ema_start: float = 0.6  # fraction of the run at which the average begins

    quant_bits: int = 8  # of matrices and embeddings in the artifact, 4 to 8
    quant_clip: float | None = None  # a row's largest number in its root mean squares; unset: where its error is least
    gptq_tokens: int = 0  # of training text, by which GPTQ rounds the matrices; 0 = they go to the nearest step
    artifact_bytes: int | None = None  # of model.bin; if it has more, the least clip that fits; default: the cap's rest
    eval_seq_len: int | None = None  # TRAIN_SEQ_LEN
    eval_stride: int = 0  # 0 = windows side by side; n = slide by n, score the last n of each window
    eval_carry: bool = True  # windows side by side hand on their state, in an architecture that has one, without TTT
    ttt_lr: float = 0.0  # test-time training, score first: SGD's rate on the text that has been scored; 0 = off
    ttt_tokens: int = 32_768  # scored between two of its steps
    val_batch_size: int | None = None  # tokens scored at once on a rank; by the device
    val_max_tokens: int | None = None  # score only the beginning; the result is then marked partial
    quick_score: bool = False  # for studies: score the artifact alone, on CPU too in bf16 and compiled, as training is

    device: str | None = None  # cuda, mps or cpu; the first there is
    bf16: bool | None = None  # activations in bf16; where a short race says that it is fast
    compile: bool | None = None  # torch.compile; on CUDA, and on CPU for runs long enough to pay for it
    cuda_graphs: bool = False  # replay forward and backward: for steps that take longer to launch than to compute

    def __post_init__(self) -> None:
        at_least_one = ("iterations", "train_batch_tokens", "train_log_every", "muon_backend_steps", "ttt_tokens")
        at_least_zero = ("max_wallclock_seconds", "warmup_steps", "warmdown_iters", "val_loss_every", "eval_stride")
        at_least_zero += ("grad_clip_norm", "muon_wd", "embed_wd", "gptq_tokens", "ttt_lr")
        for minimum, names in ((1, at_least_one), (0, at_least_zero)):
            for name in names:
                if not getattr(self, name) >= minimum:
                    raise ValueError(f"{name.upper()}={getattr(self, name)} must be at least {minimum}")
        for name in ("micro_batch_tokens", "artifact_bytes", "eval_seq_len", "val_batch_size", "val_max_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be at least 1, or unset for the default")
        if not 4 <= self.quant_bits <= 8:
            raise ValueError(f"QUANT_BITS={self.quant_bits} must be 4, 5, 6, 7 or 8")
        most = coarsest_clip(self.quant_bits)
        if self.quant_clip is not None and not 1 <= self.quant_clip <= most:
            raise ValueError(f"QUANT_CLIP={self.quant_clip} must be 1 to {most} at {self.quant_bits} bits, or unset")
        if self.schedule not in ("time", "steps"):
            raise ValueError(f"SCHEDULE={self.schedule} must be time or steps")
        if self.muon_polynomial not in MUON_POLYNOMIALS:
            raise ValueError(f"MUON_POLYNOMIAL={self.muon_polynomial} must be {' or '.join(MUON_POLYNOMIALS)}")
        for name in ("warmdown_max_fraction", "ema_decay", "ema_start", "min_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be between 0 and 1")

    @property
    def cap_seconds(self) -> float:
        return self.max_wallclock_seconds or math.inf

    @property
    def deadline(self) -> float:
        """Seconds by which a step is planned to end: the rest up to the cap is for the hiccups of the machine."""
        return self.cap_seconds - 0.02


def parse(name: str, text: str, kind):
    """The value of variable `name` for a field of type bool, int, float, str or one of these `| None`."""
    if NoneType in get_args(kind):
        if text.lower() in ("", "none"):
            return None
        kind = next(k for k in get_args(kind) if k is not NoneType)
    try:
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        return kind(text.replace("_", "") if kind is int else text)
    except (ValueError, KeyError):
        words = {bool: "0 or 1", int: "a whole number", float: "a number"}
        raise ValueError(f"{name}={text!r} must be {words[kind]}") from None


def from_env(cls, env=os.environ):
    """A config dataclass, each field overridden by the variable of its name in capitals."""
    named = {f.name: parse(f.name.upper(), env[f.name.upper()], f.type) for f in fields(cls) if f.name.upper() in env}
    return cls(**named)


def reject_typos(configs: list, env=os.environ) -> None:
    """Stop on NUM_LAYRES=12, which would otherwise train the default for ten minutes."""
    known = {f.name.upper() for c in configs for f in fields(c)} | {"ARCH"}
    others = {"COMPILER"}  # variables of other programs that look like ours
    prefixes = tuple(c.env_prefix for c in configs if getattr(c, "env_prefix", ""))
    for name in sorted(set(env) - known - others):
        close = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.85)
        if close:
            raise ValueError(f"{name} is not a setting. Did you mean {close[0]}?")
        if name.startswith(prefixes) if prefixes else False:
            own = sorted(k for k in known if k.startswith(prefixes))
            raise ValueError(f"{name} is not a setting of this architecture. It has {', '.join(own)}")


def read_settings(env=os.environ) -> tuple[str, RunConfig, ModelConfig]:
    """(arch, run config, model config) from the environment; ValueError says what is wrong with it."""
    arch = env.get("ARCH", "gpt")
    _, Config = load_architecture(arch)
    reject_typos([RunConfig, Config], env)
    return arch, from_env(RunConfig, env), from_env(Config, env)


# -----------------------------------------------------------------------------
# The machine: device, ranks, number format, and the log that only rank 0 writes.


@dataclass
class Machine:
    """Where this process runs. rank and world_size are torchrun's; dtype is that of activations in training."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    dtype: torch.dtype = torch.float32
    compile: bool = False
    quick_score: bool = False

    @property
    def lag(self) -> int:
        """Steps that may be in flight before the host waits: one on CUDA, so that the queue never runs dry."""
        return int(self.device.type == "cuda")

    @property
    def score_dtype(self) -> torch.dtype:
        """Number format in which this run's own scores are computed."""
        return self.dtype if self.quick_score else score_dtype(self.device)

    def sum(self, values: Tensor) -> Tensor:
        """values added up over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def fork_rng(self) -> contextlib.AbstractContextManager:
        """What is drawn at random inside is no part of the run."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    def most(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.world_size == 1:
            return value
        values = torch.tensor([value], device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def begin_mean(self, values: Tensor) -> Callable[[], object]:
        """Begin to average values over the ranks, in place; the call of what comes back waits for the end of that."""
        if self.world_size == 1:
            return lambda: None
        return dist.all_reduce(values.div_(self.world_size), async_op=True).wait


def score_dtype(device: torch.device) -> torch.dtype:
    """Number format of scoring: fp32 on CPU, where bf16 would make a score depend on the processor."""
    return torch.bfloat16 if device.type == "cuda" and bf16_is_fast(device) else torch.float32


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bf16 matmuls beat fp32 here: known on CUDA, a 50 ms race on CPUs that have the instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(1024, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        a @ b
        laps = []
        for _ in range(8):
            start = time.perf_counter()
            a @ b
            laps.append(time.perf_counter() - start)
        seconds[dtype] = min(laps)
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def compile_pays(run: RunConfig, device: torch.device) -> tuple[bool, str]:
    """(compile?, why): COMPILE, or where it pays; it costs most of a minute, and on CUDA a C, on CPU a C++ compiler."""
    if run.compile is not None:
        return run.compile, "COMPILE is set"
    if device.type not in ("cuda", "cpu"):
        return False, f"not by default on {device.type}"
    if device.type == "cpu" and (run.iterations < 200 or run.cap_seconds < 120):
        return False, "the run is too short to pay for it"
    variable, *usual = ("CC", "gcc", "clang") if device.type == "cuda" else ("CXX", "g++", "clang++")
    if not any(shutil.which(name) for name in (os.environ.get(variable, ""), *usual)):
        return False, f"no compiler found; install {usual[0]} to train faster"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return False, "no Python headers found; install python3-dev to train faster"
    return True, "CUDA" if device.type == "cuda" else "the run is long enough to pay for it"


def pick_device(wanted: str | None) -> torch.device:
    """The device of this process: DEVICE, or the first of cuda, mps, cpu that there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = wanted or next(k for k, ok in there.items() if ok)
    if not there.get(kind):
        raise ValueError(f"DEVICE={kind} is not here. Available: {', '.join(k for k, ok in there.items() if ok)}")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, for the next step's buffers. By itself it hands large ones back, and the system
    clears pages for them again at every step: a sixth of its time on a CPU. Other C libraries are left alone.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 0)  # no allocation has pages of its own
        mallopt(M_TRIM_THRESHOLD, -1)  # and the heap never shrinks


def make_machine(run: RunConfig) -> Machine:
    """Pick the device, join the other ranks if torchrun started this process, and choose the number format."""
    device = pick_device(run.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    machine = Machine(device, quick_score=run.quick_score)
    if "RANK" in os.environ:
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        machine.rank, machine.world_size = dist.get_rank(), dist.get_world_size()
    fast = torch.tensor(float(bf16_is_fast(device) if run.bf16 is None else run.bf16), device=device)
    if machine.world_size > 1:
        dist.broadcast(fast, 0)  # the race may end differently on another rank
    machine.dtype = torch.bfloat16 if fast.item() else torch.float32
    return machine


def attention_kernels(device: torch.device) -> dict[str, tuple[SDPBackend, str | None]]:
    """What is worth a race on this device, by name: PyTorch's backend, and whose flash attention, None for its own."""
    if device.type != "cuda":
        return {}
    kernels = {"flash": (SDPBackend.FLASH_ATTENTION, None), "cudnn": (SDPBackend.CUDNN_ATTENTION, None)}
    if importlib.util.find_spec("flash_attn_interface"):  # the package of FlashAttention 3
        kernels["flash3"] = SDPBackend.FLASH_ATTENTION, "FA3"
    return kernels


def use_flash_attention(version: str | None) -> None:
    """Have PyTorch's backend of that name call another package's kernels, or its own again."""
    if version:
        activate_flash_attention_impl(version)
    elif current_flash_attention_impl():
        restore_flash_attention_impl()


def race(kernels: dict[str, tuple[SDPBackend, str | None]], work: Callable[[], Tensor]) -> dict[str, float]:
    """Milliseconds of work() with each kernel and no other, the least of ten; a kernel that refuses is left out."""
    found = {}
    for name, (backend, version) in kernels.items():
        with contextlib.suppress(Exception):  # of whatever kind it is that a kernel says it in
            use_flash_attention(version)
            with sdpa_kernel(backend):
                laps = []
                for _ in range(10):
                    start = time.perf_counter()
                    work().sum().item()  # waits for the device
                    laps.append(1000 * (time.perf_counter() - start))
            found[name] = min(laps)
    return found


PREFERRED = contextlib.ExitStack()  # what PyTorch has been told to attend by, until it is told otherwise


def choose_attention(config: ModelConfig, machine: Machine, rows: int) -> str:
    """Have PyTorch prefer the attention kernel that is fastest, forward and backward, at this shape; what was found."""
    kernels = attention_kernels(machine.device)
    if not kernels or machine.dtype != torch.bfloat16:
        return "PyTorch's choice"
    PREFERRED.close()
    q, k, v = (
        torch.randn(rows, config.train_seq_len, heads, config.head_dim, device=machine.device, dtype=machine.dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    )
    found = race(kernels, lambda: torch.autograd.grad(causal_attention(q, k, v).sum(), (q, k, v))[0])
    order = machine.sum(torch.tensor([found.get(name, math.inf) for name in kernels], device=machine.device))
    if not order.isfinite().any():  # that on no kernel all ranks agree
        use_flash_attention(None)
        return "PyTorch's choice (all others refuse)"
    name = list(kernels)[int(order.argmin())]  # the same on every rank
    backend, version = kernels[name]
    use_flash_attention(version)
    # The others stay, for shapes that the first refuses.
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    PREFERRED.enter_context(sdpa_kernel([backend, *others], set_priority=True))
    return f"{name} ({', '.join(f'{kernel} {ms:.2f}ms' for kernel, ms in found.items())})"


def hardware_name(machine: Machine) -> str:
    """What the record says it ran on, such as "8x NVIDIA H100 80GB HBM3" or "2 cores of Intel(R) Xeon(R) Processor"."""
    if machine.device.type == "cuda":
        return f"{machine.world_size}x {torch.cuda.get_device_name(machine.device)}"
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{count} {'core' if count == 1 else 'cores'} of {model}"


class RunLog:
    """Rank 0's log: each line to the terminal and to a file; and the phases of the run with monotonic times."""

    def __init__(self, path: Path | None):
        self.file = None
        self.phase_name = self.phase_begin = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("x", buffering=1, encoding="utf-8")

    def __call__(self, line: str) -> None:
        if self.file is not None:
            self.file.write(line + "\n")
            print(line, flush=True)

    def phase(self, name: str | None, now: float | None = None) -> None:
        """End the phase that runs, if any, and begin `name`. Seconds count from the start of the process."""
        now = (time.perf_counter() if now is None else now) - PROCESS_START
        if self.phase_name is not None:
            self(f"phase:{self.phase_name} begin_seconds:{self.phase_begin:.3f} end_seconds:{now:.3f}")
        self.phase_name, self.phase_begin = name, now


# -----------------------------------------------------------------------------
# Tokens and batches. Shards are upstream's: 256 int32 (magic, version, count), then uint16 tokens.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def read_shard(path: str | Path) -> np.ndarray:
    """The uint16 tokens of one shard, memory-mapped; ValueError for a file that is not a whole shard."""
    size = os.path.getsize(path)
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ValueError(f"{path} is not a token shard of version {SHARD_VERSION}; prepare the data again")
    promised = SHARD_HEADER_BYTES + 2 * int(header[2])
    if size != promised:
        raise ValueError(f"{path} has {size} bytes, its header promises {promised}; fetch it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(int(header[2]),))


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ByteTable:
    """Bytes of text behind each token: base[id], one more for a leading space unless the token before is a boundary."""

    def __init__(self, tokenizer_path: str | Path):
        if str(tokenizer_path).endswith(".json"):
            config = json.loads(Path(tokenizer_path).read_text())["config"]
            self.base = np.zeros(config["byte_offset"] + config["byte_count"], dtype=np.int64)
            self.base[config["byte_offset"] :] = 1
            self.leading_space, self.boundary = np.zeros_like(self.base, dtype=bool), self.base == 0
            return
        from sentencepiece import SentencePieceProcessor

        sp = SentencePieceProcessor(model_file=str(tokenizer_path))
        ids = range(sp.vocab_size())
        # A model that adds a dummy prefix writes a space before the first word that the text does not have.
        dummy_prefix = sp.encode("a", out_type=str)[0].startswith("▁")
        self.boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])
        pieces = [sp.id_to_piece(i) for i in ids]
        self.leading_space = np.array([dummy_prefix and piece.startswith("▁") for piece in pieces]) & ~self.boundary
        spelled = [len(piece.replace("▁", " ").encode()) for piece in pieces]
        self.base = np.array([1 if sp.is_byte(i) else 0 if self.boundary[i] else spelled[i] for i in ids])
        self.base -= self.leading_space

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of each target tokens[1:], as int64, given the token before it."""
        return self.base[tokens[1:]] + (self.leading_space[tokens[1:]] & ~self.boundary[tokens[:-1]])


class Dataset:
    """A prepared data folder: its shards, validation tokens, and the raw bytes that they stand for."""

    def __init__(self, data_path: str, tokenizer_path: str | None):
        folder = Path(data_path)
        self.name = folder.name
        hint = "make it with `python data/prepare.py` or `python data/download.py`, or set DATA_PATH"
        if not folder.is_dir():
            raise ValueError(f"DATA_PATH={data_path} is not a folder; {hint}")
        manifest_path = folder / "manifest.json"
        self.manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else None
        self.sha256 = sha256(manifest_path) if self.manifest else None
        self.train_files, self.val_files = (self.shards(folder, split, hint) for split in ("train", "val"))
        if self.manifest:
            listed = folder / self.manifest["tokenizer"]["file"]
            self.tokenizer_path = tokenizer_path or str(listed)
        elif tokenizer_path:
            self.tokenizer_path = tokenizer_path
        else:
            raise ValueError(f"DATA_PATH={data_path} has no manifest.json, so TOKENIZER_PATH must name the tokenizer")
        if not Path(self.tokenizer_path).is_file():
            raise ValueError(f"TOKENIZER_PATH={self.tokenizer_path} does not exist")
        self.tokenizer_sha256 = sha256(self.tokenizer_path)
        if self.manifest and self.tokenizer_sha256 != self.manifest["tokenizer"]["sha256"]:
            raise ValueError(f"TOKENIZER_PATH={self.tokenizer_path} is not the tokenizer of {data_path}; unset it")
        self.bytes_of = ByteTable(self.tokenizer_path)
        self.vocab_size = len(self.bytes_of.base)

    def shards(self, folder: Path, split: str, hint: str) -> list[str]:
        """The shards of a split: those that the manifest lists and no others; without a manifest, all there are."""
        if not self.manifest:
            found = sorted(glob.glob(str(folder / f"fineweb_{split}_*.bin")))
            if not found:
                raise ValueError(f"DATA_PATH={folder} has no fineweb_{split}_*.bin; {hint}")
            return found
        listed = self.manifest["splits"][split]["shards"]
        for entry in listed:
            path = folder / entry["file"]
            if not path.is_file():
                raise ValueError(f"{path} is in manifest.json but not on disk; {hint}")
            same = len(read_shard(path)) == entry["tokens"]
            if not same or (split == "val" and sha256(path) != entry["sha256"]):
                raise ValueError(f"{path} is not the file that manifest.json describes; {hint}")
        return [str(folder / entry["file"]) for entry in listed]

    def validation(self, max_tokens: int | None) -> tuple[np.ndarray, int, bool]:
        """(tokens, raw bytes of all targets, partial?); the byte table must agree with the manifest to the byte."""
        tokens = np.concatenate([read_shard(path) for path in self.val_files])
        if tokens.max() >= self.vocab_size:
            raise ValueError(
                f"{self.val_files[0]} holds token {tokens.max()}, but {self.tokenizer_path} has {self.vocab_size}: "
                "the tokenizer does not fit these shards; set TOKENIZER_PATH"
            )
        counted = int(self.bytes_of.count(tokens).sum())
        if self.manifest and counted != (raw := self.manifest["splits"]["val"]["bytes"]):
            raise ValueError(
                f"the validation tokens spell {counted} bytes, manifest.json says {raw}: "
                f"{self.tokenizer_path} does not fit the shards in {self.name}; prepare the data again"
            )
        if max_tokens is not None and max_tokens + 1 < len(tokens):
            tokens = tokens[: max_tokens + 1]
            return tokens, int(self.bytes_of.count(tokens).sum()), True
        return tokens, counted, False


class TokenLoader:
    """Batches of (input_ids, target_ids), each (rows, T) int64. The global batch is a function of (seed, step) alone.

    Each epoch shifts the shards by a random phase, cuts them into windows of T and walks these in a random order.
    """

    def __init__(self, files: list[str], run: RunConfig, config: ModelConfig, machine: Machine):
        self.files, self.tokens = files, [read_shard(path) for path in files]
        self.seq_len, self.vocab_size = config.train_seq_len, config.vocab_size
        self.rows, self.seed, self.machine = run.train_batch_tokens // self.seq_len, run.seed, machine
        seq_len = self.seq_len
        self.windows = np.array([max(0, (len(t) - seq_len) // seq_len) for t in self.tokens])  # room for any phase
        self.num_windows = int(self.windows.sum())
        if not self.num_windows:
            raise ValueError(f"no training shard is longer than two windows of TRAIN_SEQ_LEN={seq_len}; use more text")
        self.first = np.concatenate(([0], np.cumsum(self.windows)))
        self.draw(0)  # the clock does not run yet

    def draw(self, epoch: int) -> None:
        """The order of an epoch's windows, and where in each shard the first begins."""
        rng = np.random.default_rng((self.seed, epoch))
        self.epoch, self.order = epoch, rng.permutation(self.num_windows)
        self.phases = rng.integers(self.seq_len, size=len(self.tokens))

    def window(self, index: int) -> np.ndarray:
        """The index-th window of the whole run, T + 1 tokens."""
        epoch, place = divmod(index, self.num_windows)
        if epoch != self.epoch:
            self.draw(epoch)
        number = self.order[place]
        shard = int(np.searchsorted(self.first, number, side="right")) - 1
        start = int(number - self.first[shard]) * self.seq_len + self.phases[shard]
        window = self.tokens[shard][start : start + self.seq_len + 1]
        if window.max() >= self.vocab_size:
            token, file = window.max(), self.files[shard]
            raise ValueError(f"{file} holds token {token}, which VOCAB_SIZE={self.vocab_size} does not reach")
        return window

    def batch(self, step: int) -> Tensor:
        """This rank's rows of the batch of `step`, (rows / world_size, T + 1) int32, pinned for the copy."""
        mine = self.rows // self.machine.world_size
        first = step * self.rows + self.machine.rank * mine
        batch = torch.from_numpy(np.stack([self.window(i) for i in range(first, first + mine)]).astype(np.int32))
        return batch.pin_memory() if self.machine.device.type == "cuda" else batch

    def rows_after(self, step: int, tokens: int) -> Iterator[Tensor]:
        """This rank's rows (n, T) from the batch of `step` on, a few at a time; over the ranks `tokens` or more."""
        left = -(-tokens // (self.seq_len * self.machine.world_size))
        while left > 0:
            batch = self.batch(step)[:left, :-1]
            for rows in batch.split(max(1, CALIBRATION_ROWS_TOKENS // self.seq_len)):
                yield rows.to(self.machine.device).long()
            step, left = step + 1, left - len(batch)

    def __iter__(self) -> Iterator[Tensor]:
        """Batches from step 0 on, on the device, prepared two ahead by a thread."""
        ready: queue.Queue = queue.Queue(maxsize=2)
        stop = threading.Event()

        def put(item: Tensor | Exception) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    pass

        def work() -> None:
            step = 0
            try:
                while not stop.is_set():
                    put(self.batch(step))
                    step += 1
            except Exception as error:  # the reader raises it
                put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, Exception):
                    raise item
                yield item.to(self.machine.device, non_blocking=True).long()
        finally:
            stop.set()


# -----------------------------------------------------------------------------
# Score. The same function scores the run's result and the referee's requests.


@dataclass
class ScorePlan:
    """How a stream is cut into windows. It is part of the artifact. stride == seq_len: side by side."""

    seq_len: int
    stride: int
    carry: bool = False  # each window goes on from the state of the one before it; only side by side
    ttt_lr: float = 0.0  # of TestTimeTraining; 0 = off
    ttt_tokens: int = RunConfig.ttt_tokens  # scored between two of its steps

    def __post_init__(self) -> None:
        if not (self.seq_len >= 1 and 1 <= self.stride <= self.seq_len):
            raise ValueError(f"EVAL_STRIDE={self.stride} must be between 1 and EVAL_SEQ_LEN={self.seq_len}, or 0")

    def windows(self, num_targets: int) -> list[tuple[int, int]]:
        """(first input position, first scored place in the window): every target is scored once, left to right."""
        later = range(self.stride, num_targets + self.stride - self.seq_len, self.stride)
        return [(0, 0)] + [(begin, self.seq_len - self.stride) for begin in later]

    def chunks(self, num_targets: int) -> Iterator[list[tuple[int, int]]]:
        """The windows in order, those together that have the first scored place in common and no step between them."""
        windows = self.windows(num_targets)
        most = max(1, self.ttt_tokens // self.stride) if self.ttt_lr else len(windows)
        for _, alike in itertools.groupby(windows, key=lambda window: window[1]):
            alike = list(alike)
            yield from (alike[i : i + most] for i in range(0, len(alike), most))


def score_rows(plan: ScorePlan, batch_tokens: int | None, device: torch.device) -> int:
    """Windows scored at once. The shape never varies: a score must not depend on what else is in the batch."""
    return max(1, (batch_tokens or (65_536 if device.type == "cuda" else 8_192)) // plan.seq_len)


def is_sequential(model: LanguageModel) -> bool:
    """Whether the model learns from what it has scored, so that windows must come one by one."""
    return type(model).observe is not LanguageModel.observe


def carries(model: LanguageModel, plan: ScorePlan) -> bool:
    """Whether windows are scored as one text: a row of a batch goes on from the state of the row before it."""
    return plan.carry and plan.stride == plan.seq_len and not plan.ttt_lr and model.can_carry


def fill_generated(model: LanguageModel, learn: bool = False) -> None:
    """Put generated weights into their buffers, for scoring; with their graph, to learn."""
    with torch.set_grad_enabled(learn):
        for name, value in model.materialize().items():
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, value)


class TestTimeTraining:
    """SGD on what has been scored (dynamic evaluation, Krause et al. 2018, https://arxiv.org/abs/1709.07432).

    tokens is the stream, padded; nats_of scores `rows` windows of it at once, as for the score.
    """

    def __init__(self, model: LanguageModel, tokens: np.ndarray, plan: ScorePlan, machine: Machine, rows: int, nats_of):
        self.model, self.tokens, self.plan, self.machine = model, tokens, plan, machine
        self.rows, self.nats_of = rows, nats_of
        self.before = [(p, p.detach().clone(), p.requires_grad) for p in model.parameters()]
        self.learned = 0  # targets that a step has seen
        model.requires_grad_(True)

    def learn(self, scored: int) -> None:
        """A step on the whole windows, side by side, among the first `scored` targets that no step has seen."""
        T, rank, world_size = self.plan.seq_len, self.machine.rank, self.machine.world_size
        begins = range(self.learned, scored - T + 1, T)
        if not begins:
            return
        self.learned = begins[-1] + T
        mine = begins[rank::world_size]
        loss_scale = 1 / (len(begins) * T)
        for i in range(0, len(mine), self.rows):
            ids = batch_of(self.tokens, mine[i : i + self.rows], self.rows, T).to(self.machine.device)
            with torch.enable_grad():
                fill_generated(self.model, learn=True)
                nats = self.nats_of(ids[:, :-1], ids[:, 1:], 0)[: len(mine) - i]
                (loss_scale * nats.sum()).backward()
        with torch.no_grad():
            params = list(self.model.parameters())
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
            for p, grad in zip(params, self.machine.sum(flat).split([p.numel() for p in params]), strict=True):
                p.sub_(grad.view_as(p), alpha=self.plan.ttt_lr)
                p.grad = None
            fill_generated(self.model)

    @torch.no_grad()
    def undo(self) -> None:
        """Put the model back as it was."""
        for p, value, trained in self.before:
            p.copy_(value).requires_grad_(trained)
        fill_generated(self.model)


def batch_of(padded: np.ndarray, begins: Sequence[int], rows: int, seq_len: int) -> Tensor:
    """(rows, seq_len + 1) of the tokens from each of begins on, zeros in the rows after those."""
    ids = np.zeros((rows, seq_len + 1), dtype=np.int64)
    for row, begin in enumerate(begins):
        ids[row] = padded[begin : begin + seq_len + 1]
    return torch.from_numpy(ids)


def score_stream(
    model: LanguageModel, tokens: np.ndarray, plan: ScorePlan, machine: Machine, batch_tokens: int | None = None
) -> np.ndarray:
    """Nats of every target tokens[1:], float32, left to right from a fresh state; 0 where another rank scores."""
    num_targets = len(tokens) - 1
    result = np.zeros(max(0, num_targets), dtype=np.float32)
    if num_targets < 1:
        return result
    alone, carried = is_sequential(model), carries(model, plan)
    if carried:
        model.carry(True)
    chunks = list(plan.chunks(num_targets))
    rows = 1 if alone else score_rows(plan, batch_tokens, machine.device)
    if plan.ttt_lr:
        rows = min(rows, -(-max(map(len, chunks)) // machine.world_size))
    # Not on CPU: a compiled sum may differ in its last bits from that of a process that does not compile.
    compiled = machine.compile and (machine.device.type == "cuda" or machine.quick_score) and not alone
    nats_of = torch.compile(model.nats, dynamic=False) if compiled else model.nats
    padded = np.zeros(num_targets + 1 + plan.seq_len, dtype=np.int64)
    padded[: num_targets + 1] = tokens
    learner = TestTimeTraining(model, padded, plan, machine, rows, nats_of) if plan.ttt_lr else None
    for chunk in chunks:
        start = chunk[0][1]
        batches = [[begin for begin, _ in chunk[i : i + rows]] for i in range(0, len(chunk), rows)]
        for batch in batches if alone or carried else batches[machine.rank :: machine.world_size]:
            ids = batch_of(padded, batch, rows, plan.seq_len).to(machine.device)
            with torch.no_grad():
                nats = nats_of(ids[:, :-1], ids[:, 1:], start).float().cpu().numpy()
            for row, begin in enumerate(batch):
                end = min(begin + plan.seq_len, num_targets)
                result[begin + start : end] = nats[row, : end - begin - start]
                if alone:
                    model.observe(ids[row : row + 1, 1 + start : 1 + end - begin])
        if learner:
            learner.learn(min(chunk[-1][0] + plan.seq_len, num_targets))
    if learner:
        learner.undo()
    if carried:
        model.carry(False)
    return result


@dataclass
class Score:
    """nats_sum in float64 over all targets; val_loss in nats per target; val_bpb in bits per byte of raw text."""

    nats_sum: float
    val_tokens: int
    val_bytes: int

    @property
    def val_loss(self) -> float:
        return self.nats_sum / self.val_tokens

    @property
    def val_bpb(self) -> float:
        return self.nats_sum / (math.log(2) * self.val_bytes)


def score(
    model: LanguageModel,
    tokens: np.ndarray,
    num_bytes: int,
    plan: ScorePlan,
    machine: Machine,
    batch_tokens: int | None,
) -> Score:
    """The model's score on the whole stream, the same on every rank."""
    nats = score_stream(model, tokens, plan, machine, batch_tokens)
    total = torch.tensor([nats.sum(dtype=np.float64)], dtype=torch.float64)
    if machine.world_size > 1 and not (is_sequential(model) or carries(model, plan)):
        on_device = total.to(machine.device)  # NCCL adds only on the device
        total = machine.sum(on_device).cpu()
    return Score(float(total), len(tokens) - 1, num_bytes)


# -----------------------------------------------------------------------------
# Optimizers. Muon for matrices, Adam for embeddings, head and control tensors; every parameter in exactly one group.


def parameter_groups(model: LanguageModel) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by treatment: embed, head, matrix (2-D, or stacks of 2-D), scalar (control tensors)."""
    embed = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    head = [model.head.weight] if model.head is not None else []
    placed = {id(p) for p in embed + head}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in placed]
    groups = {
        "embed": [p for p in embed if p.requires_grad],
        "head": head,
        "matrix": [p for p in rest if not is_control(p)],
        "scalar": [p for p in rest if is_control(p)],
    }
    grouped = [id(p) for group in groups.values() for p in group]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(trainable), "a parameter is in no group or in two"
    return groups


# (a, b, c) of each step x <- a x + b x^3 + c x^5, the last repeated: Jordan et al. 2024 (https://kellerjordan.github.io
# /posts/muon/), the same in every step; Polar Express (Amsel et al. 2025, https://arxiv.org/abs/2505.16932), the best
# for what the steps before have left, for singular values from 0.001 up, computed for arguments 1.02 times larger: the
# polynomials explode beyond their range, and bf16 lifts a singular value of 1 over it.
MUON_POLYNOMIALS = {
    "jordan": [(3.4445, -4.7750, 2.0315)],
    "polar": [
        (8.12472, -22.23493, 15.66949),
        (4.02653, -2.77782, 0.49348),
        (3.87127, -2.74112, 0.4998),
        (3.25335, -2.34496, 0.46197),
        (2.25554, -1.57265, 0.37933),
        (1.875, -1.25, 0.375),
    ],
}


def orthogonalize(x: Tensor, steps: int, polynomial: str) -> Tensor:
    """x (n, R, C), R <= C, each matrix with its singular values pushed towards 1."""
    coefficients = MUON_POLYNOMIALS[polynomial]
    margin = 1.02 if polynomial == "polar" else 1.0
    x = x / (margin * x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for step in range(steps):
        a, b, c = coefficients[min(step, len(coefficients) - 1)]
        gram = x @ x.mT
        # The sums are made where the products end, before these are rounded: in bf16 that halves the error.
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon:
    """Momentum, then orthogonalised updates (https://kellerjordan.github.io/posts/muon/), batched by shape.

    Matrices are laid on their side where that makes shapes equal; each rank orthogonalises its part of a batch. What
    the ranks exchange of one batch travels while the next is computed. MUON_ROW_NORM is MuonEq-R (Chang et al. 2026,
    https://arxiv.org/abs/2603.28254).
    """

    def __init__(self, params: list[nn.Parameter], run: RunConfig, machine: Machine):
        self.base_lr = self.lr = run.matrix_lr
        self.decay, self.row_norm = run.muon_wd, run.muon_row_norm
        self.momentum, self.how, self.machine = 0.95, (run.muon_backend_steps, run.muon_polynomial), machine
        self.orthogonalize = torch.compile(orthogonalize, dynamic=False) if machine.compile else orthogonalize
        self.batches: dict[tuple[int, int], list[nn.Parameter]] = {}
        for p in params:
            self.batches.setdefault((min(p.shape[-2:]), max(p.shape[-2:])), []).append(p)
        self.grads: dict[tuple[int, int], tuple[Tensor, Callable]] = {}  # (n, R, C), and what waits for their mean
        self.buffers: dict[tuple[int, int], Tensor] = {}

    @staticmethod
    def on_side(x: Tensor) -> Tensor:
        """A view of a matrix or stack of matrices as (n, R, C) with R <= C."""
        x = x.reshape(-1, *x.shape[-2:])
        return x.mT if x.size(-2) > x.size(-1) else x

    @staticmethod
    def upright(batch: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
        """The undoing of on_side: views of the batch (n, R, C) in the shapes of the parameters that it is made of."""
        parts = batch.split([math.prod(p.shape[:-2]) for p in params])
        turned = (part.mT if p.size(-2) > p.size(-1) else part for p, part in zip(params, parts, strict=True))
        return [part.reshape(p.shape) for p, part in zip(params, turned, strict=True)]

    def collect(self) -> None:
        """Batch the gradients, leaving views in .grad, and begin to average them over the ranks."""
        for shape, params in self.batches.items():
            grads = torch.cat([self.on_side(p.grad) for p in params])
            for p, view in zip(params, self.upright(grads, params), strict=True):
                p.grad = view
            self.grads[shape] = grads, self.machine.begin_mean(grads)

    def wait(self) -> None:
        """Until all gradients are averaged."""
        for _, wait in self.grads.values():
            wait()

    @torch.no_grad()
    def step(self) -> None:
        """Move the weights by what collect() has batched."""
        updates = []
        for shape, (grads, wait) in self.grads.items():
            wait()
            if shape not in self.buffers:
                self.buffers[shape] = torch.zeros_like(grads)
            buffer = self.buffers[shape].mul_(self.momentum).add_(grads)
            moved = grads.add_(buffer, alpha=self.momentum)
            if self.row_norm:
                for rows in self.upright(moved, self.batches[shape]):  # views, in which rows are rows
                    nn.functional.normalize(rows, dim=-1, out=rows)
            updates.append(self.spread(moved.to(self.machine.dtype)))
        for params, finish in zip(self.batches.values(), updates, strict=True):
            for p, update in zip(params, self.upright(finish().to(params[0].dtype), params), strict=True):
                if self.decay:
                    p.mul_(1 - self.lr * self.decay)
                p.add_(update, alpha=-self.lr * max(1.0, p.size(-2) / p.size(-1)) ** 0.5)
        self.grads = {}

    def spread(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin orthogonalize(x), each rank doing its share of the batch; the call of what comes back gives it."""
        world = self.machine.world_size
        if world == 1:
            whole = self.orthogonalize(x, *self.how)
            return lambda: whole
        share = -(-len(x) // world)
        padded = torch.cat((x, x.new_zeros(share * world - len(x), *x.shape[1:])))
        mine = self.orthogonalize(padded[self.machine.rank * share :][:share], *self.how)
        parts = [torch.empty_like(mine) for _ in range(world)]
        work = dist.all_gather(parts, mine.contiguous(), async_op=True)

        def finish() -> Tensor:
            work.wait()
            return torch.cat(parts)[: len(x)]

        return finish


class Optimizers:
    """Muon and Adam side by side, their rates scaled together."""

    def __init__(self, model: LanguageModel, run: RunConfig, machine: Machine):
        groups, self.run = parameter_groups(model), run
        embed_lr = run.tied_embed_lr if model.head is None else run.embed_lr
        rates = [("embed", embed_lr, run.embed_wd), ("head", run.head_lr, run.embed_wd), ("scalar", run.scalar_lr, 0.0)]
        adam = [
            dict(params=groups[name], lr=lr, base_lr=lr, weight_decay=decay)
            for name, lr, decay in rates
            if groups[name]
        ]
        self.adam = torch.optim.AdamW(adam, betas=(run.beta1, run.beta2), eps=run.adam_eps, fused=True)
        self.muon = Muon(groups["matrix"], run, machine)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.average: list[Tensor] = []

    def exchange(self, report: Tensor) -> Tensor:
        """Average the gradients over the ranks. The report (float32, 1-D) travels with Adam's and comes back averaged;
        the matrices are on their way until step() or muon.wait().
        """
        for p in self.params:
            if p.grad is None:  # outside this step's graph: a switch not yet flipped
                p.grad = torch.zeros_like(p)
        if self.muon.machine.world_size > 1:
            params = [p for group in self.adam.param_groups for p in group["params"]]
            flat = torch.cat([*(p.grad.reshape(-1) for p in params), report])
            self.muon.machine.begin_mean(flat)()
            *grads, report = flat.split([*(p.numel() for p in params), len(report)])
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.view_as(p)
        self.muon.collect()
        return report

    @torch.no_grad()
    def follow(self, fraction: float) -> None:
        """Move the average of the weights towards them; it begins as they are at EMA_START of the run."""
        if not self.run.ema_decay or fraction < self.run.ema_start:
            return
        if not self.average:
            self.average = [p.clone() for p in self.params]
        torch._foreach_lerp_(self.average, self.params, 1 - self.run.ema_decay)

    def install_average(self) -> None:
        """Put the average in the weights' place. Nothing is computed: it may happen when the time is up."""
        for p, mean in zip(self.params, self.average, strict=False):
            p.data = mean

    def step(self, step: int, lr_scale: float) -> None:
        """Apply the gradients of the given step at lr_scale times the base rates, and drop them."""
        run = self.run
        if run.grad_clip_norm > 0:
            self.muon.wait()
            nn.utils.clip_grad_norm_(self.params, run.grad_clip_norm, foreach=True)
        warm = min(1.0, step / run.muon_momentum_warmup_steps) if run.muon_momentum_warmup_steps else 1.0
        self.muon.momentum = (1 - warm) * run.muon_momentum_warmup_start + warm * run.muon_momentum
        self.muon.lr = self.muon.base_lr * lr_scale
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.muon.step()
        self.adam.step()
        for p in self.params:
            p.grad = None


# -----------------------------------------------------------------------------
# Schedule


class Schedule:
    """How far the run is and what follows from it: the learning-rate scale, and when to stop.

    Fed with times on which all ranks agree, so that every rank trains at the same rate and stops on the same step.
    """

    def __init__(self, run: RunConfig, step_seconds: float, lag: int):
        self.run, self.lag = run, lag
        self.recent = deque([step_seconds] if step_seconds else [], maxlen=20)
        self.step_seconds = step_seconds
        self.elapsed = 0.0
        self.scales: list[float] = []

    def completed(self, steps: int, elapsed: float, seconds: float) -> None:
        """Told that `steps` steps are done after `elapsed` seconds, the last of which took `seconds`."""
        self.elapsed, self.step_seconds = elapsed, elapsed / steps
        self.recent.append(seconds)

    def remaining_steps(self, step: int) -> float:
        left = self.run.iterations - step
        if self.run.schedule == "time" and self.step_seconds and self.run.cap_seconds < math.inf:
            left = min(left, max(0.0, self.run.cap_seconds - self.elapsed) / self.step_seconds)
        return left

    def fraction(self, step: int) -> float:
        """The part of the run that lies behind step `step`, 0 to 1."""
        return step / max(1.0, step + self.remaining_steps(step))

    def lr_scale(self, step: int) -> float:
        """1, then linearly down to MIN_LR over the warmdown, never more than warmdown_max_fraction of the run."""
        left = self.remaining_steps(step)
        warmdown = min(self.run.warmdown_iters, self.run.warmdown_max_fraction * (step + left))
        high = min(1.0, left / warmdown) if warmdown else 1.0
        self.scales.append(self.run.min_lr + (1 - self.run.min_lr) * high)
        return self.scales[-1]

    def room_for(self, seconds: float) -> bool:
        """Whether a pause of that many seconds and some more steps fit under the cap; all ranks agree."""
        return self.elapsed + 1.5 * seconds + 4 * self.step_seconds < self.run.cap_seconds

    def must_stop(self, step_began: float, now: float) -> bool:
        """Whether the step after this one could end past the cap.

        Slow steps come in spells, so the last 20 count and not their mean; the slowest of them does not, or one hiccup
        of the machine would end a run early.
        """
        slow = 1.05 * sorted(self.recent)[-2:][0] if self.recent else 0.0
        # With a lag, a step is in flight when this one is launched, and one more is before the vote is read.
        return max(now, step_began + slow) + (1 + 2 * self.lag) * slow > self.run.deadline


# -----------------------------------------------------------------------------
# Artifact: magic, header length and checksum, JSON header, one zstd frame of tensors, and the numbers of the large
# matrices as one rANS stream. No pickle; needs no environment.

ARTIFACT_MAGIC, ARTIFACT_VERSION, MAX_HEADER_BYTES = b"PGOLFKIT", 2, 1 << 20
ARTIFACT_PREFIX = struct.Struct("<8sIII")  # magic, version, header bytes, crc32 of the header
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool)
}
RANS_BITS, RANS_LEAST = 14, 1 << 16  # of a probability; the least state of the coder
SIZE_CLASSES = 41  # of numbers, by their expected size: from 1/8 to 128 in quarter octaves
FINEST_CLIP = {4: 2.0, 5: 2.6, 6: 3.5, 7: 4.6, 8: 6.0}  # by bits; below, cutting off costs more than finer steps win
LOOKUP_SHARE = 0.5  # of the inputs' mean square: how much an error counts in a row that the embedding reads
CODED_SIDE = 64  # of a matrix: in a narrower one the bytes that tell the classes cost more than they save


def coarsest_clip(bits: int) -> int:
    """The QUANT_CLIP at which a row is stored in steps of its root mean square; little is left of a model beyond it."""
    return 2 ** (bits - 1) - 1


def quantize_rows(weight: Tensor, bits: int, clip: float | None = None) -> tuple[Tensor, Tensor]:
    """(int8 values, fp16 scales (rows, 1)) of a matrix, or of a stack of them: each row is cut off at `clip` times its
    root mean square. Without a clip, at its largest number for 8 bits and where the error is least for fewer.
    """
    limit = 2 ** (bits - 1) - 1
    rows = weight.detach().float().cpu().reshape(-1, weight.size(-1))
    if clip is None:
        top, clips = rows.abs().amax(dim=1, keepdim=True), [1.0] if bits == 8 else np.linspace(1.0, 0.5, 11)
    else:  # not the standard deviation: that of a constant row is 0
        top, clips = rows.square().mean(dim=1, keepdim=True).sqrt(), [clip]
    best = None
    for fraction in clips:
        scale = (top * (fraction / limit)).clamp(2**-24, 65_000).half()
        values = (rows / scale.float()).round().clamp(-limit, limit)
        error = (values * scale.float() - rows).square().sum(dim=1, keepdim=True)
        if best is None:
            best = values, scale, error
        else:
            better = error < best[2]
            best = tuple(torch.where(better, new, old) for new, old in zip((values, scale, error), best, strict=True))
    return best[0].to(torch.int8), best[1]


def size_classes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) and (columns,) int8 whose sum is the class of a number: the size that its row and its column expect."""
    squares = np.square(values.astype(np.float32))
    row_squares = squares.mean(axis=1) + 1 / 64
    column_squares = (squares / row_squares[:, None]).mean(axis=0) + 1 / 64
    rows, columns = (np.round(2 * np.log2(x)) for x in (row_squares, column_squares))
    return (rows + 12).astype(np.int8), columns.astype(np.int8)


def class_of(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(rows x columns,) uint8: the class of each number of a matrix."""
    return np.add.outer(rows.astype(np.int16), columns).clip(0, SIZE_CLASSES - 1).astype(np.uint8).reshape(-1)


def frequencies(counts: np.ndarray) -> np.ndarray:
    """(classes, 256) whole numbers in proportion to the counts: 2**RANS_BITS in all for a class that occurs, else 0."""
    seen = counts > 0
    spare = (1 << RANS_BITS) - seen.sum(axis=1, keepdims=True)
    found = seen + counts * spare // np.maximum(1, counts.sum(axis=1, keepdims=True))
    found[np.arange(len(found)), counts.argmax(axis=1)] += seen.any(axis=1) * ((1 << RANS_BITS) - found.sum(axis=1))
    return found


def rans_lanes(count: int) -> int:
    """How many coders take turns: numpy wants many, and each costs four bytes."""
    return 1 + min(1023, count >> 13)


def rans_encode(symbols: np.ndarray, tables: np.ndarray) -> bytes:
    """The stream for (n,) symbols, 256 x class + byte, by (classes, 256) frequencies (Duda 2013, arXiv:1311.2540).

    Interleaved as in Giesen 2014 (arXiv:1402.3392): lane i takes every lanes-th number from i on; 32-bit states are
    kept in [2**16, 2**32) by moving 16 bits at a time. Written from the last number to the first, read forwards.
    """
    widths = tables.reshape(-1).astype(np.uint32)
    starts = (tables.cumsum(axis=1) - tables).reshape(-1).astype(np.uint32)
    lanes = rans_lanes(len(symbols))
    states, words = np.full(lanes, RANS_LEAST, np.uint32), []
    for begin in reversed(range(0, len(symbols), lanes)):
        now = symbols[begin : begin + lanes]
        state, width = states[: len(now)], widths.take(now)
        full = state >> (32 - RANS_BITS) >= width
        words.append(state[full].astype("<u2").tobytes())
        state = np.where(full, state >> 16, state)
        quotient = state // width
        states[: len(now)] = (quotient << RANS_BITS) + (state - quotient * width) + starts.take(now)
    return states.astype("<u4").tobytes() + b"".join(reversed(words))


def rans_decode(stream: memoryview, classes: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """(n,) uint8: the numbers of the given classes; ValueError if the stream is not what `rans_encode` makes."""
    lanes, sums = rans_lanes(len(classes)), tables.sum(axis=1)
    used = np.bincount(classes, minlength=len(tables)) > 0
    if tables.min() < 0 or not np.isin(sums, (0, 1 << RANS_BITS)).all() or not sums[used].all():
        raise ValueError("artifact is damaged: its frequencies do not add up")
    if len(stream) < 4 * lanes or len(stream) % 2:
        raise ValueError(f"artifact is damaged: {len(stream)} bytes of numbers, {lanes} coders have begun")
    byte_at = np.repeat(np.tile(np.arange(256, dtype=np.uint8), len(tables)), tables.reshape(-1))
    first = sums.cumsum() - sums  # of a class in byte_at
    widths = tables.reshape(-1).astype(np.uint32)
    starts = (tables.cumsum(axis=1) - tables).reshape(-1).astype(np.uint32)
    states, words = np.frombuffer(stream, "<u4", lanes).copy(), np.frombuffer(stream, "<u2", offset=4 * lanes)
    found, position = np.empty(len(classes), np.uint8), 0
    for begin in range(0, len(classes), lanes):
        now = classes[begin : begin + lanes]
        state = states[: len(now)]
        slot = state & ((1 << RANS_BITS) - 1)
        byte = found[begin : begin + lanes] = byte_at.take(first.take(now) + slot)
        at = now * np.uint16(256) + byte
        state = widths.take(at) * (state >> RANS_BITS) + slot - starts.take(at)
        low = np.flatnonzero(state < RANS_LEAST)
        if position + len(low) > len(words):
            raise ValueError("artifact is damaged: its numbers end early")
        state[low] = state[low] << 16 | words[position : position + len(low)]
        position += len(low)
        states[: len(now)] = state
    if position != len(words) or (states != RANS_LEAST).any():
        raise ValueError("artifact is damaged: its numbers do not end where they should")
    return found


def input_grams(model: LanguageModel, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """By the name of the matrix: X^T X, (in, in) fp32, of all X (tokens, in) that a Linear or the head multiplies by it
    in the scored path on batches (n, T). Matrices that are used otherwise are not there.
    """
    names, grams = {id(p): name for name, p in model.named_parameters()}, {}

    def add(weight: Tensor, x: Tensor) -> None:
        if id(weight) in names:
            x = x.detach().flatten(0, -2).float()
            name = names[id(weight)]
            grams[name] = x.mT @ x + grams.get(name, 0.0)

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [linear.register_forward_pre_hook(lambda module, args: add(module.weight, args[0])) for linear in linears]
    with torch.no_grad():
        for ids in batches:
            if type(model).logits is LanguageModel.logits:
                x, head = model.head_inputs(ids)
                add(head, x)
            else:
                model.logits(ids)
    for hook in hooks:
        hook.remove()
    return grams


def gptq_values(weights: Tensor, grams: Tensor, scales: Tensor, bits: int) -> Tensor:
    """int8 multiples of scales (n, rows, 1) for weights (n, rows, in) whose inputs have grams (n, in, in).

    Column by column, the one with the largest input first, each rounded to the nearest; what is lost by that is made
    good by the columns still to come (GPTQ, Frantar et al. 2022, https://arxiv.org/abs/2210.17323).
    """
    n, rows, columns = weights.shape
    order = grams.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    by_row, by_column = order[:, None].expand(n, rows, columns), order[:, None].expand(n, columns, columns)
    grams = grams.double().gather(2, by_column).gather(1, by_column.mT)
    mean = grams.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    grams.diagonal(dim1=1, dim2=2).add_(0.01 * mean[:, None])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(grams))
    carry = torch.linalg.cholesky(inverse, upper=True).float()  # row i: how column i's loss goes to those after it
    left, limit = weights.float().gather(2, by_row), 2 ** (bits - 1) - 1
    values = torch.empty_like(left, dtype=torch.int8)
    for begin in range(0, columns, 128):
        end = min(begin + 128, columns)
        lost = torch.empty_like(left[..., begin:end])
        for i in range(begin, end):
            value = (left[..., i : i + 1] / scales).round().clamp(-limit, limit)
            values[..., i : i + 1] = value
            lost[..., i - begin] = (left[..., i] - (value * scales)[..., 0]) / carry[:, i, i, None]
            left[..., i:end] -= lost[..., i - begin, None] * carry[:, i, None, i:end]
        left[..., end:] -= lost @ carry[:, begin:end, end:]
    return torch.empty_like(values).scatter_(2, by_row, values)


def gptq(
    model: LanguageModel, batches: Iterable[Tensor], bits: int, clip: float | None, machine: Machine
) -> dict[str, tuple[Tensor, Tensor]]:
    """On rank 0: in place of quantize_rows, by the parameter's name in the folded model, for those with input_grams."""
    model = model.folded().eval()
    model.compute_dtype = machine.dtype
    fill_generated(model)
    grams = {name: machine.sum(gram) for name, gram in input_grams(model, batches).items()}
    model.train()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    alike: dict[tuple, list[str]] = {}
    for name in grams if machine.rank == 0 else ():
        weight, gram = model.get_parameter(name), grams[name]
        if id(weight) in tables:  # a tied head, whose rows are also read one by one
            gram.diagonal().add_(LOOKUP_SHARE * gram.diagonal().mean())
        if weight.ndim == 2 and not is_control(weight):
            alike.setdefault(tuple(weight.shape), []).append(name)
    rounded, device = {}, "cuda" if machine.device.type == "cuda" else "cpu"  # others have no fp64
    for names in alike.values():
        weights = torch.stack([model.get_parameter(name).detach() for name in names])
        scales = torch.stack([quantize_rows(weight, bits, clip)[1] for weight in weights])
        stacked = torch.stack([grams[name] for name in names])
        values = gptq_values(weights.to(device), stacked.to(device), scales.to(device).float(), bits)
        rounded |= {name: parts for name, *parts in zip(names, values.cpu(), scales, strict=True)}
    return rounded


def shuffled(x: Tensor) -> bytes:
    """The tensor's bytes, all first bytes first: the high bytes of neighbouring numbers are alike and compress."""
    raw = x.detach().cpu().contiguous().numpy()
    return raw.reshape(-1).view(np.uint8).reshape(-1, raw.itemsize).T.tobytes()


def unshuffled(data: memoryview, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """The inverse of `shuffled`."""
    planes = np.frombuffer(data, dtype=np.uint8).reshape(dtype.itemsize, -1)
    return torch.from_numpy(planes.T.copy()).view(dtype).reshape(shape)


def pack_tensors(model: LanguageModel, header: dict, bits: int, clip: float | None, rounded: dict) -> bytes:
    """The bytes of model.bin: matrices quantised per row, control tensors fp32, shared ones once.

    Matrices that are in `rounded` are quantised already.
    The frame holds the frequencies, the classes of the coded matrices' rows and columns, then, tensor by tensor,
    scales, small matrices and all that is not quantised.
    """
    import zstandard

    params = dict(model.named_parameters(remove_duplicate=False))
    entries, chunks, classes, symbols, first = [], [], [], [np.empty(0, np.uint16)], {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        if key in first:
            entries.append([name, "same", first[key]])
            continue
        first[key] = name
        if tensor.numel() and tensor.is_floating_point() and name in params and not is_control(params[name]):
            values, scales = rounded.get(name) or quantize_rows(tensor, bits, clip)
            coded = min(values.shape) >= CODED_SIDE
            entries.append([name, "coded" if coded else "rows", list(tensor.shape)])
            if coded:
                rows, columns = size_classes(values.numpy())
                classes += [rows.tobytes(), columns.tobytes()]
                symbols.append(class_of(rows, columns) * np.uint16(256) + values.numpy().view(np.uint8).reshape(-1))
            chunks += [shuffled(scales)] if coded else [shuffled(values), shuffled(scales)]
        else:
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            entries.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
            chunks.append(shuffled(tensor))
    symbols = np.concatenate(symbols)
    tables = frequencies(np.bincount(symbols, minlength=SIZE_CLASSES * 256).reshape(SIZE_CLASSES, 256))
    payload = b"".join([shuffled(torch.from_numpy(tables.astype(np.int16))), *classes, *chunks])
    frame = zstandard.ZstdCompressor(level=22).compress(payload)
    body = frame + rans_encode(symbols, tables)
    header = header | dict(quant_bits=bits, quant_clip=clip, raw_bytes=len(payload), frame_bytes=len(frame))
    header |= dict(body_sha256=hashlib.sha256(body).hexdigest(), tensors=entries)
    text = json.dumps(header, separators=(",", ":")).encode()
    return ARTIFACT_PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(text), zlib.crc32(text)) + text + body


def pack_artifact(
    model: LanguageModel,
    arch: str,
    tokenizer_sha256: str | None,
    plan: ScorePlan,
    progress: float,
    bits: int,
    clip: float | None = None,
    most: int | None = None,
    rounded: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> bytes:
    """The bytes of model.bin, of the model folded. If they are more than `most`, the clip is widened until they fit.

    A wider clip spreads the same steps wider, so fewer are in use. If no clip fits, the bytes at the coarsest. What
    gptq has rounded holds for the clip given: at another one all is rounded to the nearest.
    """
    model = model.folded()
    header = dict(arch=arch, config=asdict(model.config), score=asdict(plan), progress=progress)
    header |= dict(tokenizer_sha256=tokenizer_sha256)
    blob = pack_tensors(model, header, bits, clip, rounded or {})
    if most is None or len(blob) <= most:
        return blob
    weights = sum(p.numel() for p in model.parameters() if not is_control(p))
    finest, coarsest, best = clip or FINEST_CLIP[bits], coarsest_clip(bits), b""
    clip = finest
    for _ in range(16):
        blob = pack_tensors(model, header, bits, clip, {})
        spare = most - len(blob)
        if spare >= 0:
            best = max(best, blob, key=len)
        if (clip == finest or spare <= most / 500) if spare >= 0 else clip == coarsest:
            break
        # Twice the clip saves a bit a weight, or less where most are 0 already: steps never go too far.
        octaves = 8 * (most / 1000 - spare) / max(1, weights)
        clip = min(max(finest, clip * 2 ** min(octaves, bits)), coarsest)
    return best or blob


def save_atomically(path: Path, blob: bytes) -> None:
    """Write the file whole or leave what was there before: a kill or a full disk leaves no half file."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path} ({len(blob):,} bytes): {error.strerror or error}; make room and run again"
        ) from None


def read_header(blob: bytes) -> tuple[dict, memoryview]:
    """(header, all that follows it) of an artifact; ValueError says in one line why it is refused."""
    if len(blob) < ARTIFACT_PREFIX.size or not blob.startswith(ARTIFACT_MAGIC):
        raise ValueError("not an artifact: it does not begin with PGOLFKIT")
    _, version, header_bytes, checksum = ARTIFACT_PREFIX.unpack_from(blob)
    if version != ARTIFACT_VERSION:
        raise ValueError(f"artifact version {version}; this script reads version {ARTIFACT_VERSION}")
    if header_bytes > min(MAX_HEADER_BYTES, len(blob) - ARTIFACT_PREFIX.size):
        raise ValueError(
            f"artifact header of {header_bytes} bytes: over the file's end or the limit of {MAX_HEADER_BYTES}"
        )
    text = blob[ARTIFACT_PREFIX.size : ARTIFACT_PREFIX.size + header_bytes]
    if zlib.crc32(text) != checksum:
        raise ValueError("artifact header does not match its checksum: the file is damaged")
    body = memoryview(blob)[ARTIFACT_PREFIX.size + header_bytes :]
    header = json.loads(text)
    if hashlib.sha256(body).hexdigest() != header["body_sha256"]:
        raise ValueError("artifact tensors do not match their checksum: the file is cut short or damaged")
    return header, body


def read_tensors(header: dict, body: memoryview) -> dict[str, Tensor]:
    """The state dict stored in an artifact, quantised rows back in fp32."""
    import zstandard

    frame, stream = body[: header["frame_bytes"]], body[header["frame_bytes"] :]
    room = (1 << 28) + 64 * len(body)  # numbers of one value cost nothing: what a small file may unpack to has to end
    raw_bytes = zstandard.frame_content_size(frame)  # what the decompressor will allocate
    if raw_bytes != header["raw_bytes"] or raw_bytes > room:
        claimed = header["raw_bytes"]
        raise ValueError(f"artifact claims {claimed} bytes of tensors, its frame {raw_bytes}; limit {room}")
    data = memoryview(zstandard.ZstdDecompressor().decompress(frame))
    position, state = 0, {}

    def take(dtype: torch.dtype, shape: list[int]) -> Tensor:
        nonlocal position
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or position + size > len(data):
            raise ValueError(f"artifact tensor of shape {shape} does not fit its data")
        position += size
        return unshuffled(data[position - size : position], dtype, shape)

    tables = take(torch.int16, [SIZE_CLASSES, 256]).numpy().astype(np.int64)
    shapes = [shape for _, kind, shape in header["tensors"] if kind == "coded"]
    if sum(math.prod(shape) for shape in shapes) > room:
        raise ValueError(f"artifact claims more than {room} coded numbers")
    parts = [(take(torch.int8, [math.prod(shape[:-1])]), take(torch.int8, shape[-1:])) for shape in shapes]
    classes = [class_of(rows.numpy(), columns.numpy()) for rows, columns in parts]
    numbers = rans_decode(stream, np.concatenate([np.empty(0, np.uint8), *classes]), tables).view(np.int8)
    coded = iter(np.split(numbers, np.cumsum([len(part) for part in classes])))

    for name, kind, shape in header["tensors"]:
        if kind == "same":
            state[name] = state[shape]
        elif kind in ("rows", "coded"):
            values = take(torch.int8, shape) if kind == "rows" else torch.from_numpy(next(coded))
            scales = take(torch.float16, [math.prod(shape[:-1]), 1])
            state[name] = (values.reshape(-1, shape[-1]).float() * scales.float()).reshape(shape)
        else:
            state[name] = take(DTYPES[kind], shape)
    if position != len(data):
        raise ValueError(f"artifact holds {len(data) - position} bytes that belong to no tensor")
    return state


def load_artifact(blob: bytes, device: torch.device) -> tuple[LanguageModel, ScorePlan, dict]:
    """(model ready to score, how to score with it, header) from the bytes of model.bin and this script alone."""
    try:
        header, body = read_header(blob)
        state = read_tensors(header, body)
        Model, Config = load_architecture(header["arch"])
        with torch.random.fork_rng(devices=[]):  # building a model draws numbers that a later run must not miss
            model = Model(Config(**header["config"]))
        model.load_state_dict(state)
        plan = ScorePlan(**header["score"])
        model.on_progress(float(header["progress"]))
    except ValueError:
        raise
    except Exception as error:  # a well-formed file whose content makes no sense
        raise ValueError(
            f"artifact does not fit this script: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None
    model.to(device).eval().requires_grad_(False)
    model.compute_dtype = score_dtype(device)
    fill_generated(model)
    return model, plan, header


# -----------------------------------------------------------------------------
# Training


class Interrupt:
    """Ctrl-C or SIGTERM: the first asks the training loop to stop, a later one leaves at once."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.previous = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self.catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def catch(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.since is None:
            self.since = now
        elif now - self.since > 1.0:  # a terminal and torchrun both pass the same Ctrl-C on
            os._exit(128 + number)


class Report:
    """A few numbers on their way from the device; reading waits for the step that made them and for nothing later."""

    def __init__(self, values: Tensor):
        self.values, self.made = values, None
        if values.is_cuda:
            self.values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            self.made = torch.cuda.Event()
            self.made.record()

    def read(self) -> list[float]:
        if self.made is not None:
            self.made.synchronize()
        return self.values.tolist()


class Trainer:
    """One model, its optimizers and the step that both warm-up and training run."""

    def __init__(self, model: LanguageModel, run: RunConfig, machine: Machine, micro_batches: int):
        self.model, self.run, self.machine, self.micro_batches = model, run, machine, micro_batches
        self.optimizers = Optimizers(model, run, machine)
        self.update_seconds = 0.0  # of the optimizers' step, the longest of late

        def loss(weights: dict[str, Tensor], input_ids: Tensor, target_ids: Tensor) -> Tensor:
            if weights:
                return torch.func.functional_call(model, weights, (input_ids, target_ids))
            return model(input_ids, target_ids)

        options = {"triton.cudagraphs": True} if run.cuda_graphs else None
        self.loss = torch.compile(loss, dynamic=False, fullgraph=True, options=options) if machine.compile else loss

    def backward(self, batch: Tensor) -> Tensor:
        """Leave this rank's mean gradient in .grad; its mean loss, a scalar on the device. batch is (rows, T + 1)."""
        if self.model.gauge_names:
            self.model.gauges.fill_(torch.nan)  # until this pass shows them; a switched off one shows nothing
        generated = self.model.materialize()
        leaves = {name: value.detach().requires_grad_() for name, value in generated.items()}
        total = torch.zeros((), device=batch.device)
        if self.run.cuda_graphs:  # a replay writes its gradients where the last one did: they are added to these
            for p in (*self.optimizers.params, *leaves.values()):
                p.grad = torch.zeros_like(p)
        for part in batch.chunk(self.micro_batches):
            if self.run.cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            loss = self.loss(leaves, part[:, :-1].contiguous(), part[:, 1:].contiguous()) / self.micro_batches
            loss.backward()
            total += loss.detach()
        if generated:
            torch.autograd.backward(list(generated.values()), [leaf.grad for leaf in leaves.values()])
        return total

    def train_step(self, batch: Tensor, step: int, lr_scale: float, votes: Callable[[], list[float]]) -> Tensor:
        """One optimizer step; [loss, *votes()] averaged over the ranks.

        Votes are cast after backward: elapsed seconds, stop after this step, drop this step for it ends too late.
        """
        loss = self.backward(batch)
        cast = torch.tensor(votes(), pin_memory=batch.is_cuda).to(batch.device, non_blocking=True)
        report = torch.cat((loss.float().reshape(1), cast))
        report = self.optimizers.exchange(report)
        if not self.machine.lag and report[-1] > 0:
            self.optimizers.muon.wait()
        else:
            start = time.perf_counter()
            self.optimizers.step(step, lr_scale)
            self.update_seconds = max(time.perf_counter() - start, 0.9 * self.update_seconds)
        return report

    def make_fit(self, batch: Tensor, log: RunLog) -> None:
        """Cut the batch into more micro-batches while the device's memory is too small for one; alike on every rank."""
        while True:
            full = 0
            try:
                self.backward(batch)
            except RuntimeError as error:
                if not any(words in str(error) for words in ("out of memory", "ALLOC_FAILED")):  # the latter: cuBLAS
                    raise
                full = 1
            for p in self.optimizers.params:
                p.grad = None
            if not self.machine.most(full):
                return
            if self.micro_batches == len(batch):
                raise ValueError(
                    f"one row of TRAIN_SEQ_LEN={batch.size(1) - 1} is too much for the memory of {batch.device}; "
                    "shorten it or make the model smaller"
                )
            gc.collect()  # a traceback may hold what did fit
            torch.cuda.empty_cache()
            self.micro_batches = split_rows(len(batch), 1, 0.75 * len(batch) / self.micro_batches)
            log(f"micro_batches:{self.micro_batches} (larger ones do not fit the memory)")

    def warm_up(self, rows: int, log: RunLog) -> float:
        """Run every graph on random tokens, then put everything back; seconds of a step (0 without warm-up)."""
        model, seconds = self.model, 0.0
        kept = {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
        with self.machine.fork_rng():
            for fraction in (0.0, *model.progress_switches) if self.run.warmup_steps else ():
                model.on_progress(fraction)
                laps = []  # (seconds, of these until the last kernel was launched)
                for lap in range(self.run.warmup_steps):
                    batch = torch.randint(
                        model.config.vocab_size, (rows, model.config.train_seq_len + 1), device=self.machine.device
                    )
                    if batch.is_cuda and not lap:
                        self.make_fit(batch, log)
                    start = time.perf_counter()
                    report = self.train_step(batch, 0, 1.0, lambda: [0.0, 0.0, 0.0])
                    launched = time.perf_counter() - start
                    report.tolist()
                    laps.append((time.perf_counter() - start, launched))
                fastest, launched = min(laps)  # the least: compilation and hiccups say nothing about the next step
                seconds = max(seconds, fastest)
                done = f"{self.run.warmup_steps}/{self.run.warmup_steps} at_fraction:{fraction}"
                queued = f" launched_after:{1000 * launched:.0f}ms" if self.machine.device.type == "cuda" else ""
                log(f"warmup_step:{done} fastest:{1000 * fastest:.0f}ms{queued}")
        with torch.no_grad():
            for name, t in [*model.named_parameters(), *model.named_buffers()]:
                t.copy_(kept[name])
        self.optimizers = Optimizers(model, self.run, self.machine)
        self.update_seconds = 0.0  # compilation is no part of a step
        model.on_progress(0.0)
        return seconds


@dataclass
class Outcome:
    """What training did."""

    steps: int = 0
    seconds: float = 0.0
    mean_lr_scale: float = 0.0
    progress: float = 0.0
    interrupted: bool = False
    rounded: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # matrices, by gptq


def train(
    trainer: Trainer,
    loader: TokenLoader,
    validate: Callable[[], Score],
    step_seconds: float,
    val_seconds: float,
    log: RunLog,
    round_after: Callable[[int], dict] | None = None,
    round_seconds: float = 0.0,
) -> Outcome:
    """Train until the iterations, the clock or the user end it. The clock runs from here on and never pauses.

    round_after, told the steps, rounds the matrices by training text; the last round_seconds under the cap are its.
    """
    run, machine, model = trainer.run, trainer.machine, trainer.model
    if run.max_wallclock_seconds:
        run = dataclasses.replace(run, max_wallclock_seconds=run.max_wallclock_seconds - round_seconds)
    schedule, outcome, pending = Schedule(run, step_seconds, machine.lag), Outcome(), deque()
    start = last = time.perf_counter()

    def finish() -> bool:
        """Wait for the oldest step in flight, log it; True when all ranks are to stop."""
        nonlocal last
        step, report = pending.popleft()
        loss, elapsed, stop, late, *gauges = report.read()
        now = time.perf_counter()
        if late:
            log(f"dropped_step:{step + 1} its gradient was ready at {1000 * (now - start):.0f}ms, too late for the cap")
            return True
        outcome.steps, outcome.seconds = step + 1, now - start
        schedule.completed(step + 1, elapsed if machine.world_size > 1 else now - start, now - last)
        last = now
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"step:{step + 1} train_loss is {loss}: training diverged. Lower MATRIX_LR={run.matrix_lr} and the "
                f"other rates, or set GRAD_CLIP_NORM=1; the log up to here is kept"
            )
        done = step + 1
        if done <= 10 or done % run.train_log_every == 0 or done == run.iterations:
            milliseconds = 1000 * outcome.seconds
            shown = zip(model.gauge_names, gauges, strict=True)  # of rank 0's last micro-batch
            log(
                f"step:{done}/{run.iterations} train_loss:{loss:.4f} train_time:{milliseconds:.0f}ms "
                f"step_avg:{milliseconds / done:.2f}ms lr_scale:{schedule.scales[step]:.3f}"
                + "".join(f" {name}:{value:.4f}" for name, value in shown if not math.isnan(value))
            )
        return stop > 0

    with Interrupt() as interrupt:

        def votes() -> list[float]:
            now = time.perf_counter() - start
            stop = interrupt.since is not None or schedule.must_stop(step_began - start, now)
            return [now, float(stop), float(now + trainer.update_seconds > run.deadline and not machine.lag)]

        stop, batches = schedule.must_stop(0.0, 0.0) and machine.world_size == 1, iter(loader)
        for step in range(run.iterations if not stop else 0):
            step_began = time.perf_counter()
            outcome.progress = schedule.fraction(step)
            model.on_progress(outcome.progress)
            report = trainer.train_step(next(batches), step, schedule.lr_scale(step), votes)
            trainer.optimizers.follow(outcome.progress)
            pending.append((step, Report(torch.cat((report, model.gauges)) if model.gauge_names else report)))
            while len(pending) > machine.lag:
                stop = finish() or stop
            if stop:
                break
            due = run.val_loss_every and (step + 1) % run.val_loss_every == 0 and step + 1 < run.iterations
            if due and schedule.room_for(val_seconds):
                log_score(log, f"step:{step + 1}/{run.iterations}", validate(), outcome)
                last = time.perf_counter()
        while pending:
            finish()
        trainer.optimizers.install_average()
        batches.close()
        outcome.interrupted = interrupt.since is not None
    if outcome.steps < run.iterations:
        reason = "interrupted" if outcome.interrupted else "wallclock_cap"
        log(f"stopping_early: {reason} train_time:{1000 * outcome.seconds:.0f}ms step:{outcome.steps}/{run.iterations}")
    outcome.progress = schedule.fraction(outcome.steps)
    if round_after:
        model.on_progress(outcome.progress)
        began, outcome.rounded = time.perf_counter(), round_after(outcome.steps)
        outcome.seconds = time.perf_counter() - start
        took = f"{1000 * (start + outcome.seconds - began):.0f}ms of {1000 * round_seconds:.0f}ms kept for it"
        log(f"gptq: matrices:{len(outcome.rounded)} of {run.gptq_tokens} tokens in {took}")
    outcome.mean_lr_scale = sum(schedule.scales) / max(1, len(schedule.scales))
    log.phase("validate", start + outcome.seconds)
    return outcome


def log_score(log: RunLog, prefix: str, found: Score, outcome: Outcome) -> None:
    milliseconds = 1000 * outcome.seconds
    log(
        f"{prefix} val_loss:{found.val_loss:.4f} val_bpb:{found.val_bpb:.4f} train_time:{milliseconds:.0f}ms "
        f"step_avg:{milliseconds / max(1, outcome.steps):.2f}ms"
    )


# -----------------------------------------------------------------------------
# Main


def code_files() -> list[Path]:
    """Every kit file that this run loaded: a handful in the repository, one once packed."""
    kit = [m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "architectures" and m.__file__]
    return sorted({Path(f).resolve() for f in (__file__, *kit)})


def check_batch(run: RunConfig, T: int, world_size: int) -> None:
    """Stop on a batch that cannot be dealt out to the ranks in whole sequences of T."""
    if run.train_batch_tokens % (T * world_size):
        raise ValueError(
            f"TRAIN_BATCH_TOKENS={run.train_batch_tokens} must be a multiple of TRAIN_SEQ_LEN={T} x "
            f"{world_size} ranks = {T * world_size}, at least one sequence per rank"
        )


def kept_bytes(model: LanguageModel) -> float:
    """Bytes a token, weights aside, that autograd keeps of the loss on one window of noise, uncompiled and on CPU.

    token_bytes goes by these, and uncompiled CUDA is no better witness: there FlexAttention writes out all scores.
    """
    model = copy.deepcopy(model).cpu()  # a copy, for what a forward counts and remembers is no part of the run
    params, T, V, most = list(model.parameters()), model.config.train_seq_len, model.config.vocab_size, 0

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage  # held, or its place in memory could be another's before the count
        return x

    with torch.random.fork_rng(devices=[]):
        tokens = torch.randint(V, (1, T + 1))
        for fraction in (0.0, *model.progress_switches):
            model.on_progress(fraction)
            made, held = model.materialize(), {}
            weights = {x.untyped_storage().data_ptr() for x in (*params, *model.buffers(), *made.values())}
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                torch.func.functional_call(model, made, (tokens[:, :-1], tokens[:, 1:]))
            most = max(most, sum(storage.nbytes() for storage in held.values()))
    return most / T


def token_bytes(model: LanguageModel, compiled: bool) -> float:
    """Bytes a token that a step keeps for backward. Compiled in fp32 these are hardly fewer than in eager."""
    return kept_bytes(model) * (KEPT_COMPILED if compiled and model.compute_dtype == torch.bfloat16 else 1.0)


def split_rows(rows: int, T: int, most: float) -> int:
    """Into how many equal parts, of one row at least, rows of T tokens must go so that none has more than `most`."""
    limit = max(T, int(most))
    return next(n for n in range(1, rows + 1) if (rows % n == 0 and (rows // n) * T <= limit) or n == rows)


def micro_batch_count(run: RunConfig, model: LanguageModel, machine: Machine) -> int:
    """Backward passes of a rank per step, alike on all: 1, unless memory asks for more. The model is as in training."""
    config, T = model.config, model.config.train_seq_len
    rows = run.train_batch_tokens // machine.world_size // T
    if run.micro_batch_tokens:
        return split_rows(rows, T, run.micro_batch_tokens)
    kept = token_bytes(model, machine.compile)
    blocked = machine.device.type == "cpu" and machine.compile and machine.dtype == torch.bfloat16
    if blocked and T <= MAX_BLOCKED_SEQ_LEN:  # the weights that blocked attention keeps
        kept += config.num_layers * config.num_heads * T
    memory = torch.cuda.mem_get_info(machine.device)[0] if machine.device.type == "cuda" else 8 << 30
    return machine.most(split_rows(rows, T, MEMORY_SHARE * memory / kept))


def prepare_run(run: RunConfig, model_config: ModelConfig, env=os.environ) -> tuple[Dataset, ModelConfig]:
    """The data set, and the model config fitted to its vocabulary when VOCAB_SIZE is unset."""
    dataset = Dataset(run.data_path, run.tokenizer_path)
    if "VOCAB_SIZE" not in env:
        model_config = dataclasses.replace(model_config, vocab_size=dataset.vocab_size)
    if model_config.vocab_size < dataset.vocab_size:
        raise ValueError(
            f"VOCAB_SIZE={model_config.vocab_size} is too small: the tokenizer of {dataset.name} has "
            f"{dataset.vocab_size}; unset VOCAB_SIZE"
        )
    return dataset, model_config


def open_log(run: RunConfig, arch: str, machine: Machine) -> tuple[Path, RunLog]:
    """(the run's folder, its log); a run never writes over another's."""
    run.run_id = run.run_id or f"{arch}_seed{run.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(run.out_dir) / run.run_id
    if machine.rank:
        return folder, RunLog(None)
    try:
        return folder, RunLog(folder / "train.log")
    except FileExistsError:
        raise ValueError(f"RUN_ID={run.run_id} has a log in {folder} already; choose another RUN_ID") from None


def store(path: Path, machine: Machine, pack: Callable[[], bytes]) -> bytes:
    """Rank 0 packs and writes the artifact; every rank gets the bytes that are on its disk."""
    failed = torch.zeros(1, device=machine.device)
    blob = error = None
    if machine.rank == 0:
        try:
            save_atomically(path, pack())
            blob = path.read_bytes()
        except OSError as caught:
            error, failed = caught, failed + 1
    if machine.world_size > 1:
        dist.broadcast(failed, 0)
    if failed.item():
        raise error or OSError("rank 0 could not write the artifact")
    if machine.world_size > 1:
        holder = [blob]
        dist.broadcast_object_list(holder, 0, device=machine.device)
        blob = holder[0]
    return blob


def verdict(result: dict, vocab_size: int) -> list[str]:
    """Why a result may not be used as a score; empty when it may."""
    reasons = []
    if result["bytes_total"] > BYTE_CAP:
        reasons.append(f"size: {result['bytes_total']} bytes of {BYTE_CAP}")
    if result["cap_seconds"] and result["train_seconds"] > result["cap_seconds"]:
        reasons.append(f"time: trained {result['train_seconds']:.3f} s of {result['cap_seconds']} s")
    if not result["val_bpb"] < math.log2(vocab_size) * result["val_tokens"] / result["val_bytes"]:
        reasons.append(f"score: {result['val_bpb']} is no better than the uniform distribution")
    if result["quick_score"]:
        reasons.append("quick: QUICK_SCORE=1 scored in the number format of training")
    if result["partial"]:
        reasons.append("partial: VAL_MAX_TOKENS left part of the validation text unscored")
    return reasons


def time_validation(validate: Callable[[], Score], machine: Machine) -> float:
    """Seconds of one validation, the mean over the ranks; it compiles what validation needs before the clock starts."""
    for _ in range(2):
        start = time.perf_counter()
        validate()
        seconds = torch.tensor([time.perf_counter() - start], device=machine.device)
    return machine.sum(seconds).item() / machine.world_size


def time_rounding(
    round_by: Callable[[Iterable[Tensor]], dict], model: LanguageModel, run: RunConfig, machine: Machine
) -> float:
    """Seconds to keep for GPTQ at the end of training: what it takes on noise, and half as much again."""
    T = model.config.train_seq_len
    rows, most = -(-run.gptq_tokens // (T * machine.world_size)), max(1, CALIBRATION_ROWS_TOKENS // T)
    start = time.perf_counter()
    with machine.fork_rng():
        round_by(torch.randint(model.config.vocab_size, (rows, T), device=machine.device).split(most))
    seconds = 0.1 + 1.5 * machine.most(math.ceil(1000 * (time.perf_counter() - start))) / 1000
    if seconds >= run.cap_seconds:
        cap = run.max_wallclock_seconds
        raise ValueError(
            f"GPTQ_TOKENS={run.gptq_tokens} takes {seconds:.1f} s of MAX_WALLCLOCK_SECONDS={cap}; take fewer"
        )
    return seconds


def announce(log: RunLog, model: LanguageModel, machine: Machine, loader: TokenLoader, why: str) -> None:
    """Log what is about to be trained, and on what."""
    params = sum(p.numel() for p in model.parameters())
    log(f"model_params:{params} | world_size:{machine.world_size} | seed:{loader.seed}")
    with torch.no_grad(), machine.fork_rng():
        generated = sum(weight.numel() for weight in model.materialize().values())
    if generated:  # by a network, say, which saves nothing if it has more numbers itself
        log(f"generated_weights:{generated}")
    dtype, threads = str(machine.dtype).removeprefix("torch."), torch.get_num_threads()
    log(f"device:{machine.device.type} dtype:{dtype} threads:{threads} hardware:{hardware_name(machine)}")
    log(f"compile:{'on' if machine.compile else 'off'} ({why})")
    log(f"train_loader: shards:{len(loader.files)} windows:{loader.num_windows} rows:{loader.rows}")


def make_result(
    run: RunConfig, model: LanguageModel, machine: Machine, dataset: Dataset, outcome: Outcome, plan: ScorePlan
) -> dict:
    """What the result line says of the run itself; the scores and sizes are added by the caller."""
    free = ("seed", "run_id", "out_dir", "data_path", "tokenizer_path")
    settings = {k: v for k, v in (asdict(run) | asdict(model.config)).items() if k not in free}
    return dict(
        run_id=run.run_id,
        seed=run.seed,
        steps=outcome.steps,
        iterations=run.iterations,
        train_seconds=math.ceil(1000 * outcome.seconds) / 1000,  # never rounded under the cap
        cap_seconds=run.max_wallclock_seconds,
        step_avg_ms=round(1000 * outcome.seconds / max(1, outcome.steps), 3),
        tokens_seen=outcome.steps * run.train_batch_tokens,
        mean_lr_scale=round(outcome.mean_lr_scale, 4),
        interrupted=outcome.interrupted,
        carries_state=is_sequential(model) or carries(model, plan) or plan.ttt_lr > 0,
        params=sum(p.numel() for p in model.parameters()),
        code_sha256=hashlib.sha256(b"".join(f.read_bytes() for f in code_files())).hexdigest(),
        config_sha256=hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        dataset=dataset.name,
        data_sha256=dataset.sha256,
        tokenizer_sha256=dataset.tokenizer_sha256,
        world_size=machine.world_size,
        device=machine.device.type,
        hardware=hardware_name(machine),
        torch=torch.__version__,
        python=platform.python_version(),
    )


def log_result(log: RunLog, result: dict, bits: int) -> None:
    """The last lines of a run: sizes and score in upstream's words, then everything as one JSON line."""
    log(f"Serialized model int{bits}+rans: {result['bytes_model']} bytes")
    log(f"Code size: {result['bytes_code']} bytes")
    log(f"Total submission size int{bits}+rans: {result['bytes_total']} bytes")
    loss, bpb, milliseconds = result["val_loss"], result["val_bpb"], 1000 * result["score_seconds"]
    log(f"final_int{bits}_rans_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{milliseconds:.0f}ms")
    log(f"final_int{bits}_rans_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    for reason in result["invalid_reasons"]:
        log(f"invalid: {reason}")
    log("result:" + json.dumps(result))


def run_training(arch: str, run: RunConfig, model_config: ModelConfig) -> int:
    """The whole run, from settings to result line; the exit status."""
    Model, _ = load_architecture(arch)
    dataset, model_config = prepare_run(run, model_config)
    T = model_config.train_seq_len
    window = run.eval_seq_len or T
    plan = ScorePlan(window, run.eval_stride or window, run.eval_carry, run.ttt_lr, run.ttt_tokens)
    untaught = dataclasses.replace(plan, ttt_lr=0.0)
    check_batch(run, T, int(os.environ.get("WORLD_SIZE", 1)))
    val_tokens, val_bytes, partial = dataset.validation(run.val_max_tokens)
    machine = make_machine(run)
    machine.compile, why = compile_pays(run, machine.device)
    if run.cuda_graphs and not (machine.compile and machine.device.type == "cuda"):
        raise ValueError(f"CUDA_GRAPHS=1 needs CUDA and COMPILE=1, here is {machine.device.type}; unset CUDA_GRAPHS")
    if machine.compile:
        torch._dynamo.config.recompile_limit = 64  # one graph per batch shape of Muon, per switch and score window
    loader = TokenLoader(dataset.train_files, run, model_config, machine)
    folder, log = open_log(run, arch, machine)
    log.phase("setup", PROCESS_START)
    log("config:" + json.dumps({"arch": arch} | asdict(run) | asdict(model_config)))

    torch.manual_seed(run.seed)
    model = Model(model_config).to(machine.device)
    if machine.world_size > 1:  # ranks share the weights, not what a loss draws at random
        torch.manual_seed(run.seed + machine.rank)
    announce(log, model, machine, loader, why)
    model.compute_dtype = machine.dtype
    micro_batches = micro_batch_count(run, model, machine)
    log(f"micro_batches:{micro_batches}")
    rows = loader.rows // machine.world_size // micro_batches
    log(f"attention:{choose_attention(model_config, machine, rows)}")

    def validate() -> Score:
        """The score of the weights in memory, in the number format of the final score, without test-time training."""
        model.eval()
        model.compute_dtype = machine.score_dtype
        fill_generated(model)
        found = score(model, val_tokens, val_bytes, untaught, machine, run.val_batch_size)
        model.compute_dtype = machine.dtype
        model.train()
        return found

    def round_by(batches: Iterable[Tensor]) -> dict:
        return gptq(model, batches, run.quant_bits, run.quant_clip, machine)

    def round_after(steps: int) -> dict:
        return round_by(loader.rows_after(steps, run.gptq_tokens))

    log.phase("warmup")
    if kernels := model.choose_kernels(rows, machine.compile, machine.sum):
        log(f"kernels:{kernels}")
    trainer = Trainer(model, run, machine, micro_batches)
    step_seconds = trainer.warm_up(loader.rows // machine.world_size, log)
    val_seconds = time_validation(validate, machine) if run.val_loss_every else 0.0
    rounding = (round_after, time_rounding(round_by, model, run, machine)) if run.gptq_tokens else ()
    log.phase("train")
    outcome = train(trainer, loader, validate, step_seconds, val_seconds, log, *rounding)
    before = None if run.quick_score else validate()
    if before:
        log_score(log, f"step:{outcome.steps}/{run.iterations}", before, outcome)

    log.phase("export")
    settings = (arch, dataset.tokenizer_sha256, plan, outcome.progress, run.quant_bits)
    code_bytes = sum(f.stat().st_size for f in code_files())
    most = run.artifact_bytes or BYTE_CAP - code_bytes
    settings += (run.quant_clip, most, outcome.rounded)
    blob = store(folder / "model.bin", machine, lambda: pack_artifact(model, *settings))
    log.phase("score")
    began = time.perf_counter()
    reloaded, plan, header = load_artifact(blob, machine.device)
    if run.artifact_bytes or header["quant_clip"] != run.quant_clip:
        log(f"quant_clip:{header['quant_clip']} bytes_model:{len(blob)} artifact_bytes:{most}")
    if outcome.rounded and header["quant_clip"] != run.quant_clip:
        log(f"gptq: dropped, what it rounded is over ARTIFACT_BYTES={most}; set QUANT_CLIP={header['quant_clip']:.1f}")
    if len(blob) > most:
        log(f"over ARTIFACT_BYTES={most} at the coarsest clip: lower QUANT_BITS={run.quant_bits}")
    reloaded.compute_dtype = machine.score_dtype
    after = score(reloaded, val_tokens, val_bytes, plan, machine, run.val_batch_size)
    score_seconds = round(time.perf_counter() - began, 3)
    log.phase(None)
    before_ttt = None
    if plan.ttt_lr and not run.quick_score:
        before_ttt = score(reloaded, val_tokens, val_bytes, untaught, machine, run.val_batch_size)

    result = dict(arch=arch, val_loss=after.val_loss, val_bpb=after.val_bpb) | asdict(after)
    if before:
        result |= dict(pre_quant_val_loss=before.val_loss, pre_quant_val_bpb=before.val_bpb)
    if before_ttt:
        result |= dict(pre_ttt_val_loss=before_ttt.val_loss, pre_ttt_val_bpb=before_ttt.val_bpb)
    result |= dict(partial=partial, quick_score=run.quick_score)
    result |= dict(score_seconds=score_seconds, eval_seq_len=plan.seq_len, eval_stride=plan.stride)
    result |= dict(bytes_code=code_bytes, bytes_model=len(blob))
    result |= dict(bytes_total=result["bytes_code"] + len(blob), artifact_sha256=hashlib.sha256(blob).hexdigest())
    result |= make_result(run, model, machine, dataset, outcome, plan)
    result["invalid_reasons"] = verdict(result, model_config.vocab_size)
    result["valid"] = not result["invalid_reasons"]
    log_result(log, result, run.quant_bits)
    return 0 if result["valid"] or partial or run.quick_score else 3


def serve(artifact: str) -> int:
    """Score what standard input asks for, each request from a fresh state, and answer each with one JSON line."""
    blob = Path(artifact).read_bytes()
    device = pick_device(from_env(RunConfig).device)
    machine = Machine(device, compile=device.type == "cuda")
    model, plan, _ = load_artifact(blob, device)
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if is_sequential(model):
                model, plan, _ = load_artifact(blob, device)
            tokens = read_shard(request["tokens"])
            if len(tokens) and tokens.max() >= model.config.vocab_size:
                raise ValueError(
                    f"{request['tokens']} holds token {tokens.max()}, the model has {model.config.vocab_size}"
                )
            nats = score_stream(model, tokens, plan, machine)
            save_atomically(Path(request["nats"]), nats.astype("<f4").tobytes())
            answer = {"nats": request["nats"], "targets": len(nats)}
        except (ValueError, KeyError, TypeError, OSError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    return 0


def main(argv: list[str]) -> int:
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        keep_freed_memory()
        if len(argv) == 2 and argv[0] == "score":
            return serve(argv[1])
        if argv:
            raise ValueError(f"unknown arguments {' '.join(argv)}; settings are environment variables, see --help")
        status = run_training(*read_settings())
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    # Tearing torch down takes most of a second, and after a failure it would wait for ranks that wait for this one.
    os._exit(status)
