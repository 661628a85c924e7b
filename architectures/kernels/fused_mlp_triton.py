"""The Triton kernel of fused_mlp.py; imported where there is CUDA, and by tests and tools.

Letters: M rows, D width of the product's inner dimension, F hidden width.

Tiles as in cross_entropy_triton.py: small enough for two programs to share a multiprocessor, so that one multiplies
while the other evaluates and stores. Neighbouring programs share rows, which stay in the cache of the chip.
"""

import triton
import triton.language as tl
from torch import Tensor

RELU2_TILE = {"BLOCK_M": 128, "BLOCK_F": 128, "BLOCK_D": 64}
RELU2_LAUNCH = {"num_warps": 8, "num_stages": 3}


@triton.jit
def store_relu2(x, act, out, rows, columns, M, F: tl.constexpr, BACKWARD: tl.constexpr):
    at = rows.to(tl.int64)[:, None] * F + columns[None, :]
    there = (rows < M)[:, None] & (columns < F)[None, :]
    if BACKWARD:
        x *= 2 * tl.sqrt(tl.load(act + at, mask=there, other=0.0).to(tl.float32))
    else:
        x = tl.maximum(x, 0.0)
        x *= x
    tl.store(out + at, x.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["M"])
def relu2_tile(
    left, weight, act, out, M,
    D: tl.constexpr, F: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of out (M, F): relu(left weight^T)^2, weight (F, D); BACKWARD (left weight) 2 sqrt(act), weight (D, F)."""
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    dims = tl.arange(0, BLOCK_D)
    row = tl.minimum(rows, M - 1).to(tl.int64)  # past the end the last row is read again, not used: no mask for rows
    x = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + dims
        left_at = left + row[:, None] * D + d[None, :]
        weight_at = weight + (d[:, None] * F + columns[None, :] if BACKWARD else columns[None, :] * D + d[:, None])
        if D % BLOCK_D == 0 and F % BLOCK_F == 0:
            left_tile, weight_tile = tl.load(left_at), tl.load(weight_at)
        else:
            left_tile = tl.load(left_at, mask=d[None, :] < D, other=0.0)
            weight_tile = tl.load(weight_at, mask=(d < D)[:, None] & (columns < F)[None, :], other=0.0)
        x = tl.dot(left_tile, weight_tile, x)
    left_half, right_half = tl.split(tl.permute(tl.reshape(x, [BLOCK_M, 2, BLOCK_F // 2]), (0, 2, 1)))
    columns = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F // 2)
    store_relu2(left_half, act, out, rows, columns, M, F, BACKWARD)
    store_relu2(right_half, act, out, rows, columns + BLOCK_F // 2, M, F, BACKWARD)


def launch_relu2(left: Tensor, weight: Tensor, act: Tensor, hidden: int, backward: bool) -> Tensor:
    (M, D), left = left.shape, left.contiguous()
    out = left.new_empty(M, hidden)
    grid = (triton.cdiv(hidden, RELU2_TILE["BLOCK_F"]), triton.cdiv(M, RELU2_TILE["BLOCK_M"]))
    relu2_tile[grid](left, weight.contiguous(), act, out, M, D, hidden, backward, **RELU2_TILE, **RELU2_LAUNCH)
    return out


def launch_relu2_up(x: Tensor, up: Tensor) -> Tensor:
    """relu2_up of fused_mlp.py from one kernel."""
    return launch_relu2(x, up, x, len(up), backward=False)


def launch_relu2_down_gradient(dy: Tensor, down: Tensor, act: Tensor) -> Tensor:
    """relu2_down_gradient of fused_mlp.py from one kernel."""
    return launch_relu2(dy, down, act, down.size(1), backward=True)
