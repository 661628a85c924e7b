"""Which modules of a model run, in which order and in which layer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from architectures.layers import LanguageModel


@dataclass(frozen=True)
class Call:
    """One run of a module. layer counts the runs of blocks before it; None outside the blocks."""

    layer: int | None
    name: str
    module: nn.Module


@torch.no_grad()
def calls(model: LanguageModel, input_ids: Tensor, wanted: Callable[[nn.Module], bool]) -> list[Call]:
    """The runs of every wanted module while the model reads input_ids (B, T), in order.

    Found by running it, because a module may hold weights for others and never run itself, or run many times.
    """
    found, handles = [], []
    blocks, running = set(model.blocks), []
    num_begun = 0

    def begin(module: nn.Module, args: tuple) -> None:
        nonlocal num_begun
        running.append(num_begun)
        num_begun += 1

    def end(module: nn.Module, args: tuple, result: Tensor) -> None:
        running.pop()

    for name, module in model.named_modules():
        if module in blocks:
            handles.append(module.register_forward_pre_hook(begin))
            handles.append(module.register_forward_hook(end))
        if wanted(module):

            def note(module: nn.Module, args: tuple, name: str = name) -> None:
                found.append(Call(running[-1] if running else None, name, module))

            handles.append(module.register_forward_pre_hook(note))
    try:
        model.logits(input_ids)
    finally:
        for handle in handles:
            handle.remove()
    return found


def layers(model: LanguageModel, input_ids: Tensor) -> list[nn.Module]:
    """The block of every layer, in the order in which they run."""
    blocks = set(model.blocks)
    return [call.module for call in calls(model, input_ids, blocks.__contains__)]


@torch.no_grad()
def backbone_input(model: LanguageModel, input_ids: Tensor) -> Tensor | None:
    """What the model hands to its backbone, (B, T, D); None if it does not call one."""
    seen, backbone = [], model.backbone

    def watch(x: Tensor) -> Tensor:
        seen.append(x)
        return backbone(x)

    model.backbone = watch
    try:
        model.logits(input_ids)
    finally:
        del model.backbone
    return seen[0] if seen else None
