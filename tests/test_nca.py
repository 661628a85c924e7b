"""The automaton over tokens sees as far as its steps reach; the one over weights stores a rule, not the weights."""

from types import SimpleNamespace

import pytest
import torch
from test_architectures import CPU, shake, some_tokens, tiny

import train_gpt
from architectures.layers import MLP
from architectures.nca import Config, Model, fire, naive_neighbour_attention, neighbour_attention

WEIGHTS = dict(nca_mode="weights", nca_steps=4)


def reach(model: Model) -> int:
    """How many tokens before the last one move its logits, by the farthest that does."""
    x = some_tokens(1, 64)
    last = model.logits(x)[:, -1]
    moved = []
    for back in range(64):
        y = x.clone()
        y[:, 63 - back] = (y[:, 63 - back] + 7) % 260
        moved.append(bool((model.logits(y)[:, -1] != last).any()))
    return max(back for back in range(64) if moved[back])


@pytest.mark.parametrize("T", [1, 63])
@pytest.mark.parametrize("distance", [1, 4, 100])
@pytest.mark.parametrize("groups", [1, 2])
def test_neighbour_attention_equals_the_loop_over_positions(T, distance, groups):
    g = torch.Generator().manual_seed(T)
    tensors = [torch.randn(2, heads, T, 8, generator=g).requires_grad_() for heads in (4, groups, groups)]

    def naive(q, k, v):
        k, v = (x.repeat_interleave(4 // groups, dim=1) for x in (k, v))
        return naive_neighbour_attention(q, k, v, distance, 3)

    outputs = neighbour_attention(*tensors, distance, 3), naive(*tensors)
    weights = torch.randn(outputs[0].shape, generator=g)
    grads = [torch.autograd.grad((y * weights).sum(), tensors) for y in outputs]
    for fast, slow in zip((outputs[0], *grads[0]), (outputs[1], *grads[1]), strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("steps", "neighbours"), [(1, 3), (3, 3), (6, 3), (4, 5)])
def test_receptive_field_grows_with_the_steps(steps, neighbours):
    settings = dict(num_layers=1, nca_steps=steps, nca_neighbours=neighbours, nca_dilated=False)
    assert reach(shake(tiny("nca", **settings))) == steps * (neighbours - 1)


@pytest.mark.parametrize(("steps", "tokens"), [(1, 2), (2, 2 + 4), (4, 2 + 4 + 8 + 16), (5, 62), (6, 63)])
def test_dilated_steps_double_the_receptive_field_until_it_is_the_context(steps, tokens):
    assert reach(shake(tiny("nca", num_layers=1, nca_steps=steps))) == tokens


@pytest.mark.parametrize("mode", ["state", "weights"])
def test_ten_and_fifty_steps_differ_with_equal_parameters(mode):
    ten, fifty = (shake(tiny("nca", num_layers=1, nca_mode=mode, nca_steps=steps)) for steps in (10, 50))
    weights = zip(ten.parameters(), fifty.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights) and ten.config.num_params() == fifty.config.num_params()
    assert (ten.logits(some_tokens(1, 64)) - fifty.logits(some_tokens(1, 64))).abs().max() > 1e-3


def test_firing_cells_change_as_much_in_the_mean():
    torch.manual_seed(0)
    old, new = torch.randn(4, 3), torch.randn(4, 3)
    states = fire(old.expand(20_000, -1, -1), new.expand(20_000, -1, -1), 0.25)
    torch.testing.assert_close(states.mean(0), new, atol=0.1, rtol=0)
    cells = (states != old).float().mean(0)  # all channels of a cell fire together
    torch.testing.assert_close(cells, torch.full((4, 3), 0.25), atol=0.02, rtol=0)
    assert torch.equal((states != old).any(-1), (states != old).all(-1))


@pytest.mark.parametrize("mode", ["state", "weights"])
@pytest.mark.parametrize(("probability", "random"), [(1.0, False), (0.5, True)])
def test_cells_fire_at_random_in_training_alone(mode, probability, random):
    model, x = shake(tiny("nca", nca_mode=mode, nca_fire=probability)), some_tokens(1, 64)

    def logits() -> torch.Tensor:
        train_gpt.fill_generated(model)
        return model.logits(x)

    scored = logits()
    assert torch.equal(logits(), scored)
    model.train()
    assert torch.equal(logits(), scored) is not random


def test_a_cell_of_the_sheet_reaches_one_cell_further_with_every_step():
    sheet = shake(tiny("nca", nca_mode="weights", model_dim=256, num_layers=1)).sheet
    cells = torch.randn(sheet.noise.shape, generator=torch.Generator().manual_seed(0))
    other = cells.clone()
    other[0, 8, 8] += 1.0
    for steps in (1, 2, 3):
        cells, other = sheet.step(cells), sheet.step(other)
        moved = (cells != other).any(-1)[0].nonzero()  # (row, column) of each cell that differs
        assert (moved - 8).abs().sum(1).max() == steps


def test_sheet_makes_unlike_matrices_of_full_rank():
    made = tiny("nca", nca_mode="weights", model_dim=128).materialize()
    up = [made[f"blocks.{i}.mlp.up.weight"] for i in range(2)]
    assert torch.linalg.matrix_rank(up[0]) == 128
    assert abs(torch.cosine_similarity(up[0].flatten(), up[1].flatten(), dim=0)) < 0.3
    plain = MLP(Config(model_dim=128)).up.weight
    assert 0.9 < up[0].std() / plain.std() < 1.1


def test_what_is_stored_of_the_sheet_does_not_depend_on_the_width():
    def rule(**settings) -> int:
        model = tiny("nca", **WEIGHTS, **settings)
        assert sum(p.numel() for p in model.parameters()) == model.config.num_params()
        return sum(p.numel() for p in model.sheet.parameters()) + sum(p.numel() for p in model.scale.parameters())

    assert rule(model_dim=32) == rule(model_dim=128, mlp_mult=4) < 60_000


def test_artifact_of_the_automaton_over_weights_is_small_and_makes_the_same_weights():
    model = tiny("nca", **WEIGHTS, model_dim=128)
    shake(model)
    blob = train_gpt.pack_artifact(model, "nca", None, train_gpt.ScorePlan(64, 64), 1.0, 8)
    assert len(blob) < 110_000 < model.config.num_generated() / 4
    stored = [train_gpt.load_artifact(blob, CPU.device)[0].materialize() for _ in range(2)]
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])
    assert sum(w.numel() for w in stored[0].values()) == model.config.num_generated()


def test_automaton_over_weights_never_looks_at_later_tokens_and_trains_all_that_it_stores():
    model, x = shake(tiny("nca", **WEIGHTS)), some_tokens(2, 64)
    y = x.clone()
    y[:, 32:] = (y[:, 32:] + 7) % 260
    torch.testing.assert_close(model.logits(x)[:, :32], model.logits(y)[:, :32], atol=1e-5, rtol=0)
    model = tiny("nca", **WEIGHTS)
    trainer = train_gpt.Trainer(model, train_gpt.RunConfig(), CPU, micro_batches=2)
    for step in range(2):  # writers begin at a gain of 0, then the rule's last matrix is still 0
        trainer.train_step(some_tokens(4, 65), step, 1.0, lambda: [0.0, 0.0, 0.0])
    trainer.backward(some_tokens(4, 65))
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nca_mode": "token"}, "NCA_MODE=token"),
        ({"nca_steps": 3, "num_layers": 4}, "NCA_STEPS=3"),
        ({"nca_neighbours": 1}, "NCA_NEIGHBOURS=1"),
        ({"nca_fire": 0.0}, "NCA_FIRE=0.0"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny("nca", **settings)


def test_counting_the_weights_that_it_makes_draws_nothing_from_the_run():
    model, lines = tiny("nca", nca_mode="weights", nca_fire=0.5).train(), []
    loader = SimpleNamespace(seed=1, files=[], num_windows=0, rows=0)
    before = torch.get_rng_state()
    train_gpt.announce(lines.append, model, CPU, loader, "")
    assert torch.equal(torch.get_rng_state(), before)
    assert f"generated_weights:{sum(weight.numel() for weight in model.materialize().values())}" in lines
