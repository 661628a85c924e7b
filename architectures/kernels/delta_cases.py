"""What the kernels of the gated delta rule move and compute, counted from their launches, and cases to compile them by.

Letters: B batch, T time, G key groups, H heads (G divides H), N key dim, P value dim of a head. Only tools import this.
"""

from architectures.kernels import delta_triton
from architectures.kernels.scan_op import ROWS, ceil_div

COSTS = {  # by kernel: what it loads, what it stores, its products of two tiles per chunk
    "delta_inverse": ("k g beta", "inverse", 11),
    "delta_states": ("k v g beta inverse", "e states", 3),
    "delta_outputs": ("q k e g beta states", "y", 3),
    "delta_slopes": ("q k e g beta inverse dy", "dv dbeta slopes", 8),
    "delta_gradients": ("q q k e g beta dy dv states states slopes", "dq dk dg", 11),
}
CASES = ((32, 2048, 8, 8, 64, 64), (16, 4096, 2, 8, 48, 32))  # (B, T, G, H, N, P), each of 65,536 tokens


def count(B: int, T: int, G: int, H: int, N: int, P: int, value_bytes: int = 2) -> dict[str, tuple[int, int]]:
    """(bytes, operations) by launch of one forward and backward: what all its programs load, store and compute."""
    heads, chunks = B * H, ceil_div(T, ROWS)
    moved = dict.fromkeys(("q", "k", "dq", "dk"), T * N * value_bytes)  # bytes of a head
    moved |= dict.fromkeys(("v", "e", "y", "dy", "dv"), T * P * value_bytes)
    moved |= dict.fromkeys(("g", "beta", "dg", "dbeta"), 4 * T)
    moved |= dict.fromkeys(("inverse", "states", "slopes"), chunks * ROWS**2 * value_bytes)
    costs = {}
    for name, (loads, stores, products) in COSTS.items():
        size = heads * sum(moved[x] for x in (*loads.split(), *stores.split()))
        costs[name] = size, heads * chunks * products * 2 * ROWS**3
    if G < H:
        costs["sums"] = 2 * B * T * (H + G) * N * value_bytes, 2 * B * T * H * N
    return costs


def hopper_cases() -> list[dict]:
    """Every kernel at the shapes of CASES, for tools.bench --kernels."""
    types = dict.fromkeys(["g", "dg", "beta", "dbeta"], "*fp32") | {"T": "i32"}
    cases = []
    for B, T, G, H, N, P in CASES:
        costs, constants = count(B, T, G, H, N, P), dict(G=G, H=H, N=N, P=P)
        for name in COSTS:
            kernel = getattr(delta_triton, name)
            case = dict(name=f"{name} G={G} H={H} N={N} P={P}", kernel=kernel, **delta_triton.DELTA_LAUNCH)
            case["signature"] = {x: types.get(x, "*bf16") for x in kernel.arg_names if x not in constants}
            size, operations = costs[name]
            cases.append(case | dict(constexprs=constants, bytes=size, flops=operations, matmul=True))
    return cases
