"""The Triton scan equals the definition at sizes that do not fit its tiles; checked in Triton's interpreter, in fp32.

Everything that runs a kernel does so in one other process: this file as a script.
"""

import json
from importlib.util import find_spec

import pytest
import torch
from kernel_tools import (
    compiled_difference,
    multiply_bf16,
    operators_called,
    outputs,
    run_in_interpreter,
    watch_costs,
)

if find_spec("triton") is None:
    pytest.skip("Triton, which these kernels are written in, is not installed", allow_module_level=True)

from architectures.kernels import scan_cases, scan_op
from architectures.kernels.scan import chunked_scan, naive_scan

CASES = {  # (T, G, H, N, P, steps of a segment or as planned), steps that are resets
    "one chunk": ((37, 1, 1, 16, 32, None), []),
    "ragged": ((65, 2, 2, 64, 64, None), []),
    "three segments, two heads of a group": ((130, 1, 2, 32, 16, 64), []),
    "four segments, last one short": ((200, 2, 2, 16, 48, 64), []),
    "tiles of N": ((200, 1, 1, 128, 64, 128), []),
    "tiles of N and P": ((100, 1, 2, 128, 128, 64), []),
    "resets at segments and one after another": ((140, 1, 1, 16, 16, 64), [10, 64, 127, 128]),
}
SHAPE = (2, 200, 1, 2, 96, 64)  # (B, T, G, H, N, P) of what is counted


def inputs(T: int, G: int, H: int, N: int, P: int, resets: list[int] = ()) -> list[torch.Tensor]:
    """q, k, v, log_decay, in which resets are -64 and -inf in turns, delta and skip."""
    g = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, T, *shape, generator=g) for shape in ((G, N), (G, N), (H, P)))
    log_decay = -torch.rand(2, T, H, generator=g) * torch.logspace(-3, 0.5, H)
    for i, t in enumerate(resets):
        log_decay[:, t] = (-64.0, -torch.inf)[i % 2]
    delta, skip = torch.rand(2, T, H, generator=g), torch.randn(H, generator=g)
    return [x.requires_grad_() for x in (q / N**0.5, k, v, log_decay, delta, skip)]


def errors(shape: tuple, resets: list[int], dtype: torch.dtype = torch.float32) -> list[float]:
    """Largest errors of y and the gradients of inputs against the definition in fp64, over the largest value."""
    *shape, length = shape
    tensors = [x.detach().to(dtype).requires_grad_() for x in inputs(*shape, resets)]
    got = outputs(lambda *x: scan_op.triton_scan(*x, segment_length=length), tensors)
    wanted = outputs(naive_scan, [x.detach().double().requires_grad_() for x in tensors])
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, wanted, strict=True)]


SIDES = (100, 2, 4, 16, 32)  # (T, G, H, N, P) of tensors that lie side by side


def split(x: torch.Tensor, *rest: torch.Tensor, length: int = 64) -> torch.Tensor:
    """The scan of parts of one tensor, in segments."""
    _, G, H, N, P = SIDES
    v, k, q = x.split((H * P, G * N, G * N), dim=-1)
    return scan_op.triton_scan(*(y.unflatten(2, (G, N)) for y in (q, k)), v.unflatten(2, (H, P)), *rest, length)


def joined(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    q, k, v, *rest = tensors
    return [torch.cat([x.detach().flatten(2) for x in (v, k, q)], dim=-1).requires_grad_(), *rest]


def side_by_side() -> list[float]:
    """How far y and gradients move when q, k and v are parts of one tensor, and when what is optional is left out."""
    tensors = inputs(*SIDES)
    alone = outputs(lambda *x: scan_op.triton_scan(*x, segment_length=64), tensors)
    found = outputs(split, joined(tensors))
    wanted = [alone[0], torch.cat([x.flatten(2) for x in (alone[3], alone[2], alone[1])], dim=-1), *alone[4:]]
    moved = [(a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)]
    q, k, v, log_decay, delta, skip = tensors
    neutral = scan_op.triton_scan(q, k, v, log_decay, torch.ones_like(delta), torch.zeros_like(skip))
    return [*moved, (scan_op.triton_scan(q, k, v, log_decay) - neutral).abs().max().item()]


def odd_layouts() -> list[float]:
    """How far y moves when each tensor lies in memory in some other way."""
    q, k, v, log_decay, delta, skip = (x.detach() for x in inputs(*SIDES))
    q = q[:, :1].expand_as(q)
    wide = torch.zeros(*v.shape[:2], 5, 32)[:, :, 1:]  # begins 32 numbers later, in a step of 160
    odd = torch.zeros(*v.shape[:2], 4, 33)[..., 1:]  # on no boundary of 16 bytes
    layouts = {"v": v.transpose(1, 2).contiguous().transpose(1, 2), "wide": wide.copy_(v), "odd": odd.copy_(v)}
    plain = scan_op.triton_scan(q.contiguous(), k, v, log_decay, delta, skip)
    turned = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (log_decay, delta))
    moved = [scan_op.triton_scan(q, k, v, *turned, skip.repeat_interleave(2)[::2]) - plain]
    moved += [scan_op.triton_scan(q, k, other, log_decay, delta, skip) - plain for other in layouts.values()]
    beside = torch.cat((k, k), dim=-1)[..., : k.size(-1)]  # k of another pitch than q
    moved += [scan_op.triton_scan(q, beside, v, log_decay, delta, skip) - plain]
    return [x.abs().max().item() for x in moved]


def at_resets() -> list[float]:
    """(gradient of the log decay at resets, how far a document's gradients move with the next document)."""
    tensors = inputs(100, 1, 1, 16, 16, [40, 70])
    first = outputs(scan_op.triton_scan, tensors)[4]
    with torch.no_grad():
        for x in tensors[:3]:
            x[:, 70:] *= 3
    second = outputs(scan_op.triton_scan, tensors)[4]
    return [first[:, [40, 70]].abs().max().item(), (first - second)[:, :70].abs().max().item()]


def counted() -> list[list[int]]:
    """Bytes that kernels move and operations of their products, as the interpreter saw and as scan_cases counts."""
    scan_op.MIN_SEGMENT = 32  # four segments
    found = watch_costs(lambda: outputs(scan_op.triton_scan, inputs(*SHAPE[1:])))
    costs = scan_cases.count(*SHAPE, value_bytes=4)
    del costs["sums"]  # by PyTorch
    bytes_moved = sum(size for size, _ in costs.values())
    return [found, [bytes_moved, sum(n for name, (_, n) in costs.items() if not name.startswith("join"))]]


def op_checks() -> str:
    """On q, k and v that are parts of one tensor."""
    _, G, H, N, P = SIDES
    x, *rest = joined(inputs(*SIDES))
    v, k, q = x.detach().split((H * P, G * N, G * N), dim=-1)
    tensors = [*(y.unflatten(2, (G, N)) for y in (q, k)), v.unflatten(2, (H, P)), *(y.detach() for y in rest)]
    found = torch.library.opcheck(scan_op.fused_scan, (*(y.requires_grad_() for y in tensors), 64))
    tensors = [y.detach() for y in tensors]
    y, starts = scan_op.fused_scan(*tensors, 64)
    backward = torch.library.opcheck(scan_op.fused_scan_backward, (y, *tensors, starts, 64))
    return " ".join(sorted({*found.values(), *backward.values()}))


@pytest.fixture(scope="module")
def interpreted() -> dict:
    """What this file finds when it runs as a script in the interpreter."""
    return run_in_interpreter(__file__)


@pytest.mark.parametrize("name", CASES)
def test_the_triton_scan_and_its_gradients_equal_the_sequential_loop(interpreted, name):
    assert max(interpreted["errors"][name]) <= (2e-5 if CASES[name][1] else 3e-6)


def test_bf16_is_as_exact_as_its_rounding(interpreted):
    *others, d_skip = interpreted["bf16"]
    assert max(others) <= 2e-2 and d_skip <= 5e-3


def test_q_k_and_v_may_be_parts_of_one_tensor_and_the_rest_left_out(interpreted):
    assert max(interpreted["side_by_side"]) == 0


def test_tensors_may_lie_in_memory_in_any_way(interpreted):
    assert max(interpreted["odd_layouts"]) == 0


@pytest.mark.parametrize(
    ("part", "kept"), [(slice(0, 48), True), (slice(16, 64), True), (slice(1, 49), False), (slice(16, 40), True)]
)
def test_parts_are_copied_only_where_a_kernel_would_load_them_slowly(part, kept):
    whole = torch.zeros(2, 30, 64, dtype=torch.bfloat16)
    for heads in (whole[:, :, part].unflatten(2, (1, -1)), whole.unsqueeze(2)[..., part]):  # two strides of one head
        assert (scan_op.by_steps(heads).data_ptr() == heads.data_ptr()) is kept


def test_a_reset_has_no_gradient_and_keeps_those_of_documents_apart(interpreted):
    assert interpreted["at_resets"] == [0, 0]


def test_the_scan_compiles_without_graph_breaks(interpreted):
    assert interpreted["compiled_difference"] == 0


def test_the_operators_are_registered_as_pytorch_wants_them(interpreted):
    assert interpreted["op_checks"] == "SUCCESS"


def test_counted_costs_are_what_the_kernels_load_store_and_multiply(interpreted):
    found, counted = interpreted["counted"]
    assert found == counted


def test_the_scan_moves_at_most_half_more_than_each_pass_must():
    shape = (32, 2048, 8, 8, 64, 64)  # 65,536 tokens
    moved = sum(size for size, _ in scan_cases.count(*shape).values())
    assert moved <= 1.5 * scan_cases.least_bytes(*shape)


@pytest.mark.parametrize("B", [1, 3, 64])
@pytest.mark.parametrize("T", [1, 640, 65_536])
def test_time_is_cut_only_where_heads_leave_multiprocessors_idle(B, T):
    steps = scan_op.segment_steps(B, T, H=8, N=64, P=64)
    segments = -(-T // steps)
    assert steps % scan_op.ROWS == 0 and (segments == 1 or B * 8 * (segments // 2) < scan_op.NUM_MULTIPROCESSORS)
    assert segments == 1 or steps >= scan_op.MIN_SEGMENT
    assert B * 8 * segments >= scan_op.NUM_MULTIPROCESSORS or 2 * segments * scan_op.MIN_SEGMENT > T


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunked_scan_takes_the_kernels_on_cuda_alone(device):
    called = operators_called(
        chunked_scan, (2, 300, 1, 64), (2, 300, 1, 64), (2, 300, 8, 48), (2, 300, 8), device=device
    )
    assert ("golf.scan.default" in called) is (device == "cuda")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q, k, v, g, *_: (q, k[:, 1:], v, g), "shapes"),
        (lambda q, k, v, g, *_: (q, k, v[:, :, :3], g[:, :, :3]), "must be"),
        (lambda q, k, v, g, delta, _: (q, k, v, g, delta[:, 1:]), r"delta, skip of shapes \(2, 7, 4\), \(4,\) must be"),
        (lambda q, k, v, g, delta, skip: (q, k, v, g, delta, skip[1:]), r"\(3,\) must be"),
        (lambda q, k, v, g, *_: (q, k.bfloat16(), v, g), "make all bfloat16 or all float32"),
        (lambda q, k, v, g, *_: (q, k, v, g, None, None, 100), "segment_length=100 must be a multiple of 64"),
        (
            lambda *x: [y[:, :1].to("meta").expand(-1, 2**27, *y.shape[2:]) for y in x[:4]],
            r"T \* H \* max\(N, P\) = 8589934592 steps over 32 bits",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        scan_op.triton_scan(*change(*inputs(8, 2, 4, 16, 16)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = dict(errors={name: errors(*case) for name, case in CASES.items()}, at_resets=at_resets())
    found |= dict(side_by_side=side_by_side(), op_checks=op_checks(), counted=counted())
    found["odd_layouts"] = odd_layouts()
    found["compiled_difference"] = compiled_difference(split, joined(inputs(*SIDES)))
    multiply_bf16()
    found["bf16"] = errors((130, 1, 2, 16, 32, 64), [], torch.bfloat16)
    print(json.dumps(found))
