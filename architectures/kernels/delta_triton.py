"""The Triton kernels of the gated delta rule, forward and backward; delta_op.py launches them.

Letters: B batch, T time, G key groups, H heads (G divides H), N key dim, P value dim of a head, C chunks of 64 steps.

Of one chunk, with `state` that before it, a its log decays summed from its beginning on, A their sum, b its betas and
D_ts = e^(a_t - a_s) for s <= t, 0 elsewhere; K = (k k^T) * D below the diagonal, 0 on it:
    e = (I + K b)^-1 (v - e^a k state),    u = b e: what each step misses of its value, and what it writes,
    y = ((q k^T) * D) u + e^a q state,     state <- e^A state + (e^(A - a) k)^T u.
Backward, with `slope` the gradient of the state after the chunk:
    du = ((q k^T) * D)^T dy + e^(A - a) k slope,    dv = (I + K b)^-T (b du),    db = e . (du - K^T dv),
    slope <- e^A slope + (e^a q)^T dy - (e^a k)^T dv.
k reads (what it recalls, with gradient -dv) as q does (with dy), and is read by both:
    dq = ((dy u^T) * D) k + e^a dy state^T,    of reading dk = -((dv u^T) * D) k - e^a dv state^T, D without diagonal,
    of being read dk = ((dy u^T) * D)^T q - ((dv u^T) * D)^T k + e^(A - a) u slope^T.
The gradient of a log decay is all that is written before its step and read from it on:
    dg_t = dg_(t+1) + q_t . dq_t + k_t . dk_t of reading - k_t . dk_t of being read, after the chunk <state, slope>.
This is the WY form of Gated DeltaNet (Yang et al. 2024, https://arxiv.org/abs/2412.06464), whose inverse is made from
blocks of 1, 2, .. 32 steps: two neighbours with the inverses m, m' and L below them have [[m, 0], [-m' L m, m']].

Only states and slopes need a walk over time, a program per head (delta_states, delta_slopes); they are stored before
and after each chunk, and all else has a program per chunk. A tile has 64 rows and columns; narrower heads are padded.
"""

import triton
import triton.language as tl

from architectures.kernels.scan_triton import (
    SCAN_TILE,
    decay_after,
    load_decays,
    load_rows,
    load_scales,
    scaled_steps,
    state_at,
    store_rows,
)

DELTA_LAUNCH = {"num_warps": 4, "num_stages": 2}


@triton.jit
def locate_head(T, G: tl.constexpr, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """Where this program's head begins: (in q and k, in steps, in dq and dk, in values), its row, and columns."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // H, row % H
    step = b * T * H + h
    return (b * T * G + h // (H // G)) * N, step, step * N, step * P, row, tl.arange(0, SCAN_TILE)


@triton.jit
def strictly(tile, upper: tl.constexpr):
    """What lies below the diagonal, or above it if upper."""
    t = tl.arange(0, SCAN_TILE)
    return tl.where(t[:, None] < t[None, :] if upper else t[:, None] > t[None, :], tile, 0.0)


@triton.jit(do_not_specialize=["T"])
def delta_inverse(
    k, g, beta, inverse, T, G: tl.constexpr, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """(I + K b)^-1 of one chunk: grid (B H, C)."""
    key, step, _, _, row, columns = locate_head(T, G, H, N, P)
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    t = chunk * SCAN_TILE + columns
    a, _total, _going_on = load_decays(g + step, t, T, H)
    k_tile = load_rows(k + key, t, columns, T, G * N, N)
    recalled = tl.dot(k_tile, tl.trans(k_tile)) * decay_after(a, False) * load_scales(beta + step, t, T, H)[None, :]
    rows, sources = columns[:, None], columns[None, :]
    found = tl.where(rows == sources, 1.0, 0.0)
    found -= tl.where((rows >> 1 == sources >> 1) & (rows > sources), recalled, 0.0)
    for level in tl.range(1, 6):  # of blocks of 2^level steps
        below = (rows >> (level + 1) == sources >> (level + 1)) & (rows >> level > sources >> level)
        between = tl.where(below, recalled, 0.0)
        between = tl.dot(tl.dot(found, between, input_precision="tf32x3"), found, input_precision="tf32x3")
        found -= between
    tl.store(state_at(inverse, row, chunk, chunks), found.to(inverse.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def delta_states(
    k, v, g, beta, inverse, e, states, T, G: tl.constexpr, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """e of one head, and the states before its chunks: grid (B H)."""
    key, step, _, value, row, columns = locate_head(T, G, H, N, P)
    k, v, g, beta, e = k + key, v + value, g + step, beta + step, e + value
    chunks = tl.cdiv(T, SCAN_TILE)
    state = tl.zeros([SCAN_TILE, SCAN_TILE], tl.float32)
    for chunk in tl.range(chunks, disable_licm=True):
        t = chunk * SCAN_TILE + columns
        a, total, _going_on = load_decays(g, t, T, H)
        k_tile = load_rows(k, t, columns, T, G * N, N)
        v_tile = load_rows(v, t, columns, T, H * P, P)
        before = state.to(k_tile.dtype)
        tl.store(state_at(states, row, chunk, chunks), before)
        missed = v_tile - tl.dot(k_tile, before) * tl.exp2(a)[:, None]
        inverse_tile = tl.load(state_at(inverse, row, chunk, chunks))
        e_tile = tl.dot(inverse_tile, missed.to(k_tile.dtype))
        store_rows(e, e_tile, t, columns, T, H * P, P)
        u_tile = (e_tile * load_scales(beta, t, T, H)[:, None]).to(k_tile.dtype)
        state = tl.dot(scaled_steps(k_tile, tl.exp2(total - a)), u_tile, state * tl.exp2(total))


@triton.jit(do_not_specialize=["T"])
def delta_outputs(
    q, k, e, g, beta, states, y, T, G: tl.constexpr, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """y of one chunk: grid (B H, C)."""
    key, step, _, value, row, columns = locate_head(T, G, H, N, P)
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    t = chunk * SCAN_TILE + columns
    a, _total, _going_on = load_decays(g + step, t, T, H)
    q_tile = load_rows(q + key, t, columns, T, G * N, N)
    k_tile = load_rows(k + key, t, columns, T, G * N, N)
    e_tile = load_rows(e + value, t, columns, T, H * P, P)
    u_tile = (e_tile * load_scales(beta + step, t, T, H)[:, None]).to(k_tile.dtype)
    y_tile = tl.dot(q_tile, tl.load(state_at(states, row, chunk, chunks))) * tl.exp2(a)[:, None]
    scores = tl.dot(q_tile, tl.trans(k_tile)) * decay_after(a, False)
    y_tile = tl.dot(scores.to(k_tile.dtype), u_tile, y_tile)
    store_rows(y + value, y_tile, t, columns, T, H * P, P)


@triton.jit(do_not_specialize=["T"])
def delta_slopes(
    q, k, e, g, beta, inverse, dy, dv, dbeta, slopes, T,
    G: tl.constexpr, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """dv and dbeta of one head, and the slopes after its chunks: grid (B H)."""
    key, step, _, value, row, columns = locate_head(T, G, H, N, P)
    q, k, e, dy, dv = q + key, k + key, e + value, dy + value, dv + value
    g, beta, dbeta = g + step, beta + step, dbeta + step
    chunks = tl.cdiv(T, SCAN_TILE)
    slope = tl.zeros([SCAN_TILE, SCAN_TILE], tl.float32)
    for i in tl.range(chunks, disable_licm=True):
        chunk = chunks - 1 - i
        t = chunk * SCAN_TILE + columns
        a, total, _going_on = load_decays(g, t, T, H)
        q_tile = load_rows(q, t, columns, T, G * N, N)
        k_tile = load_rows(k, t, columns, T, G * N, N)
        dy_tile = load_rows(dy, t, columns, T, H * P, P)
        after = slope.to(k_tile.dtype)
        tl.store(state_at(slopes, row, chunk, chunks), after)
        slope = tl.dot(scaled_steps(q_tile, tl.exp2(a)), dy_tile, slope * tl.exp2(total))
        decay = decay_after(a, True)
        scores = tl.dot(k_tile, tl.trans(q_tile)) * decay
        du_tile = tl.dot(k_tile, after) * tl.exp2(total - a)[:, None]
        du_tile = tl.dot(scores.to(k_tile.dtype), dy_tile, du_tile)
        inverse_tile = tl.load(state_at(inverse, row, chunk, chunks))
        weighed = (du_tile * load_scales(beta, t, T, H)[:, None]).to(k_tile.dtype)
        dv_tile = tl.dot(tl.trans(inverse_tile), weighed).to(k_tile.dtype)
        store_rows(dv, dv_tile, t, columns, T, H * P, P)
        slope -= tl.dot(scaled_steps(k_tile, tl.exp2(a)), dv_tile)
        recalled = strictly(tl.dot(k_tile, tl.trans(k_tile)) * decay, True)
        du_tile -= tl.dot(recalled.to(k_tile.dtype), dv_tile)
        e_tile = load_rows(e, t, columns, T, H * P, P)
        tl.store(dbeta + t * H, tl.sum(du_tile * e_tile, 1), mask=t < T)


@triton.jit(do_not_specialize=["T"])
def delta_gradients(
    q, k, e, g, beta, dy, dv, states, slopes, dq, dk, dg, T,
    G: tl.constexpr, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg of one chunk: grid (B H, C)."""
    key, step, out, value, row, columns = locate_head(T, G, H, N, P)
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    t = chunk * SCAN_TILE + columns
    a, total, _going_on = load_decays(g + step, t, T, H)
    k_tile = load_rows(k + key, t, columns, T, G * N, N)
    dy_tile = load_rows(dy + value, t, columns, T, H * P, P)
    dv_tile = load_rows(dv + value, t, columns, T, H * P, P)
    e_tile = load_rows(e + value, t, columns, T, H * P, P)
    u_tile = (e_tile * load_scales(beta + step, t, T, H)[:, None]).to(k_tile.dtype)
    after = tl.load(state_at(slopes, row, chunk, chunks))
    later = tl.load(state_at(states, row, tl.minimum(chunk + 1, chunks - 1), chunks))  # of the last, after is 0
    later_sum = tl.sum(tl.sum(after.to(tl.float32) * later, 1), 0)
    # Products anew, not transposes of those below, which are in registers: Triton from 3.4 to 3.7 may get those wrong.
    decay = decay_after(a, True)
    read = tl.dot(u_tile, tl.trans(after)) * tl.exp2(total - a)[:, None]
    by_q = (tl.dot(u_tile, tl.trans(dy_tile)) * decay).to(k_tile.dtype)
    read = tl.dot(by_q, load_rows(q + key, t, columns, T, G * N, N), read)
    by_k = strictly(tl.dot(u_tile, tl.trans(dv_tile)) * decay, True).to(k_tile.dtype)
    read -= tl.dot(by_k, k_tile)
    flow = -tl.sum(read * k_tile, 1)
    before = tl.trans(tl.load(state_at(states, row, chunk, chunks)))
    decay, since = decay_after(a, False), tl.exp2(a)[:, None]
    by_k = strictly(tl.dot(dv_tile, tl.trans(u_tile)) * decay, False).to(k_tile.dtype)
    recalling = tl.dot(by_k, k_tile, tl.dot(dv_tile, before) * since)
    store_rows(dk + out, read - recalling, t, columns, T, H * N, N)
    flow -= tl.sum(recalling * k_tile, 1)
    by_q = (tl.dot(dy_tile, tl.trans(u_tile)) * decay).to(k_tile.dtype)
    dq_tile = tl.dot(by_q, k_tile, tl.dot(dy_tile, before) * since)
    store_rows(dq + out, dq_tile, t, columns, T, H * N, N)
    flow += tl.sum(dq_tile * load_rows(q + key, t, columns, T, G * N, N), 1)  # held until here, it would spill
    tl.store(dg + step + t * H, tl.cumsum(flow, 0, reverse=True) + later_sum, mask=t < T)
