"""Recurrent layers equal their recurrences, keep long memories, cost what grows linearly, and carry their states."""

from itertools import pairwise

import pytest
import torch
from test_architectures import CPU, SHAPE, shake, some_tokens, tiny
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from architectures import mamba
from architectures.kernels import delta, modes, scan
from tools import pack

every_kind = pytest.mark.parametrize("kind", sorted(mamba.KINDS))


def slow_filter(u: Tensor, pole: modes.Pair, weight: modes.Pair, state: None, chunk_size: int) -> tuple[Tensor, None]:
    return modes.naive_modal_filter(u, pole, weight), state


def mixer(kind: str, **settings) -> mamba.Recurrent:
    torch.manual_seed(0)
    layer = mamba.KINDS[kind](mamba.Config(**SHAPE | settings, ssm_kind=kind))
    torch.nn.init.normal_(layer.out.weight, std=0.2)
    return layer


@every_kind
@pytest.mark.parametrize("T", [1, 63, 200])
def test_a_layer_equals_its_recurrence_forward_and_backward(kind, T, monkeypatch):
    layer, x = mixer(kind, d_state=8, ssm_gate=True), torch.randn(2, T, 32)
    weights, found = torch.randn(2, T, 32), []
    for slow in (False, True):
        if slow:
            monkeypatch.setattr(mamba, "chunked_scan", lambda *x, skip, chunk_size: scan.naive_scan(*x, skip))
            monkeypatch.setattr(mamba, "delta_rule", lambda *x, chunk_size: delta.naive_delta_rule(*x))
            monkeypatch.setattr(mamba, "modal_filter", slow_filter)
        inputs = [x.clone().requires_grad_(), *layer.parameters()]
        y = layer(inputs[0])
        found.append([y, *torch.autograd.grad((y * weights).sum(), inputs)])
    for fast, slow in zip(*found, strict=True):
        assert (fast - slow).abs().max() <= 1e-4 * slow.abs().max() + 1e-6


@every_kind
@pytest.mark.parametrize("hybrid", ["sequential", "parallel"])
@pytest.mark.parametrize("cut", [15, 16, 17, 31, 32, 33])
def test_logits_never_look_over_the_edge_of_a_chunk_or_block(kind, hybrid, cut):
    settings = dict(ssm_kind=kind, ssm_hybrid=hybrid, chunk_size=16, ssm_attn_window=32)
    model, x = shake(tiny("mamba", **settings)), some_tokens(2, 64)
    y = x.clone()
    y[:, cut:] = (y[:, cut:] + 7) % 260
    before, after = model.logits(x), model.logits(y)
    torch.testing.assert_close(before[:, :cut], after[:, :cut], atol=1e-5, rtol=0)
    assert not torch.equal(before[:, cut:], after[:, cut:])


@every_kind
def test_rows_scored_as_one_text_are_one_long_window(kind):
    model, text = shake(tiny("mamba", ssm_kind=kind, ssm_attn_window=16)), some_tokens(1, 12 * 16)
    whole = model.logits(text).view(12, 16, -1)
    model.carry(True)
    carried = torch.cat([model.logits(rows) for rows in text.view(3, 4, 16)])  # three batches of four windows
    model.carry(False)
    torch.testing.assert_close(carried, whole, atol=1e-3, rtol=1e-4)
    alone = model.logits(text.view(12, 16))
    torch.testing.assert_close(alone[0], whole[0], atol=1e-4, rtol=1e-4)
    assert (alone[1:] - whole[1:]).abs().max() > 0.1


@every_kind
def test_a_text_begins_from_nothing_and_rows_are_alone_again_after_it(kind):
    model, x = shake(tiny("mamba", ssm_kind=kind)), some_tokens(3, 64)
    alone = model.logits(x)
    model.carry(True)
    first, second = model.logits(x), model.logits(x)
    model.carry(True)
    again = model.logits(x)
    model.carry(False)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(model.logits(x), alone)


@every_kind
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_state_is_carried_to_later_rows_only(kind, row):
    model, x = shake(tiny("mamba", ssm_kind=kind)), some_tokens(3, 64)
    y = x.clone()
    y[row, 40:] = 9
    model.carry(True)
    before = model.logits(x)
    model.carry(True)
    after = model.logits(y)
    model.carry(False)
    assert torch.equal(before[:row], after[:row]) and torch.equal(before[row, :40], after[row, :40])
    assert all(not torch.equal(before[later], after[later]) for later in range(row + 1, 3))


def test_without_recurrent_layers_nothing_is_carried():
    assert not tiny("mamba", ssm_pattern="a").can_carry and not tiny("gpt").can_carry and tiny("mamba").can_carry


@every_kind
def test_decays_and_skips_are_in_no_group_of_muon_and_stored_whole(kind):
    model = tiny("mamba", ssm_kind=kind)
    groups = train_gpt.parameter_groups(model)
    names = {id(p): n for n, p in model.named_parameters()}
    delicate = {n.split(".")[-1] for n in (names[id(p)] for p in groups["scalar"])}
    expected = {"mamba2": {"A_log", "dt_bias", "skip", "conv"}, "gdn": {"A_log", "dt_bias", "conv"}}
    expected["s4d"] = {"A_log", "dt_bias", "skip", "conv", "frequency", "weight"}
    assert expected[kind] <= delicate
    assert {names[id(p)].split(".")[-1] for p in groups["matrix"]} == {"weight"}
    layer = model.blocks[0].mixer
    matrices = [layer.inputs, layer.out, layer.gate, layer.rates]
    assert {id(p) for p in layer.parameters()} & {id(p) for p in groups["matrix"]} == {
        id(m.weight) for m in matrices if m is not None
    }


def test_half_of_the_heads_remember_at_first_what_was_64_tokens_ago():
    layer = mamba.Mamba2(mamba.Config())
    kept = torch.exp(-64 * torch.nn.functional.softplus(layer.dt_bias) * layer.A_log.exp())
    assert kept.median() > 0.05 and kept.max() > 0.75 and kept.min() < 1e-20


@every_kind
def test_time_constants_are_those_of_the_settings(kind):
    layer = mixer(kind, ssm_dt_min=0.01, ssm_dt_max=0.5, ssm_a_max=4.0)
    delta_t = torch.nn.functional.softplus(layer.dt_bias)
    torch.testing.assert_close(delta_t[[0, -1]], torch.tensor([0.01, 0.5]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(delta_t.log().diff(), delta_t.log().diff().mean().expand(len(delta_t) - 1))
    if kind != "s4d":
        torch.testing.assert_close(layer.A_log.exp()[[0, -1]], torch.tensor([1.0, 4.0]))


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_short_conv_is_a_causal_depthwise_convolution(taps):
    layer, x = mixer("mamba2", d_conv=taps), torch.randn(2, 20, 32 + 2 * 64)
    padded = torch.nn.functional.pad(x.mT, (taps - 1, 0))
    expected = torch.nn.functional.conv1d(padded, layer.conv[:, None], groups=x.size(-1)).mT
    torch.testing.assert_close(layer.short_conv(x), expected, atol=1e-5, rtol=1e-4)


def test_s4d_is_one_convolution_and_its_layer_commutes_with_delays():
    layer = mixer("s4d").requires_grad_(False)
    v = torch.randn(1, 100, 4, 8)
    y = layer.mix(None, v, None, None, None)[0]
    late = layer.mix(None, torch.cat((0 * v[:, :30], v), dim=1), None, None, None)[0]
    torch.testing.assert_close(late[:, 30:], y, atol=1e-4, rtol=1e-4)
    double = layer.mix(None, 2 * v, None, None, None)[0]
    torch.testing.assert_close(double, 2 * y, atol=1e-4, rtol=1e-4)
    impulse = torch.zeros(1, 100, 4, 8)
    impulse[:, 0] = 1
    response = layer.mix(None, impulse, None, None, None)[0].flatten(2)[0].T  # (32, 100)
    padded = torch.nn.functional.pad(v.flatten(2).mT, (99, 0))
    expected = torch.nn.functional.conv1d(padded, response.flip(1)[:, None], groups=32).mT
    torch.testing.assert_close(y.flatten(2), expected, atol=1e-4, rtol=1e-4)


def operations(T: int, **settings) -> int:
    """Floating-point operations of the products in a forward and backward pass over one row of T tokens."""
    shape = dict(num_layers=2, ssm_pattern="ma", model_dim=64, num_heads=2, num_kv_heads=1, train_seq_len=T)
    model = mamba.Model(mamba.Config(**shape | settings)).to("meta")
    x = torch.zeros(1, T, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whose products are counted
        model(x, x).backward()
    return counter.get_total_flops()


@every_kind
def test_twice_the_text_is_at_most_2_1_times_the_work(kind):
    counts = [operations(T, ssm_kind=kind) for T in (512, 1024, 2048, 4096)]
    assert all(late <= 2.1 * early for early, late in pairwise(counts))


def test_attention_over_the_whole_text_would_be_more():
    assert operations(4096, ssm_attn_window=4096) > 2.1 * operations(2048, ssm_attn_window=4096)


def test_layers_follow_the_pattern_and_parallel_ones_have_both_mixers():
    kinds = [type(block.mixer).__name__ for block in tiny("mamba", num_layers=9).blocks]
    assert kinds == ["Mamba2"] * 3 + ["BlockAttention"] + ["Mamba2"] * 3 + ["BlockAttention", "Mamba2"]
    both = tiny("mamba", ssm_hybrid="parallel").blocks[3].mixer
    x = torch.randn(2, 40, 32)
    for part in both.mixers:
        torch.nn.init.normal_(part.out.weight)
    torch.testing.assert_close(both(x), both.mixers[0](x) + both.mixers[1](x))
    assert [type(part).__name__ for part in both.mixers] == ["BlockAttention", "Mamba2"]


@pytest.mark.parametrize("T", [31, 32, 33, 64, 70])
def test_attention_sees_its_block_alone(T):
    torch.manual_seed(0)
    attention = mamba.BlockAttention(mamba.Config(**SHAPE, ssm_attn_window=32)).requires_grad_(False)
    torch.nn.init.normal_(attention.out.weight)
    x = torch.randn(2, T, 32)
    alone = [attention(x[:, begin : begin + 32]) for begin in range(0, T, 32)]
    torch.testing.assert_close(attention(x), torch.cat(alone, dim=1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "groups", "heads"), [("mamba2", 1, 4), ("mamba2", 2, 4), ("gdn", None, 8), ("gdn", 2, 4), ("s4d", 1, 2)]
)
def test_count_of_parameters_is_the_closed_form_for_every_kind(kind, groups, heads):
    for settings in ({}, {"ssm_hybrid": "parallel"}, {"ssm_gate": False}, {"expand": 0.5, "d_state": 6}):
        model = tiny("mamba", ssm_kind=kind, ssm_groups=groups, ssm_heads=heads, **settings)
        assert sum(p.numel() for p in model.parameters()) == model.config.num_params()


def test_default_size_is_stored_in_less_than_sixteen_megabytes_with_its_code():
    model = mamba.Model(mamba.Config())
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)  # untrained and dense: harder to code than trained weights
    blob = train_gpt.pack_artifact(model, "mamba", None, train_gpt.ScorePlan(1024, 1024), 1.0, 8)
    assert len(blob) + len(pack.flatten("mamba").encode()) < 16_000_000


@every_kind
def test_every_kind_learns_more_than_the_frequencies_of_bytes(kind, text):
    tokens = torch.tensor(list(text[: 60 * 257])).view(60, 257) + 4
    counts = torch.bincount(tokens.flatten()).float()
    unigram = torch.special.entr(counts / counts.sum()).sum()
    model = tiny("mamba", ssm_kind=kind, num_layers=1, ssm_pattern="m", d_state=16)
    trainer = train_gpt.Trainer(model, train_gpt.RunConfig(muon_momentum_warmup_steps=0), CPU, micro_batches=1)
    losses = [trainer.train_step(row[None], 0, 1 - i / 60, lambda: [0.0, 0.0])[0] for i, row in enumerate(tokens)]
    assert torch.stack(losses[-10:]).mean() < unigram - 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ssm_kind": "mamba3"}, "SSM_KIND=mamba3 must be one of mamba2, gdn, s4d"),
        ({"ssm_pattern": "mmx"}, "SSM_PATTERN=mmx must be made of m"),
        ({"ssm_pattern": ""}, "SSM_PATTERN= must be made of m"),
        ({"ssm_hybrid": "both"}, "SSM_HYBRID=both must be one of sequential, parallel"),
        ({"d_conv": 0}, "D_CONV=0 must be at least 1"),
        ({"ssm_a_max": 0.5}, "SSM_A_MAX=0.5 must be at least 1"),
        ({"ssm_dt_min": 0.2}, "SSM_DT_MIN=0.2 must be above 0, at most SSM_DT_MAX=0.1"),
        ({"ssm_heads": 7}, "SSM_HEADS=7 must divide"),
        ({"ssm_groups": 3}, "must divide EXPAND x MODEL_DIM = 512 and be a multiple of SSM_GROUPS=3"),
        ({"ssm_kind": "s4d", "d_state": 7}, "D_STATE=7 must be even"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        mamba.Config(**settings)
