"""The chunked scan of scan.py as one operator on CUDA: its launches and gradients.

Letters: B batch, T time, G key groups, H heads (G divides H), N key dim, P value dim of a head, S segments. What the
kernels compute stands in scan_triton.py; sums over tiles and over the heads of a group are taken here, from parts in
the dtype of q.
"""

import torch
from torch import Tensor

from architectures.kernels.scan_triton import (
    DKV_LAUNCH,
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


def pitch(x: Tensor) -> int:
    """Numbers from one step of x (B, T, heads, width) to the next."""
    return x.size(2) * x.size(3) if x.is_contiguous() else x.stride(1)


def by_steps(x: Tensor) -> Tensor:
    """x (B, T, heads, width), copied unless a step's numbers lie side by side and steps at equal distances.

    These have to be multiples of 16 bytes, in which kernels load, and to stay within 32 bits over time.
    """
    apart = x.stride(1)
    strides = x.size(1) * apart, apart, x.size(3), 1
    fits = all(found == wanted or size == 1 for found, wanted, size in zip(x.stride(), strides, x.shape, strict=True))
    fits = fits and x.size(2) * x.size(3) <= apart and x.size(1) * apart < 2**31
    return x if fits and (apart | x.storage_offset()) * x.itemsize % 16 == 0 else x.contiguous()


def laid_out(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three as kernels take them, q and k at one pitch."""
    q, k, v = (by_steps(x) for x in (q, k, v))
    return (q, k, v) if pitch(q) == pitch(k) else (q.contiguous(), k.contiguous(), v)


class ScanLauncher:
    """The kernels at one shape: keys (B, T, G, N) and values (B, T, H, P), in segments of `length` steps."""

    def __init__(self, keys: Tensor, values: Tensor, length: int):
        (self.B, self.T, self.G, self.N), (self.H, self.P), self.length = keys.shape, values.shape[2:], length
        self.key_pitch, self.value_pitch = pitch(keys), pitch(values)  # k as q
        self.tiles_n, self.tiles_p = ceil_div(self.N, ROWS), ceil_div(self.P, ROWS)
        self.tiles, self.segments = self.tiles_n * self.tiles_p, ceil_div(self.T, length)

    def __call__(self, kernel, *tensors: Tensor, values: Tensor | None = None, fewer: int = 0, **options: int) -> None:
        grid = (self.B * self.H, self.segments - fewer, self.tiles)
        pitches = dict(KEYS=self.key_pitch, VALUES=self.value_pitch if values is None else pitch(values))
        shape = dict(G=self.G, H=self.H, N=self.N, P=self.P, **pitches)
        kernel[grid](*tensors, self.T, self.length, **shape, **(SCAN_LAUNCH | options))

    def state_shape(self) -> tuple[int, int, int, int]:
        """Of the states between segments, which there are for each head of the batch and each tile."""
        return self.tiles * self.B * self.H, self.segments - 1, ROWS, ROWS

    def states(self, x: Tensor, values: Tensor, g: Tensor, delta: Tensor, backward: bool) -> Tensor:
        """The state at the end of each segment but the last, or the slope at the beginning of each but the first."""
        states = g.new_empty(self.state_shape())
        rows, slots = states.shape[:2]
        if slots:
            fades = g.new_empty(rows, slots)
            self(segment_states, x, values, g, delta, states, fades, values=values, fewer=1, BACKWARD=backward)
        if slots > 1:
            join_segments[rows, 4](states, fades, slots, BACKWARD=backward)
        return states


@torch.library.custom_op("golf::scan", mutates_args=())
def fused_scan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, delta: Tensor, skip: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """(y, states between segments); g, delta and skip contiguous and in fp32."""
    q, k, v = laid_out(q, k, v)
    launch = ScanLauncher(q, v, length)
    starts = launch.states(k, v, g, delta, backward=False)
    y = v.new_empty(launch.tiles_n, *v.shape)
    launch(scan_forward, q, k, v, g, delta, skip, y, starts, SEGMENTED=launch.segments > 1)
    return y.sum(0) if len(y) > 1 else y[0], starts


@fused_scan.register_fake
def fused_scan_shapes(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, delta: Tensor, skip: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), g.new_empty(ScanLauncher(q, v, length).state_shape())


@torch.library.custom_op("golf::scan_backward", mutates_args=())
def fused_scan_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, delta: Tensor, skip: Tensor, starts: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dg, d_delta, d_skip) in the shapes of q, k, v, g, delta and skip."""
    (q, k, v), dy = laid_out(q, k, v), dy.contiguous()
    launch = ScanLauncher(q, v, length)
    (B, T, G, N), H, segmented = q.shape, launch.H, launch.segments > 1
    dq, dk = (q.new_empty(launch.tiles_p, B, T, H, N) for _ in "qk")
    dv = v.new_empty(launch.tiles_n, *v.shape)
    dg, d_delta = (g.new_empty(launch.tiles, *g.shape) for _ in "gd")
    q_dq, dy_v = g.new_empty(launch.tiles, B, H, T), g.new_empty(launch.tiles, B, H, launch.segments)
    ends = launch.states(q, dy, g, delta, backward=True)
    launch(scan_dq, q, k, v, g, delta, dy, dq, q_dq, dy_v, starts, SEGMENTED=segmented)
    tensors = q, k, v, g, delta, skip, dy, q_dq, dk, dv, dg, d_delta, starts, ends
    launch(scan_dkv, *tensors, SEGMENTED=segmented, **DKV_LAUNCH)

    def of_groups(parts: Tensor) -> Tensor:
        """(tiles of P, B, T, H, N) summed to (B, T, G, N)."""
        return parts.unflatten(3, (G, H // G)).sum((0, 4)) if len(parts) > 1 or G < H else parts[0]

    dv, dg, d_delta = (x.sum(0) if len(x) > 1 else x[0] for x in (dv, dg, d_delta))
    return of_groups(dq), of_groups(dk), dv, dg, d_delta, dy_v[: launch.tiles_p].sum((0, 1, 3))


@fused_scan_backward.register_fake
def fused_scan_backward_shapes(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, delta: Tensor, skip: Tensor, starts: Tensor, length: int
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, g, delta, skip))


def keep_scan_inputs(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.length = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def scan_gradients(ctx, dy: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    return *fused_scan_backward(dy, *ctx.saved_tensors, ctx.length), None


fused_scan.register_autograd(scan_gradients, setup_context=keep_scan_inputs)


def triton_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    delta: Tensor | None = None,
    skip: Tensor | None = None,
    segment_length: int | None = None,
) -> Tensor:
    """naive_scan of scan.py, differentiable once: y (B, T, H, P) in the dtype of v.

    q, k (B, T, G, N), v (B, T, H, P), all bf16, or all fp32, whose products are rounded to tf32; log_decay (B, T, H) at
    most 0, where MIN_LOG_DECAY and less, -inf too, resets the state and gets no gradient; delta (B, T, H), 1 if None;
    skip (H), 0 if None. segment_length, a multiple of ROWS, replaces the plan's. ValueError for tensors that do not fit
    each other.
    """
    (B, T, G, N), (H, P) = q.shape, v.shape[2:]
    delta = torch.ones_like(log_decay) if delta is None else delta
    skip = log_decay.new_zeros(H) if skip is None else skip
    if k.shape != q.shape or v.shape[:2] != (B, T) or H % G or log_decay.shape != (B, T, H):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, log_decay))
        raise ValueError(f"q, k, v, log_decay of shapes {shapes} must be (B, T, G, N) twice, (B, T, H, P), (B, T, H)")
    if delta.shape != (B, T, H) or skip.shape != (H,):
        raise ValueError(f"delta, skip of shapes {tuple(delta.shape)}, {tuple(skip.shape)} must be {B, T, H}, {(H,)}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; make all bfloat16 or all float32")
    if T * H * max(N, P) >= 2**31:
        raise ValueError(f"T * H * max(N, P) = {T * H * max(N, P)} steps over 32 bits; cut the sequence")
    length = segment_length or segment_steps(B, T, H, N, P)
    if length % ROWS:
        raise ValueError(f"segment_length={length} must be a multiple of {ROWS}")
    decays = (x.float().contiguous() for x in (log_decay, delta, skip))
    return fused_scan(q, k, v, *decays, length)[0]
