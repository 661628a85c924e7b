"""The streamed cross-entropy equals its definition in loss, gradients and errors, and takes less memory."""

import json

import pytest
import torch
from kernel_tools import run_in_interpreter
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from architectures.kernels.cross_entropy import (
    chunked_cross_entropy,
    naive_cross_entropy,
    softcapped_cross_entropy,
)

SOFTCAP = 30.0
CASES = (
    (37, 48, 131, 37, 1.0, 30.0),
    (150, 64, 256, 128, 1.0, 4.0),
    (1, 100, 260, 128, 1.0, 30.0),
    (9, 16, 128, 4, 50.0, 30.0),
)  # (M, D, V, rows at a time, scale, softcap)


def inputs(M: int = 37, D: int = 48, V: int = 131, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """h (M, D) times scale, weight (V, D), targets (M), the first and the last word among them."""
    g = torch.Generator().manual_seed(M + D + V)
    targets = torch.randint(V, (M,), generator=g)
    targets[0], targets[-1] = 0, V - 1
    return scale * torch.randn(M, D, generator=g), torch.randn(V, D, generator=g), targets


def with_gradients(function, h: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, ...]:
    h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(h, weight, targets, softcap)
    return loss.detach(), *torch.autograd.grad(loss, (h, weight))


def exact(h: Tensor, weight: Tensor, targets: Tensor, softcap: float = SOFTCAP) -> tuple[Tensor, ...]:
    """(loss, dh, dW) of the definition in fp64."""
    return with_gradients(naive_cross_entropy, h.double(), weight.double(), targets, softcap)


def relative_errors(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> list[float]:
    return [((x - y).norm() / y.norm()).item() for x, y in zip(got, wanted, strict=True)]


def peak_bytes(function, *tensors: Tensor) -> int:
    """The most bytes that a forward and backward pass held at once beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        with_gradients(function, *tensors, SOFTCAP)
    held = peak = 0
    events = (e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("rows", [1, 16, 37, 64])
def test_the_chunked_form_equals_the_definition_whatever_the_chunk(rows):
    tensors = [x.double() if x.is_floating_point() else x for x in inputs()]
    assert max(relative_errors(chunked_cross_entropy(*tensors, SOFTCAP, True, rows), exact(*tensors))) < 1e-13


@pytest.mark.parametrize("shape", [(1, 8, 2), (37, 48, 131), (300, 20, 1031)])
@pytest.mark.parametrize("softcap", [4.0, 30.0, 50.0])
def test_loss_and_gradients_are_those_of_the_definition(shape, softcap):
    got = with_gradients(softcapped_cross_entropy, *inputs(*shape), softcap)
    assert max(relative_errors(got, exact(*inputs(*shape), softcap))) < 3e-6


def test_bf16_is_as_close_to_fp64_as_the_plain_form_in_bf16():
    h, weight, targets = inputs(300, 64, 1031)
    h, weight = h.bfloat16(), weight.bfloat16()
    wanted = exact(h, weight, targets)
    ours = relative_errors(with_gradients(softcapped_cross_entropy, h, weight, targets, SOFTCAP), wanted)
    plain = relative_errors(with_gradients(naive_cross_entropy, h, weight, targets, SOFTCAP), wanted)
    assert all(a < 1.5 * b for a, b in zip(ours[1:], plain[1:], strict=True)) and ours[0] < 1e-3


def test_the_gradient_of_an_fp32_weight_under_bf16_activations_is_summed_in_fp32():
    h, weight, targets = inputs(4096, 8, 16)
    h = h.bfloat16()
    _, _, dw = chunked_cross_entropy(h, weight, targets, SOFTCAP, True, 16)
    assert dw.dtype == torch.float32
    assert relative_errors((dw,), exact(h, weight.bfloat16(), targets)[2:])[0] < 5e-3


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_where_tanh_saturates_the_gradient_is_zero_and_nothing_is_nan(scale):
    h, weight = torch.full((5, 16), scale), torch.ones(40, 16)
    loss, dh, dw = with_gradients(softcapped_cross_entropy, h, weight, torch.arange(5), SOFTCAP)
    assert (loss - torch.tensor(40.0).log()).abs() < 1e-5 and not dh.any() and not dw.any()


def test_a_sure_and_right_token_keeps_a_precise_gradient():
    h, weight = torch.zeros(2, 4), torch.eye(6, 4)
    h[:, 1] = 18.0
    targets = torch.tensor([1, 1])
    got = with_gradients(softcapped_cross_entropy, h, weight, targets, SOFTCAP)
    assert max(relative_errors(got[1:], exact(h, weight, targets)[1:])) < 1e-5


def test_a_weighted_loss_has_weighted_gradients():
    h, weight, targets = inputs()
    got = with_gradients(lambda *x: 3 * softcapped_cross_entropy(*x), h, weight, targets, SOFTCAP)
    assert max(relative_errors(got[1:], [3 * x for x in exact(h, weight, targets)[1:]])) < 3e-6


def test_without_gradients_the_loss_is_the_same():
    with torch.no_grad():
        alone = softcapped_cross_entropy(*inputs(), SOFTCAP)
    assert not alone.requires_grad
    assert alone == with_gradients(softcapped_cross_entropy, *inputs(), SOFTCAP)[0]


def test_a_second_derivative_is_refused():
    h, weight, targets = inputs()
    loss = softcapped_cross_entropy(h.requires_grad_(), weight, targets, SOFTCAP)
    with pytest.raises(ValueError, match="no second derivative"):
        torch.autograd.grad(loss, h, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, t: (h[:, :-1], w, t, SOFTCAP), r"h \(37, 47\), weight \(131, 48\)"),
        (lambda h, w, t: (h, w, t[1:], SOFTCAP), r"target_ids \(36,\)"),
        (lambda h, w, t: (h.half(), w, t, SOFTCAP), "use bfloat16 or float32"),
        (lambda h, w, t: (h, w, t, 51.0), "softcap=51.0 must be above 0 and at most 50.0"),
        (lambda h, w, t: (h, w, t, 0.0), "softcap=0.0 must be above 0"),
    ],
)
def test_unfitting_input_is_refused_with_its_value(change, message):
    with pytest.raises(ValueError, match=message):
        softcapped_cross_entropy(*change(*inputs()))


def test_the_operator_is_registered_as_torch_wants_it():
    h, weight, targets = inputs()
    arguments = (h.requires_grad_(), weight.requires_grad_(), targets, SOFTCAP)
    for with_grad in (True, False):
        tests = ["test_schema", "test_faketensor"] + [
            "test_autograd_registration",
            "test_aot_dispatch_dynamic",
        ] * with_grad
        torch.library.opcheck(
            torch.ops.golf.softcapped_cross_entropy.default, (*arguments, with_grad), test_utils=tests
        )


def test_the_kept_gradients_cannot_be_differentiated():
    h, weight, targets = inputs()
    _, dh, dw = torch.ops.golf.softcapped_cross_entropy(h.requires_grad_(), weight, targets, SOFTCAP, True)
    assert not dh.requires_grad and not dw.requires_grad


def test_it_compiles_into_one_graph():
    compiled = torch.compile(softcapped_cross_entropy, fullgraph=True, dynamic=False, backend="aot_eager")
    got = with_gradients(compiled, *inputs(), SOFTCAP)
    assert max(relative_errors(got, exact(*inputs()))) < 3e-6


def test_memory_at_vocabulary_8192_is_at_most_half_of_the_plain_forms():
    tensors = inputs(4096, 256, 8192, 0.1)
    assert peak_bytes(softcapped_cross_entropy, *tensors) <= 0.5 * peak_bytes(naive_cross_entropy, *tensors)


def in_the_interpreter() -> list[tuple[float, bool]]:
    """Of each case with the Triton kernel: the largest error, and whether the loss alone is the loss with gradients."""
    from architectures.kernels.cross_entropy_triton import tiled_slopes

    found = []
    for M, D, V, rows, scale, softcap in CASES:
        tensors = inputs(M, D, V, scale)
        got = chunked_cross_entropy(*tensors, softcap, True, rows, tiled_slopes)
        alone = chunked_cross_entropy(*tensors, softcap, False, rows, tiled_slopes)[0]
        found.append((float(max(relative_errors(got, exact(*tensors, softcap)))), bool(alone == got[0])))
    return found


def test_the_triton_kernel_equals_the_definition():
    for error, equal in run_in_interpreter(__file__):
        assert error < 5e-6 and equal


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(in_the_interpreter()))
