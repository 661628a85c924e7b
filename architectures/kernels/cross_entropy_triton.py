"""The Triton kernel of the softcapped linear cross-entropy; imported where there is CUDA, and by tests and tools.

Letters: M tokens, D model_dim, V vocab_size, R rows of a chunk.

At the rates of Hopper, the two exponentials and the reciprocal of a logit take about the time of its product at D = 512
(by count). So a tile is small enough for two programs to share a multiprocessor: one multiplies while the other
evaluates. The tile is evaluated in halves, which need fewer registers: at most 128 a thread where V fills its tiles.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOGIT_TILE = {"BLOCK_R": 128, "BLOCK_V": 128, "BLOCK_D": 64}
LOGIT_LAUNCH = {"num_warps": 8, "num_stages": 3}


@triton.jit
def grade(x, words, target, scale_in, scale_out, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """(mass, slope, each row's sum of mass, target's x) of the products x (rows, words)."""
    wanted = target[:, None] == words[None, :]
    target_x = tl.sum(tl.where(wanted, x, 0.0), axis=1)
    half = 1 / (1 + tl.exp2(x * scale_in))
    mass = tl.where(wanted, 0.0, tl.exp2(scale_out - 2 * scale_out * half))
    if V % BLOCK_V:
        mass = tl.where(words[None, :] < V, mass, 0.0)
    return mass * (half * (1 - half)), tl.sum(mass, axis=1), target_x


@triton.jit
def softcapped_tile(
    h, w, targets, slopes, others, target_x, R, scale_in, scale_out,
    V: tl.constexpr, D: tl.constexpr, stride: tl.constexpr, WITH_GRAD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of tiled_slopes: BLOCK_R rows by BLOCK_V words, the logits in registers alone."""
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    words = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_there, tile = rows < R, tl.program_id(0) * R + rows
    # Past the end, the last row and word are read again and not used: that needs no mask in the loop.
    h_row = h + tl.minimum(rows, R - 1)[:, None] * D
    w_row = w + tl.minimum(words, V - 1)[:, None] * D
    dims = tl.arange(0, BLOCK_D)[None, :]
    x = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            h_tile, w_tile = tl.load(h_row + start + dims), tl.load(w_row + start + dims)
        else:
            h_tile = tl.load(h_row + start + dims, mask=start + dims < D, other=0.0)
            w_tile = tl.load(w_row + start + dims, mask=start + dims < D, other=0.0)
        x = tl.dot(h_tile, tl.trans(w_tile), x)
    target = tl.load(targets + rows, mask=row_there, other=0).to(tl.int32)
    left, right = tl.split(tl.permute(tl.reshape(x, [BLOCK_R, 2, BLOCK_V // 2]), (0, 2, 1)))
    half_words = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V // 2)
    slope, sum_left, x_left = grade(left, half_words, target, scale_in, scale_out, V, BLOCK_V)
    at = slopes + rows[:, None] * stride + half_words[None, :]
    if WITH_GRAD:
        tl.store(at, slope.to(slopes.dtype.element_ty))
    slope, sum_right, x_right = grade(right, half_words + BLOCK_V // 2, target, scale_in, scale_out, V, BLOCK_V)
    if WITH_GRAD:
        tl.store(at + BLOCK_V // 2, slope.to(slopes.dtype.element_ty))
    tl.store(others + tile, sum_left + sum_right, mask=row_there)
    tl.store(target_x + tile, x_left + x_right, mask=row_there)


def tiled_slopes(h: Tensor, w: Tensor, targets: Tensor, softcap: float, with_grad: bool) -> tuple[Tensor, ...]:
    """chunk_slopes of cross_entropy.py from one kernel. h (R, D), w (V, D), targets (R, 1), all contiguous."""
    (R, D), V = h.shape, len(w)
    row_tiles, word_tiles = triton.cdiv(R, LOGIT_TILE["BLOCK_R"]), triton.cdiv(V, LOGIT_TILE["BLOCK_V"])
    padded = (row_tiles * LOGIT_TILE["BLOCK_R"], word_tiles * LOGIT_TILE["BLOCK_V"]) if with_grad else (0, 0)
    slopes = h.new_empty(padded)  # whole tiles: stores without a mask, rows that start at multiples of 16 bytes
    others, target_x = h.new_empty(2, word_tiles, R, dtype=torch.float32)
    pointers = h, w, targets, slopes, others, target_x
    softcapped_tile[(word_tiles, row_tiles)](
        *pointers, R, *scales(softcap), V, D, padded[1], with_grad, **LOGIT_TILE, **LOGIT_LAUNCH
    )
    half_y = torch.sigmoid(target_x.sum(dim=0) * (-2 / softcap))
    return slopes[:R, :V], others.sum(dim=0)[:, None], half_y[:, None]


def scales(softcap: float) -> tuple[float, float]:
    """What makes of exp(2 x / softcap) and of exp(softcap tanh) powers of two."""
    return 2 / (softcap * math.log(2)), softcap / math.log(2)


def hopper_cases() -> list[dict]:
    """How the kernel is compiled for Hopper, with what a launch moves and computes, for tools that need no GPU."""
    signature = {"h": "*bf16", "w": "*bf16", "targets": "*i64", "slopes": "*bf16", "others": "*fp32"}
    signature |= {"target_x": "*fp32", "R": "i32", "scale_in": "fp32", "scale_out": "fp32"}
    cases = []
    for R, V, D, with_grad in ((4096, 8192, 512, True), (4096, 8192, 512, False), (32_768, 1024, 512, True)):
        cases.append(hopper_case(signature, R, V, D, with_grad))
    return [*cases, hopper_case(signature, 640, 50_257, 512, True), hopper_case(signature, 4096, 260, 384, True)]


def hopper_case(signature: dict[str, str], R: int, V: int, D: int, with_grad: bool) -> dict:
    tiles = triton.cdiv(V, LOGIT_TILE["BLOCK_V"])
    stride = tiles * LOGIT_TILE["BLOCK_V"] if with_grad else 0
    return {
        "name": f"softcapped_tile {'with' if with_grad else 'without'} gradient, {R} x {V} x {D}",
        "kernel": softcapped_tile,
        "signature": signature,
        "constexprs": {"V": V, "D": D, "stride": stride, "WITH_GRAD": with_grad, **LOGIT_TILE},
        **LOGIT_LAUNCH,
        "bytes": 2 * R * D + 2 * V * D + 8 * R + 8 * tiles * R + 2 * R * stride,
        "flops": 2 * R * V * D,
        "matmul": True,
    }
