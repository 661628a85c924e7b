"""The shelf: attention in blocks is the definition, forward and backward, and is what a compiled step on CPU runs."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from architectures import layers
from architectures.layers import ModelConfig

SHAPES = [(2, 4, 4, 64, 16), (1, 6, 2, 130, 8), (2, 8, 4, 257, 16), (1, 4, 1, 1030, 8)]  # B, H, G, T, K


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool = True) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    B, H, G, T, K = shape
    made = torch.Generator().manual_seed(T)
    return [torch.randn(B, n, T, K, generator=made, dtype=torch.float64).to(dtype).requires_grad_() for n in (H, G, G)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_causal", [True, False])
def test_blocked_attention_is_softmax_attention_forward_and_backward(shape, is_causal):
    ours, wanted = inputs(shape, torch.float32), inputs(shape, torch.float64)
    y, want = layers.blocked_attention(*ours, is_causal), sdpa(*wanted, is_causal)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    for got, grad in zip(
        torch.autograd.grad(y, ours, upstream), torch.autograd.grad(want, wanted, upstream.double()), strict=True
    ):
        torch.testing.assert_close(got.double(), grad, rtol=1e-4, atol=1e-4)


@pytest.fixture
def blocked_calls(monkeypatch) -> list:
    """Filled at every trace or run of the blocked form."""
    calls, real = [], layers.blocked_attention
    monkeypatch.setattr(layers, "blocked_attention", lambda *args: calls.append(1) or real(*args))
    torch._dynamo.reset()
    return calls


def test_a_graph_can_attend_in_blocks_at_two_lengths(blocked_calls):
    def both(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return sum(layers.causal_attention(z, z, z).float().square().sum() for z in (x, y))

    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, T, 16, generator=g).bfloat16().requires_grad_() for T in (256, 96)]
    found = torch.autograd.grad(torch.compile(both, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    assert len(blocked_calls) >= 2
    for ours, plain in zip(found, torch.autograd.grad(both(*inputs), inputs), strict=True):
        assert (ours - plain).float().norm() < 0.03 * plain.float().norm()


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_compiled_bf16_step_on_cpu_attends_in_blocks_and_is_as_close_to_fp64_as_the_plain_one(
    blocked_calls, is_causal
):
    compiled = torch.compile(layers.attention, dynamic=False)
    exact = inputs(SHAPES[2], torch.float64)
    want = torch.autograd.grad(sdpa(*exact, is_causal).square().sum(), exact)
    errors = {}
    for name, attention in (("blocked", compiled), ("plain", layers.attention)):
        ours = inputs(SHAPES[2], torch.bfloat16)
        found = torch.autograd.grad(attention(*ours, is_causal=is_causal).float().square().sum(), ours)
        errors[name] = max(float((a - b).norm() / b.norm()) for a, b in zip(found, want, strict=True))
    assert blocked_calls and errors["blocked"] < 2 * errors["plain"] < 0.05, errors


@pytest.mark.parametrize(("length", "grads"), [(layers.MAX_BLOCKED_SEQ_LEN + 8, True), (64, False)])
def test_long_contexts_and_scoring_keep_the_kernel_that_keeps_nothing(blocked_calls, length, grads):
    with torch.set_grad_enabled(grads):
        torch.compile(layers.causal_attention, dynamic=False)(*inputs((1, 2, 2, length, 8), torch.bfloat16))
    assert not blocked_calls


def test_layers_of_blocked_attention_share_a_compiled_graph(blocked_calls):
    def layers_of(q, k, v):
        return layers.causal_attention(layers.causal_attention(q, k, v), k, v)

    y = torch.compile(layers_of, fullgraph=True, dynamic=False, backend="aot_eager")(*inputs(SHAPES[1], torch.bfloat16))
    want = layers_of(*inputs(SHAPES[1], torch.float32))
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)
    assert len(blocked_calls) == 2


def test_who_only_scores_does_not_wait_for_the_compiler_to_load():
    lines = "import sys, torch; before = 'torch._dynamo' in sys.modules; import train_gpt, architectures.gpt"
    told = "print(before or 'torch._dynamo' not in sys.modules)"
    command = [sys.executable, "-c", f"{lines}; {told}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("shape", [(2, 9, 3), (1, 2, 5)])
def test_short_conv_and_its_gradients_are_the_same_for_a_compiler(shape):
    g = torch.Generator().manual_seed(0)
    x, taps = (torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in (shape, (shape[2], 4)))
    assert torch.equal(layers.ShortConv.apply(x, taps), layers.short_conv(x, taps))
    assert torch.autograd.gradcheck(layers.ShortConv.apply, (x, taps))
    before = torch.zeros(shape[0], 3, shape[2], dtype=torch.float64)
    assert torch.equal(layers.short_conv(x, taps, before), layers.short_conv(x, taps))


def test_a_gain_is_a_factor_of_the_norm():
    g = torch.Generator().manual_seed(0)
    x, gain = (torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((2, 5, 3, 8), (3, 1)))
    results = [f(x) for f in (lambda x: layers.rms_norm(x, gain), lambda x: layers.rms_norm(x) * gain)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), (x, gain)) for y in results))


@pytest.mark.parametrize("takes_scale", [True, False])
def test_a_scale_is_a_factor_of_what_a_layer_gives(takes_scale):
    g = torch.Generator().manual_seed(0)
    x, scale = (torch.randn(s, generator=g, requires_grad=True) for s in ((2, 5, 8), (8,)))
    layer = layers.MLP(ModelConfig(model_dim=8, num_heads=2, num_kv_heads=1))
    torch.nn.init.normal_(layer.down.weight, generator=g)
    layer.takes_scale = takes_scale
    results, params = [layers.scaled(layer, x, scale), scale * layer(x)], (x, scale, *layer.parameters())
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), params) for y in results))


def test_fp32_on_cuda_attends_with_as_many_keys_as_queries(monkeypatch):
    seen = []

    def kernel(q, k, v, *_, enable_gqa, **__):
        seen.append((k.size(1), v.size(1), enable_gqa))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16):
            layers.causal_attention(*(torch.empty(1, n, 8, 4, device="cuda", dtype=dtype) for n in (4, 2, 2)))
    assert seen == [(4, 4, False), (2, 2, True)]


def test_attention_is_handed_heads_as_they_lie_in_memory():
    seen, layer = [], layers.CausalSelfAttention(ModelConfig(model_dim=32, num_heads=4, num_kv_heads=2))

    def attend(*heads):
        seen.extend(heads)
        return layers.causal_attention(*heads)

    layer.attend = attend
    layer(torch.randn(2, 5, 32))
    assert len(seen) == 3 and all(x.transpose(1, 2).is_contiguous() for x in seen)  # no copy made to turn them
