"""Cases to compile the kernels of fused_norm_triton.py by, and the least a launch moves. Only tools import this."""

from architectures.kernels import fused_norm_triton
from architectures.kernels.fused_norm import MAX_NORM_DIM, MAX_TERMS

CASES = ((65_536, 512, MAX_TERMS), (65_536, 512, 2), (65_536, 768, 4), (16_384, MAX_NORM_DIM, MAX_TERMS))  # (M, D, K)


def hopper_cases() -> list[dict]:
    """Both kernels at the shapes of CASES: a block's two sums at upstream's width, and what is wider."""
    cases = []
    for M, D, K in CASES:
        tile, launch = fused_norm_triton.norm_shape(D)
        for name, streams, operations in (
            ("mix_norm_rows", K + 2, 2 * K + 4),
            ("mix_norm_backward_rows", 2 * K + 2, 5 * K + 12),
        ):
            kernel = getattr(fused_norm_triton, name)
            signature = {x: "*bf16" for x in kernel.arg_names if x[0] in "ud" or x in ("mixed", "normed")}
            signature |= {x: "*fp32" for x in ("gains", "parts") if x in kernel.arg_names} | {"M": "i32", "eps": "fp32"}
            case = dict(name=f"{name} {K} terms, {M} x {D}", kernel=kernel, signature=signature, **launch)
            case |= dict(constexprs={"D": D, "K": K, **tile}, matmul=False)
            cases.append(case | dict(bytes=2 * streams * M * D, flops=operations * M * D))
    return cases
