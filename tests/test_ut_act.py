"""Universal transformer: steps that share blocks, and tokens that halt."""

import pytest
import torch
from test_architectures import CPU, some_tokens, tiny
from torch import Tensor

import train_gpt
from architectures.layers import LanguageModel, rms_norm
from architectures.ut_act import Config


def halting(num_layers: int = 6, bias: float | None = None, **settings) -> LanguageModel:
    """A model, far from its beginning, whose tokens halt at very different steps."""
    model = tiny("ut_act", num_layers=num_layers, **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        if model.config.ut_act:
            model.halt.normal_(std=4.0)
            model.halt_bias.fill_(model.halt_bias.item() if bias is None else bias)
    return model.eval().requires_grad_(False)


def naive_act(model: LanguageModel, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out, N, R) of one row x (T, D), token by token as in the equation."""
    T, D = x.shape
    L, eps = model.config.num_layers, model.config.ut_halt_eps
    state, x0, out = x, x, torch.zeros_like(x)
    spent, N, R = [0.0] * T, [0] * T, [0.0] * T
    for n in range(1, L + 1):
        new = model.step(n - 1, state[None], x0[None])[0]
        state = torch.stack([state[t] if N[t] else new[t] for t in range(T)])
        for t in range(T):
            if N[t]:
                continue
            h = torch.sigmoid(rms_norm(new[t]) @ model.halt / D**0.5 + model.halt_bias).item()
            h = h if n >= model.config.ut_min_steps else 0.0
            if spent[t] + h >= 1 - eps or n == L:
                h, N[t], R[t] = 1 - spent[t], n, 1 - spent[t]
            out[t] += h * new[t]
            spent[t] += h
    return out, torch.tensor(N), torch.tensor(R)


@pytest.mark.parametrize(("blocks", "min_steps"), [(1, 1), (3, 1), (3, 3)])
def test_halting_is_its_equation(blocks, min_steps):
    model, x = halting(ut_blocks=blocks, ut_min_steps=min_steps), rms_norm(torch.randn(2, 24, 32))
    for train in (True, False):
        out, taken, remainder = model.train(train).adaptive(x)
        for row in range(2):
            expected, N, R = naive_act(model, x[row])
            torch.testing.assert_close(out[row], expected, atol=1e-4, rtol=1e-4)
            assert taken[row, :, 0].tolist() == N.tolist() and len(set(N.tolist())) >= 3
            assert N.min() >= min_steps
            torch.testing.assert_close(remainder[row, :, 0], R.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 12, 20])
def test_halting_probabilities_sum_to_one(steps):
    model, x = halting(steps, ut_min_steps=1), rms_norm(torch.randn(4, 32, 32))
    with torch.no_grad():
        model.step_scale.zero_()  # states that stay what they are: their mean is the sum of the probabilities
    out, taken, _ = model.adaptive(x)
    torch.testing.assert_close(out, x, atol=1e-6, rtol=1e-6)
    assert taken.unique().numel() >= min(3, steps)  # tokens halt at different steps, or it would prove little


def test_a_token_may_halt_however_few_steps_there_are():
    for steps in (2, 3):
        model = tiny("ut_act", num_layers=steps, ut_min_steps=5)
        model.adaptive(rms_norm(torch.randn(1, 16, 32)))[1:][1].sum().backward()
        assert model.halt_bias.grad


def test_about_half_of_the_steps_left_are_taken_at_first():
    for steps, least in ((4, 1), (12, 3), (24, 3)):
        model = tiny("ut_act", num_layers=steps, ut_min_steps=least)
        _, taken, _ = model.adaptive(rms_norm(torch.randn(1, 16, 32)))
        left = steps - least + 1
        assert least - 1 + left / 2 <= taken.mean() <= least + left / 2


def test_the_cost_of_steps_is_in_the_training_loss_and_nowhere_else():
    model, x, y = halting(ut_ponder=0.3), some_tokens(2, 32), some_tokens(2, 33)[:, 1:]
    nats = model.nats(x, y).mean()
    assert model(x, y) == pytest.approx(nats.item(), abs=1e-6)
    _, taken, remainder = model.adaptive(rms_norm(model.embed(x)))
    cost = 0.3 * (taken + remainder).mean().item() / 6
    assert model.train()(x, y).item() == pytest.approx(nats.item() + cost, abs=1e-5) and cost > 0.05
    assert model.gauges.tolist() == pytest.approx([nats.item(), taken.mean().item()], abs=1e-5)
    assert model.nats(x, y).mean() == pytest.approx(nats.item(), abs=1e-6)
    assert halting(ut_act=False).train()(x, y) == pytest.approx(halting(ut_act=False).nats(x, y).mean(), abs=1e-6)


def test_steps_differ_between_tokens_and_fall_with_their_weight(text):
    tokens, means = torch.tensor(list(text[:100_000])) + 4, {}
    for weight in (0.01, 1.0):
        model, rng = tiny("ut_act", ut_ponder=weight, num_layers=8, ut_min_steps=1), torch.Generator().manual_seed(0)
        trainer = train_gpt.Trainer(model, train_gpt.RunConfig(muon_momentum_warmup_steps=0), CPU, micro_batches=1)
        for step in range(40):
            batch = tokens[torch.randint(len(tokens) - 65, (4, 1), generator=rng) + torch.arange(65)]
            trainer.train_step(batch, step, 1.0, lambda: [0.0, 0.0, 0.0])
        with torch.no_grad():
            _, taken, _ = model.eval().adaptive(rms_norm(model.embed(tokens[:1024].view(16, 64))))
        means[weight] = taken.mean().item(), taken.std().item()
    assert means[0.01][0] > means[1.0][0] + 0.5 and means[0.01][1] > 0.1, means


def test_ending_when_all_have_halted_changes_nothing():
    model, x, calls = halting(12, bias=1.0), some_tokens(2, 32), []
    with torch.no_grad():
        model.halt.mul_(0.2)
    for block in model.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    early, early_calls = model.logits(x), len(calls)
    full = model.train().logits(x)
    assert torch.equal(early, full) and early_calls < len(calls) - early_calls == 12


@pytest.mark.parametrize("bias", [-2.0, 1.0])
def test_tokens_that_halt_at_other_steps_change_no_earlier_logits(bias):
    model, x = halting(bias=bias), some_tokens(1, 32)
    y = x.clone()
    y[:, 20:] = (y[:, 20:] + 7) % 260
    taken = [model.adaptive(rms_norm(model.embed(ids)))[1] for ids in (x, y)]
    assert not torch.equal(taken[0][:, 20:], taken[1][:, 20:])
    torch.testing.assert_close(model.logits(x)[:, :20], model.logits(y)[:, :20], atol=1e-5, rtol=0)


def test_without_halting_blocks_take_turns_over_all_steps():
    model, x = halting(ut_act=False, ut_blocks=2, num_layers=5), rms_norm(torch.randn(1, 16, 32))
    state = x
    for n, block in enumerate([model.blocks[0], model.blocks[1]] * 2 + [model.blocks[0]]):
        moved = block(state + model.step_embed[n], x)
        state = state + model.step_scale[n] * (moved - state)
    torch.testing.assert_close(model.backbone(x), state, atol=1e-5, rtol=1e-5)


def test_further_steps_cost_embeddings_and_scales_alone():
    for settings in ({}, {"ut_act": False}, {"ut_step_embed": False}, {"ut_step_scales": False}):
        few, many = (Config(num_layers=n, **settings).num_params() for n in (6, 24))
        tables = 2 - (len(settings) and "ut_act" not in settings)
        assert many - few == tables * 18 * 512


@pytest.mark.parametrize(
    "settings",
    [
        {"ut_blocks": 0},
        {"ut_min_steps": 0},
        {"ut_ponder": -0.1},
        {"ut_halt_eps": 0.0},
        {"ut_halt_eps": 1.0},
        {"num_layers": 0},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name.upper()}={value} must be"):
        Config(**settings)
