"""Cases to compile the kernels of fused_qk_triton.py by, and the least a launch moves. Only tools import this."""

from architectures.kernels import fused_qk_triton

CASES = ((65_536, 8, 4, 64), (65_536, 6, 6, 128), (65_536, 4, 2, 80))  # (M, H, G, K)


def hopper_cases() -> list[dict]:
    """Both kernels at upstream's shape, at wider heads, and at heads that tiles do not divide."""
    cases = []
    for M, H, G, K in CASES:
        for name in ("qk_norm_rope_rows", "qk_norm_rope_backward_rows"):
            kernel = getattr(fused_qk_triton, name)
            types = {"gain": "*fp32", "parts": "*fp32", "M": "i32", "T": "i32", "eps": "fp32"}
            tile = fused_qk_triton.qk_tile(K)
            constants = {"H": H, "G": G, "K": K, **tile}
            case = dict(name=f"{name} H={H} G={G} K={K}", kernel=kernel, **fused_qk_triton.QK_LAUNCH, matmul=False)
            case["signature"] = {x: types.get(x, "*bf16") for x in kernel.arg_names if x not in constants}
            backward = name == "qk_norm_rope_backward_rows"
            moved = 2 * M * K * ((3 if backward else 2) * (H + G) + 2 * G)
            cases.append(
                case | dict(constexprs=constants, bytes=moved, flops=(20 if backward else 9) * M * K * (H + G))
            )
    return cases
