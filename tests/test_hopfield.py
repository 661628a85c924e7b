"""Hopfield layers go down the energy that they declare, and nothing comes back through the keys."""

import pytest
import torch
from test_architectures import shake, some_tokens, tiny

from architectures.hopfield import Energy
from architectures.layers import rms_norm


def an_energy(**settings) -> Energy:
    return shake(tiny("hopfield", **settings)).blocks[0].energy


def states(T: int = 40) -> torch.Tensor:
    return torch.randn(2, T, 32, generator=torch.Generator().manual_seed(T))


def naive_energy(energy: Energy, g: torch.Tensor, scene: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The definition, one position after another: E_t for g (B, T, D), as (B, T)."""
    q, context = scene
    H, K, D = q.size(1), q.size(-1), g.size(-1)
    k, v = (x.repeat_interleave(H // context.size(1), dim=1) for x in context.split(K, dim=-1))
    b, values = energy.beta / K**0.5, []
    for t in range(g.size(1)):
        probe = torch.einsum("hkd,bd->bhk", energy.probe.weight.view(H, K, D), g[:, t])
        exponents = torch.einsum("bhk,bhsk->bhs", q[:, :, t], k[:, :, : t + 1]) / K**0.5
        exponents = exponents + b * torch.einsum("bhk,bhsk->bhs", probe, v[:, :, : t + 1])
        answers = (g[:, t] @ energy.memory.weight.T).clamp(min=0) ** energy.degree / energy.degree
        values.append(-exponents.exp().sum(-1).log().sum(-1) / b - answers @ energy.strength)
    return torch.stack(values, dim=1)


@pytest.mark.parametrize("T", [1, 63])
@pytest.mark.parametrize("settings", [{}, {"hop_degree": 2}, {"hop_beta": 2.0}, {"num_kv_heads": 4}], ids=str)
def test_update_is_the_gradient_of_the_declared_energy(T, settings):
    energy, g = an_energy(**settings), states(T).requires_grad_()
    scene = energy.scene(states(T))
    declared, defined = energy(g, scene), naive_energy(energy, g, scene)
    torch.testing.assert_close(declared, defined, atol=1e-4, rtol=1e-5)
    (slope,) = torch.autograd.grad(defined.sum(), g, create_graph=True)
    torch.testing.assert_close(energy.descent(g, scene), -slope, atol=1e-5, rtol=1e-4)


def test_update_trains_like_the_gradient_of_the_declared_energy():
    energy = an_energy().requires_grad_()
    weights = states().flip(0)

    def grads(descent) -> list[torch.Tensor]:
        x = states().requires_grad_()
        loss = (descent(rms_norm(x), energy.scene(rms_norm(x))) * weights).sum()
        return torch.autograd.grad(loss, [x, *energy.parameters()])

    def by_autograd(g: torch.Tensor, scene: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        # Only g is the energy's own variable; the scene, though made from the same x, is held.
        g_own = g.detach().requires_grad_()
        (slope,) = torch.autograd.grad(
            naive_energy(energy, g_own + (g - g.detach()), scene).sum(), g_own, create_graph=True
        )
        return -slope

    for fast, slow in zip(grads(energy.descent), grads(by_autograd), strict=True):
        assert (fast - slow).abs().max() <= 1e-4 * slow.abs().max()


@pytest.mark.parametrize("hop_degree", [2, 3])
def test_energy_falls_with_every_small_step(hop_degree):
    energy, x = an_energy(hop_degree=hop_degree), states()
    scene, levels = energy.scene(rms_norm(x)), []
    for _ in range(20):
        levels.append(energy(rms_norm(x), scene))
        x = x + 0.01 * energy.descent(rms_norm(x), scene)
    falls = torch.stack(levels).diff(dim=0)
    assert falls.max() < 1e-4 and (levels[-1] < levels[0] - 0.01).all()


def test_full_energy_of_the_paper_would_leak_the_future():
    """The sum over pairs moves early positions when late ones change: what the energy per query must not do."""
    energy = an_energy()
    x, other = states(), states()
    other[:, 30:] += 1.0

    def update(x: torch.Tensor, whole: bool) -> torch.Tensor:
        g = rms_norm(x).requires_grad_()
        scene = energy.scene(g)
        if not whole:
            return energy.descent(g, scene)[:, :30]
        return torch.autograd.grad(energy(g, scene).sum(), g)[0][:, :30]

    assert (update(x, True) - update(other, True)).abs().max() > 1e-3
    assert torch.equal(update(x, False), update(other, False))


def test_steps_cost_no_parameters_and_change_the_score():
    x = some_tokens(2, 64)
    one, three = shake(tiny("hopfield", hop_steps=1)), shake(tiny("hopfield", hop_steps=3))
    assert one.config.num_params() == three.config.num_params()
    assert (one.logits(x) - three.logits(x)).abs().max() > 1e-3


def test_content_decides_what_is_found_as_beta_grows():
    def moved(hop_beta: float) -> float:
        energy = an_energy(hop_beta=hop_beta)
        g, scene = states(), energy.scene(states())
        with torch.no_grad():
            energy.strength.zero_()
        return (energy.descent(g, scene) - energy.descent(g + 0.5 * states().flip(0), scene)).abs().max().item()

    assert moved(1e-4) < 1e-2 < moved(1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"hop_steps": 0}, "HOP_STEPS=0"), ({"hop_degree": 1}, "HOP_DEGREE=1"), ({"hop_beta": 0.0}, "HOP_BETA=0.0")],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny("hopfield", **settings)
