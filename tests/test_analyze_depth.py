"""tools.analyze: Lyapunov exponents and sensitivity to tokens, against full Jacobians and closed forms."""

import math

import pytest
import torch
from test_analyze import SMALL, every_model
from test_architectures import every_architecture, shake, some_tokens, tiny
from torch import Tensor

import train_gpt
from architectures.layers import LanguageModel
from tools.analysis import lyapunov, sensitivity
from tools.analysis.calls import backbone_input, layers


def in_double(name: str, **settings) -> LanguageModel:
    """A small model in float64, all of it but the inside of attention, which is fp32 on a CPU."""
    model = shake(tiny(name, **SMALL | settings)).folded().double().requires_grad_(False)  # as it is stored
    model.compute_dtype = torch.float64
    train_gpt.fill_generated(model)
    return model


def window(model: LanguageModel) -> Tensor:
    return some_tokens(1, model.config.train_seq_len + 1)


def chain(matrices: list[Tensor]) -> lyapunov.States:
    def states(x: Tensor) -> tuple[Tensor, ...]:
        seen = []
        for matrix in matrices:
            x = x @ matrix.T
            seen.append(x)
        return tuple(seen)

    return states


def test_exponents_of_a_linear_chain_are_the_log_singular_values_of_its_product():
    matrices = list(torch.randn(5, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    product = torch.linalg.multi_dot(matrices[::-1])
    found = lyapunov.growth(chain(matrices), torch.randn(1, 40, dtype=torch.float64), 4, tolerance=1e-9)
    torch.testing.assert_close(found.exponents, torch.linalg.svdvals(product)[:4].log() / 5)
    q, steps = torch.linalg.svd(product)[2][:4].T, []  # the textbook's way: QR after every layer
    for matrix in matrices:
        q, r = torch.linalg.qr(matrix @ q)
        steps.append(r.diagonal().abs().log())
    torch.testing.assert_close(found.leading, torch.stack(steps).cumsum(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("count", [2, 4, 6, 9])
def test_exponents_of_a_repeated_symmetric_map_are_its_log_eigenvalues(count):
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    rates = torch.tensor([2.0, 1.5, -1.2, 0.9, 0.5, 0.1], dtype=torch.float64)
    found = lyapunov.growth(chain([basis @ rates.diag() @ basis.T] * 7), torch.ones(1, 6, dtype=torch.float64), count)
    torch.testing.assert_close(found.exponents, rates.abs().log()[:count])
    assert found.change < 0.01


def test_states_are_what_the_next_block_reads():
    model, x = in_double("gpt"), torch.randn(1, 6, 16, dtype=torch.float64)
    first, second, third, fourth = model.blocks
    a, w = first(x, x), model.skip_weights
    b = second(a, x)
    c = third(b + w[0] * b, x)  # the skips mirror the first half: layer 1 feeds layer 2, layer 0 feeds layer 3
    expected = (a, b + w[0] * b, c + w[1] * a, fourth(c + w[1] * a, x))
    torch.testing.assert_close(lyapunov.stream_states(model)(x), expected)
    ode = in_double("tong_ode")
    a = x + ode.blocks[0](x, 0.25) / 4
    torch.testing.assert_close(lyapunov.stream_states(ode)(x)[:2], (a, a + ode.blocks[1](a, 0.25) / 4))


@every_model
def test_pull_is_the_transpose_of_push(name, settings):
    model = in_double(name, **settings)
    states, x = lyapunov.stream_states(model), torch.randn(1, 6, 16, dtype=torch.float64)
    u, v = torch.randn(2, 96, 3, dtype=torch.float64)
    pushed, pulled = lyapunov.push(states, x, v)[-1], lyapunov.pull(states, x, u)
    torch.testing.assert_close(u.T @ pushed, pulled.T @ v, atol=1e-4, rtol=1e-5)


@every_model
def test_exponents_are_those_of_the_full_jacobian(name, settings):
    model = in_double(name, **settings)
    x = backbone_input(model, window(model)[:, :-1])
    n, states, L = x.numel(), lyapunov.stream_states(model), len(layers(model, window(model)[:, :-1]))
    jacobian = torch.autograd.functional.jacobian(model.backbone, x, vectorize=True).view(n, n)
    whole, leading = lyapunov.growth(states, x, n), lyapunov.growth(states, x, 4, max_rounds=24, tolerance=1e-7)
    assert whole.leading.shape == (L, n) and whole.change == 0
    assert L * whole.exponents.sum() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), rel=1e-4, abs=1e-3)
    torch.testing.assert_close(L * leading.exponents, torch.linalg.svdvals(jacobian)[:4].log(), atol=1e-4, rtol=0)
    assert whole.random[-1] == pytest.approx(math.log(jacobian.norm() / n**0.5), abs=1e-4)
    assert leading.stream[-1] == pytest.approx((model.backbone(x).norm() / x.norm()).log().item(), abs=1e-6)


@every_model
def test_sensitivity_is_the_gradient_of_each_score(name, settings):
    model = in_double(name, **settings)
    tokens, embedded = window(model), model.embed(window(model)[:, :-1])

    def nats(e: Tensor) -> Tensor:
        handle = model.embed.register_forward_hook(lambda *_: e)
        found = model.nats(tokens[:, :-1], tokens[:, 1:])[0]
        handle.remove()
        return found

    expected = torch.autograd.functional.jacobian(nats, embedded, vectorize=True)[:, 0].norm(dim=-1)  # (T, T)
    found = sensitivity.sensitivity(model, tokens[0, :-1], tokens[0, 1:])
    torch.testing.assert_close(found, expected * embedded[0].square().mean(-1).sqrt(), atol=1e-6, rtol=1e-4)


@every_architecture
def test_sensitivity_to_later_tokens_is_exactly_zero(name):
    model, tokens = shake(tiny(name)), some_tokens(41)
    found = sensitivity.report([sensitivity.sensitivity(model, tokens[:-1], tokens[1:])])
    assert found["max_future"] == 0 and min(found["by_distance"]) > 0
