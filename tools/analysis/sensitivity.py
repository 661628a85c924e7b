"""How much the score of each target hangs on each token read: d nats(s) / d embedding(t)."""

import torch
from torch import Tensor

from architectures.layers import LanguageModel

ROWS = 16  # copies of the window differentiated at once


def sensitivity(model: LanguageModel, input_ids: Tensor, target_ids: Tensor) -> Tensor:
    """rms(e_t) |d nats_s / d e_t|, e_t the embedding of token t, Frobenius norm: (T, T) by s and t of one window (T,).

    The root mean square makes the step relative: e_t is normalised before it is used. Zero wherever t > s.
    """
    leaves: list[Tensor] = []

    def cut(module: torch.nn.Module, args: tuple, embedded: Tensor) -> Tensor:
        leaves.append(embedded.detach().requires_grad_())
        return leaves[-1]

    T, found = len(input_ids), []
    handle = model.embed.register_forward_hook(cut)
    try:
        for places in torch.arange(T).split(ROWS):
            inputs, targets = (ids.expand(len(places), T) for ids in (input_ids, target_ids))
            nats = model.nats(inputs, targets)  # row i is differentiated at place i alone
            (gradient,) = torch.autograd.grad(nats.gather(1, places[:, None]).sum(), leaves[-1])  # (rows, T, D)
            found.append(gradient.norm(dim=-1) * leaves[-1].detach().square().mean(dim=-1).sqrt())
    finally:
        handle.remove()
    return torch.cat(found)


def by_distance(matrix: Tensor) -> Tensor:
    """The mean over s of the entries (s, s - i), for every i: (T,). Token s - i stands i + 1 before the target of s."""
    return torch.stack([matrix.diagonal(-i).mean() for i in range(len(matrix))])


def report(found: list[Tensor]) -> dict:
    """The means over windows, with standard errors, as they stand in the JSON."""
    distances = torch.stack([by_distance(matrix) for matrix in found]).double()
    error = (distances.std(dim=0) / len(found) ** 0.5).tolist() if len(found) > 1 else None
    return {
        "max_future": max(matrix.triu(1).abs().max().item() for matrix in found),
        "by_distance": distances.mean(dim=0).tolist(),
        "by_distance_error": error,
        "matrix": torch.stack(found).double().mean(dim=0).tolist(),
    }
