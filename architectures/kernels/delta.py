"""The gated delta rule, computed chunk by chunk with matrix products, triangular solves and a tree over the chunks.

And a state that enters and leaves a scan, this one or that of scan.py.

Letters: B batch, T time, G key groups, H heads (G divides H), N key dim, P value dim of a head, C chunks of Q steps.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from architectures.kernels.scan import CHUNK_SIZE, in_chunks, triton_takes


def naive_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """The definition, one step after another, with a_t = exp(log_decay_t):

    S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T, y_t = S_t^T q_t: what k_t recalls moves towards v_t.
    q, k (B, T, G, N), k of length 1; v (B, T, H, P); beta, log_decay (B, T, H); y (B, T, H, P).
    """
    repeats = v.size(2) // q.size(2)
    q, k = q.repeat_interleave(repeats, dim=2), k.repeat_interleave(repeats, dim=2)
    state, outputs = v.new_zeros(v.size(0), v.size(2), k.size(-1), v.size(-1)), []  # (B, H, N, P)
    for t in range(v.size(1)):
        state = log_decay[:, t].exp()[..., None, None] * state
        recalled = (k[:, t, :, :, None] * state).sum(dim=2)  # (B, H, P)
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * (v[:, t] - recalled))[:, :, None]
        outputs.append((q[:, t, :, :, None] * state).sum(dim=2))
    return torch.stack(outputs, dim=1)


def states_before(turn: Tensor, add: Tensor) -> Tensor:
    """S_c of S_{c+1} = turn_c S_c + add_c, S_0 = 0; turn (B, C, ..., N, N), add and S (B, C, ..., N, P).

    By a tree (Blelloch 1990, https://www.cs.cmu.edu/~guyb/papers/Ble93.pdf): upwards, neighbours become one step;
    downwards, the state before a pair gives that between its two. Both take log2 C rounds.
    """
    C, firsts = turn.size(1), []
    while turn.size(1) > 1:
        if turn.size(1) % 2:  # what is added at the end meets no later chunk
            turn, add = (torch.cat((x, torch.zeros_like(x[:, :1])), dim=1) for x in (turn, add))
        firsts.append((turn[:, 0::2], add[:, 0::2]))
        second = turn[:, 1::2]
        turn, add = second @ turn[:, 0::2], second @ add[:, 0::2] + add[:, 1::2]
    before = torch.zeros_like(add)  # the top of the tree
    for turn, add in reversed(firsts):
        before = before[:, : turn.size(1)]
        before = torch.stack((before, turn @ before + add), dim=2).flatten(1, 2)
    return before[:, :C]


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, chunk_size: int = CHUNK_SIZE
) -> Tensor:
    """naive_delta_rule in the WY form of Gated DeltaNet (Yang et al. 2024, https://arxiv.org/abs/2412.06464).

    With u_t = beta_t (v_t - a_t S_{t-1}^T k_t) every chunk is a scan of k and u; the u of a chunk solve one triangular
    system, in which the state before the chunk stands on the right. log_decay is at most 0. All of it in fp32, for the
    solve multiplies errors; y (B, T, H, P) in the dtype of v. In bf16 on CUDA, where a key fits a tile, the same is
    computed by Triton kernels, whose chunks have their own size.
    """
    if triton_takes(q, k, v):
        from architectures.kernels.delta_op import triton_delta_rule
        from architectures.kernels.scan_op import ROWS

        if q.size(-1) <= ROWS:
            return triton_delta_rule(q, k, v, log_decay, beta)
    (_, T, H, P), (G, N), Q, dtype = v.shape, q.shape[2:], chunk_size, v.dtype
    q, k = (in_chunks(x.float(), Q).transpose(2, 3)[:, :, :, None] for x in (q, k))  # (B, C, G, 1, Q, N)
    v, beta, log_decay = (
        in_chunks(x.float(), Q).transpose(2, 3).unflatten(2, (G, H // G))
        for x in (v, beta[..., None], log_decay[..., None])
    )  # (B, C, G, H / G, Q, P or 1)
    since = log_decay.cumsum(dim=-2)  # from the chunk's beginning on
    causal = torch.ones(Q, Q, dtype=torch.bool, device=v.device).tril()
    # -inf before exp, not 0 after it: the differences above the diagonal are positive and may overflow.
    decay = (since - since.mT).masked_fill(~causal, -torch.inf).exp()  # (B, C, G, H / G, Q, Q)
    right = torch.cat((v, since.exp() * k.expand(*v.shape[:-1], N)), dim=-1)
    # The solve takes 1 for the diagonal and reads nothing above it.
    solved = torch.linalg.solve_triangular(beta * decay * (k @ k.mT), beta * right, upper=False, unitriangular=True)
    written, erased = solved.split((P, N), dim=-1)  # u = written - erased S
    keys = (k * (since[..., -1:, :] - since).exp()).mT  # (B, C, G, H / G, N, Q): as they are at the chunk's end
    turn = since[..., -1:, :].exp() * torch.eye(N, device=v.device) - keys @ erased
    before = states_before(turn, keys @ written)  # (B, C, G, H / G, N, P)
    y = (decay * (q @ k.mT)) @ (written - erased @ before) + since.exp() * (q @ before)
    return y.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :T].to(dtype)


def scan_from(
    state: Tensor | None,
    scan: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    delta: Tensor,
    **rest,
) -> tuple[Tensor, Tensor | None]:
    """(y of a scan, chunked_scan or delta_rule, that begins with state (N, H, P), the state after its last step).

    delta is the last tensor that the scan has for each step, beta of the delta rule. B is 1. The state enters by N
    steps before the first, of which each writes a row of it, and leaves by N steps after the last, of which each reads
    one. No state enters and none leaves where it is None, for any B.
    """
    if state is None:
        return scan(q, k, v, log_decay, delta, **rest), None
    G, N = q.shape[2:]
    unit = torch.eye(N, dtype=q.dtype, device=q.device)[None, :, None].expand(1, N, G, N)
    q, k = torch.cat((0 * unit, q, unit), dim=1), torch.cat((unit, k, 0 * unit), dim=1)
    written = state[None].to(v.dtype)
    v = torch.cat((written, v, torch.zeros_like(written)), dim=1)
    delta = F.pad(F.pad(delta, (0, 0, N, 0), value=1.0), (0, 0, 0, N))
    y = scan(q, k, v, F.pad(log_decay, (0, 0, N, N)), delta, **rest)
    return y[:, N:-N], y[0, -N:]
