"""Cases to compile the kernel of fused_mlp_triton.py by, and the least a launch moves. Only tools import this."""

from architectures.kernels.fused_mlp_triton import RELU2_LAUNCH, RELU2_TILE, relu2_tile

CASES = ((65_536, 512, 1024), (65_536, 512, 2048), (65_536, 768, 3072), (65_536, 200, 400))  # (M, D, F)


def hopper_cases() -> list[dict]:
    """Forward and backward at upstream's width, wider, and at sizes that tiles do not divide."""
    cases = []
    for M, D, F in CASES:
        for backward in (True, False):
            name = f"relu2_tile {'backward' if backward else 'forward'}, {M} x {D} x {F}"
            case = dict(name=name, kernel=relu2_tile, **RELU2_LAUNCH, matmul=True)
            case["signature"] = dict.fromkeys(("left", "weight", "act", "out"), "*bf16") | {"M": "i32"}
            case["constexprs"] = {"D": D, "F": F, "BACKWARD": backward, **RELU2_TILE}
            cases.append(case | dict(bytes=2 * (M * D + D * F + (1 + backward) * M * F), flops=2 * M * D * F))
    return cases
