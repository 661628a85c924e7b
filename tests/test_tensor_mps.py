"""Products of matrices along the sequence: the tree equals the loop, order matters, nothing overflows; and trains."""

import numpy as np
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


def mixer_of(**settings) -> MatrixProduct:
    return next(m for m in shake(tiny("tensor_mps", **settings)).modules() if isinstance(m, MatrixProduct))


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(0))


def states(mixer: MatrixProduct, u: torch.Tensor) -> torch.Tensor:
    """h of every position of u."""
    seen = []
    with mixer.read.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        mixer(u)
    return seen[0]


def test_the_state_is_a_bottleneck_of_the_bond_s_size():
    assert states(mixer_of(mps_bond=2), inputs(3, 50)).shape == (3, 50, 2)


def test_a_token_s_matrix_is_the_identity_plus_its_site_s_sum_of_cores_at_a_rate_per_row():
    mixer, u = mixer_of(mps_bond=3, mps_phys=5), inputs(2, 4)
    made = mixer.matrices(u)
    assert made.shape == (2, 4, 3, 3)
    for b, t in np.ndindex(2, 4):
        p = mixer.physical.weight @ u[b, t]
        p = p / p.square().mean().sqrt()
        moves = sum(p[d] * mixer.core[d].view(3, 3) for d in range(5))
        torch.testing.assert_close(made[b, t], torch.eye(3) + torch.diag(mixer.rate) @ moves)


@pytest.mark.parametrize(("bond", "matters"), [(1, False), (2, True), (8, True)])
def test_the_order_of_two_tokens_stays_in_the_state_unless_the_bond_is_1(bond, matters):
    mixer, u = mixer_of(mps_bond=bond), inputs(2, 12)
    ends = [states(mixer, x)[:, -1] for x in (u, u[:, [0, 5, 2, 3, 4, 1, *range(6, 12)]])]
    moved = (ends[0] - ends[1]).abs().amax(dim=-1)
    assert (moved > 0.01).all() if matters else (moved < 1e-5).all()


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
