"""What a training step of an arm costs: time in turns with the baseline, memory, floating-point operations."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from tools.costs import forward_flops, make_stepper, peak_megabytes
from tools.plain_step import chosen_machine, interleave
from train_gpt import RunConfig, from_env, hardware_name

LAP_STEPS = 1  # short, so that a slow spell of the machine meets every arm of a round


@dataclass
class Costs:
    """Of one training step on this machine. ratio: the median over rounds of its time over the baseline's."""

    step_ms: float
    step_ms_rounds: list[float]
    ratio: float
    peak_mem_mb: float  # live at once in a step: weights, optimizer, gradients, activations
    flops_per_token: float  # forward, 2 per multiply-add, a shared weight once per use
    hardware: str
    torch: str


def measure(
    arms: dict[str, tuple[str, dict[str, str]]], baseline: str, rounds: int, failed: Callable[[str], None]
) -> dict[str, Costs]:
    """The costs of every arm, (architecture, settings) by name; each takes turns with the baseline.

    An arm that takes no step is left out, and failed is told of it in words; without the baseline nothing is measured.
    """
    steppers = {}
    for name, (arch, settings) in arms.items():
        try:
            steppers[name] = make_stepper(arch, settings)
        except Exception as error:  # whatever it is, it must not cost the others their numbers
            failed(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
    if baseline not in steppers:
        return {}
    laps = interleave({name: lambda s=stepper: s.lap(LAP_STEPS) for name, stepper in steppers.items()}, rounds)
    machine = chosen_machine(from_env(RunConfig, arms[baseline][1]))
    found = {}
    for name, stepper in steppers.items():
        ratio = median(a / b for a, b in zip(laps[name], laps[baseline], strict=True))
        own = [1000 * lap for lap in laps[name]]
        memory, flops = peak_megabytes(stepper), forward_flops(stepper)
        found[name] = Costs(median(own), own, ratio, memory, flops, hardware_name(machine), torch.__version__)
    return found
