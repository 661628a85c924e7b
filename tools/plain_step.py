"""The training step as one first writes it, and the kit's step measured in turns with it.

PlainStep is upstream's starter in fp32 (TF32 on CUDA): eager, one Newton-Schulz per matrix, torch.optim.Adam. It shares
the model with train_gpt.py and nothing of the step, so the step is also tested against it. It is timed in a process of
its own: train_gpt.py sets the C library's allocator, and what that holds would serve both.
"""

import ctypes
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from statistics import median
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures import layers, load_architecture
from architectures.layers import MAX_BLOCKED_SEQ_LEN, LanguageModel, ModelConfig, is_control
from train_gpt import (
    MUON_POLYNOMIALS,
    Machine,
    RunConfig,
    Trainer,
    compile_pays,
    keep_freed_memory,
    make_machine,
    micro_batch_count,
)

COMPILED_GRAPHS = 256  # of one function by all models here; beyond its own limit torch goes on uncompiled
FP32_TOLERANCE, BF16_TOLERANCE = 1e-3, 5e-3  # of a loss, relative
LAP_SECONDS = 0.5
GLIBC = {-4: 65_536, -3: 32 << 20, -1: 64 << 20}  # M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD where they settle


def newton_schulz(matrix: Tensor, steps: int, polynomial: str = "jordan") -> Tensor:
    """The matrix (R, C), singular values near 1 (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)."""
    x = matrix / ((1.02 if polynomial == "polar" else 1.0) * matrix.norm() + 1e-7)
    x = x.T if matrix.size(0) > matrix.size(1) else x
    table = MUON_POLYNOMIALS[polynomial]
    for a, b, c in [*table, *steps * table[-1:]][:steps]:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.size(0) > matrix.size(1) else x


class PlainStep:
    """One optimizer step of the model on a batch (rows, T + 1), at the run's base rates; returns the mean loss."""

    def __init__(self, model: LanguageModel, run: RunConfig, micro_batches: int = 1):
        self.model, self.run, self.micro_batches = model, run, micro_batches
        embed = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
        head = [] if model.head is None else [model.head.weight]
        rest = [p for p in model.parameters() if all(p is not q for q in embed + head)]
        self.matrices = [p for p in rest if not is_control(p)]
        controls = [p for p in rest if is_control(p)]
        rates = (embed, run.embed_lr if head else run.tied_embed_lr), (head, run.head_lr), (controls, run.scalar_lr)
        groups = [dict(params=params, lr=lr) for params, lr in rates if params]
        self.adam = torch.optim.Adam(groups, betas=(run.beta1, run.beta2), eps=run.adam_eps, fused=True)
        self.buffers = {p: torch.zeros_like(p) for p in self.matrices}

    def loss(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Mean nats, written out; an architecture with generated weights or a loss of its own is asked for that."""
        if (generated := self.model.materialize()) or type(self.model).training_loss is not LanguageModel.training_loss:
            return torch.func.functional_call(self.model, generated, (input_ids, target_ids))
        logits = self.model.logits(input_ids)
        return F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), target_ids.reshape(-1))

    def __call__(self, batch: Tensor, step: int) -> Tensor:
        total = torch.zeros((), device=batch.device)
        for part in batch.chunk(self.micro_batches):
            loss = self.loss(part[:, :-1], part[:, 1:]) / self.micro_batches
            loss.backward()
            total += loss.detach()
        self.muon_step(step)
        self.adam.step()
        self.model.zero_grad()
        return total

    @torch.no_grad()
    def muon_step(self, step: int) -> None:
        run = self.run
        warm = min(1.0, step / max(1, run.muon_momentum_warmup_steps))
        momentum = run.muon_momentum_warmup_start + warm * (run.muon_momentum - run.muon_momentum_warmup_start)
        for p in self.matrices:
            if p.grad is None:
                continue
            self.buffers[p].mul_(momentum).add_(p.grad)
            moved = p.grad + momentum * self.buffers[p]
            for weight, update in zip(p.reshape(-1, *p.shape[-2:]), moved.reshape(-1, *p.shape[-2:]), strict=True):
                scale = max(1.0, weight.size(0) / weight.size(1)) ** 0.5
                weight.sub_(run.matrix_lr * scale * newton_schulz(update, run.muon_backend_steps, run.muon_polynomial))


def interleave(laps: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every lap, taken A B C A B C ...: a slow spell of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in laps}
    for _ in range(rounds):
        for name, lap in laps.items():
            seconds[name].append(lap())
    return seconds


def compare(seconds: dict[str, list[float]], base: str) -> list[dict]:
    """A table row for each. Its speed is the median over the rounds of the base's time over its own."""
    rows = []
    for name, laps in seconds.items():
        speed = median(a / b for a, b in zip(seconds[base], laps, strict=True))
        rows.append(dict(what=name, n=len(laps), min_ms=1000 * min(laps), median_ms=1000 * median(laps), speed=speed))
    return rows


def table(rows: list[dict]) -> str:
    """The rows, as columns under their keys; words to the left, numbers to the right."""

    def cell(value) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
        return "" if value is None else f"{value:,}" if isinstance(value, int) else value

    columns = []
    for key in dict.fromkeys(key for row in rows for key in row):
        texts = [key, *(cell(row.get(key)) for row in rows)]
        side = "<" if any(isinstance(row.get(key), str) for row in rows) else ">"
        columns.append([f"{text:{side}{max(map(len, texts))}}" for text in texts])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def random_batches(run: RunConfig, config: ModelConfig, device: torch.device, count: int = 8) -> list[Tensor]:
    """Batches of uniform random tokens, each (rows, T + 1), from the run's seed."""
    shape = run.train_batch_tokens // config.train_seq_len, config.train_seq_len + 1
    generator = torch.Generator().manual_seed(run.seed)
    return [torch.randint(config.vocab_size, shape, generator=generator).to(device) for _ in range(count)]


def as_the_kit() -> None:
    """The process as train_gpt.py sets it."""
    keep_freed_memory()
    layers.MAX_BLOCKED_SEQ_LEN = MAX_BLOCKED_SEQ_LEN


def with_memory_handed_back() -> None:
    """The same, but the C library's allocator as a program finds it that does not ask."""
    as_the_kit()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, value in GLIBC.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def with_pytorch_s_attention() -> None:
    """The same, but a compiled step attends by PyTorch's kernel alone."""
    as_the_kit()
    layers.MAX_BLOCKED_SEQ_LEN = 0


def as_it_is() -> None:
    """The process as PyTorch finds it."""


class Stepper:
    """A step with its own model, timed, in a condition of the process; from (batch, number of the step) to the loss."""

    entered: ClassVar[Callable[[], None] | None] = None  # the condition that the process is in

    def __init__(self, step: Callable, model: LanguageModel, batches: list[Tensor], condition=as_the_kit):
        self.step, self.model, self.batches, self.condition, self.done = step, model, batches, condition, 0

    def enter(self) -> bool:
        """Bring the process into the condition; whether it was in another."""
        changes = Stepper.entered is not self.condition
        if changes:
            Stepper.entered = self.condition
            self.condition()
        return changes

    def take(self, steps: int) -> float:
        """The loss of the last of these steps; the device may queue them, and is waited for at the end."""
        self.enter()
        for _ in range(steps):
            loss = self.step(self.batches[self.done % len(self.batches)], self.done)
            self.done += 1
        return loss.item()

    def lap(self, steps: int) -> float:
        """Seconds per step over a number of steps; after a change of condition one goes before, not counted."""
        if self.enter():
            self.take(1)
        start = time.perf_counter()
        self.take(steps)
        return (time.perf_counter() - start) / steps


def build(Model, config: ModelConfig, run: RunConfig, device: torch.device) -> LanguageModel:
    """A model with the run's initial weights, shaken: zero-initialised projections would hide what lies behind them."""
    torch.manual_seed(run.seed)
    model = Model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.to(device)


def kit_stepper(
    model: LanguageModel, run: RunConfig, machine: Machine, micro_batches: int, batches: list, condition=as_the_kit
) -> Stepper:
    """train_gpt.py's own step, at the base rates."""
    model.compute_dtype = machine.dtype
    model.choose_kernels(len(batches[0]) // micro_batches, machine.compile, machine.sum)
    trainer = Trainer(model, run, machine, micro_batches)

    def step(batch: Tensor, number: int) -> Tensor:
        return trainer.train_step(batch, number, 1.0, lambda: [0.0, 0.0, 0.0])[0]

    return Stepper(step, model, batches, condition)


def chosen_machine(run: RunConfig) -> Machine:
    """The machine as train_gpt.py would set it up for this run."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = COMPILED_GRAPHS
    machine = make_machine(run)
    machine.compile = compile_pays(run, machine.device)[0] if run.compile is None else run.compile
    return machine


def serve_plain(pipe: Connection, arch: str, run: RunConfig, config: ModelConfig, micro_batches: int) -> None:
    """Take steps and laps of a PlainStep as asked for, until the process is ended."""
    Model, _ = load_architecture(arch)
    device = make_machine(replace(run, bf16=False)).device  # no race of number formats: this step's is fp32
    model = build(Model, config, run, device)
    step = Stepper(PlainStep(model, run, micro_batches), model, random_batches(run, config, device), as_it_is)
    torch.manual_seed(run.seed)
    while True:
        method, steps = pipe.recv()
        pipe.send(getattr(step, method)(steps))


class Elsewhere:
    """The Stepper of serve_plain, which another process holds."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe

    def ask(self, method: str, steps: int) -> float:
        try:
            self.pipe.send((method, steps))
            return self.pipe.recv()
        except (EOFError, BrokenPipeError):
            raise ValueError("the process of the plain step ended; its last words are above") from None

    def take(self, steps: int) -> float:
        return self.ask("take", steps)

    def lap(self, steps: int) -> float:
        return self.ask("lap", steps)


@contextmanager
def plain_elsewhere(arch: str, run: RunConfig, config: ModelConfig, micro_batches: int) -> Iterator[Elsewhere]:
    """A PlainStep in a process of its own, for the while."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve_plain, args=(there, arch, run, config, micro_batches), daemon=True)
    process.start()
    there.close()
    try:
        yield Elsewhere(here)
    finally:
        process.terminate()
        process.join()
        here.close()


def variants(run: RunConfig, chosen: Machine, count: int, rows: int) -> dict[str, tuple[Machine, int, Callable]]:
    """(machine, micro-batches, condition) by name: each choice alone, then together, then the kit's without one or
    otherwise. BF16=0 and COMPILE=0 leave theirs out."""
    found = {}
    for compiled in (False,) if run.compile is False else (False, True):
        for dtype in (torch.float32,) if run.bf16 is False else (torch.float32, torch.bfloat16):
            words = ["batched Muon"] + ["bf16"] * (dtype == torch.bfloat16) + ["compile"] * compiled
            mark = " (kit)" if (dtype, compiled) == (chosen.dtype, chosen.compile) else ""
            found[" + ".join(words) + mark] = replace(chosen, dtype=dtype, compile=compiled), count, as_the_kit
    if chosen.device.type == "cpu":
        found["kit, memory handed back"] = chosen, count, with_memory_handed_back
        if chosen.compile and chosen.dtype == torch.bfloat16:
            found["kit, PyTorch's attention"] = chosen, count, with_pytorch_s_attention
    for more in (2, 4):
        if rows % (count * more) == 0:
            found[f"kit in {count * more} micro-batches"] = chosen, count * more, as_the_kit
    return found


def measure_step(arch: str, run: RunConfig, config: ModelConfig, rounds: int) -> dict:
    """Tokens per second of the kit's step, and of each of its choices alone, against PlainStep on the same batches."""
    (Model, _), chosen = load_architecture(arch), chosen_machine(run)
    model, batches = build(Model, config, run, chosen.device), random_batches(run, config, chosen.device)
    model.compute_dtype = chosen.dtype
    count = micro_batch_count(run, model, chosen)
    with plain_elsewhere(arch, run, config, count) as plain:
        steppers, tolerances = {"plain": plain}, {"plain": 0.0}
        for name, (machine, parts, condition) in variants(run, chosen, count, len(batches[0])).items():
            model = build(Model, config, run, chosen.device)
            steppers[name] = kit_stepper(model, run, machine, parts, batches, condition)
            tolerances[name] = FP32_TOLERANCE if machine.dtype == torch.float32 else BF16_TOLERANCE
        first_seconds, losses = {}, {}
        for name, stepper in steppers.items():
            torch.manual_seed(run.seed)
            start = time.perf_counter()
            losses[name] = [stepper.take(1)]
            first_seconds[name] = time.perf_counter() - start
            losses[name].append(stepper.take(1))  # the loss after a step: the optimizers are to agree as well
            for mine, theirs in zip(losses[name], losses["plain"], strict=True):
                if not math.isclose(mine, theirs, rel_tol=tolerances[name]):
                    said = f"losses {losses[name]}, the plain one's {losses['plain']}"
                    raise ValueError(f"{name} is another step: {said}")
        steps = max(1, round(LAP_SECONDS / plain.lap(2)))
        seconds = interleave({name: lambda s=s: s.lap(steps) for name, s in steppers.items()}, rounds)
    rows = []
    for row in compare(seconds, "plain"):
        name, speed = row["what"], 1000 * run.train_batch_tokens / row["median_ms"]
        rows.append(row | dict(tokens_per_second=speed, first_seconds=first_seconds[name], first_loss=losses[name][0]))
    notes = [
        "plain: in a process of its own, as PyTorch finds it; the rest: as train_gpt.py sets its process, or otherwise",
        f"n rounds of {steps} step(s); first_seconds: the first call, compilation included; (kit): its choice",
        f"before and after a step the losses are the plain one's within {FP32_TOLERANCE}, bf16 within {BF16_TOLERANCE}",
    ]
    settings = dict(arch=arch, train_batch_tokens=run.train_batch_tokens, steps_per_lap=steps, **asdict(config))
    return dict(settings=settings, raw_seconds_per_step=seconds, losses=losses, rows=rows, notes=notes, ok=True)
