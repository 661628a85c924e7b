"""The chunked scans equal their definitions, at lengths and chunks that do not fit."""

import pytest
import torch

from architectures.kernels import scan


def inputs(T: int, G: int = 1, H: int = 4, N: int = 8, P: int = 6) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, T, *shape, generator=g) for shape in ((G, N), (G, N), (H, P)))
    log_decay = -torch.rand(2, T, H, generator=g) * torch.logspace(-3, 0.5, H)
    delta, skip = torch.rand(2, T, H, generator=g), torch.randn(H, generator=g)
    return [x.requires_grad_() for x in (q / N**0.5, k, v, log_decay, delta, skip)]


def agree(fast, slow, tensors: list[torch.Tensor]) -> None:
    """Outputs and gradients of fast in fp32 are those of slow in fp64, to 1e-5 of the largest."""
    exact = [x.detach().double().requires_grad_() for x in tensors]
    outputs = fast(*tensors), slow(*exact)
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(0))
    grads = [torch.autograd.grad((y * weights).sum(), x) for y, x in zip(outputs, (tensors, exact), strict=True)]
    for got, wanted in zip((outputs[0], *grads[0]), (outputs[1], *grads[1]), strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("T", [1, 63, 200])
@pytest.mark.parametrize("chunk_size", [1, 7, 64, None])
def test_chunked_scan_equals_the_sequential_loop(T, chunk_size):
    agree(lambda *x: scan.chunked_scan(*x, chunk_size=chunk_size or T), scan.naive_scan, inputs(T))


@pytest.mark.parametrize("G", [2, 4])
def test_chunked_scan_serves_any_number_of_key_groups(G):
    agree(lambda *x: scan.chunked_scan(*x, chunk_size=16), scan.naive_scan, inputs(70, G))


def test_without_scales_and_skip_values_are_written_as_they_are():
    q, k, v, log_decay, delta, skip = inputs(70)
    plain = scan.chunked_scan(q, k, v, log_decay)
    neutral = scan.chunked_scan(q, k, v, log_decay, torch.ones_like(delta), torch.zeros_like(skip))
    assert torch.equal(plain, neutral)


@pytest.mark.parametrize("T", [1, 63, 200])
@pytest.mark.parametrize("chunk_size", [1, 7, 64, None])
def test_diagonal_scan_equals_the_sequential_loop(T, chunk_size):
    g = torch.Generator().manual_seed(T)
    tensors = [torch.randn(2, T, 8, generator=g).requires_grad_(), (-torch.logspace(-3, 0.5, 8)).requires_grad_()]
    agree(lambda *x: scan.diagonal_scan(*x, chunk_size or T), scan.naive_diagonal_scan, tensors)


def test_scans_stay_finite_where_decays_underflow():
    q, k, v, log_decay, *_ = inputs(64)
    log_decay = (log_decay - 80).detach().requires_grad_()
    y = scan.chunked_scan(q, k, v, log_decay, chunk_size=16)
    y.sum().backward()
    assert y.isfinite().all() and log_decay.grad.isfinite().all()
    assert scan.diagonal_scan(v[:, :, 0], torch.full((6,), -80.0), 16).isfinite().all()


@pytest.mark.parametrize("cut", [15, 16, 17])
def test_chunked_scan_gives_no_gradient_to_later_steps(cut):
    tensors = inputs(48)
    scan.chunked_scan(*tensors, chunk_size=16)[:, :cut].sum().backward()
    assert all(x.grad[:, cut:].abs().max() == 0 and x.grad[:, :cut].any() for x in tensors[:-1])
