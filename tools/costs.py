"""What an architecture costs: stored bytes, floating-point operations, memory, and the time of a step beside gpt's."""

from collections.abc import Callable
from dataclasses import asdict
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from architectures import load_architecture, names
from architectures.layers import ModelConfig, is_control
from tools.pack import flatten
from tools.plain_step import (
    LAP_SECONDS,
    Stepper,
    build,
    chosen_machine,
    compare,
    interleave,
    kit_stepper,
    random_batches,
)
from train_gpt import (
    BYTE_CAP,
    MEMORY_SHARE,
    RunConfig,
    ScorePlan,
    fill_generated,
    from_env,
    micro_batch_count,
    pack_artifact,
    read_header,
    split_rows,
    token_bytes,
)

GPU_BYTES = 80e9


def stored_bytes(arch: str, settings: dict[str, str], vocab_size: int) -> int:
    """Bytes of an artifact before compression, nearly: one per quantised weight, four per control number."""
    Model, Config = load_architecture(arch)
    model = Model(from_env(Config, {"VOCAB_SIZE": str(vocab_size)} | settings)).folded()
    unique = {id(p): p for p in model.parameters()}.values()
    return sum(p.numel() * 4 if is_control(p) else p.numel() + 2 * p.numel() // p.size(-1) for p in unique)


def artifact_bytes(arch: str, settings: dict[str, str], vocab_size: int) -> tuple[int, float | None]:
    """(bytes of model.bin and the packed script, its clip) where all weights are noise: no coder finds much in either.

    Packed as train_gpt.py packs it: in 8 bits, and where that is over the cap, at the least clip that fits.
    """
    Model, Config = load_architecture(arch)
    model, noise = Model(from_env(Config, settings | {"VOCAB_SIZE": str(vocab_size)})), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if not is_control(p):
                p.normal_(generator=noise)
    code = len(flatten(arch).encode())
    blob = pack_artifact(model, arch, None, ScorePlan(1024, 1024), 1.0, RunConfig.quant_bits, None, BYTE_CAP - code)
    return code + len(blob), read_header(blob)[0]["quant_clip"]


def measure_artifacts(env: dict[str, str], archs: list[str] | None = None) -> dict:
    """Parameters, bytes of the submission and memory of a step of these architectures, by default all."""
    rows = []
    for arch in archs or names():
        Model, Config = load_architecture(arch)
        config = from_env(Config, env)
        packed, clip = artifact_bytes(arch, env, config.vocab_size)
        row = dict(what=arch, params=config.num_params(), stored_bytes=stored_bytes(arch, env, config.vocab_size))
        model = Model(config).train()
        model.compute_dtype = torch.bfloat16
        kept, T = token_bytes(model, compiled=True), config.train_seq_len
        parts = split_rows(RunConfig.train_batch_tokens // T, T, MEMORY_SHARE * GPU_BYTES / kept)
        row |= dict(artifact_bytes=packed, clip=clip, kept_kb=kept / 1000, micro_batches=parts)
        rows.append(row | dict(kept_gb=RunConfig.train_batch_tokens / parts * kept / 1e9))
    notes = [
        "stored_bytes: int8 weights, fp32 controls, before coding; artifact_bytes: coded, with the packed script",
        "every weight is noise, in which a coder finds hardly more or less than in what was trained",
        "clip: QUANT_CLIP that the cap of 16,000,000 bytes made necessary",
        "kept_kb: of a token for backward, estimated from eager; micro_batches: of 524,288 tokens on one GPU of 80 GB",
        "kept_gb: of a micro-batch, beside weights and optimizers",
    ]
    ok = all(row["artifact_bytes"] <= BYTE_CAP for row in rows)
    return dict(settings=asdict(from_env(ModelConfig, env)), rows=rows, notes=notes, ok=ok)


def forward_flops(stepper: Stepper) -> float:
    """Floating-point operations of a token's way through the scored path, by PyTorch's counter; attention unmasked."""
    model, input_ids = stepper.model, stepper.batches[0][:, :-1]
    fill_generated(model)
    # The counter knows no fused attention on CPU; written out, it is two matrix products over the whole window.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(input_ids)
    return counter.get_total_flops() / input_ids.numel()


def peak_megabytes(stepper: Stepper) -> float:
    """Most bytes alive at once during a step, in 10^6: by the allocator on CUDA, by its ledger on CPU."""
    if stepper.batches[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        stepper.take(1)
        return torch.cuda.max_memory_allocated() / 1e6
    held = sum(p.numel() * p.element_size() * (3 if p.ndim < 2 else 2) for p in stepper.model.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        stepper.take(1)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return (held + most) / 1e6


def make_stepper(arch: str, settings: dict[str, str]) -> Stepper:
    """The kit's own step of an architecture on random tokens, compiled and warm."""
    Model, Config = load_architecture(arch)
    run, config = from_env(RunConfig, settings), from_env(Config, settings)
    machine = chosen_machine(run)
    model, batches = build(Model, config, run, machine), random_batches(run, config, machine.device)
    stepper = kit_stepper(model, run, machine, micro_batch_count(run, model, machine), batches)
    stepper.take(3)
    return stepper


def measure_lengths(env: dict[str, str], rounds: int, arch: str, lengths: tuple[int, ...]) -> dict:
    """The step on one sequence of each length in turns; how much longer one takes than the length before it."""
    steppers = {
        T: make_stepper(arch, env | {"TRAIN_SEQ_LEN": str(T), "TRAIN_BATCH_TOKENS": str(T)}) for T in lengths
    }
    seconds = interleave({str(T): lambda s=s: s.lap(3) for T, s in steppers.items()}, rounds)
    rows = compare(seconds, str(lengths[0]))
    for row, before in zip(rows[1:], rows, strict=False):
        row["over_the_one_before"] = median(
            a / b for a, b in zip(seconds[row["what"]], seconds[before["what"]], strict=True)
        )
    notes = ["what: tokens of the one sequence of a step; n rounds of 3 steps in turns"]
    settings = dict(arch=arch, **asdict(steppers[lengths[0]].model.config))
    return dict(settings=settings, raw_seconds_per_step=seconds, rows=rows, notes=notes, ok=True)


def measure_archs(
    env: dict[str, str], rounds: int, archs: list[str] | None = None, save: Callable[[dict], None] = lambda found: None
) -> dict:
    """Parameters, bytes, step time, memory and operations of these architectures, each in turns with gpt.

    What there is, is saved after each, for all of them take long.
    """
    gpt, rows, raw = make_stepper("gpt", env), [], {}
    steps = max(1, round(LAP_SECONDS / gpt.lap(2)))
    tokens = from_env(RunConfig, env).train_batch_tokens
    settings = dict(train_batch_tokens=tokens, steps_per_lap=steps, **asdict(gpt.model.config))
    notes = [
        f"n rounds of {steps} step(s), each in turns with gpt; gpt in turns with itself shows the noise",
        "artifact_bytes: coded noise for weights, and the packed script; mflop_per_token: forward, attention unmasked",
    ]
    for arch in archs or names():
        try:
            mine = make_stepper(arch, env)
            raw[arch] = interleave({"gpt": lambda: gpt.lap(steps), "it": lambda s=mine: s.lap(steps)}, rounds)
            row = compare(raw[arch], "gpt")[1] | dict(what=arch, params=sum(p.numel() for p in mine.model.parameters()))
            row |= dict(artifact_bytes=artifact_bytes(arch, env, mine.model.config.vocab_size)[0])
            row |= dict(peak_mb=peak_megabytes(mine), mflop_per_token=forward_flops(mine) / 1e6)
            rows.append(row)
        except Exception as error:  # one broken architecture must not cost the others their numbers
            rows.append(dict(what=arch, error=f"{type(error).__name__}: {error}".splitlines()[0]))
        ok = all("n" in row for row in rows)
        found = dict(settings=settings, raw_seconds_per_step=raw, rows=rows, notes=notes, ok=ok)
        save(found)
    return found
