"""Linear recurrences over time, computed chunk by chunk with matrix products and no loop.

Letters: B batch, T time, G key groups, H heads (G divides H), N key dim, P value dim of a head, C chunks of Q steps.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_SIZE = 64
HAS_TRITON = find_spec("triton") is not None


def triton_takes(*tensors: Tensor) -> bool:
    """Whether the Triton kernels take these: all in bf16, on CUDA."""
    return HAS_TRITON and all(x.is_cuda and x.dtype == torch.bfloat16 for x in tensors)


def naive_scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, delta: Tensor | None = None, skip: Tensor | None = None
) -> Tensor:
    """The definition, one step after another, with a_t = exp(log_decay_t) and c the skip of a head:

    S_t = a_t S_{t-1} + k_t (delta_t v_t)^T, y_t = S_t^T q_t + c v_t. Without them, delta is 1 and skip 0.
    q, k (B, T, G, N), v (B, T, H, P), log_decay, delta (B, T, H), skip (H); y (B, T, H, P). H / G neighbouring heads
    share q and k.
    """
    repeats = v.size(2) // q.size(2)
    q, k = q.repeat_interleave(repeats, dim=2), k.repeat_interleave(repeats, dim=2)
    written = v if delta is None else v * delta[..., None]
    state, outputs = v.new_zeros(v.size(0), v.size(2), k.size(-1), v.size(-1)), []  # (B, H, N, P)
    for t in range(v.size(1)):
        state = log_decay[:, t].exp()[..., None, None] * state + k[:, t, :, :, None] * written[:, t, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(dim=2))
    y = torch.stack(outputs, dim=1)
    return y if skip is None else y + v * skip[:, None]


def in_chunks(x: Tensor, chunk_size: int) -> Tensor:
    """x (B, T, ...) as (B, C, Q, ...), zeros after its end."""
    missing = -x.size(1) % chunk_size
    x = F.pad(x, (*(0, 0) * (x.ndim - 2), 0, missing)) if missing else x
    return x.unflatten(1, (-1, chunk_size))


def carry_decay(total: Tensor) -> Tensor:
    """exp of the sum of total (..., C) strictly between chunks j and c, (..., C, C): 0 unless j < c."""
    C = total.size(-1)
    rows = torch.arange(C, device=total.device)
    # Sums of each run of chunks on its own: differences of one long cumulative sum would cancel.
    later = rows[:, None] > rows[None, :] + 1  # the chunk before c comes after j
    runs = torch.where(later, total.roll(1, -1)[..., :, None], 0.0).cumsum(dim=-2)
    return torch.where(rows[:, None] > rows[None, :], runs, -torch.inf).exp()


def scan_in_chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, Q: int) -> Tensor:
    """naive_scan of values that are scaled already, and without a skip."""
    (_, T, H, P), (G, N) = v.shape, q.shape[2:]
    q, k, v = (in_chunks(x, Q) for x in (q, k, v))  # (B, C, Q, G, N), twice, and (B, C, Q, H, P)
    log_decay = in_chunks(log_decay.float(), Q).cumsum(dim=2)  # (B, C, Q, H): from the chunk's beginning on
    q, k = q.transpose(2, 3), k.transpose(2, 3)  # (B, C, G, Q, N)
    by_head = log_decay.transpose(2, 3)  # (B, C, H, Q)
    causal = torch.ones(Q, Q, dtype=torch.bool, device=v.device).tril()
    # -inf before exp, not 0 after it: the differences above the diagonal are positive and may overflow.
    decay = (by_head[..., :, None] - by_head[..., None, :]).masked_fill(~causal, -torch.inf).exp().to(v.dtype)
    scores = (q @ k.mT).unsqueeze(3) * decay.unflatten(2, (G, H // G))  # (B, C, G, H / G, Q, Q)
    within = (scores.flatten(2, 3) @ v.transpose(2, 3)).transpose(2, 3)  # (B, C, Q, H, P)
    if v.size(1) == 1:
        return within.flatten(1, 2)[:, :T]

    def grouped(x: Tensor) -> Tensor:
        """(B, C, Q, H, P) as (B, C, G, Q, H / G * P): the heads of a group side by side, one product for all."""
        return x.unflatten(3, (G, H // G)).transpose(2, 3).flatten(-2)

    to_end = (log_decay[:, :, -1:] - log_decay).exp().to(v.dtype)  # (B, C, Q, H)
    states = k.mT @ grouped(v * to_end[..., None])  # (B, C, G, N, H / G * P): what each chunk adds
    states = states.unflatten(-1, (H // G, P)).permute(0, 2, 4, 1, 3, 5)  # (B, G, H / G, C, N, P)
    carry = carry_decay(log_decay[:, :, -1].transpose(1, 2)).to(v.dtype)  # (B, H, C, C)
    before = carry.unflatten(1, (G, H // G)) @ states.flatten(-2)  # (B, G, H / G, C, N * P)
    before = before.unflatten(-1, (N, P)).permute(0, 3, 1, 4, 2, 5).flatten(-2)  # (B, C, G, N, H / G * P)
    from_before = (q @ before).unflatten(-1, (H // G, P)).transpose(2, 3).flatten(3, 4)  # (B, C, Q, H, P)
    y = within + from_before * log_decay.exp().to(v.dtype)[..., None]
    return y.flatten(1, 2)[:, :T]


def chunked_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    delta: Tensor | None = None,
    skip: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """naive_scan by the state-space duality (Dao and Gu 2024, https://arxiv.org/abs/2405.21060).

    Within a chunk y = ((q k^T) * decay) v; between chunks the summed states travel. log_decay is at most 0 and fp32.
    In bf16 on CUDA the same is computed by Triton kernels, whose chunks have their own size.
    """
    if triton_takes(q, k, v):
        from architectures.kernels.scan_op import triton_scan

        return triton_scan(q, k, v, log_decay, delta, skip)
    written = v if delta is None else v * delta.to(v.dtype)[..., None]
    y = scan_in_chunks(q, k, written, log_decay, chunk_size)
    return y if skip is None else (y + v * skip[:, None]).to(v.dtype)


def naive_diagonal_scan(u: Tensor, log_decay: Tensor) -> Tensor:
    """The definition, one step after another: h_t = exp(log_decay) h_{t-1} + u_t; u, h (B, T, N), log_decay (N)."""
    state, states = torch.zeros_like(u[:, 0]), []
    for t in range(u.size(1)):
        state = log_decay.exp() * state + u[:, t]
        states.append(state)
    return torch.stack(states, dim=1)


def decay_powers(log_decay: Tensor, size: int, first: int) -> Tensor:
    """exp(log_decay (s - r - first)) for s - r >= first, else 0: (N, size, size), one lower triangle per channel."""
    steps = torch.arange(size, device=log_decay.device)
    gap = steps[:, None] - steps[None, :] - first
    return (log_decay[:, None, None] * gap).masked_fill(gap < 0, -torch.inf).exp()


def diagonal_scan(u: Tensor, log_decay: Tensor, chunk_size: int = CHUNK_SIZE) -> Tensor:
    """naive_diagonal_scan in chunks: one decay per channel that never changes, at most 0 and fp32."""
    T, Q, dtype = u.size(1), chunk_size, u.dtype
    u, log_decay = in_chunks(u, Q), log_decay.float()  # (B, C, Q, N)
    by_channel = u.permute(3, 0, 2, 1)  # (N, B, Q, C)
    within = decay_powers(log_decay, Q, 0).to(dtype)[:, None] @ by_channel
    ends = within[:, :, -1:]  # (N, B, 1, C)
    before = ends @ decay_powers(log_decay * Q, u.size(1), 1).to(dtype).mT[:, None]  # state before each chunk
    steps = torch.arange(1, Q + 1, device=u.device)
    since = (log_decay[:, None] * steps).exp().to(dtype)[:, None, :, None]  # (N, 1, Q, 1)
    return (within + since * before).permute(1, 3, 2, 0).flatten(1, 2)[:, :T]
