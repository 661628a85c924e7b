"""Multi-head latent attention: one latent for keys and values, and position in its own part of a head."""

import pytest
import torch
from test_architectures import SHAPE
from torch import Tensor

from architectures import mla
from architectures.layers import CausalSelfAttention, ModelConfig

every_rope = pytest.mark.parametrize("rope", ["decoupled", "post"])


def attention(**settings) -> mla.LatentAttention:
    torch.manual_seed(0)
    mixer = mla.LatentAttention(mla.Config(**SHAPE | settings)).requires_grad_(False)
    torch.nn.init.normal_(mixer.out.weight, std=0.2)
    return mixer


def inputs_of(mixer: mla.LatentAttention, x: Tensor, monkeypatch) -> tuple[Tensor, Tensor, Tensor]:
    """The queries, keys and values with which the mixer attends."""
    seen = []
    with monkeypatch.context() as patch:
        real = mla.causal_attention
        patch.setattr(mla, "causal_attention", lambda *qkv: seen.append(qkv) or real(*qkv))
        mixer(x)
    return seen[0]


def turned(x: Tensor, base: float) -> Tensor:
    """RoPE of x (T, K) by complex numbers."""
    T, K = x.shape
    z = torch.complex(x[:, : K // 2], x[:, K // 2 :])
    angle = torch.arange(T)[:, None] * base ** -(torch.arange(K // 2) * 2 / K)
    z = z * torch.polar(torch.ones_like(angle), -angle)
    return torch.cat((z.real, z.imag), dim=1)


@every_rope
@pytest.mark.parametrize("T", [1, 63])
def test_attention_is_its_equation(rope, T):
    mixer, x = attention(mla_latent=12, mla_rope=rope), torch.randn(T, 32)
    K, R, still = 8, mixer.rope_dims, 8 - mixer.rope_dims

    def n(y: Tensor) -> Tensor:
        return y / y.square().mean(-1, keepdim=True).sqrt()

    c, heads = n(x @ mixer.latent.weight.T), []
    for h in range(4):
        group = h // 2  # two query heads share a key head
        q = n(x @ mixer.query.weight[h * K : (h + 1) * K].T)
        k = n(c @ mixer.key.weight[group * still : (group + 1) * still].T)
        if R:
            q = torch.cat((q[:, :still], turned(q[:, still:], 10_000.0)), dim=1)
            k = torch.cat((k, turned(n(x @ mixer.rotated_key.weight.T), 10_000.0)), dim=1)
        else:
            q, k = turned(q, 10_000.0), turned(k, 10_000.0)
        scores = (1.5 * q @ k.T / K**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ (c @ mixer.value.weight[group * K : (group + 1) * K].T))
    expected = torch.cat(heads, dim=1) @ mixer.out.weight.T
    torch.testing.assert_close(mixer(x[None])[0], expected, atol=1e-4, rtol=1e-4)


@every_rope
def test_keys_and_values_together_have_the_rank_of_the_latent(rope, monkeypatch):
    mixer, made = attention(mla_latent=6, mla_rope=rope), []
    for up in (mixer.key, mixer.value):
        up.register_forward_hook(lambda _, __, y: made.append(y[0]))
    mixer(torch.randn(1, 64, 32))
    singular = torch.linalg.svdvals(torch.cat(made, dim=1))  # (64, 2 x 16) or fewer, were they free
    assert len(singular) > 6 and singular[6] / singular[0] < 1e-5 and singular[5] / singular[0] > 1e-2


def test_what_the_latent_does_not_see_reaches_no_value_and_no_unturned_key(monkeypatch):
    mixer, x = attention(mla_latent=6, mla_rope="decoupled"), torch.randn(1, 16, 32)
    unseen = torch.linalg.svd(mixer.latent.weight).Vh[6:]  # (26, 32), which W_d maps to 0
    q, k, v = inputs_of(mixer, x, monkeypatch)
    q2, k2, v2 = inputs_of(mixer, x + torch.randn(1, 16, 26) @ unseen, monkeypatch)
    torch.testing.assert_close((v2, k2[..., :4]), (v, k[..., :4]), atol=1e-4, rtol=1e-4)
    assert (q2 - q).abs().max() > 0.1 and (k2 - k)[..., 4:].abs().max() > 0.1
    with torch.no_grad():
        mixer.latent.weight[0] += 1
    _, k3, v3 = inputs_of(mixer, x, monkeypatch)
    assert (k3 - k)[..., :4].abs().max() > 0.1 and (v3 - v).abs().max() > 0.1  # one latent makes both


def test_full_latent_with_rope_after_it_is_ordinary_attention():
    mixer, plain = attention(mla_latent=32, mla_rope="post"), CausalSelfAttention(ModelConfig(**SHAPE))
    turn = torch.linalg.qr(torch.randn(32, 32)).Q
    with torch.no_grad():
        mixer.latent.weight.copy_(turn)
        mixer.key.weight.copy_(plain.key.weight @ turn.T)
        mixer.value.weight.copy_(plain.value.weight @ turn.T)
        mixer.query.weight.copy_(plain.query.weight)
        plain.out.weight.copy_(mixer.out.weight)
    x = torch.nn.functional.rms_norm(torch.randn(2, 64, 32), (32,))  # as a block hands it over
    torch.testing.assert_close(mixer(x), plain(x), atol=1e-5, rtol=1e-4)


@every_rope
def test_scores_depend_on_distance_and_not_on_place(rope, monkeypatch):
    mixer = attention(mla_latent=12, mla_rope=rope)
    q, k, _ = inputs_of(mixer, torch.randn(1, 1, 32).expand(1, 40, 32), monkeypatch)  # one token everywhere
    scores = (q.unflatten(1, (2, 2)) @ k[:, :, None].mT).flatten(1, 2)  # (1, 4, 40, 40)
    torch.testing.assert_close(scores[..., 5:, 5:], scores[..., :-5, :-5], atol=1e-4, rtol=1e-4)
    assert (scores[..., 39, 0] - scores[..., 39, 39]).abs().min() > 1e-3


def test_decoupled_position_is_in_the_turned_part_alone_and_shared_by_heads(monkeypatch):
    mixer = attention(mla_latent=12, num_kv_heads=4, mla_rope="decoupled")
    _, k, v = inputs_of(mixer, torch.randn(1, 1, 32).expand(1, 40, 32), monkeypatch)
    same = k[..., :1, :4].expand(1, 4, 40, 4), v[..., :1, :].expand_as(v), k[:, :1, :, 4:].expand(1, 4, 40, 4)
    torch.testing.assert_close((k[..., :4], v, k[..., 4:]), same, atol=1e-5, rtol=1e-5)
    assert (k[..., :1, 4:] - k[..., 1:, 4:]).abs().amax(-1).min() > 1e-3


def test_saves_what_the_formula_says():
    saved = 2 * 512 * 256 - (512 * 128 + 2 * 128 * 256)  # per layer: two matrices become one down and two up
    assert mla.Config().num_params() == 17_059_912 - 9 * saved == 15_880_264
    assert mla.Config(mla_rope="decoupled").num_params() == 15_880_264 + 9 * (512 * 16 - 128 * 4 * 16)


def test_a_turned_part_of_a_head_makes_it_decoupled():
    assert (mla.Config().mla_rope, mla.Config(mla_rope_dims=8).mla_rope) == ("post", "decoupled")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mla_latent": 0}, "MLA_LATENT=0 must be at least 1"),
        ({"mla_rope": "pre"}, "MLA_ROPE=pre must be one of decoupled, post"),
        ({"mla_rope_dims": 7}, "MLA_ROPE_DIMS=7 must be even and between 2 and 62"),
        ({"mla_rope_dims": 64}, "MLA_ROPE_DIMS=64 must be even and between 2 and 62"),
        ({"mla_rope_dims": 8, "mla_rope": "post"}, "MLA_ROPE_DIMS=8 has no meaning with MLA_ROPE=post"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        mla.Config(**settings)
