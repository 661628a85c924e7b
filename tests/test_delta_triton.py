"""The Triton kernels of the gated delta rule equal the definition, at sizes that do not fit their tiles.

Everything that runs a kernel does so in one other process: this file as a script, in Triton's interpreter.
"""

import json
from importlib.util import find_spec

import pytest
import torch
from kernel_tools import compiled_difference, multiply_bf16, operators_called, outputs, run_in_interpreter, watch_costs
from torch import Tensor

if find_spec("triton") is None:
    pytest.skip("Triton, which these kernels are written in, is not installed", allow_module_level=True)

from architectures.kernels import delta, delta_cases, delta_op
from architectures.kernels.delta import delta_rule, naive_delta_rule

CASES = {  # (B, T, G, H, N, P), how far the keys of a head are from one another: 1 at random, 0 all the same
    "one chunk": ((2, 37, 1, 1, 16, 32), 1.0),
    "ragged": ((1, 65, 2, 2, 64, 64), 1.0),
    "heads of a group": ((1, 130, 2, 4, 32, 16), 1.0),
    "tiles of P": ((1, 100, 1, 2, 48, 80), 1.0),
    "keys much alike": ((1, 130, 1, 1, 64, 16), 0.1),
}
SHAPE = (2, 200, 1, 2, 24, 40)  # (B, T, G, H, N, P) of what is counted


def inputs(B: int, T: int, G: int, H: int, N: int, P: int, apart: float = 1.0) -> list[Tensor]:
    """q, k, v, log_decay, in which no decay and a reset are, and beta, in which 0 and 1 are."""
    g = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(B, T, *shape, generator=g) for shape in ((G, N), (G, N), (H, P)))
    k = apart * k + (1 - apart) * torch.randn(B, 1, G, N, generator=g)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    log_decay, beta = (-torch.rand(B, T, H, generator=g) for _ in range(2))
    log_decay = log_decay * torch.logspace(-3, 0.5, H)
    log_decay[:, 5], log_decay[:, 20], beta[:, 7], beta[:, 9] = 0.0, -100.0, 0.0, -1.0
    return [x.requires_grad_() for x in (q, k, v, log_decay, -beta)]


def errors(rule, tensors: list[Tensor]) -> list[float]:
    """Relative errors of y, dq, dk, dv, dg, dbeta against the definition in fp64 on the same numbers."""
    wanted = outputs(naive_delta_rule, [x.detach().double().requires_grad_() for x in tensors])
    return [((a - b).norm() / b.norm()).item() for a, b in zip(outputs(rule, tensors), wanted, strict=True)]


def in_bf16(name: str) -> list[list[float]]:
    """Errors of the kernels and of PyTorch's form, where q, k, v are bf16."""
    shape, apart = CASES[name]
    *tensors, log_decay, beta = inputs(*shape, apart)
    tensors = [x.detach().bfloat16().requires_grad_() for x in tensors]
    return [errors(rule, [*tensors, log_decay, beta]) for rule in (delta_op.triton_delta_rule, delta_rule)]


def counted() -> list[list[int]]:
    """Bytes that kernels move and operations of their products, as the interpreter saw and as delta_cases counts."""
    found = watch_costs(lambda: outputs(delta_op.triton_delta_rule, inputs(*SHAPE)))
    costs = delta_cases.count(*SHAPE, value_bytes=4)
    del costs["sums"]  # by PyTorch
    return [found, [sum(numbers) for numbers in zip(*costs.values(), strict=True)]]


def op_checks() -> str:
    tensors = inputs(1, 70, 1, 2, 16, 16)
    found = torch.library.opcheck(delta_op.fused_delta, tuple(tensors))
    tensors = [x.detach() for x in tensors]
    y, *kept = delta_op.fused_delta(*tensors)
    backward = torch.library.opcheck(delta_op.fused_delta_backward, (y, *tensors, *kept))
    return " ".join(sorted({*found.values(), *backward.values()}))


@pytest.fixture(scope="module")
def interpreted() -> dict:
    """What this file finds when it runs as a script in the interpreter."""
    return run_in_interpreter(__file__)


@pytest.mark.parametrize("name", CASES)
def test_the_triton_kernels_and_their_gradients_equal_the_sequential_loop(interpreted, name):
    assert max(interpreted["errors"][name]) < 1e-5


@pytest.mark.parametrize(("name", "limit"), [("ragged", 0.02), ("keys much alike", 0.07)])
def test_in_bf16_the_kernels_are_within_rounding_of_the_definition(interpreted, name, limit):
    """They round inverses, e, u and states, which PyTorch's form, in fp32, does not; keys much alike multiply that."""
    ours, plain = interpreted["bf16"][name]
    assert max(ours) < limit and max(plain) < 5e-3


def test_the_rule_compiles_without_graph_breaks(interpreted):
    assert interpreted["compiled_difference"] == 0


def test_the_operators_are_registered_as_pytorch_wants_them(interpreted):
    assert interpreted["op_checks"] == "SUCCESS"


def test_counted_costs_are_what_the_kernels_load_store_and_multiply(interpreted):
    found, counted = interpreted["counted"]
    assert found == counted


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_delta_rule_takes_the_kernels_on_cuda_alone(device):
    shapes = (2, 300, 8, 64), (2, 300, 8, 64), (2, 300, 8, 48), (2, 300, 8), (2, 300, 8)
    assert ("golf.delta.default" in operators_called(delta_rule, *shapes, device=device)) is (device == "cuda")


def test_keys_wider_than_a_tile_go_to_pytorchs_form(monkeypatch):
    monkeypatch.setattr(delta, "triton_takes", lambda *tensors: True)
    assert max(errors(delta_rule, inputs(1, 70, 1, 1, 80, 16))) < 1e-5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q, k, v, g, b: (q, k[:, 1:], v, g, b), "of shapes"),
        (lambda q, k, v, g, b: (q, k, v, g, b[..., :1]), "must be"),
        (lambda q, k, v, g, b: (q, k.bfloat16(), v, g, b), "make all bfloat16 or all float32"),
        (lambda q, k, v, g, b: (q.repeat(1, 1, 1, 5), k.repeat(1, 1, 1, 5), v, g, b), "keys of 80 numbers"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        delta_op.triton_delta_rule(*change(*inputs(1, 30, 2, 4, 16, 16)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    multiply_bf16()
    found = {name: errors(delta_op.triton_delta_rule, inputs(*shape, apart)) for name, (shape, apart) in CASES.items()}
    found = {"errors": found, "bf16": {name: in_bf16(name) for name in ("ragged", "keys much alike")}}
    found |= dict(op_checks=op_checks(), counted=counted())
    found["compiled_difference"] = compiled_difference(delta_op.triton_delta_rule, inputs(1, 70, 1, 2, 16, 16))
    print(json.dumps(found))
