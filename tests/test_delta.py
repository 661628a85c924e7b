"""The gated delta rule equals its definition; a state enters and leaves a scan; filters of modes are convolutions."""

import pytest
import test_scan
import torch
from test_scan import agree
from torch import Tensor

from architectures.kernels import delta, modes, scan


def inputs(T: int, G: int = 1, H: int = 4, N: int = 8, P: int = 6) -> list[Tensor]:
    """Those of the scan, with keys of length 1, and beta."""
    q, k, v, log_decay, *_ = (x.detach() for x in test_scan.inputs(T, G, H, N, P))
    beta = torch.rand(2, T, H, generator=torch.Generator().manual_seed(T))
    return [x.requires_grad_() for x in (q, torch.nn.functional.normalize(k, dim=-1), v, log_decay, beta)]


def filters(T: int) -> tuple[Tensor, modes.Pair, modes.Pair]:
    """u (2, T, 5), poles and weights of 3 modes per channel."""
    g = torch.Generator().manual_seed(T)
    pole = -torch.rand(5, 3, generator=g) * 0.3, torch.rand(5, 3, generator=g) * 3
    return torch.randn(2, T, 5, generator=g), pole, tuple(torch.randn(2, 5, 3, generator=g))


@pytest.mark.parametrize("T", [1, 63, 200])
@pytest.mark.parametrize("chunk_size", [1, 7, 64, None])
def test_delta_rule_equals_the_sequential_loop(T, chunk_size):
    agree(lambda *x: delta.delta_rule(*x, chunk_size or T), delta.naive_delta_rule, inputs(T))


@pytest.mark.parametrize("G", [2, 4])
def test_delta_rule_serves_any_number_of_key_groups(G):
    agree(lambda *x: delta.delta_rule(*x, 16), delta.naive_delta_rule, inputs(70, G))


@pytest.mark.parametrize("rule", [delta.naive_delta_rule, delta.delta_rule])
def test_writing_a_key_again_replaces_its_value_and_leaves_orthogonal_keys_alone(rule):
    k = torch.eye(8)[[0, 1, 0, 0]][None, :, None]  # steps 0, 2 and 3 write to one key, step 1 to another
    v, ones = torch.randn(1, 4, 1, 6), torch.ones(1, 4, 1)
    for query, last in ((0, [0, 0, 2, 3]), (1, [None, 1, 1, 1])):
        y = rule(torch.eye(8)[query].expand(1, 4, 1, 8), k, v, 0 * ones, ones)
        wanted = [torch.zeros(6) if step is None else v[0, step, 0] for step in last]
        torch.testing.assert_close(y[0, :, 0], torch.stack(wanted), atol=1e-6, rtol=0)


def test_half_a_beta_moves_the_value_half_of_the_way():
    k, v = torch.eye(8)[[0, 0]][None, :, None], torch.randn(1, 2, 1, 6)
    beta = torch.tensor([1.0, 0.5])[None, :, None]
    y = delta.delta_rule(k, k, v, torch.zeros(1, 2, 1), beta)
    torch.testing.assert_close(y[0, 1, 0], v[0].mean(dim=0)[0], atol=1e-6, rtol=0)


def test_without_erasing_the_delta_rule_is_the_scan():
    q, k, v, log_decay, beta = inputs(70)
    k = torch.eye(70)[None, :, None].expand(2, 70, 1, 70)  # no key is ever recalled
    q = torch.randn(2, 70, 1, 70)
    y = delta.delta_rule(q, k, v, log_decay, beta, 16)
    torch.testing.assert_close(y, scan.naive_scan(q, k, v * beta[..., None], log_decay), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_delta_rule_stays_finite_over_a_long_text_of_like_keys(scale):
    q, k, v, log_decay, beta = (x.detach() for x in inputs(4096))
    k = k[:, :1].expand_as(k) * torch.tensor([1.0, scale]).repeat(2048)[None, :, None, None]
    y = delta.delta_rule(q, k, v, 0 * log_decay, torch.ones_like(beta))
    assert y.isfinite().all() and y[:, -64:].abs().max() < 2 * y[:, :64].abs().max()


def test_delta_rule_stays_finite_where_decays_underflow():
    q, k, v, log_decay, beta = inputs(64)
    log_decay = (log_decay - 80).detach().requires_grad_()
    y = delta.delta_rule(q, k, v, log_decay, beta, 16)
    y.sum().backward()
    assert y.isfinite().all() and log_decay.grad.isfinite().all()


@pytest.mark.parametrize("cut", [15, 16, 17])
def test_delta_rule_gives_no_gradient_to_later_steps(cut):
    tensors = inputs(48)
    delta.delta_rule(*tensors, 16)[:, :cut].sum().backward()
    assert all(x.grad[:, cut:].abs().max() == 0 and x.grad[:, :cut].any() for x in tensors)


@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 8, 13])
def test_states_before_chunks_are_those_of_the_loop(chunks):
    turn, add = torch.randn(2, chunks, 3, 4, 4, dtype=torch.double) / 2, torch.randn(2, chunks, 3, 4, 5).double()
    state, states = torch.zeros(2, 3, 4, 5).double(), []
    for c in range(chunks):
        states.append(state)
        state = turn[:, c] @ state + add[:, c]
    torch.testing.assert_close(delta.states_before(turn, add), torch.stack(states, dim=1))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", [scan.chunked_scan, delta.delta_rule])
def test_a_scan_in_parts_that_hand_on_their_state_is_the_whole_scan(kernel, groups):
    tensors = [x.detach()[:1] for x in inputs(150, groups)]
    whole, state, parts = kernel(*tensors), torch.zeros(8, 4, 6), []
    for begin, end in ((0, 70), (70, 71), (71, 150)):
        y, state = delta.scan_from(state, kernel, *(x[:, begin:end] for x in tensors))
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("T", [1, 63, 200])
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_modal_filter_is_a_convolution_with_its_impulse_response(T, chunk_size):
    u, pole, weight = filters(T)
    agree(
        lambda u, *x: modes.modal_filter(u, x[:2], x[2:], None, chunk_size)[0],
        lambda u, *x: modes.naive_modal_filter(u, x[:2], x[2:]),
        [x.requires_grad_() for x in (u, *pole, *weight)],
    )
    response = modes.impulse_response(pole, weight, T)
    padded = torch.nn.functional.pad(u.mT, (T - 1, 0))
    expected = torch.nn.functional.conv1d(padded, response.flip(1)[:, None], groups=5).mT
    y = modes.modal_filter(u, pole, weight, None, chunk_size)[0]
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cut", [1, 64, 65, 140])
def test_a_filter_in_parts_that_hand_on_their_state_is_the_whole_filter(cut):
    u, pole, weight = filters(150)
    whole, after = modes.modal_filter(u, pole, weight)
    first, state = modes.modal_filter(u[:, :cut], pole, weight)
    second, state = modes.modal_filter(u[:, cut:], pole, weight, state)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state, after, atol=1e-4, rtol=1e-4)


def test_a_held_input_follows_the_differential_equation():
    pole, delta_t, weight = complex(-0.4, 2.0), 0.3, complex(0.7, -0.2)
    pairs = [(torch.tensor([[x.real]]), torch.tensor([[x.imag]])) for x in (pole, weight)]
    log_pole, scaled = modes.held(pairs[0], torch.tensor([delta_t]), pairs[1])
    u, steps = torch.randn(1, 5, 1), 2000
    h, expected = 0j, []
    for value in u.flatten().tolist():  # Euler's method in small steps
        for _ in range(steps):
            h += delta_t / steps * (pole * h + value)
        expected.append(2 * (weight * h).real)
    y = modes.modal_filter(u, log_pole, scaled)[0].flatten()
    torch.testing.assert_close(y, torch.tensor(expected), atol=2e-3, rtol=2e-3)
