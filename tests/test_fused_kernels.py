"""The fused kernels and their references compute their definitions, forward and backward.

The Triton kernels run in Triton's interpreter, in one other process: this file as a script. There they take the
references' place on the CPU.
"""

import json

import pytest
import torch
from kernel_tools import run_in_interpreter
from torch import Tensor

from architectures.kernels import fused_mlp, fused_norm, fused_qk

# Sizes that tiles divide, and others.
NORM_SHAPES = ((1, 37, 48), (2, 5, 100), (5, 130, 512), (3, 1, 3), (4, 700, 20))  # (K, M, D)
MLP_SHAPES = ((37, 48, 100, 20), (130, 64, 128, 64), (1, 200, 129, 7))  # (M, D, F, width of y)
QK_SHAPES = ((2, 37, 4, 2, 6), (1, 65, 2, 1, 64), (3, 20, 3, 3, 20), (1, 1, 1, 1, 4))  # (B, T, H, G, K)


def norm_case(K: int, M: int, D: int) -> tuple:
    """(the operator, its definition, its inputs) as functions of tensors alone; so do the next two."""
    g = torch.Generator().manual_seed(M)
    inputs = [torch.randn(M, D, generator=g) for _ in range(K)] + [torch.randn(K, D, generator=g)]
    return (
        lambda *x: fused_norm.mix_norm(list(x[:-1]), x[-1]),
        lambda *x: fused_norm.naive_mix_norm(list(x[:-1]), x[-1]),
        inputs,
    )


def mlp_case(M: int, D: int, F: int, width: int) -> tuple:
    g = torch.Generator().manual_seed(M)
    inputs = [torch.randn(*shape, generator=g) for shape in ((M, D), (F, D), (width, F))]
    return fused_mlp.relu2_mlp, fused_mlp.naive_relu2_mlp, inputs


def qk_case(B: int, T: int, H: int, G: int, K: int) -> tuple:
    g = torch.Generator().manual_seed(T)
    angles = torch.randn(T, K // 2, generator=g)
    inputs = [torch.randn(B, T, (H + 2 * G) * K, generator=g), torch.randn(H, generator=g)]

    def with_tables(function):
        return lambda qkv, gain: function(qkv, gain, angles.cos().to(qkv.dtype), angles.sin().to(qkv.dtype))

    return with_tables(fused_qk.qk_norm_rope), with_tables(fused_qk.naive_qk_norm_rope), inputs


CASES = {f"norm {shape}": norm_case(*shape) for shape in NORM_SHAPES}
CASES |= {f"mlp {shape}": mlp_case(*shape) for shape in MLP_SHAPES} | {f"qk {s}": qk_case(*s) for s in QK_SHAPES}
LARGE = [
    f"norm {NORM_SHAPES[2]}",
    f"mlp {MLP_SHAPES[1]}",
    f"qk {QK_SHAPES[1]}",
]  # whose rounding errors are a mean of many


def results(function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and gradients of a weighted sum of them, in float64."""
    return results_of(function, [x.detach().to(dtype).requires_grad_() for x in inputs])


def results_of(function, inputs: list[Tensor]) -> list[Tensor]:
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    g = torch.Generator().manual_seed(0)
    total = sum((y * torch.randn(y.shape, generator=g).to(y.dtype)).sum() for y in outputs)
    return [x.detach().double() for x in (*outputs, *torch.autograd.grad(total, inputs))]


def errors(name: str, dtype: torch.dtype = torch.float32, plain: bool = False) -> list[float]:
    """Relative errors of outputs and gradients against the definition in float64 on the same numbers."""
    fused, definition, inputs = CASES[name]
    inputs = [x.to(dtype) for x in inputs]
    found = results(definition if plain else fused, inputs, dtype)
    return [
        ((a - b).norm() / b.norm()).item()
        for a, b in zip(found, results(definition, inputs, torch.float64), strict=True)
    ]


@pytest.mark.parametrize("name", CASES)
def test_the_reference_and_its_gradients_are_the_definitions(name):
    assert max(errors(name)) < 2e-6
    assert max(errors(name, torch.float64)) < 1e-12


@pytest.mark.parametrize("name", LARGE)
def test_in_bf16_the_reference_is_as_close_as_the_plain_form(name):
    ours, plain = errors(name, torch.bfloat16), errors(name, torch.bfloat16, plain=True)
    assert all(a <= 1.5 * b for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("name", ["norm (2, 5, 100)", "mlp (37, 48, 100, 20)", "qk (2, 37, 4, 2, 6)"])
def test_the_operators_are_registered_as_pytorch_wants_them(name):
    inputs = [x.detach().requires_grad_() for x in CASES[name][2]]
    if name.startswith("norm"):
        arguments = fused_norm.mix_norm_op, (inputs[:-1], inputs[-1])
        y, backward = arguments[0](*arguments[1]), fused_norm.mix_norm_backward
        gradients = *y, inputs[:-1], inputs[-1]
    elif name.startswith("mlp"):
        arguments = fused_mlp.relu2_mlp_op, tuple(inputs)
        (y, act), backward = arguments[0](*inputs), fused_mlp.relu2_mlp_backward
        gradients = y, *inputs, act
    else:
        tables = torch.ones(37, 3), torch.zeros(37, 3)
        arguments = fused_qk.qk_norm_rope_op, (*inputs, *tables)
        backward = fused_qk.qk_norm_rope_backward
        gradients = *arguments[0](*inputs, *tables), *inputs, *tables
    detached = [[x.detach() for x in g] if isinstance(g, list) else g.detach() for g in gradients]
    found = [torch.library.opcheck(*arguments), torch.library.opcheck(backward, tuple(detached))]
    assert {verdict for each in found for verdict in each.values()} == {"SUCCESS"}


def in_the_interpreter() -> dict[str, float]:
    """The largest error of each case, and of a whole model's gradients from gpt's, with Triton's kernels."""
    from architectures.kernels import fused_norm_triton, fused_qk_triton
    from tests.test_megakernel import ALL, distance_to_gpt

    fused_norm.mix_norm_op.register_kernel("cpu")(fused_norm_triton.launch_mix_norm)
    fused_norm.mix_norm_backward.register_kernel("cpu")(fused_norm_triton.launch_mix_norm_backward)
    fused_mlp.relu2_mlp_op.register_kernel("cpu")(fused_mlp.relu2_mlp_on_cuda)
    fused_mlp.relu2_mlp_backward.register_kernel("cpu")(fused_mlp.relu2_mlp_backward_on_cuda)
    fused_qk.qk_norm_rope_op.register_kernel("cpu")(fused_qk_triton.launch_qk_norm_rope)
    fused_qk.qk_norm_rope_backward.register_kernel("cpu")(fused_qk_triton.launch_qk_norm_rope_backward)
    found = {name: max(errors(name)) for name in CASES}
    return found | {"strided": strided_difference(), "model": distance_to_gpt(ALL, num_layers=2)}


def strided_difference() -> float:
    """Of results on tensors that are not contiguous from those on their copies, over all kernels."""
    worst = 0.0
    for name in ("norm (2, 5, 100)", "mlp (37, 48, 100, 20)", "qk (2, 37, 4, 2, 6)"):
        fused, _, inputs = CASES[name]
        wide = [torch.stack((x, x), dim=-1)[..., 0] for x in inputs]
        leaves = [x.detach().requires_grad_() for x in wide]
        pairs = zip(results_of(fused, leaves), results(fused, inputs, torch.float32), strict=True)
        worst = max(worst, *((a - b).abs().max().item() for a, b in pairs))
    return worst


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    """What this file finds when it runs as a script in the interpreter."""
    return run_in_interpreter(__file__)


@pytest.mark.parametrize("name", CASES)
def test_the_triton_kernel_and_its_gradients_are_the_definitions(interpreted, name):
    assert interpreted[name] < 2e-6


def test_tensors_that_are_not_contiguous_give_the_same(interpreted):
    assert interpreted["strided"] == 0 and strided_difference() == 0


def test_a_model_on_triton_kernels_has_the_gradients_of_gpt(interpreted):
    assert interpreted["model"] < 1e-5


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda r: fused_norm.mix_norm([r(3, 8)] * 6, r(6, 8)), "6 terms of .* at most 5 terms"),
        (lambda r: fused_norm.mix_norm([r(3, 8)], r(2, 8)), r"gains \(2, 8\) must be"),
        (lambda r: fused_norm.mix_norm([r(3, 8), r(2, 8)], r(2, 8)), "one shape and dtype"),
        (lambda r: fused_mlp.relu2_mlp(r(3, 8), r(16, 8), r(8, 15)), r"\(16, 8\), \(8, 15\) must be"),
        (lambda r: fused_mlp.relu2_mlp(r(3, 8), r(16, 8).bfloat16(), r(8, 16)), "make them one dtype"),
        (lambda r: fused_qk.qk_norm_rope(r(2, 5, 30), r(4), r(5, 2), r(5, 2)), r"\(2, 5, 30\), \(4,\), .* must be"),
        (lambda r: fused_qk.qk_norm_rope(r(2, 5, 32), r(4), r(6, 2), r(6, 2)), r"\(6, 2\) must be"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(torch.ones)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(in_the_interpreter()))
