"""The Triton kernels of fused_qk.py; imported where there is CUDA, and by tests and tools.

Letters: M tokens, T time, H query heads, G key and value heads, K numbers of a head.

A program takes a few tokens through all of their heads, so that it reads their cosines and sines once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from architectures.kernels.fused_norm import norm_eps
from architectures.kernels.fused_qk import head_counts

HALF_TILE = 1024  # numbers of each half of a head that a program holds
QK_LAUNCH = {"num_warps": 4, "num_stages": 1}


@triton.jit
def load_half(x, at, there):
    return tl.load(x + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def unit_halves(qkv, at, there, eps, K: tl.constexpr):
    """(first half, second half, 1 / s) of a head of each token, the halves over s."""
    first, second = load_half(qkv, at, there), load_half(qkv, at + K // 2, there)
    scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / K + eps)[:, None]
    return first * scale, second * scale, scale


@triton.jit
def turned_head(qkv, out, gain, at, out_at, there, cos, sin, eps, K: tl.constexpr):
    first, second, _scale = unit_halves(qkv, at, there, eps, K)
    first, second = (first * cos + second * sin) * gain, (second * cos - first * sin) * gain
    tl.store(out + out_at, first.to(out.dtype.element_ty), mask=there)
    tl.store(out + out_at + K // 2, second.to(out.dtype.element_ty), mask=there)


@triton.jit
def turned_head_gradient(qkv, d_out, d_qkv, gain, at, out_at, there, cos, sin, eps, K: tl.constexpr):
    """The gradient of gain; that of the head is stored."""
    first, second, scale = unit_halves(qkv, at, there, eps, K)
    d_first, d_second = load_half(d_out, out_at, there), load_half(d_out, out_at + K // 2, there)
    dx, dy = d_first * cos - d_second * sin, d_first * sin + d_second * cos
    along = tl.sum(dx * first + dy * second, axis=1)
    mean, scale = (along / K)[:, None], scale * gain
    tl.store(d_qkv + at, (scale * (dx - first * mean)).to(d_qkv.dtype.element_ty), mask=there)
    tl.store(d_qkv + at + K // 2, (scale * (dy - second * mean)).to(d_qkv.dtype.element_ty), mask=there)
    return tl.sum(along, axis=0)


@triton.jit
def copied_head(source, target, at, out_at, there, K: tl.constexpr):
    tl.store(target + out_at, tl.load(source + at, mask=there), mask=there)
    tl.store(target + out_at + K // 2, tl.load(source + at + K // 2, mask=there), mask=there)


@triton.jit
def token_tile(
    cos, sin, M, T, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr
):
    """Of this program's tokens: where their first heads begin in qkv, in q, in k and v; what is there; cos, sin."""
    tokens, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF)[None, :]
    there = (tokens < M)[:, None] & (columns < K // 2)
    table_at = (tokens % T)[:, None] * (K // 2) + columns
    token = tokens.to(tl.int64)[:, None]
    cos, sin = load_half(cos, table_at, there), load_half(sin, table_at, there)
    return token * ((H + 2 * G) * K) + columns, token * (H * K) + columns, token * (G * K) + columns, there, cos, sin


@triton.jit(do_not_specialize=["M", "T"])
def qk_norm_rope_rows(
    qkv, gain, cos, sin, q, k, v, M, T, eps,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """q, k and v of some tokens."""
    at, q_at, k_at, there, cos, sin = token_tile(cos, sin, M, T, H, G, K, ROWS, HALF)
    for h in range(H):
        w = tl.load(gain + h).to(tl.float32)
        turned_head(qkv, q, w, at + h * K, q_at + h * K, there, cos, sin, eps, K)
    for g in range(G):
        turned_head(qkv, k, 1.0, at + (H + g) * K, k_at + g * K, there, cos, sin, eps, K)
        copied_head(qkv, v, at + (H + G + g) * K, k_at + g * K, there, K)


@triton.jit(do_not_specialize=["M", "T"])
def qk_norm_rope_backward_rows(
    dq, dk, dv, qkv, gain, cos, sin, d_qkv, parts, M, T, eps,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """d_qkv of some tokens, and their part (programs, H) of the gains' gradient."""
    at, q_at, k_at, there, cos, sin = token_tile(cos, sin, M, T, H, G, K, ROWS, HALF)
    for h in range(H):
        w = tl.load(gain + h).to(tl.float32)
        part = turned_head_gradient(qkv, dq, d_qkv, w, at + h * K, q_at + h * K, there, cos, sin, eps, K)
        tl.store(parts + tl.program_id(0) * H + h, part)
    for g in range(G):
        turned_head_gradient(qkv, dk, d_qkv, 1.0, at + (H + g) * K, k_at + g * K, there, cos, sin, eps, K)
        copied_head(dv, d_qkv, k_at + g * K, at + (H + G + g) * K, there, K)


def qk_tile(K: int) -> dict[str, int]:
    """Constants of the tile for heads of K."""
    half = triton.next_power_of_2(K // 2)
    return {"ROWS": max(1, HALF_TILE // half), "HALF": half}


def launch_qk(kernel, before: tuple[Tensor, ...], tensors: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> None:
    """The kernel on what it reads first, on qkv, gain, cos and sin, and on what it writes."""
    qkv, gain, cos, _ = tensors
    (B, T), (H, G, K), tile = qkv.shape[:2], head_counts(qkv, gain, cos), qk_tile(2 * cos.size(1))
    programs = triton.cdiv(B * T, tile["ROWS"])
    kernel[(programs,)](*before, *tensors, *after, B * T, T, norm_eps(qkv), H, G, K, **tile, **QK_LAUNCH)


def launch_qk_norm_rope(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qk_norm_rope_op of fused_qk.py from one kernel."""
    tensors = tuple(x.contiguous() for x in (qkv, gain, cos, sin))
    H, G, K = head_counts(qkv, gain, cos)
    q, k, v = (qkv.new_empty(*qkv.shape[:2], heads, K) for heads in (H, G, G))
    launch_qk(qk_norm_rope_rows, (), tensors, (q, k, v))
    return q, k, v


def launch_qk_norm_rope_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """qk_norm_rope_backward of fused_qk.py from one kernel and one sum."""
    before, tensors = (tuple(x.contiguous() for x in part) for part in ((dq, dk, dv), (qkv, gain, cos, sin)))
    programs = triton.cdiv(qkv.size(0) * qkv.size(1), qk_tile(2 * cos.size(1))["ROWS"])
    d_qkv, parts = torch.empty_like(tensors[0]), gain.new_empty(programs, len(gain), dtype=torch.float32)
    launch_qk(qk_norm_rope_backward_rows, before, tensors, (d_qkv, parts))
    return d_qkv, parts.sum(dim=0).to(gain.dtype)
