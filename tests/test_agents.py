"""What the speaker knows reaches the listener through its messages alone, and these are narrow."""

import pytest
import torch
from test_architectures import shake, some_tokens, tiny

from architectures.agents import Config, Model, local_attention, naive_local_attention

TINY = dict(agent_msg_dim=4, agent_window=5, agent_layers=2)
REACH = 1 + 2 * (5 - 1)  # tokens that the listener sees by itself


def without_messages(model: Model) -> Model:
    model.messages.hear.weight.zero_()
    return model


@pytest.mark.parametrize("T", [1, 63, 80])
@pytest.mark.parametrize("window", [1, 5, 16])
@pytest.mark.parametrize("groups", [1, 4])
def test_local_attention_equals_the_loop_over_positions(T, window, groups):
    g = torch.Generator().manual_seed(T)
    tensors = [torch.randn(2, heads, T, 8, generator=g).requires_grad_() for heads in (4, groups, groups)]

    def naive(q, k, v):
        return naive_local_attention(q, *(x.repeat_interleave(4 // groups, dim=1) for x in (k, v)), window)

    outputs = local_attention(*tensors, window), naive(*tensors)
    weights = torch.randn(outputs[0].shape, generator=g)
    grads = [torch.autograd.grad((y * weights).sum(), tensors) for y in outputs]
    for fast, slow in zip((outputs[0], *grads[0]), (outputs[1], *grads[1]), strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)


def test_speaker_moves_the_logits_in_no_more_directions_than_a_message_has():
    model, states = shake(tiny("agents", **TINY)), []
    hook = model.blocks[-1].register_forward_hook(lambda _, __, x: states.append(x.requires_grad_()) or x)
    logits = model.logits(some_tokens(1, 1))[0, 0]  # one position: one message
    hook.remove()
    rows = [torch.autograd.grad(logit, states[0], retain_graph=True)[0].flatten() for logit in logits]
    singular = torch.linalg.svdvals(torch.stack(rows).double())
    rank = int((singular > 1e-5 * singular[0]).sum())
    assert rank == 4 - 1  # the norm of a message says nothing


def test_what_is_heard_over_all_positions_has_the_rank_of_a_message():
    model, heard = shake(tiny("agents", **TINY)), []
    hook = model.messages.register_forward_hook(lambda _, __, x: heard.append(x))
    model.logits(some_tokens(4, 64))
    hook.remove()
    assert heard[0].shape == (4, 64, 32) and torch.linalg.matrix_rank(heard[0].flatten(0, 1).double(), rtol=1e-5) == 4


@pytest.mark.parametrize(("back", "matters"), [(REACH - 1, True), (REACH, False), (20, False), (63, False)])
def test_only_the_local_window_matters_without_messages(back, matters):
    model, x = without_messages(shake(tiny("agents", **TINY))), some_tokens(1, 64)
    y = x.clone()
    y[:, 63 - back] = (y[:, 63 - back] + 7) % 260
    assert bool((model.logits(x)[:, -1] != model.logits(y)[:, -1]).any()) is matters


@pytest.mark.parametrize("back", [20, 63])
def test_messages_carry_what_is_out_of_sight(back):
    model, x = shake(tiny("agents", **TINY)), some_tokens(1, 64)
    y = x.clone()
    y[:, 63 - back] = (y[:, 63 - back] + 7) % 260
    assert (model.logits(x)[:, -1] - model.logits(y)[:, -1]).abs().max() > 1e-3


def test_messages_in_levels_take_these_values_and_still_train():
    model, x = shake(tiny("agents", **TINY, agent_levels=3)), torch.randn(2, 64, 32)
    said = model.messages.message(x)
    torch.testing.assert_close(said.unique(), torch.tensor([-1.0, 0.0, 1.0]))
    model.messages.requires_grad_().message(x)[..., 0].sum().backward()
    assert model.messages.say.weight.grad.abs().max() > 0


def test_default_size_is_stored_in_less_than_sixteen_megabytes():
    assert Config().num_params() < 15_500_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"agent_layers": 0}, "AGENT_LAYERS=0"),
        ({"agent_window": 0}, "AGENT_WINDOW=0"),
        ({"agent_levels": 1}, "LEVELS=1"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny("agents", **settings)
