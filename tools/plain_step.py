"""The training step as one first writes it, and the kit's step measured in turns with it.

PlainStep is upstream's starter in fp32 (TF32 on CUDA): eager, one Newton-Schulz per matrix, torch.optim.AdamW; or, as
upstream runs it, in bf16, compiled, in eight micro-batches. It shares the model with train_gpt.py and nothing of the
step, so the step is also tested against it. Every step is timed in a process of its own: what one has taken from the
C library's allocator, or left there, would serve or cost the others.
"""

import math
import multiprocessing
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures import layers, load_architecture
from architectures.layers import LanguageModel, ModelConfig, is_control
from train_gpt import (
    MUON_POLYNOMIALS,
    Machine,
    RunConfig,
    Trainer,
    choose_attention,
    compile_pays,
    keep_freed_memory,
    make_machine,
    micro_batch_count,
)

COMPILED_GRAPHS = 256  # of one function by all models here; beyond its own limit torch goes on uncompiled
FP32_TOLERANCE, BF16_TOLERANCE = 1e-3, 5e-3  # of a loss, relative
LAP_SECONDS = 0.5
UPSTREAM_MICRO_BATCHES = 8  # on one device


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

    def __init__(self, model: LanguageModel, run: RunConfig, micro_batches: int = 1, compiled: bool = False):
        self.model, self.run, self.micro_batches = model, run, micro_batches
        self.loss, self.orthogonalize = (
            torch.compile(function, dynamic=False) if compiled else function for function in (self.loss, newton_schulz)
        )
        embed = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
        head = [] if model.head is None else [model.head.weight]
        rest = [p for p in model.parameters() if all(p is not q for q in embed + head)]
        self.matrices = [p for p in rest if not is_control(p)]
        controls = [p for p in rest if is_control(p)]
        embed_lr = run.embed_lr if head else run.tied_embed_lr
        rates = (embed, embed_lr, run.embed_wd), (head, run.head_lr, run.embed_wd), (controls, run.scalar_lr, 0.0)
        groups = [dict(params=params, lr=lr, weight_decay=decay) for params, lr, decay in rates if params]
        self.adam = torch.optim.AdamW(groups, betas=(run.beta1, run.beta2), eps=run.adam_eps, fused=True)
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
        if self.run.grad_clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.run.grad_clip_norm)
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
                rate = run.matrix_lr * max(1.0, weight.size(0) / weight.size(1)) ** 0.5
                update = F.normalize(update, dim=-1) if run.muon_row_norm else update
                update = update.to(self.model.compute_dtype)
                if run.muon_wd:
                    weight.mul_(1 - run.matrix_lr * run.muon_wd)
                weight.sub_(rate * self.orthogonalize(update, run.muon_backend_steps, run.muon_polynomial))


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


def with_pytorch_s_attention() -> None:
    """The same, but a compiled step attends by PyTorch's kernel alone."""
    as_the_kit()
    layers.MAX_BLOCKED_SEQ_LEN = 0


def as_it_is() -> None:
    """The process as PyTorch finds it."""


@dataclass(frozen=True)
class Choices:
    """What one process times: PlainStep or the kit's step, and how the process is prepared before it allocates."""

    plain: bool = False
    bf16: bool = False
    compile: bool = False
    micro_batches: int = 1
    cuda_graphs: bool = False
    prepare: Callable[[], None] = as_the_kit


class Stepper:
    """A step with its own model, timed; from (batch, number of the step) to the loss."""

    def __init__(self, step: Callable, model: LanguageModel, batches: list[Tensor]):
        self.step, self.model, self.batches, self.done = step, model, batches, 0

    def take(self, steps: int) -> float:
        """The loss of the last of these steps; the device may queue them, and is waited for at the end."""
        for _ in range(steps):
            loss = self.step(self.batches[self.done % len(self.batches)], self.done)
            self.done += 1
        return loss.item()

    def lap(self, steps: int) -> float:
        """Seconds per step over a number of steps."""
        start = time.perf_counter()
        self.take(steps)
        return (time.perf_counter() - start) / steps


def build(Model, config: ModelConfig, run: RunConfig, machine: Machine) -> LanguageModel:
    """A model on the machine, in its number format, with the run's initial weights, shaken: zero-initialised
    projections would hide what lies behind them."""
    torch.manual_seed(run.seed)
    model = Model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    model.compute_dtype = machine.dtype
    return model.to(machine.device)


def kit_stepper(model: LanguageModel, run: RunConfig, machine: Machine, micro_batches: int, batches: list) -> Stepper:
    """train_gpt.py's own step, at the base rates."""
    rows = len(batches[0]) // micro_batches
    choose_attention(model.config, machine, rows)
    model.choose_kernels(rows, machine.compile, machine.sum)
    trainer = Trainer(model, run, machine, micro_batches)

    def step(batch: Tensor, number: int) -> Tensor:
        return trainer.train_step(batch, number, 1.0, lambda: [0.0, 0.0, 0.0])[0]

    return Stepper(step, model, batches)


def chosen_machine(run: RunConfig) -> Machine:
    """The machine, and this process, as train_gpt.py would set them up for this run."""
    as_the_kit()
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = COMPILED_GRAPHS
    machine = make_machine(run)
    machine.compile = compile_pays(run, machine.device)[0] if run.compile is None else run.compile
    return machine


def serve(pipe: Connection, arch: str, run: RunConfig, config: ModelConfig, choices: Choices) -> None:
    """Take steps and laps of what was chosen as asked for, until the other end is closed."""
    choices.prepare()
    Model, _ = load_architecture(arch)
    run = replace(run, bf16=choices.bf16, cuda_graphs=choices.cuda_graphs)
    machine = make_machine(run)
    if choices.compile:
        torch._dynamo.config.recompile_limit = COMPILED_GRAPHS  # a looped Muon's function has every shape
    machine.compile = choices.compile
    model, batches = build(Model, config, run, machine), random_batches(run, config, machine.device)
    pipe.send("ready")
    stepper = None
    while True:
        try:
            method, steps = pipe.recv()
        except EOFError:
            return
        if stepper is None:  # not before it is asked: now no other process is at work, and kernels can be raced
            if choices.plain:
                stepper = Stepper(PlainStep(model, run, choices.micro_batches, choices.compile), model, batches)
            else:
                stepper = kit_stepper(model, run, machine, choices.micro_batches, batches)
            torch.manual_seed(run.seed)
        if machine.device.type == "cuda" and method == "lap":
            stepper.take(1)  # not counted: its memory was given back
        pipe.send(getattr(stepper, method)(steps))
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()  # the others have the same device


class Elsewhere:
    """A Stepper in a process of its own, which begins at once and ends after close()."""

    def __init__(self, name: str, *what: object):
        context = multiprocessing.get_context("spawn")
        self.name, (self.pipe, there) = name, context.Pipe()
        self.process = context.Process(target=serve, args=(there, *what), daemon=True)
        self.process.start()
        there.close()

    def answer(self) -> float | str:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise ValueError(f"the process of the step {self.name!r} ended; its last words are above") from None

    def ask(self, method: str, steps: int) -> float:
        with suppress(BrokenPipeError):  # the answer, which then will not come, says why
            self.pipe.send((method, steps))
        return self.answer()

    def take(self, steps: int) -> float:
        return self.ask("take", steps)

    def lap(self, steps: int) -> float:
        return self.ask("lap", steps)

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


def micro_batch_counts(Model, config: ModelConfig, run: RunConfig, chosen: Machine) -> dict[tuple[bool, bool], int]:
    """By (bf16, compile): the micro-batches of the kit, whose number follows from what a forward keeps in memory."""
    counts = {}
    for bf16 in (False, True):
        machine = replace(chosen, dtype=torch.bfloat16 if bf16 else torch.float32)
        model = build(Model, config, run, machine)
        for compiled in (False, True):
            counts[bf16, compiled] = micro_batch_count(run, model, replace(machine, compile=compiled))
    return counts


def variants(run: RunConfig, chosen: Machine, counts: dict[tuple[bool, bool], int], rows: int) -> dict[str, Choices]:
    """By name: the plain step, as upstream runs it, each choice alone, then together, then the kit's without one or
    otherwise. BF16=0 and COMPILE=0 leave theirs out."""
    plain = Choices(plain=True, micro_batches=counts[False, False], prepare=as_it_is)
    found = {"plain": plain}
    if run.compile is not False and run.bf16 is not False and rows % UPSTREAM_MICRO_BATCHES == 0:
        found["upstream's"] = replace(plain, bf16=True, compile=True, micro_batches=UPSTREAM_MICRO_BATCHES)
    choice = chosen.dtype == torch.bfloat16, chosen.compile
    for compiled in (False,) if run.compile is False else (False, True):
        for bf16 in (False,) if run.bf16 is False else (False, True):
            words = ["batched Muon"] + ["bf16"] * bf16 + ["compile"] * compiled
            name = " + ".join(words) + " (kit)" * ((bf16, compiled) == choice)
            found[name] = Choices(bf16=bf16, compile=compiled, micro_batches=counts[bf16, compiled])
    kit = Choices(bf16=choice[0], compile=choice[1], micro_batches=counts[choice])
    if chosen.device.type == "cpu":
        found["kit, memory handed back"] = replace(kit, prepare=as_it_is)
        if kit.compile and kit.bf16:
            found["kit, PyTorch's attention"] = replace(kit, prepare=with_pytorch_s_attention)
    for count in (2 * kit.micro_batches, 4 * kit.micro_batches):
        if rows % count == 0:
            found[f"kit in {count} micro-batches"] = replace(kit, micro_batches=count)
    half = f"kit in {2 * kit.micro_batches} micro-batches"
    if chosen.device.type == "cuda" and kit.compile and half in found:
        # Not of larger ones: graphs do not give their memory back, and the others have the same device.
        found[f"{half}, CUDA graphs"] = replace(found[half], cuda_graphs=True)
    return found


def check_losses(losses: list[float], plain: list[float], bf16: bool) -> None:
    """ValueError for a step that is not the plain one: other losses, beyond what its number format explains."""
    tolerance = BF16_TOLERANCE if bf16 else FP32_TOLERANCE
    if not all(math.isclose(a, b, rel_tol=tolerance) for a, b in zip(losses, plain, strict=True)):
        raise ValueError(f"another step: losses {losses}, the plain one's {plain}")


def first_steps(stepper: Elsewhere) -> tuple[float, list[float]]:
    """(seconds of the first step, losses of the first two): the second loss tells whether the optimizers agree."""
    start = time.perf_counter()
    loss = stepper.take(1)
    return time.perf_counter() - start, [loss, stepper.take(1)]


def measure_step(arch: str, run: RunConfig, config: ModelConfig, rounds: int) -> dict:
    """Tokens per second of the kit's step, and of each of its choices alone, against PlainStep on the same batches."""
    (Model, _), chosen = load_architecture(arch), chosen_machine(run)
    counts = micro_batch_counts(Model, config, run, chosen)
    found = variants(run, chosen, counts, run.train_batch_tokens // config.train_seq_len)
    errors = {}

    def answers(names: Iterable[str], question: Callable[[str], object]) -> dict[str, object]:
        """By name; a step that fails is left out of what follows, but for the plain one, by which all are measured."""
        given = {}
        for name in names:
            try:
                given[name] = question(name)
            except ValueError as error:
                if name == "plain":
                    raise
                errors[name] = str(error)
        return given

    with ExitStack() as stack:
        steppers = {
            name: stack.enter_context(closing(Elsewhere(name, arch, run, config, choices)))
            for name, choices in found.items()
        }
        ready = answers(found, lambda name: steppers[name].answer())
        began = answers(ready, lambda name: first_steps(steppers[name]))
        losses = {name: both for name, (_, both) in began.items()}
        right = answers(began, lambda name: check_losses(losses[name], losses["plain"], found[name].bf16))
        steps = max(1, round(LAP_SECONDS / steppers["plain"].lap(2)))

        def lap(name: str) -> float:
            return answers([name], lambda name: steppers[name].lap(steps)).get(name, math.inf)

        seconds = interleave({name: lambda name=name: lap(name) for name in right}, rounds)
        seconds = {name: laps for name, laps in seconds.items() if name not in errors}
    rows = []
    for row in compare(seconds, "plain"):
        name, speed = row["what"], 1000 * run.train_batch_tokens / row["median_ms"]
        row |= dict(micro_batches=found[name].micro_batches, tokens_per_second=speed)
        rows.append(row | dict(first_seconds=began[name][0], first_loss=losses[name][0]))
    notes = [
        "each in a process of its own; plain: as PyTorch finds it; the rest: as train_gpt.py sets it, or otherwise",
        f"n rounds of {steps} step(s); first_seconds: the first call, compilation included; (kit): its choice",
        f"before and after a step the losses are the plain one's within {FP32_TOLERANCE}, bf16 within {BF16_TOLERANCE}",
    ]
    if "upstream's" in seconds:
        for row, other in zip(rows, compare(seconds, "upstream's"), strict=True):
            row["over_upstream"] = other["speed"]
        words = f"plain, bf16, compiled, {UPSTREAM_MICRO_BATCHES} micro-batches"
        notes.append(f"over_upstream: speed beside upstream's: {words}")
    rows += [dict(what=name, error=error) for name, error in errors.items()]
    settings = dict(arch=arch, train_batch_tokens=run.train_batch_tokens, steps_per_lap=steps, **asdict(config))
    raw = dict(raw_seconds_per_step=seconds, losses=losses)
    return dict(settings=settings) | raw | dict(rows=rows, notes=notes, ok=not errors)
