"""The gated delta rule of delta.py as one operator on CUDA: its launches and gradients.

Letters: B batch, T time, G key groups, H heads (G divides H), N key dim, P value dim of a head, C chunks of 64 steps.
What the kernels compute stands in delta_triton.py; sums over the heads of a group are taken here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from architectures.kernels.delta_triton import (
    DELTA_LAUNCH,
    delta_gradients,
    delta_inverse,
    delta_outputs,
    delta_slopes,
    delta_states,
)
from architectures.kernels.scan_op import ROWS, ceil_div


def tiles_of(q: Tensor, v: Tensor) -> Tensor:
    """A tile for each chunk of each head, (B, H, C, 64, 64), in the dtype of q."""
    B, T, H = v.shape[:3]
    return q.new_empty(B, H, ceil_div(T, ROWS), ROWS, ROWS)


def launch(kernel, q: Tensor, v: Tensor, *tensors: Tensor, by_chunk: bool = True) -> None:
    (B, T, H, P), (G, N) = v.shape, q.shape[2:]
    grid = (B * H, ceil_div(T, ROWS)) if by_chunk else (B * H,)
    kernel[grid](*tensors, T, G=G, H=H, N=N, P=P, **DELTA_LAUNCH)


@torch.library.custom_op("golf::delta", mutates_args=())
def fused_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, e, inverses and states of the chunks); all tensors contiguous, g and beta in fp32, N and P at most 64."""
    inverse, states, e, y = tiles_of(k, v), tiles_of(k, v), torch.empty_like(v), torch.empty_like(v)
    launch(delta_inverse, k, v, k, g, beta, inverse)
    launch(delta_states, k, v, k, v, g, beta, inverse, e, states, by_chunk=False)
    launch(delta_outputs, k, v, q, k, e, g, beta, states, y)
    return y, e, inverse, states


@fused_delta.register_fake
def fused_delta_shapes(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(v), tiles_of(k, v), tiles_of(k, v)


@torch.library.custom_op("golf::delta_backward", mutates_args=())
def fused_delta_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, e: Tensor, inverse: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dg, dbeta) in the shapes of q, k, v, g and beta."""
    (B, T, G, N), H = q.shape, v.size(2)
    slopes, dv, dbeta, dg = tiles_of(k, v), torch.empty_like(v), torch.empty_like(beta), torch.empty_like(g)
    dq, dk = (q.new_empty(B, T, H, N) for _ in "qk")
    launch(delta_slopes, k, v, q, k, e, g, beta, inverse, dy, dv, dbeta, slopes, by_chunk=False)
    launch(delta_gradients, k, v, q, k, e, g, beta, dy, dv, states, slopes, dq, dk, dg)
    if G < H:
        dq, dk = (x.unflatten(2, (G, H // G)).sum(3) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta


@fused_delta_backward.register_fake
def fused_delta_backward_shapes(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, e: Tensor, inverse: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x) for x in (q, k, v, g, beta))


def keep_delta_inputs(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs, *output[1:])


def delta_rule_gradients(ctx, dy: Tensor, *unused: Tensor) -> tuple[Tensor, ...]:
    return fused_delta_backward(dy.contiguous(), *ctx.saved_tensors)


fused_delta.register_autograd(delta_rule_gradients, setup_context=keep_delta_inputs)


def triton_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """naive_delta_rule of delta.py, differentiable once: y (B, T, H, P) in the dtype of v.

    q, k (B, T, G, N), N at most 64, v (B, T, H, P), all bf16, or all fp32, whose products are rounded to tf32;
    log_decay, at most 0, and beta (B, T, H). ValueError for tensors that do not fit each other.
    """
    (B, T, G, N), (H, P) = q.shape, v.shape[2:]
    if k.shape != q.shape or v.shape[:2] != (B, T) or H % G or not log_decay.shape == beta.shape == (B, T, H):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, log_decay, beta))
        wanted = "(B, T, G, N) twice, (B, T, H, P), (B, T, H) twice"
        raise ValueError(f"q, k, v, log_decay, beta of shapes {shapes} must be {wanted}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; make all bfloat16 or all float32")
    if N > ROWS:
        raise ValueError(f"keys of {N} numbers are wider than a tile; make them at most {ROWS}, or use delta_rule")
    if T * H * max(N, P) >= 2**31:
        raise ValueError(f"T * H * max(N, P) = {T * H * max(N, P)} steps over 32 bits; cut the sequence")
    tiles = ceil_div(P, ROWS)
    if tiles > 1:  # columns of a value are written and read each on its own, so each tile of them is a head
        v = F.pad(v, (0, -P % ROWS)).unflatten(3, (tiles, ROWS)).flatten(2, 3)
        log_decay, beta = (x.repeat_interleave(tiles, dim=2) for x in (log_decay, beta))
    scalars = (x.float().contiguous() for x in (log_decay, beta))
    y = fused_delta(q.contiguous(), k.contiguous(), v.contiguous(), *scalars)[0]
    return y.unflatten(2, (H, tiles)).flatten(3)[..., :P] if tiles > 1 else y
