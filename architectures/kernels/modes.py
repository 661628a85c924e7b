"""Filters made of decaying oscillations, computed chunk by chunk with matrix products.

Letters: B batch, T time, D channels, M modes of a channel, C chunks of Q steps. A complex number is a pair of
real ones, because torch.compile makes no code for others.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from architectures.kernels.scan import CHUNK_SIZE, in_chunks

Pair = tuple[Tensor, Tensor]  # real and imaginary part


def times(a: Pair, b: Pair) -> Pair:
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def powers(log_pole: Pair, exponents: Tensor) -> Pair:
    """exp(log_pole e) of every mode (D, M) and exponent (n): two tensors (D, n, M)."""
    size, angle = (x[:, None] * exponents[:, None] for x in log_pole)
    return size.exp() * angle.cos(), size.exp() * angle.sin()


def held(pole: Pair, delta: Tensor, weight: Pair) -> tuple[Pair, Pair]:
    """(log_pole, weight) of h' = pole h + u, y = 2 Re sum_m weight_m h_m, where u is held for delta (D) per step.

    All others are (D, M) pairs: log_pole is delta pole, and weight gets the factor 2 (exp(log_pole) - 1) / pole.
    """
    log_pole = tuple(delta[:, None] * x for x in pole)
    size, angle = log_pole[0].exp(), log_pole[1]
    gain = times((size * angle.cos() - 1, size * angle.sin()), (pole[0], -pole[1]))
    length = (pole[0].square() + pole[1].square()) / 2
    return log_pole, tuple(x / length for x in times(weight, gain))


def impulse_response(log_pole: Pair, weight: Pair, length: int) -> Tensor:
    """What a 1 at step 0 leaves at steps 0 .. length - 1: Re sum_m weight_m exp(log_pole_m s), (D, length)."""
    steps = torch.arange(length, device=weight[0].device)
    return times(tuple(w[:, None] for w in weight), powers(log_pole, steps))[0].sum(dim=-1)


def naive_modal_filter(u: Tensor, log_pole: Pair, weight: Pair) -> Tensor:
    """The definition: u (B, T, D) convolved with the impulse response of its channel; log_pole, weight (D, M) pairs."""
    T, response = u.size(1), impulse_response(log_pole, weight, u.size(1))
    return torch.stack([(u[:, : t + 1] * response[:, : t + 1].flip(1).T).sum(dim=1) for t in range(T)], dim=1)


def modal_filter(
    u: Tensor, log_pole: Pair, weight: Pair, state: Tensor | None = None, chunk_size: int = CHUNK_SIZE
) -> tuple[Tensor, Tensor]:
    """(naive_modal_filter of u, (B, T, D), and the state after its last step, (2, D, B, M)); all fp32.

    h_s = exp(log_pole) h_{s-1} + u_s from the given state, or from none, and y_s = Re sum_m weight_m h_s: within a
    chunk y is u times a triangular Toeplitz matrix, between chunks h travels.
    """
    (B, T, _), Q = u.shape, chunk_size
    steps = torch.arange(Q, device=u.device)
    by_channel = in_chunks(u, Q).permute(3, 0, 1, 2)  # (D, B, C, Q)
    C, flat = by_channel.size(2), by_channel.flatten(1, 2)  # (D, B C, Q)

    def power(*exponents: int) -> Pair:
        return powers(log_pole, steps.new_tensor(exponents))  # (D, number of exponents, M)

    def states(u: Tensor, exponents: Tensor) -> Pair:
        """What the steps of chunks u (D, n, Q) leave when each fades as often as exponents (Q) say, (D, n, M)."""
        return tuple(u @ p for p in powers(log_pole, exponents))

    gap = steps[:, None] - steps
    toeplitz = torch.where(gap >= 0, impulse_response(log_pole, weight, Q)[:, gap.clamp(min=0)], 0.0)  # (D, Q, Q)
    ends = torch.stack(states(flat, Q - 1 - steps)).unflatten(2, (B, C))  # (2, D, B, C, M)
    first = torch.zeros_like(ends[:, :, :, :1]) if state is None else state[:, :, :, None]
    before = torch.cat((first, ends[:, :, :, :-1]), dim=3)  # of each chunk, as far as the last chunk made it
    reach = 1
    while reach < C:  # each takes in as many chunks before it as it has taken in already
        fade = (p[:, :, None] for p in power(Q * reach))  # (D, 1, 1, M)
        earlier = F.pad(before[:, :, :, :-reach], (0, 0, reach, 0))
        before, reach = before + torch.stack(times(tuple(fade), earlier.unbind())), 2 * reach
    read = times(tuple(w[:, None] for w in weight), powers(log_pole, steps + 1))  # (D, Q, M): of the state before
    at = before.flatten(2, 3)  # (2, D, B C, M)
    y = flat @ toeplitz.mT + at[0] @ read[0].mT - at[1] @ read[1].mT
    y = y.unflatten(1, (B, C)).permute(1, 2, 3, 0).flatten(1, 2)[:, :T]
    used = T - (C - 1) * Q  # steps of the last chunk
    after = times(power(used), before[:, :, :, -1].unbind())
    last = states(by_channel[:, :, -1], (used - 1 - steps).clamp(min=0))
    return y, torch.stack(after) + torch.stack(last)
