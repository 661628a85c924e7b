"""Finite-depth Lyapunov exponents of the backbone, by JVP and QR (Benettin et al. 1980, doi:10.1007/BF02128236).

The state is the residual stream of a whole window: x (T, D) into the backbone, then what each next block reads (after
the skips or the solver's step that lead to it), then what the backbone returns. With V the leading right singular
vectors of the whole Jacobian J_L, and J_i V the tangents at layer i,
    J_i V = Q_i R_i,   exponent k of layer i: log R_i[k, k] - log R_{i-1}[k, k],   exponent k: log R_L[k, k] / L.
A backbone with skips has no state of its own size between layers. One JVP through all of it carries the tangent of the
skips along, and by linearity the QR of J_i V has the R of a chain re-orthonormalised after every layer.
Random tangents would not do: in a few layers they do not turn towards the leading directions, and show the mean growth.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from architectures.layers import LanguageModel

States = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass
class Growth:
    """How perturbations grow through L layers, in nats. All that is by layer is cumulated from the first on."""

    leading: Tensor  # (L, k): log R[k, k], directions from the fastest at the end down
    random: Tensor  # (L,): a random perturbation, root mean square
    stream: Tensor  # (L,): the stream itself
    change: float  # of the last value, largest over k, when the search for directions ended

    @property
    def exponents(self) -> Tensor:
        """(k,), nats per layer."""
        return self.leading[-1] / len(self.leading)


def stream_states(model: LanguageModel) -> States:
    """x (B, T, D) to the stream after each layer: what the second, third ... block reads, and the backbone's result."""

    def states(x: Tensor) -> tuple[Tensor, ...]:
        seen: list[Tensor] = []
        blocks = set(model.blocks)
        # Rows first: two lanes are (2, B, T, D).
        handles = [
            block.register_forward_pre_hook(lambda _, args: seen.append(args[0].transpose(0, -3))) for block in blocks
        ]
        try:
            result = model.backbone(x)
        finally:
            for handle in handles:
                handle.remove()
        return (*seen[1:], result)

    return states


def push(states: States, x: Tensor, directions: Tensor) -> list[Tensor]:
    """J_i directions at every layer: directions (n, k) at x (1, ...) of n numbers to a list of (n_i, k).

    Each direction has a row of the batch to itself, as rows do not see one another. NotImplementedError where the
    model has an operation without a forward derivative.
    """
    rows = x.repeat(directions.size(1), *[1] * (x.ndim - 1))
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():  # fused attention has no forward derivative
        reached = states(forward_ad.make_dual(rows, directions.T.reshape(rows.shape)))
        return [forward_ad.unpack_dual(state).tangent.flatten(1).T for state in reached]


def pull(states: States, x: Tensor, images: Tensor) -> Tensor:
    """J_L^T images: images (n_L, k) to (n, k)."""
    rows = x.repeat(images.size(1), *[1] * (x.ndim - 1)).requires_grad_()
    result = states(rows)[-1]
    return torch.autograd.grad(result, rows, images.T.reshape(result.shape))[0].flatten(1).T


def growth(states: States, x: Tensor, count: int, max_rounds: int = 12, tolerance: float = 0.01) -> Growth:
    """How the `count` fastest perturbations of x (1, ...) grow, in all states(x).

    The directions are found by block Krylov iteration (Musco and Musco 2015, https://arxiv.org/abs/1504.05477): the
    singular values found in the space of all V, J^T J V, ... grow from round to round until log changes by less than
    the tolerance.
    """
    n = x[0].numel()
    count = min(count, n)
    width = count if 2 * count <= n else n  # of a block; two of them must fit, or one must be everything
    random = torch.randn(n, width, generator=torch.Generator().manual_seed(0)).to(x.dtype)
    block = torch.linalg.qr(random)[0]
    basis, images, logs, change = [], [], torch.full((count,), -torch.inf), math.inf
    for _ in range(min(max_rounds, n // width)):
        tangents = push(states, x, block)
        if not images:
            mean_square = torch.stack([tangent.square().sum() / width for tangent in tangents])
        basis.append(block)
        images.append(tangents[-1])
        _, values, turn = torch.linalg.svd(torch.cat(images, dim=1), full_matrices=False)
        change, logs = (values[:count].log() - logs).abs().max().item(), values[:count].log()
        if change < tolerance:
            break
        block, known = pull(states, x, tangents[-1]), torch.cat(basis, dim=1)
        for _ in range(2):  # once leaves what rounding left
            block = block - known @ (known.T @ block)
        block = torch.linalg.qr(block)[0]
    directions = torch.cat(basis, dim=1) @ turn[:count].T
    leading = torch.stack([log_diagonal(tangent) for tangent in push(states, x, directions)])
    with torch.no_grad():
        stream = torch.stack([state.norm() / x.norm() for state in states(x)]).log()
    return Growth(leading, mean_square.log() / 2, stream, 0.0 if len(basis) * width == n else change)


def log_diagonal(tangents: Tensor) -> Tensor:
    """log |R[k, k]| of the QR decomposition of tangents (n, k)."""
    return torch.linalg.qr(tangents, mode="r")[1].diagonal().abs().log()


def mean_and_error(samples: list[Tensor]) -> tuple[list, list | None]:
    """The mean over samples of any shape and its standard error, None for one sample."""
    stacked = torch.stack(samples).double()
    error = (stacked.std(dim=0) / len(samples) ** 0.5).tolist() if len(samples) > 1 else None
    return stacked.mean(dim=0).tolist(), error


def report(found: list[Growth]) -> dict:
    """The means over windows, with standard errors, as they stand in the JSON."""
    exponents, error = mean_and_error([each.exponents for each in found])
    return {
        "exponents": exponents,
        "exponents_error": error,
        "leading_by_layer": mean_and_error([each.leading for each in found])[0],
        "random_by_layer": mean_and_error([each.random for each in found])[0],
        "stream_by_layer": mean_and_error([each.stream for each in found])[0],
        "change": max(each.change for each in found),
    }
