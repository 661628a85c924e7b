"""Products of matrices along the sequence: the tree equals the loop, order matters, nothing overflows; and trains."""

import pytest
import torch
from test_architectures import shake, some_tokens, tiny

from architectures.kernels.matrix_scan import matrix_scan, naive_matrix_scan
from architectures.tensor_mps import MatrixProduct, TensorTrain, naive_tensor_train, two_factors


def matrices(T: int, X: int = 8, spread: float = 0.5) -> torch.Tensor:
    g = torch.Generator().manual_seed(T)
    return torch.eye(X).double() + spread * torch.randn(2, T, X, X, generator=g).double()


@pytest.mark.parametrize("T", [1, 2, 3, 37, 64, 65, 130])
def test_the_tree_over_time_equals_the_loop_forward_and_gradient(T):
    start, results = torch.randn(8, generator=torch.Generator().manual_seed(0)).double(), []
    weights = torch.randn(2, T, 8, generator=torch.Generator().manual_seed(1)).double()
    for scan in (matrix_scan, naive_matrix_scan):
        steps, begin = matrices(T).requires_grad_(), start.clone().requires_grad_()
        out = scan(steps, begin)
        results.append([out, *torch.autograd.grad((out * weights).sum(), [steps, begin])])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)


def test_steps_do_not_commute():
    steps = matrices(4)
    swapped = steps[:, [1, 0, 2, 3]]
    ends = [matrix_scan(x, torch.ones(8).double())[:, -1] for x in (steps, swapped)]
    assert (ends[0] - ends[1]).abs().max() > 0.1


@pytest.mark.parametrize("spread", [0.01, 10.0])
def test_a_long_product_neither_overflows_nor_vanishes(spread):
    steps = matrices(4096, X=4, spread=spread).float().requires_grad_()
    out = matrix_scan(steps, torch.ones(4))
    out.square().sum().backward()
    assert out.isfinite().all() and steps.grad.isfinite().all()
    torch.testing.assert_close(out.square().mean(-1), torch.ones(2, 4096), atol=1e-3, rtol=0)


def test_the_state_is_a_bottleneck_of_the_bond_s_size():
    mixer = next(m for m in shake(tiny("tensor_mps", mps_bond=2)).modules() if isinstance(m, MatrixProduct))
    seen = []
    mixer.read.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mixer(torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(0)))
    assert seen[0].shape == (3, 50, 2)


def test_exchanging_two_tokens_of_the_past_changes_the_prediction():
    model, x = shake(tiny("tensor_mps", mps_attn_every=None)), some_tokens(1, 64)
    y = x.clone()
    y[:, [3, 9]] = y[:, [9, 3]]
    assert x[0, 3] != x[0, 9] and (model.logits(x)[:, -1] - model.logits(y)[:, -1]).abs().max() > 1e-6


@pytest.mark.parametrize(("rows", "columns", "rank"), [(64, 32, 3), (12, 35, 2), (7, 16, 4)])
def test_a_tensor_train_is_a_sum_of_kronecker_products_of_its_rank(rows, columns, rank):
    torch.manual_seed(0)
    train, x = TensorTrain(columns, rows, rank).double(), torch.randn(5, columns).double()
    torch.testing.assert_close(train(x), naive_tensor_train(train, x))
    (o1, o2), (i1, i2) = two_factors(rows), two_factors(columns)
    pairs = sum(torch.kron(f.view(o1, i1), s.view(o2, i2)) for f, s in zip(train.first, train.second, strict=True))
    torch.testing.assert_close(train.matrix(torch.float64), pairs)
    # Entries by pairs of factors are a matrix whose rank is the train's: fewer numbers than rows x columns.
    by_pairs = train.matrix(torch.float64).view(o1, o2, i1, i2).transpose(1, 2).reshape(o1 * i1, o2 * i2)
    assert torch.linalg.matrix_rank(by_pairs) == min(rank, o1 * i1, o2 * i2)


def test_tensor_trains_begin_as_large_as_plain_matrices():
    torch.manual_seed(0)
    train = TensorTrain(256, 512, 16)
    assert train.matrix(torch.float32).std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.2)
