"""What changes from layer to layer beside the matrices: gates, coefficients, scales, and time constants of SSMs."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from architectures.layers import LanguageModel, is_control
from architectures.time_gates import GatedStack
from tools.analysis.calls import calls

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}


@dataclass
class Group:
    """Numbers that every layer of a list has: values (layers, channels)."""

    name: str
    kind: str  # gate: multiplies a weight; coefficient: weighs a basis; scale: multiplies the residual stream
    layers: list[int]
    values: Tensor


def gate_groups(model: GatedStack) -> list[Group]:
    """The gates of a time-indexed stack, each in those layers alone that have something for it to multiply."""
    groups = []
    for name, gate in model.gates().items():
        used = [i for i in range(len(gate)) if has_gate(model, i, name)]
        groups.append(Group(name, "gate", used, gate[used]))
    return groups


def has_gate(model: GatedStack, layer_idx: int, name: str) -> bool:
    """Whether a layer has a tensor that the named gate multiplies; a low-rank gate bears its matrix's name."""
    gated = model.config.gated(layer_idx).items()
    return any(name in (tensor, gate.rows, gate.columns) for tensor, gate in gated)


def scale_groups(blocks: list[nn.Module], model_dim: int) -> list[Group]:
    """Every control tensor of the stream's width in the blocks that run, row by row."""
    rows: dict[str, dict[int, Tensor]] = {}
    for layer_idx, block in enumerate(blocks):
        for name, param in block.named_parameters():
            if is_control(param) and param.size(-1) == model_dim:
                for i, row in enumerate(param.view(-1, model_dim)):
                    rows.setdefault(f"{name}.{i}" if param.ndim > 1 else name, {})[layer_idx] = row
    return [Group(name, "scale", list(by), torch.stack(list(by.values()))) for name, by in rows.items()]


@torch.no_grad()
def groups(model: LanguageModel, blocks: list[nn.Module]) -> list[Group]:
    """All that the model has: gates and coefficients of a time-indexed one, scales of any."""
    found = gate_groups(model) if isinstance(model, GatedStack) and model.time is not None else []
    if hasattr(model, "coefficients") and model.config.num_timed:
        coefficients = model.coefficients()[:, 1:]  # the first is 1
        found.append(Group("coefficients", "coefficient", list(range(len(coefficients))), coefficients))
    return found + scale_groups(blocks, model.config.model_dim)


def summary(group: Group) -> dict:
    """Variance over depth, mean over channels; its share of the variance of all values; quantiles by layer.

    The rest of the variance is that of the channels' means over depth. A share of 0 means that depth is not used.
    """
    values = group.values.double()
    over_depth, total = values.var(dim=0, correction=0).mean().item(), values.var(correction=0).item()
    entry = {"group": group.name, "kind": group.kind, "layers": group.layers, "channels": values.size(1)}
    entry |= {"mean": values.mean().item(), "depth_variance": over_depth, "total_variance": total}
    entry |= {"depth_share": over_depth / total if total else None}
    entry |= {"mean_by_layer": values.mean(dim=1).tolist()}
    return entry | {f"{word}_by_layer": values.quantile(q, dim=1).tolist() for word, q in QUANTILES.items()}


class StepSizes(TorchFunctionMode):
    """Collects what softplus gives inside state-space modules, their step sizes Delta, by call."""

    def __init__(self) -> None:
        super().__init__()
        self.module: nn.Module | None = None  # that runs
        self.by_call: list[list[Tensor]] = []

    def begin(self, module: nn.Module, args: tuple) -> None:
        self.module = module
        self.by_call.append([])

    def end(self, *_: object) -> None:
        self.module = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_step = func is nn.functional.softplus and self.module is not None
        if is_step and result.shape[-1:] == self.module.dt_bias.shape[-1:]:
            self.by_call[-1].append(result.detach().reshape(-1, result.size(-1)))
        return result


def is_ssm(module: nn.Module) -> bool:
    """State-space modules hold ln of the decay rates A and the bias of Delta under Mamba's names."""
    return isinstance(getattr(module, "A_log", None), Tensor) and isinstance(getattr(module, "dt_bias", None), Tensor)


def constants(delta: Tensor, A_log: Tensor) -> dict[str, list[float]]:
    """Quantiles over tokens of 1 / (Delta A), the tokens in which a state falls to 1 / e: delta (tokens, units),
    A_log (units, ...); a number for each of A_log, flattened."""
    delta, rate = delta.double(), A_log.detach().double().exp()
    found = {}
    for word, q in QUANTILES.items():
        step = delta.quantile(1 - q, dim=0)  # (units,): the longer the step, the shorter the memory
        found[f"tau_{word}"] = (1 / (step.view(-1, *[1] * (rate.ndim - 1)) * rate)).flatten().tolist()
    return found


@torch.no_grad()
def time_constants(model: LanguageModel, input_ids: Tensor) -> list[dict]:
    """An entry per layer with a state-space module, in running order, Delta measured on input_ids (B, T).

    measured is false where no softplus was seen, as in a fused kernel: then Delta is that of an input of zeros.
    """
    steps, handles = StepSizes(), []
    for module in filter(is_ssm, model.modules()):
        handles += [module.register_forward_pre_hook(steps.begin), module.register_forward_hook(steps.end)]
    try:
        with steps:
            found = calls(model, input_ids, is_ssm)
    finally:
        for handle in handles:
            handle.remove()
    entries = []
    for call, measured in zip(found, steps.by_call, strict=True):
        delta = torch.cat(measured) if measured else zero_input_step(call.module)[None]
        entry = {"layer": call.layer, "module": call.name, "measured": bool(measured)}
        entries.append(entry | constants(delta, call.module.A_log))
    return entries


def zero_input_step(ssm: nn.Module) -> Tensor:
    """Delta (units,) where the input adds nothing to its bias."""
    return nn.functional.softplus(ssm.dt_bias)
