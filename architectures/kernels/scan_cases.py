"""What the kernels of the chunked scan move and compute, counted from their launches, and cases to compile them by.

Letters: B batch, T time, G key groups, H heads (G divides H), N key dim, P value dim of a head. Only tools import this.
"""

from architectures.kernels import scan_triton
from architectures.kernels.scan_op import ROWS, ceil_div, segment_steps

COSTS = {  # by kernel: what it loads, what it stores, its products of two tiles per chunk
    "scan_forward": ("q k v g delta", "y", 4),
    "scan_dq": ("q k v g delta dy", "dq q_dq", 4),
    "scan_dkv": ("q k v g delta dy q_dq", "dk dv dg d_delta", 7),
    "segment_states": ("k v g delta", "", 1),
    "segment_states_backward": ("q dy g", "", 1),
}
CASES = (  # (B, T, G, H, N, P), each of 65,536 tokens; with one group, q, k and v are parts of one tensor
    (32, 2048, 8, 8, 64, 64),  # one segment
    (16, 4096, 8, 8, 64, 64),  # two
    (1, 65_536, 1, 8, 128, 64),  # packed documents, sums over tiles of N and over the heads of the only group
    (32, 2048, 1, 8, 128, 128),  # and over tiles of P
)  # fmt: skip


def count(B: int, T: int, G: int, H: int, N: int, P: int, value_bytes: int = 2) -> dict[str, tuple[int, int]]:
    """(bytes, operations) by launch of one forward and backward: what all its programs load, store and compute."""
    length, tiles_n, tiles_p = segment_steps(B, T, H, N, P), ceil_div(N, ROWS), ceil_div(P, ROWS)
    parts, joints = tiles_n * tiles_p, ceil_div(T, length) - 1
    fades = 4 * B * H * parts * joints
    states = fades * ROWS**2
    moved = dict.fromkeys(("q", "k", "dq", "dk"), N * tiles_p * value_bytes)  # bytes per step of a head
    moved |= dict.fromkeys(("v", "y", "dy", "dv"), P * tiles_n * value_bytes)
    moved |= dict.fromkeys(("g", "delta", "dg", "d_delta", "q_dq"), 4 * parts)
    steps = dict.fromkeys(COSTS, T)
    steps |= dict(segment_states=joints * length, segment_states_backward=T - length if joints else 0)
    states_moved = dict(scan_forward=states, scan_dq=states, scan_dkv=2 * states)
    heads = 4 * B * H * parts * (joints + 1)  # of programs: each loads or stores a number of its head
    states_moved = {name: size + heads for name, size in states_moved.items()}
    costs = {}
    for name, (loads, stores, products) in COSTS.items():
        size = B * H * steps[name] * sum(moved[x] for x in (*loads.split(), *stores.split()))
        operations = B * H * parts * ceil_div(steps[name], ROWS) * products * 2 * ROWS**3
        costs[name] = size + states_moved.get(name, states + fades), operations
    if joints > 1:
        costs |= dict.fromkeys(("join_segments", "join_segments_backward"), (2 * states + 4 * fades, states // 2))
    sums = {x: N * value_bytes * G // H for x in ("dq", "dk") if tiles_p > 1 or G < H}
    sums |= {x: P * value_bytes for x in ("y", "dv") if tiles_n > 1}
    sums |= {x: 4 for x in ("dg", "d_delta") if parts > 1}
    summed = sum(moved[x] for x in sums)
    costs["sums"] = B * T * H * (summed + sum(sums.values())), B * T * H * summed // value_bytes
    return {name: cost for name, cost in costs.items() if cost[0]}


def least_bytes(B: int, T: int, G: int, H: int, N: int, P: int, value_bytes: int = 2) -> int:
    """q, k, v, g, delta read and y written once forward; these, dy and the five gradients once backward."""
    keys, values, decays = B * T * G * N * value_bytes, B * T * H * P * value_bytes, 2 * 4 * B * T * H
    return (2 * keys + 2 * values + decays) + (4 * keys + 3 * values + 2 * decays)


def hopper_cases() -> list[dict]:
    """Every kernel at the shapes of CASES, for tools.bench --kernels."""
    types = dict.fromkeys(["q", "k", "v", "y", "dy", "dq", "dk", "dv", "x", "values"], "*bf16")
    types |= dict.fromkeys(["g", "delta", "skip", "dg", "d_delta", "q_dq", "dy_v"], "*fp32")
    types |= dict.fromkeys(["starts", "ends", "states", "fades"], "*fp32")
    types |= dict.fromkeys(["T", "length", "slots"], "i32")
    cases = []
    for B, T, G, H, N, P in CASES:
        for launch, (size, operations) in count(B, T, G, H, N, P).items():
            name = launch.removesuffix("_backward")
            if name == "sums":
                continue
            kernel = getattr(scan_triton, name)
            apart = dict.fromkeys(("KEYS", "VALUES"), 2 * N + H * P) if G == 1 else dict(KEYS=G * N, VALUES=H * P)
            constants = dict(G=G, H=H, N=N, P=P) | apart
            constants |= dict(SEGMENTED=segment_steps(B, T, H, N, P) < T, BACKWARD=launch != name)
            options = scan_triton.DKV_LAUNCH if name == "scan_dkv" else scan_triton.SCAN_LAUNCH
            case = dict(name=f"{launch} G={G} H={H} N={N} P={P} T={T}", kernel=kernel, **options)
            case["signature"] = {x: types[x] for x in kernel.arg_names if x in types}
            case["constexprs"] = {x: constants[x] for x in kernel.arg_names if x in constants}
            cases.append(case | dict(bytes=size, flops=operations, matmul=name != "join_segments"))
    return cases
