"""Pause tokens: where they stand, what is read, and that nothing but real tokens is scored."""

import itertools

import numpy as np
import pytest
import torch
from test_architectures import CPU, shake, some_tokens, tiny

import train_gpt
from architectures.layers import LanguageModel, Rotary, rms_norm
from architectures.pause_tokens import Config, PausedRotary

SHORT = dict(num_pause=3, pause_interval=8)
SETTINGS = [
    dict(SHORT, pause_read=read, pause_pos=pos)
    for read, pos in itertools.product(("last", "real"), ("real", "inflated"))
]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s['pause_read']}-{s['pause_pos']}")


def paused(**settings) -> LanguageModel:
    return shake(tiny("pause_tokens", **settings))


def places(T: int, interval: int, num_pause: int) -> list[tuple[int, int | None]]:
    """(index of the token last seen, pause number or None) of every place, by walking along the window."""
    found = []
    for t in range(T):
        found.append((t, None))
        if (t + 1) % interval == 0:
            found += [(t, i) for i in range(num_pause)]
    return found


@pytest.mark.parametrize("T", [8, 9, 15, 16, 63, 64])
def test_a_pause_follows_every_so_many_tokens(T):
    model, x = paused(**SHORT), torch.randn(2, T, 32)
    pauses = rms_norm(model.pause.weight)
    rows = [x[:, t] if i is None else pauses[i].expand(2, -1) for t, i in places(T, 8, 3)]
    assert torch.equal(model.insert(x), torch.stack(rows, dim=1)) and len(rows) == model.config.paused_len(T)


@pytest.mark.parametrize("read", ["last", "real"])
@pytest.mark.parametrize("T", [8, 9, 63, 64])
def test_each_token_is_read_once_from_its_place(T, read):
    model, found = paused(**SHORT, pause_read=read), places(T, 8, 3)
    numbers = torch.arange(len(found)).view(1, -1, 1)
    last = {t: place for place, (t, _) in enumerate(found)}
    own = {t: place for place, (t, i) in enumerate(found) if i is None}
    expected = last if read == "last" else own
    assert model.strip(numbers, T).flatten().tolist() == [expected[t] for t in range(T)]


@pytest.mark.parametrize("pos", ["real", "inflated"])
def test_pauses_stand_where_the_token_before_them_does_or_count_as_positions(pos):
    config = Config(train_seq_len=20, num_pause=3, pause_interval=8, model_dim=32, num_heads=4, pause_pos=pos)
    found, plain = places(20, 8, 3), Rotary(8, 10_000.0, 64)
    index = [t if pos == "real" else place for place, (t, _) in enumerate(found)]
    rotary = PausedRotary(config)
    assert torch.equal(rotary.cos, plain.cos[index]) and torch.equal(rotary.sin, plain.sin[index])


@pytest.mark.parametrize(("read", "same"), [("last", 7), ("real", 8)])
def test_tokens_before_the_first_pause_are_predicted_as_by_gpt(read, same):
    gpt, x = shake(tiny("gpt")), some_tokens(2, 64)
    model = paused(**SHORT, pause_read=read)
    assert model.load_state_dict(gpt.state_dict(), strict=False).missing_keys == ["pause.weight"]
    off = (model.logits(x) - gpt.logits(x)).abs().amax(dim=(0, 2))
    assert off[:same].max() < 1e-5 and off[same] > 1e-3


@every_setting
@pytest.mark.parametrize("cut", [1, 7, 8, 9, 16, 43])
def test_logits_with_many_pauses_ignore_later_tokens(settings, cut):
    model, x = paused(**settings), some_tokens(2, 45)
    y = x.clone()
    y[:, cut:] = (y[:, cut:] + 7) % 260
    before, after = model.logits(x), model.logits(y)
    torch.testing.assert_close(before[:, :cut], after[:, :cut], atol=1e-5, rtol=0)
    assert not torch.equal(before[:, cut:], after[:, cut:])


@every_setting
def test_a_shorter_window_is_the_beginning_of_a_longer_one(settings):
    model, x = paused(**settings), some_tokens(1, 64)
    whole = model.logits(x)
    for T in (1, 7, 9, 40):
        torch.testing.assert_close(model.logits(x[:, :T]), whole[:, :T], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.logits(x, T), whole[:, T:], atol=1e-5, rtol=1e-5)
    # With READ=last a window that ends with a group ends with its pause, which is why 8 is no exception.
    torch.testing.assert_close(model.logits(x[:, :8]), whole[:, :8], atol=1e-5, rtol=1e-5)


@every_setting
def test_windows_longer_than_in_training_have_the_same_positions(settings):
    short, long = tiny("pause_tokens", **settings), paused(**settings, train_seq_len=128)
    short.load_state_dict(long.state_dict())
    x = some_tokens(1, 128)
    torch.testing.assert_close(short.eval().logits(x), long.logits(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stride", [48, 16])
def test_every_target_and_no_pause_is_scored(stride):
    model, tokens = paused(**SHORT), some_tokens(200).numpy()
    plan = train_gpt.ScorePlan(48, stride)
    nats = train_gpt.score_stream(model, tokens, plan, CPU)
    assert nats.shape == (199,)
    expected = np.full(199, np.nan)
    for begin, first in plan.windows(199):
        window = torch.from_numpy(tokens[begin : begin + 48])[None]  # the pattern begins anew in each
        log_p = model.logits(window)[0].log_softmax(-1)
        for t in range(first, min(48, 199 - begin)):
            expected[begin + t] = -log_p[t, tokens[begin + t + 1]]
    np.testing.assert_allclose(nats, expected, atol=1e-4)


def test_every_pause_vector_is_its_own():
    model, x = paused(**SHORT), some_tokens(2, 64)
    model.pause.weight.requires_grad_()
    model(x, x).backward()
    assert (model.pause.weight.grad.abs().amax(dim=1) > 0).all()
    before = model.logits(x)
    with torch.no_grad():
        model.pause.weight.copy_(model.pause.weight[[1, 0, 2]])
    assert (model.logits(x) - before).abs().max() > 1e-3


def test_the_published_settings_lengthen_a_window_as_published():
    assert Config().paused_len(1024) == 1088
    assert Config(num_pause=8, pause_interval=32).paused_len(1024) == 1280


@pytest.mark.parametrize(
    "settings", [{"num_pause": -1}, {"pause_interval": 0}, {"pause_read": "first"}, {"pause_pos": "none"}]
)
def test_settings_out_of_range_are_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name.upper()}={value} must be"):
        Config(**settings)
