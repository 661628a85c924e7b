"""The Triton kernels of the chunked scan, forward and backward; scan_op.py launches them.

Letters: B batch, T time, G key groups, H heads (G divides H), N key dim, P value dim of a head, S segments.

Of one chunk of 64 steps, with `state` that before it, a its log decays summed from its beginning on, A their sum,
d the scales of v (delta), and c the head's share of v in y (skip):
    y = ((q k^T) * D) d v + e^a q state + c v,    state <- e^A state + (e^(A - a) d k)^T v,
    D_ts = e^(a_t - a_s) for s <= t.
Backward, with `slope` the gradient of the state after the chunk and u that of d v:
    dq = ((dy v^T) * D) d k + e^a dy state^T,    u = ((q k^T) * D)^T dy + e^(A - a) k slope,
    dk = d ((dy v^T) * D)^T q + d e^(A - a) v slope^T,    slope <- e^A slope + (e^a q)^T dy,
    dv = d u + c dy,    dd_t = v_t . u_t,    dc the sum of dy_t . v_t.
The gradient of a log decay is <e^g state, slope> at its step, which is a sum over the steps that follow:
    dg_t = dg_(t+1) + q_t . dq_t - d_t dd_t,    from the products in fp32, not from dq and dv as they are stored.
This is the state-space duality (Dao and Gu 2024, https://arxiv.org/abs/2405.21060), fused into one walk over time.

One program walks one head through time with its state in registers: scan_forward and scan_dq from the left (scan_dq
makes the states again), scan_dkv from the right. No state is stored, except where there are fewer heads than
multiprocessors: then time is cut into segments, each with its own program, which starts from a state made beforehand.
A chunk begins with the update of the state, whose operands need registers that the rest can have afterwards; thus
nothing spills (tools.bench --kernels). Tiles are 64 x 64, for wgmma takes 64 rows from a group of four warps, and a
narrower head is padded. A wider one is cut: y and dv are sums over tiles of N, dq and dk over tiles of P, dg and dd
over both. From one step to the next, q and k go KEYS numbers on and v VALUES: they may lie side by side in one tensor.

Log decays are cut off at MIN_LOG_DECAY. One at or below it, -inf too, resets the state: it has no gradient, and dg
starts from 0 before it, so that the rounding of one document does not reach another.
"""

import triton
import triton.language as tl

SCAN_TILE = tl.constexpr(64)
LOG2_E = tl.constexpr(1.4426950408889634)
MIN_LOG_DECAY = tl.constexpr(-32.0)  # e^-32 of a state is nothing even in fp32, and sums of a few keep 5 decimals
SCAN_LAUNCH = {"num_warps": 4, "num_stages": 3}  # two chunks are on their way while one is computed
DKV_LAUNCH = SCAN_LAUNCH | {"num_stages": 2}  # one: the addresses of another would not fit into registers


@triton.jit
def load_rows(x, t, columns, T, PITCH: tl.constexpr, WIDTH: tl.constexpr):
    """Rows t and some columns of x, zeros where it has none."""
    there = (t < T)[:, None]
    if WIDTH // SCAN_TILE * SCAN_TILE < WIDTH:
        there = there & (columns < WIDTH)[None, :]
    return tl.load(x + t[:, None] * PITCH + columns[None, :], mask=there, other=0.0)


@triton.jit
def store_rows(x, tile, t, columns, T, PITCH: tl.constexpr, WIDTH: tl.constexpr):
    there = (t < T)[:, None]
    if WIDTH // SCAN_TILE * SCAN_TILE < WIDTH:
        there = there & (columns < WIDTH)[None, :]
    tl.store(x + t[:, None] * PITCH + columns[None, :], tile.to(x.dtype.element_ty), mask=there)


@triton.jit
def load_decays(g, t, T, H: tl.constexpr):
    """(a, A, 0 at resets and 1 elsewhere); a and A for powers of 2."""
    x = tl.load(g + t * H, mask=t < T, other=0.0)
    going_on = tl.where(x <= MIN_LOG_DECAY, 0.0, 1.0)
    x = tl.where(x < MIN_LOG_DECAY, MIN_LOG_DECAY, x) * LOG2_E  # not a maximum, which would hide NaN
    return tl.cumsum(x, 0), tl.sum(x, 0), going_on


@triton.jit
def load_scales(delta, t, T, H: tl.constexpr):
    return tl.load(delta + t * H, mask=t < T, other=0.0)


@triton.jit
def scaled_steps(x, scales):
    """x^T with each of its steps scaled."""
    return tl.trans((x * scales[:, None]).to(x.dtype))


@triton.jit
def decay_after(a, upper: tl.constexpr):
    """D, or its transpose if upper."""
    t = tl.arange(0, SCAN_TILE)
    if upper:
        exponent, causal = a[None, :] - a[:, None], t[:, None] <= t[None, :]
    else:
        exponent, causal = a[:, None] - a[None, :], t[:, None] >= t[None, :]
    return tl.exp2(tl.where(causal, exponent, float("-inf")))  # the others may overflow


@triton.jit
def state_at(states, row, slot, slots):
    return (
        states
        + (row * slots + slot) * SCAN_TILE * SCAN_TILE
        + tl.arange(0, SCAN_TILE)[:, None] * SCAN_TILE
        + tl.arange(0, SCAN_TILE)
    )


@triton.jit
def locate(
    T, G: tl.constexpr, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr
):  # fmt: skip
    """Where this program's head begins: (in q and k, in v, in steps, in dq and dk, in y and dv), row, columns n and p.

    Each part of a sum over tiles is a tensor of its own; a row is a head of the batch, once per tile.
    """
    tiles_p: tl.constexpr = (P + SCAN_TILE - 1) // SCAN_TILE
    heads, tile = tl.num_programs(0), tl.program_id(2)
    row = (tile * heads + tl.program_id(0)).to(tl.int64)
    tile_n, tile_p = tile // tiles_p, tile % tiles_p
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    step = b * T * H + h
    key, value = b * T * KEYS + h // (H // G) * N, b * T * VALUES + h * P
    n = tile_n * SCAN_TILE + tl.arange(0, SCAN_TILE)
    p = tile_p * SCAN_TILE + tl.arange(0, SCAN_TILE)
    size = heads.to(tl.int64) * T
    return key, value, step, (tile_p * size + step) * N, (tile_n * size + step) * P, row, n, p


@triton.jit
def load_skip(skip, H: tl.constexpr, P: tl.constexpr):
    """c of this program's head, in the first of the tiles of N whose sum is y."""
    share = tl.load(skip + tl.program_id(0) % H)
    return tl.where(tl.program_id(2) < (P + SCAN_TILE - 1) // SCAN_TILE, share, 0.0)


@triton.jit(do_not_specialize=["T", "length"])
def scan_forward(
    q, k, v, g, delta, skip, y, starts, T, length,
    G: tl.constexpr, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    SEGMENTED: tl.constexpr,
):  # fmt: skip
    """y of one head, tile and segment: grid (B H, S, tiles)."""
    key, value, step, _, out, row, n, p = locate(T, G, H, N, P, KEYS, VALUES)
    q, k, v, g, delta, y = q + key, k + key, v + value, g + step, delta + step, y + out
    share = load_skip(skip, H, P)
    segment = tl.program_id(1)
    state = tl.zeros([SCAN_TILE, SCAN_TILE], tl.float32)
    if SEGMENTED and segment > 0:
        state = tl.load(state_at(starts, row, segment - 1, tl.num_programs(1) - 1))
    for start in tl.range(segment * length, min(T, segment * length + length), SCAN_TILE, disable_licm=True):
        t = start + tl.arange(0, SCAN_TILE)
        a, total, _going_on = load_decays(g, t, T, H)
        scales = load_scales(delta, t, T, H)
        k_tile = load_rows(k, t, n, T, KEYS, N)
        v_tile = load_rows(v, t, p, T, VALUES, P)
        before = state.to(k_tile.dtype)
        state = tl.dot(scaled_steps(k_tile, tl.exp2(total - a) * scales), v_tile, state * tl.exp2(total))
        q_tile = load_rows(q, t, n, T, KEYS, N)
        y_tile = tl.dot(q_tile, before) * tl.exp2(a)[:, None]
        scores = tl.dot(q_tile, tl.trans(k_tile)) * decay_after(a, False) * scales[None, :]
        y_tile = tl.dot(scores.to(v_tile.dtype), v_tile, y_tile)
        store_rows(y, y_tile + v_tile * share, t, p, T, H * P, P)


@triton.jit(do_not_specialize=["T", "length"])
def scan_dq(
    q, k, v, g, delta, dy, dq, q_dq, dy_v, starts, T, length,
    G: tl.constexpr, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    SEGMENTED: tl.constexpr,
):  # fmt: skip
    """dq of one head, tile and segment, q . dq (tiles, B, H, T), and the sum of dy . v: grid (B H, S, tiles)."""
    key, value, step, out, _, row, n, p = locate(T, G, H, N, P, KEYS, VALUES)
    q, k, v, g, delta, dy = q + key, k + key, v + value, g + step, delta + step, dy + step * P
    dq, q_dq = dq + out, q_dq + row * T
    segment, along = tl.program_id(1), 0.0
    state = tl.zeros([SCAN_TILE, SCAN_TILE], tl.float32)
    if SEGMENTED and segment > 0:
        state = tl.load(state_at(starts, row, segment - 1, tl.num_programs(1) - 1))
    for start in tl.range(segment * length, min(T, segment * length + length), SCAN_TILE, disable_licm=True):
        t = start + tl.arange(0, SCAN_TILE)
        a, total, _going_on = load_decays(g, t, T, H)
        scales = load_scales(delta, t, T, H)
        k_tile = load_rows(k, t, n, T, KEYS, N)
        v_tile = load_rows(v, t, p, T, VALUES, P)
        before = state.to(k_tile.dtype)
        state = tl.dot(scaled_steps(k_tile, tl.exp2(total - a) * scales), v_tile, state * tl.exp2(total))
        dy_tile = load_rows(dy, t, p, T, H * P, P)
        dq_tile = tl.dot(dy_tile, tl.trans(before)) * tl.exp2(a)[:, None]
        along += tl.sum(tl.sum(dy_tile.to(tl.float32) * v_tile, 1), 0)
        d_scores = tl.dot(dy_tile, tl.trans(v_tile)) * decay_after(a, False) * scales[None, :]
        dq_tile = tl.dot(d_scores.to(k_tile.dtype), k_tile, dq_tile)
        store_rows(dq, dq_tile, t, n, T, H * N, N)
        q_tile = load_rows(q, t, n, T, KEYS, N)
        tl.store(q_dq + t, tl.sum(dq_tile * q_tile, 1), mask=t < T)
    tl.store(dy_v + row * tl.num_programs(1) + segment, along)


@triton.jit
def chain_stretches(later, later_sum, going_on, x):
    """Two neighbouring stretches of sum_t = going_on_t (x_t + sum_(t+1)), as one."""
    return later * going_on, x + later_sum * going_on


@triton.jit(do_not_specialize=["T", "length"])
def scan_dkv(
    q, k, v, g, delta, skip, dy, q_dq, dk, dv, dg, d_delta, starts, ends, T, length,
    G: tl.constexpr, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    SEGMENTED: tl.constexpr,
):  # fmt: skip
    """dk, dv, dg and dd of one head, tile and segment; ends are the slopes after segments: grid (B H, S, tiles)."""
    key, value, step, out_n, out_p, row, n, p = locate(T, G, H, N, P, KEYS, VALUES)
    q, k, v, g, delta, dy = q + key, k + key, v + value, g + step, delta + step, dy + step * P
    part = tl.program_id(2).to(tl.int64) * tl.num_programs(0) * T + step
    q_dq, dk, dv, dg, d_delta = q_dq + row * T, dk + out_n, dv + out_p, dg + part, d_delta + part
    share = load_skip(skip, H, P)
    segment, slots = tl.program_id(1), tl.num_programs(1) - 1
    slope = tl.zeros([SCAN_TILE, SCAN_TILE], tl.float32)
    dg_later = 0.0
    if SEGMENTED and segment < slots:
        slope = tl.load(state_at(ends, row, segment, slots))
        dg_later = tl.sum(tl.sum(slope * tl.load(state_at(starts, row, segment, slots)), 1), 0)
    chunks = tl.cdiv(min(T - segment * length, length), SCAN_TILE)
    for i in tl.range(chunks, disable_licm=True):
        t = segment * length + (chunks - 1 - i) * SCAN_TILE + tl.arange(0, SCAN_TILE)
        a, total, going_on = load_decays(g, t, T, H)
        scales = load_scales(delta, t, T, H)
        q_tile = load_rows(q, t, n, T, KEYS, N)
        dy_tile = load_rows(dy, t, p, T, H * P, P)
        after = slope.to(q_tile.dtype)
        slope = tl.dot(scaled_steps(q_tile, tl.exp2(a)), dy_tile, slope * tl.exp2(total))
        decay, to_end = decay_after(a, True), tl.exp2(total - a)[:, None]
        k_tile = load_rows(k, t, n, T, KEYS, N)
        scores = tl.dot(k_tile, tl.trans(q_tile)) * decay
        u_tile = tl.dot(k_tile, after) * to_end
        u_tile = tl.dot(scores.to(q_tile.dtype), dy_tile, u_tile)
        store_rows(dv, u_tile * scales[:, None] + dy_tile * share, t, p, T, H * P, P)
        v_tile = load_rows(v, t, p, T, VALUES, P)
        u_v = tl.sum(u_tile * v_tile, 1)
        tl.store(d_delta + t * H, u_v, mask=t < T)
        x = tl.load(q_dq + t, mask=t < T, other=0.0) - u_v * scales
        through, x = tl.associative_scan((going_on, x * going_on), 0, chain_stretches, reverse=True)
        x += through * dg_later
        dg_later = tl.sum(tl.where(tl.arange(0, SCAN_TILE) == 0, x, 0.0), 0)
        tl.store(dg + t * H, x, mask=t < T)
        d_scores = tl.dot(v_tile, tl.trans(dy_tile)) * decay
        dk_tile = tl.dot(v_tile, tl.trans(after)) * to_end
        dk_tile = tl.dot(d_scores.to(q_tile.dtype), q_tile, dk_tile)
        store_rows(dk, dk_tile * scales[:, None], t, n, T, H * N, N)


@triton.jit(do_not_specialize=["T", "length"])
def segment_states(
    x, values, g, delta, states, fades, T, length,
    G: tl.constexpr, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """What one segment adds to the state after it, or BACKWARD to the slope before it, and the decay over it.

    x is k, or BACKWARD q; values v, or BACKWARD dy. Slot i lies between segments i and i + 1: grid (B H, S - 1, tiles).
    """
    key, value, step, _, _, row, n, p = locate(T, G, H, N, P, KEYS, VALUES)
    x, values, g, delta = x + key, values + value, g + step, delta + step
    slot, slots = tl.program_id(1), tl.num_programs(1)
    segment = slot + 1 if BACKWARD else slot
    state = tl.zeros([SCAN_TILE, SCAN_TILE], tl.float32)
    fade = 0.0
    chunks = tl.cdiv(min(T - segment * length, length), SCAN_TILE)
    for i in tl.range(chunks, disable_licm=True):
        t = segment * length + (chunks - 1 - i if BACKWARD else i) * SCAN_TILE + tl.arange(0, SCAN_TILE)
        a, total, _going_on = load_decays(g, t, T, H)
        x_tile = load_rows(x, t, n, T, KEYS, N)
        value_tile = load_rows(values, t, p, T, VALUES, P)
        scales = tl.exp2(a) if BACKWARD else tl.exp2(total - a) * load_scales(delta, t, T, H)
        state = tl.dot(scaled_steps(x_tile, scales), value_tile, state * tl.exp2(total))
        fade += total
    tl.store(state_at(states, row, slot, slots), state)
    tl.store(fades + row * slots + slot, fade)


@triton.jit(do_not_specialize=["slots"])
def join_segments(states, fades, slots, BACKWARD: tl.constexpr):
    """The states of segment_states, summed in locate over the segments before, or BACKWARD after: grid (rows, 4)."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * (SCAN_TILE * SCAN_TILE // 4) + tl.arange(0, SCAN_TILE * SCAN_TILE // 4)
    state = tl.zeros([SCAN_TILE * SCAN_TILE // 4], tl.float32)
    for i in range(slots):
        slot = row * slots + (slots - 1 - i if BACKWARD else i)
        at = states + slot * SCAN_TILE * SCAN_TILE + offsets
        state = state * tl.exp2(tl.load(fades + slot)) + tl.load(at)
        tl.store(at, state)
