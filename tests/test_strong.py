"""strong: each of its pieces is its equation, and the whole is what they add up to, forward and gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_architectures import shake, some_tokens, tiny
from torch import Tensor

from architectures.documents import BOS_ID
from architectures.layers import Rotary, rms_norm
from architectures.strong import Config, Model, PartialRotary, exclude_own

OFF = Config.neutral
PIECES = [name for name in OFF if name != "qk_gain_init"]


def with_only(piece: str, **settings) -> Model:
    """The model, far from its beginning, with one of its pieces."""
    others = {name: value for name, value in OFF.items() if name != piece}
    return shake(tiny("strong", **others | settings))


def by_hand(model: Model, ids: Tensor) -> Tensor:
    """The logits (T, V) of one row of ids (T,) with all pieces on, head by head and token by token."""
    config, L, K = model.config, model.config.num_layers, model.config.head_dim
    x = rms_norm(model.embed.weight[ids])
    smeared = [x[0]]
    for t in range(1, len(x)):
        g = 0.0 if ids[t] == BOS_ID else model.smear_size * torch.sigmoid(model.smear @ x[t, :12])
        smeared.append(x[t] + g * x[t - 1])
    x = x0 = torch.stack(smeared)
    rotary, skips, first = Rotary(4, config.rope_base, len(x)), [], None
    for layer, block in enumerate(model.blocks):
        if layer >= L // 2:
            x = x + model.skip_weights[layer - L // 2] * skips.pop()
        x = block.resid_mix[0] * x + block.resid_mix[1] * x0
        h = rms_norm(x) / math.sqrt(layer + 1)
        mixer, heads, values = block.mixer, [], []
        for j in range(config.num_kv_heads):
            v = h @ mixer.value.weight[j * K : (j + 1) * K].T
            values.append(v if layer == 0 else mixer.value_mix[0] * v + mixer.value_mix[1] * first[j])
        first = values if layer == 0 else first
        for head in range(config.num_heads):
            j = head // (config.num_heads // config.num_kv_heads)
            rows = slice(head * K, (head + 1) * K), slice(j * K, (j + 1) * K)
            q, k = (rms_norm(h @ w.T) for w in (mixer.query.weight[rows[0]], mixer.key.weight[rows[1]]))
            q, k = (torch.cat((rotary(z[None, :, None, :4])[0, :, 0], z[:, 4:]), dim=1) for z in (q, k))
            scores = mixer.q_gain[head] * (q @ k.T) / math.sqrt(K)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            y, v = scores.softmax(dim=1) @ values[j], values[j]
            y = y - (y * v).sum(dim=1, keepdim=True) * v / v.square().sum(dim=1, keepdim=True)
            heads.append(y * 2 * torch.sigmoid(h[:, :12] @ mixer.gate[head])[:, None])
        x = x + block.mixer_scale * (torch.cat(heads, dim=1) @ mixer.out.weight.T)
        h = h if layer >= L - L // 3 else rms_norm(x) / math.sqrt(layer + 1)
        up = h @ block.mlp.up.weight.T
        up = torch.where(up > 0, up, 0.5 * up).square()
        x = x + block.mlp_scale * (up @ block.mlp.down.weight.T)
        if layer < L // 2:
            skips.append(x)
    return 30 * torch.tanh(rms_norm(x) @ model.embed.weight.T / 30)


def test_the_whole_model_and_its_gradients_equal_the_equations():
    model, ids = shake(tiny("strong")).requires_grad_(True), some_tokens(1, 40)
    ids[0, 20] = BOS_ID
    found = []
    for logits in (model.logits(ids)[0], by_hand(model, ids[0])):
        model.zero_grad()
        (logits * torch.linspace(-1, 1, 260)).mean().backward()
        found.append((logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("piece", PIECES)
def test_each_piece_alone_changes_the_logits_and_none_looks_ahead(piece):
    model, ids = with_only(piece), some_tokens(2, 64)
    plain, logits = tiny("strong", **OFF), model.logits(ids)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert (logits - plain.logits(ids)).abs().max() > 1e-3
    later = ids.clone()
    later[:, 40:] = (later[:, 40:] + 7) % 260
    assert torch.equal(logits[:, :40], model.logits(later)[:, :40])


def test_what_is_read_has_no_part_along_the_own_value():
    y, v = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 10, 8)
    left = exclude_own(y, v)
    own = v.repeat_interleave(2, dim=1)
    assert (left * own).sum(-1).abs().max() < 1e-5
    torch.testing.assert_close(y - left, (y * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True) * own)
    assert exclude_own(y, torch.zeros_like(v)).equal(y)  # of no value there is no part


def test_the_last_layers_alone_exclude_and_run_side_by_side():
    model = tiny("strong", num_layers=6, xsa_last_n=2, parallel_last_n=1)
    assert [block.mixer.excludes for block in model.blocks] == 4 * [False] + 2 * [True]
    assert [block.parallel for block in model.blocks] == 5 * [False] + [True]
    read = {}
    for name, module in model.named_modules():
        if name.endswith((".mixer", ".mlp")):
            module.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
    shake(model).logits(some_tokens(1, 64))
    same = [torch.equal(read[f"blocks.{i}.mixer"], read[f"blocks.{i}.mlp"]) for i in range(6)]
    assert same == 5 * [False] + [True]
    sizes = [read[f"blocks.{i}.mixer"].square().mean().sqrt().item() for i in range(6)]
    assert sizes == pytest.approx([(i + 1) ** -0.5 for i in range(6)], rel=1e-3)


@pytest.mark.parametrize(("fraction", "dims"), [(0.0, 0), (0.01, 4), (0.25, 4), (0.5, 8), (1.0, 16)])
def test_a_fraction_of_a_head_is_rotated(fraction, dims):
    config = Config(model_dim=64, num_heads=4, num_kv_heads=2, rope_fraction=fraction)
    assert config.rope_dims == dims
    x = torch.randn(1, 10, 2, 16)
    turned = PartialRotary(dims, 1e4, 10)(x)
    assert torch.equal(turned[..., dims:], x[..., dims:]) and torch.equal(turned[:, 0], x[:, 0])
    assert not dims or (turned[:, 1:, :, :dims] != x[:, 1:, :, :dims]).all()


def test_smear_reads_no_token_of_the_document_before():
    model, ids = with_only("smear_gate"), some_tokens(1, 64) % 250 + 5
    ids[0, 30] = BOS_ID
    other = ids.clone()
    other[0, 29] += 1
    changed = (model.embedded(ids) != model.embedded(other)).any(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [29]
    other = ids.clone()
    other[0, 30] = 7  # no beginning
    changed = (model.embedded(ids) != model.embedded(other)).any(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [30, 31]


def test_a_document_scores_the_same_whatever_stands_before_it():
    model, ids = shake(tiny("strong", doc_mask=True)), some_tokens(2, 64) % 250 + 5
    ids[:, 24] = BOS_ID
    ids[1, 24:] = ids[0, 24:]
    logits = model.logits(ids)[:, 24:]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-4)


def test_gates_are_open_and_nothing_is_smeared_at_first():
    ids = some_tokens(2, 64)
    on, off = tiny("strong"), tiny("strong", attn_gate=False, smear_gate=False)
    off.load_state_dict(on.state_dict(), strict=False)
    assert torch.equal(on.logits(ids), off.logits(ids))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rope_fraction": 1.5}, "ROPE_FRACTION=1.5 must be between 0 and 1"),
        ({"leaky_slope": -0.1}, "LEAKY_SLOPE=-0.1 must be between 0 and 1"),
        ({"xsa_last_n": 10}, "XSA_LAST_N=10 must be between 0 and NUM_LAYERS=9"),
        ({"parallel_last_n": -1}, "PARALLEL_LAST_N=-1 must be"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        Config(**settings)


def test_leaky_relu_squared():
    model = with_only("leaky_slope", leaky_slope=0.3)
    mlp, x = model.blocks[0].mlp, torch.randn(1, 5, 32)
    up = mlp.up(x)
    torch.testing.assert_close(mlp(x), mlp.down(F.relu(up).square() + 0.09 * F.relu(-up).square()))
