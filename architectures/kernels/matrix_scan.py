"""Products of a matrix per step, applied to one starting vector: a recurrence whose steps do not commute.

Letters: B batch, T time, X bond dim. Only directions count: states have root mean square 1, so no product overflows.
"""

import torch
from torch import Tensor

from architectures.layers import rms_norm


def naive_matrix_scan(matrices: Tensor, start: Tensor) -> Tensor:
    """The definition, one step after another: h_t = A_t h_{t-1} over its RMS; A (B, T, X, X), h_0 (X), h (B, T, X)."""
    state, states = rms_norm(start).expand(matrices.size(0), -1), []
    for t in range(matrices.size(1)):
        state = rms_norm((matrices[:, t] @ state[..., None]).squeeze(-1))
        states.append(state)
    return torch.stack(states, dim=1)


def matrix_scan(matrices: Tensor, start: Tensor) -> Tensor:
    """naive_matrix_scan by a tree over time (Blelloch 1990, https://www.cs.cmu.edu/~guyb/papers/Ble93.pdf).

    Upwards, neighbours are multiplied, T - 1 products of matrices in all; downwards, the state before a pair of steps
    gives that before its second: a matrix times a vector. Both take log2 T rounds.
    """
    B, T, X, _ = matrices.shape
    firsts, level = [], matrices
    while level.size(1) > 1:
        if level.size(1) % 2:  # the last of an odd number meets a step that does nothing
            level = torch.cat((level, torch.eye(X, dtype=level.dtype, device=level.device).expand(B, 1, X, X)), dim=1)
        first, second = level[:, 0::2], level[:, 1::2]
        firsts.append(first)
        level = second @ first
        # The scale of a product changes no direction, so its gradient is none.
        level = level / level.detach().square().mean(dim=(-2, -1), keepdim=True).sqrt()
    before = rms_norm(start).expand(B, 1, X)  # the state before the only node at the top
    for first in reversed(firsts):
        before = before[:, : first.size(1)]
        between = rms_norm((first @ before[..., None]).squeeze(-1))
        before = torch.stack((before, between), dim=2).flatten(1, 2)
    return rms_norm((matrices @ before[:, :T, :, None]).squeeze(-1))
