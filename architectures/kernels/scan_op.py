"""The chunked scan of scan.py as one operator on CUDA: its launches and gradients.

Letters: B batch, T time, G key groups, H heads (G divides H), N key dim, P value dim of a head, S segments. What the
kernels compute stands in scan_triton.py; sums over tiles and over the heads of a group are taken here, from parts in
the dtype of q.
"""

import torch
from torch import Tensor

from architectures.kernels.scan_triton import (
    SCAN_LAUNCH,
    SCAN_TILE,
    join_segments,
    scan_dkv,
    scan_dq,
    scan_forward,
    segment_states,
)

ROWS = SCAN_TILE.value  # of a chunk, and both sides of a tile
NUM_MULTIPROCESSORS = 132  # of an H100; a constant, so that all machines sum in one order
MIN_SEGMENT = 4 * ROWS  # steps


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def segment_steps(B: int, T: int, H: int, N: int, P: int) -> int:
    """Steps of a segment: all of time, or as few as leave no multiprocessor without a program."""
    programs, segments = B * H * ceil_div(N, ROWS) * ceil_div(P, ROWS), 1
    while segments * programs < NUM_MULTIPROCESSORS and 2 * segments * MIN_SEGMENT <= T:
        segments *= 2
    return ceil_div(ceil_div(T, segments), ROWS) * ROWS


class ScanLauncher:
    """The kernels at one shape: x (B, T, G, N) and values (B, T, H, P), in segments of `length` steps."""

    def __init__(self, x: Tensor, values: Tensor, length: int):
        (self.B, self.T, self.G, self.N), (self.H, self.P), self.length = x.shape, values.shape[2:], length
        self.tiles_n, self.tiles_p = ceil_div(self.N, ROWS), ceil_div(self.P, ROWS)
        self.segments = ceil_div(self.T, length)

    def __call__(self, kernel, *tensors: Tensor, fewer: int = 0, **constants: bool) -> None:
        grid = (self.B * self.H, self.segments - fewer, self.tiles_n * self.tiles_p)
        shape = dict(G=self.G, H=self.H, N=self.N, P=self.P)
        kernel[grid](*tensors, self.T, self.length, **shape, **constants, **SCAN_LAUNCH)

    def state_shape(self) -> tuple[int, int, int, int]:
        """Of the states between segments, which there are for each head of the batch and each tile."""
        return self.B * self.H * self.tiles_n * self.tiles_p, self.segments - 1, ROWS, ROWS

    def states(self, x: Tensor, values: Tensor, g: Tensor, backward: bool) -> Tensor:
        """The state at the end of each segment but the last, or the slope at the beginning of each but the first."""
        states = g.new_empty(self.state_shape())
        rows, slots = states.shape[:2]
        if slots:
            fades = g.new_empty(rows, slots)
            self(segment_states, x, values, g, states, fades, fewer=1, BACKWARD=backward)
        if slots > 1:
            join_segments[rows, 4](states, fades, slots, BACKWARD=backward)
        return states


@torch.library.custom_op("golf::scan", mutates_args=())
def fused_scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(y, states between segments); all tensors contiguous, g in fp32."""
    launch = ScanLauncher(q, v, length)
    starts = launch.states(k, v, g, backward=False)
    y = v.new_empty(launch.tiles_n, *v.shape)
    launch(scan_forward, q, k, v, g, y, starts, SEGMENTED=launch.segments > 1)
    return y.sum(0) if len(y) > 1 else y[0], starts


@fused_scan.register_fake
def fused_scan_shapes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, length: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), g.new_empty(ScanLauncher(q, v, length).state_shape())


@torch.library.custom_op("golf::scan_backward", mutates_args=())
def fused_scan_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, starts: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dg) in the shapes of q, k, v and g."""
    launch = ScanLauncher(q, v, length)
    (B, T, G, N), H, segmented = q.shape, launch.H, launch.segments > 1
    dq, dk = (q.new_empty(launch.tiles_p, B, T, H, N) for _ in "qk")
    dv = v.new_empty(launch.tiles_n, *v.shape)
    dg = g.new_empty(launch.tiles_n * launch.tiles_p, *g.shape)
    q_dq = g.new_empty(len(dg), B, H, T)
    ends = launch.states(q, dy, g, backward=True)
    launch(scan_dq, q, k, v, g, dy, dq, q_dq, starts, SEGMENTED=segmented)
    launch(scan_dkv, q, k, v, g, dy, q_dq, dk, dv, dg, starts, ends, SEGMENTED=segmented)

    def of_groups(parts: Tensor) -> Tensor:
        """(tiles of P, B, T, H, N) summed to (B, T, G, N)."""
        return parts.unflatten(3, (G, H // G)).sum((0, 4)) if len(parts) > 1 or G < H else parts[0]

    dv, dg = (x.sum(0) if len(x) > 1 else x[0] for x in (dv, dg))
    return of_groups(dq), of_groups(dk), dv, dg


@fused_scan_backward.register_fake
def fused_scan_backward_shapes(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, starts: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(g)


def keep_scan_inputs(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.length = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def scan_gradients(ctx, dy: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    return *fused_scan_backward(dy.contiguous(), *ctx.saved_tensors, ctx.length), None


fused_scan.register_autograd(scan_gradients, setup_context=keep_scan_inputs)


def triton_scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, segment_length: int | None = None) -> Tensor:
    """naive_scan of scan.py, differentiable once: y (B, T, H, P) in the dtype of v.

    q, k (B, T, G, N), v (B, T, H, P), all bf16, or all fp32, whose products are rounded to tf32; log_decay (B, T, H) at
    most 0, where MIN_LOG_DECAY and less, -inf too, resets the state and gets no gradient. segment_length, a multiple of
    ROWS, replaces the plan's. ValueError for tensors that do not fit each other.
    """
    (B, T, G, N), (H, P) = q.shape, v.shape[2:]
    if k.shape != q.shape or v.shape[:2] != (B, T) or H % G or log_decay.shape != (B, T, H):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, log_decay))
        raise ValueError(f"q, k, v, log_decay of shapes {shapes} must be (B, T, G, N) twice, (B, T, H, P), (B, T, H)")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; make all bfloat16 or all float32")
    if T * H * max(N, P) >= 2**31:
        raise ValueError(f"T * H * max(N, P) = {T * H * max(N, P)} steps over 32 bits; cut the sequence")
    length = segment_length or segment_steps(B, T, H, N, P)
    if length % ROWS:
        raise ValueError(f"segment_length={length} must be a multiple of {ROWS}")
    return fused_scan(q.contiguous(), k.contiguous(), v.contiguous(), log_decay.float().contiguous(), length)[0]
