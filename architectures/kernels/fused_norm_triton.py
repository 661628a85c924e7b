"""The Triton kernels of fused_norm.py; imported where there is CUDA, and by tests and tools.

Letters: M rows, D model_dim, K terms.

A program takes tiles of rows in turns with the others, a whole row at a time in registers; the sums over rows for the
gains stay in registers too, and each program writes its own once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from architectures.kernels.fused_norm import MAX_TERMS, norm_eps

NORM_TILE = 1024  # numbers of a term that a program holds, at least one row
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 8 * 132, 3 * 132  # what runs at once on an H100, by their registers


@triton.jit
def read_tile(pointer, at, there):
    return tl.load(pointer + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def scaled_term(term, gains, at, there, columns, D, there_d, INDEX: tl.constexpr, K: tl.constexpr):
    """(term, its gain), or zeros past the last term."""
    if INDEX < K:
        value = read_tile(term, at, there)
        gain = tl.load(gains + INDEX * D + columns, mask=there_d, other=0.0).to(tl.float32)[None, :]
    else:
        value = tl.zeros(at.shape, tl.float32)
        gain = tl.zeros([1, at.shape[1]], tl.float32)
    return value, gain


@triton.jit
def store_gradient(pointer, at, there, g, gain, INDEX: tl.constexpr, K: tl.constexpr):
    if INDEX < K:
        tl.store(pointer + at, (g * gain).to(pointer.dtype.element_ty), mask=there)


@triton.jit
def store_gain_gradient(parts, total, columns, D, there_d, INDEX: tl.constexpr, K: tl.constexpr):
    if INDEX < K:
        at = parts + (tl.program_id(0) * K + INDEX) * D + columns
        tl.store(at, tl.sum(total, axis=0), mask=there_d)


@triton.jit
def mixed_terms(u0, u1, u2, u3, u4, gains, at, there, columns, there_d, eps, D: tl.constexpr, K: tl.constexpr):
    """Five terms, their gains, the sum of terms times gains, and 1 over its root mean square per row."""
    v0, w0 = scaled_term(u0, gains, at, there, columns, D, there_d, 0, K)
    v1, w1 = scaled_term(u1, gains, at, there, columns, D, there_d, 1, K)
    v2, w2 = scaled_term(u2, gains, at, there, columns, D, there_d, 2, K)
    v3, w3 = scaled_term(u3, gains, at, there, columns, D, there_d, 3, K)
    v4, w4 = scaled_term(u4, gains, at, there, columns, D, there_d, 4, K)
    x = v0 * w0 + v1 * w1 + v2 * w2 + v3 * w3 + v4 * w4
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    return v0, v1, v2, v3, v4, w0, w1, w2, w3, w4, x, scale


@triton.jit(do_not_specialize=["M"])
def mix_norm_rows(
    u0, u1, u2, u3, u4, gains, mixed, normed, M, eps,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mixed and normed of all rows."""
    columns = tl.arange(0, BLOCK_D)
    there_d = columns < D
    for start in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        at = rows.to(tl.int64)[:, None] * D + columns[None, :]
        there = (rows < M)[:, None] & there_d[None, :]
        _v0, _v1, _v2, _v3, _v4, _w0, _w1, _w2, _w3, _w4, x, scale = mixed_terms(
            u0, u1, u2, u3, u4, gains, at, there, columns, there_d, eps, D, K
        )
        tl.store(mixed + at, x.to(mixed.dtype.element_ty), mask=there)
        tl.store(normed + at, (x * scale).to(normed.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["M"])
def mix_norm_backward_rows(
    d_mixed, d_normed, u0, u1, u2, u3, u4, gains, d0, d1, d2, d3, d4, parts, M, eps,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The terms' gradients, and each program's part (programs, K, D) of the gains'."""
    columns = tl.arange(0, BLOCK_D)
    there_d = columns < D
    sum0 = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sum1, sum2, sum3, sum4 = sum0, sum0, sum0, sum0
    for start in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        at = rows.to(tl.int64)[:, None] * D + columns[None, :]
        there = (rows < M)[:, None] & there_d[None, :]
        v0, v1, v2, v3, v4, w0, w1, w2, w3, w4, x, scale = mixed_terms(
            u0, u1, u2, u3, u4, gains, at, there, columns, there_d, eps, D, K
        )
        x *= scale
        dx = read_tile(d_normed, at, there)
        g = read_tile(d_mixed, at, there) + scale * (dx - x * (tl.sum(x * dx, axis=1) / D)[:, None])
        sum0 += v0 * g
        sum1 += v1 * g
        sum2 += v2 * g
        sum3 += v3 * g
        sum4 += v4 * g
        store_gradient(d0, at, there, g, w0, 0, K)
        store_gradient(d1, at, there, g, w1, 1, K)
        store_gradient(d2, at, there, g, w2, 2, K)
        store_gradient(d3, at, there, g, w3, 3, K)
        store_gradient(d4, at, there, g, w4, 4, K)
    store_gain_gradient(parts, sum0, columns, D, there_d, 0, K)
    store_gain_gradient(parts, sum1, columns, D, there_d, 1, K)
    store_gain_gradient(parts, sum2, columns, D, there_d, 2, K)
    store_gain_gradient(parts, sum3, columns, D, there_d, 3, K)
    store_gain_gradient(parts, sum4, columns, D, there_d, 4, K)


def norm_shape(D: int) -> tuple[dict[str, int], dict[str, int]]:
    """(constants of the tile, options of the launch) for rows of D: 8 numbers of a term in a thread."""
    block = triton.next_power_of_2(D)
    rows = max(1, NORM_TILE // block)
    return {"ROWS": rows, "BLOCK_D": block}, {"num_warps": max(1, rows * block // 256), "num_stages": 1}


def filled(tensors: list[Tensor]) -> list[Tensor]:
    """As many pointers as the kernels take; those past the last term are not followed."""
    return tensors + tensors[:1] * (MAX_TERMS - len(tensors))


def launch_mix_norm(terms: list[Tensor], gains: Tensor) -> tuple[Tensor, Tensor]:
    """mix_norm_op of fused_norm.py from one kernel."""
    terms, D, K = [term.contiguous() for term in terms], terms[0].size(-1), len(terms)
    mixed, normed = (torch.empty_like(terms[0]) for _ in range(2))
    M, (tile, launch) = mixed.numel() // D, norm_shape(D)
    programs = min(FORWARD_PROGRAMS, triton.cdiv(M, tile["ROWS"]))
    pointers = *filled(terms), gains.contiguous(), mixed, normed
    mix_norm_rows[(programs,)](*pointers, M, norm_eps(mixed), D, K, **tile, **launch)
    return mixed, normed


def launch_mix_norm_backward(d_mixed: Tensor, d_normed: Tensor, terms: list[Tensor], gains: Tensor) -> list[Tensor]:
    """mix_norm_backward of fused_norm.py from one kernel and one sum."""
    terms, D, K = [term.contiguous() for term in terms], terms[0].size(-1), len(terms)
    d_terms = [torch.empty_like(term) for term in terms]
    M, (tile, launch) = terms[0].numel() // D, norm_shape(D)
    programs = min(BACKWARD_PROGRAMS, triton.cdiv(M, tile["ROWS"]))
    parts = torch.empty(programs, K, D, dtype=torch.float32, device=gains.device)
    pointers = d_mixed.contiguous(), d_normed.contiguous(), *filled(terms), gains.contiguous(), *filled(d_terms), parts
    mix_norm_backward_rows[(programs,)](*pointers, M, norm_eps(terms[0]), D, K, **tile, **launch)
    return [*d_terms, parts.sum(dim=0).to(gains.dtype)]
