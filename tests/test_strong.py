"""strong: each of its pieces is its equation, and the whole is what they add up to, forward and gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_architectures import CPU, shake, some_tokens, tiny
from torch import Tensor

import train_gpt
from architectures.documents import BOS_ID
from architectures.layers import Rotary, rms_norm
from architectures.strong import Config, Model, PartialRotary, exclude_own

OFF = Config.neutral
PIECES = [name for name in OFF if name != "qk_gain_init"]
MORE = {"lanes_last_n": 2, "skip_gates": True}  # pieces that are off unless asked for


def with_only(piece: str, **settings) -> Model:
    """The model, far from its beginning, with one of its pieces."""
    on = {piece: MORE[piece]} if piece in MORE else {}
    others = {name: value for name, value in OFF.items() if name != piece}
    return shake(tiny("strong", **others | on | settings))


def by_hand(model: Model, ids: Tensor) -> Tensor:
    """The logits (T, V) of one row of ids (T,) with all pieces on, and lanes and skip gates as the model has them, lane
    by lane, head by head and token by token."""
    config, L, K = model.config, model.config.num_layers, model.config.head_dim
    x = rms_norm(model.embed.weight[ids])
    smeared = [x[0]]
    for t in range(1, len(x)):
        g = 0.0 if ids[t] == BOS_ID else model.smear_size * torch.sigmoid(model.smear @ x[t, :12])
        smeared.append(x[t] + g * x[t - 1])
    x0 = torch.stack(smeared)
    lanes, rotary, skips, first = [x0], Rotary(4, config.rope_base, len(x0)), [], None
    for layer, block in enumerate(model.blocks):
        if layer == L - config.lanes_last_n:
            lanes = 2 * lanes
        if layer >= L // 2:
            i, skip = layer - L // 2, skips.pop()
            g = torch.sigmoid(model.skip_gates[i]) if config.skip_gates else 1.0
            kept = 1 - g if config.skip_gates else 1.0
            skip = skip if len(skip) == len(lanes) else 2 * skip
            lanes = [kept * x + g * model.skip_weights[i] * s for x, s in zip(lanes, skip, strict=True)]
        lanes = [block.resid_mix[0] * x + block.resid_mix[1] * x0 for x in lanes]
        h = rms_norm(lanes[0]) / math.sqrt(layer + 1)
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
        attended = block.mixer_scale * (torch.cat(heads, dim=1) @ mixer.out.weight.T)
        if len(lanes) == 2:
            h = rms_norm(lanes[1]) / math.sqrt(layer + 1)
        elif config.lanes_last_n or layer < L - L // 3:
            h = rms_norm(lanes[0] + attended) / math.sqrt(layer + 1)
        up = h @ block.mlp.up.weight.T
        up = torch.where(up > 0, up, 0.5 * up).square()
        computed = block.mlp_scale * (up @ block.mlp.down.weight.T)
        gains = block.gains if len(lanes) == 2 else torch.ones(2, 1)
        lanes = [x + gains[0, lane] * attended + gains[1, lane] * computed for lane, x in enumerate(lanes)]
        if layer < L // 2:
            skips.append(lanes)
    return 30 * torch.tanh(rms_norm(sum(lanes) / len(lanes)) @ model.embed.weight.T / 30)


@pytest.mark.parametrize("lanes", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_the_whole_model_and_its_gradients_equal_the_equations(lanes, gated):
    model = shake(tiny("strong", lanes_last_n=lanes, skip_gates=gated)).requires_grad_(True)
    ids = some_tokens(1, 40)
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
    model, ids = shake(tiny("strong", doc_mask=True, **MORE)), some_tokens(2, 64) % 250 + 5
    ids[:, 24] = BOS_ID
    ids[1, 24:] = ids[0, 24:]
    logits = model.logits(ids)[:, 24:]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-4)


def test_gates_are_open_and_nothing_is_smeared_at_first():
    ids = some_tokens(2, 64)
    on, off = tiny("strong"), tiny("strong", attn_gate=False, smear_gate=False)
    off.load_state_dict(on.state_dict(), strict=False)
    assert torch.equal(on.logits(ids), off.logits(ids))


@pytest.mark.parametrize("count", [1, 3, 4])
def test_lanes_begin_as_the_parallel_form_of_the_last_layers(count):
    ids, parallel = some_tokens(2, 64), shake(tiny("strong", parallel_last_n=count))
    lanes = tiny("strong", lanes_last_n=count).eval()
    missing = lanes.load_state_dict(parallel.state_dict(), strict=False).missing_keys
    assert missing == [f"blocks.{i}.gains" for i in range(4 - count, 4)]
    assert torch.equal(lanes.logits(ids), parallel.logits(ids))
    with torch.no_grad():
        lanes.blocks[-1].gains[:, 0] += 0.5  # a stream's gains alone, and half of that is in the mean
    assert not torch.equal(lanes.logits(ids), parallel.logits(ids))


def test_lanes_take_the_place_of_the_parallel_form():
    assert Config(num_layers=9).parallel_layers == 3
    assert Config(num_layers=9, lanes_last_n=2).parallel_layers == 0
    Config(num_layers=9, lanes_last_n=2, parallel_last_n=0)  # both said, and no contradiction


def test_gated_skips_begin_as_half_of_the_skip_and_half_of_the_stream():
    model, (x, skip) = with_only("skip_gates"), torch.randn(2, 1, 5, 32)
    model.skip_gates.zero_()
    torch.testing.assert_close(model.join_skip(1, x, skip), x / 2 + model.skip_weights[1] * skip / 2)
    model.skip_gates.fill_(-30.0)
    assert torch.equal(model.join_skip(1, x, skip), x)


@pytest.mark.parametrize("pieces", [*({piece: value} for piece, value in MORE.items()), MORE], ids=str)
def test_what_is_off_by_default_is_trained_and_its_parameters_are_counted(pieces):
    for shape in ({"num_layers": 2, "tie_embeddings": False}, {"num_layers": 5, "mlp_mult": 3}, {}):
        model = tiny("strong", **pieces, **shape)
        assert sum(p.numel() for p in model.parameters()) == model.config.num_params()
    batch = some_tokens(4, 65)
    trainer = train_gpt.Trainer(model, train_gpt.RunConfig(), CPU, micro_batches=1)
    losses = [trainer.train_step(batch, step, 1.0, lambda: [0.0, 0.0, 0.0])[0].item() for step in range(3)]
    trainer.backward(batch)
    assert losses[2] < losses[0] and all(p.grad.any() for p in model.parameters())


def test_lanes_and_gated_skips_compile_without_graph_breaks():
    torch._dynamo.reset()
    model, batch = tiny("strong", **MORE), some_tokens(2, 65)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    inputs = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    torch.testing.assert_close(compiled(*inputs), model(*inputs), atol=1e-4, rtol=1e-4)


def test_a_model_of_one_layer_has_no_skip_to_gate():
    model = tiny("strong", num_layers=1, lanes_last_n=1, skip_gates=True)
    assert sum(p.numel() for p in model.parameters()) == model.config.num_params()
    assert model.logits(some_tokens(1, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lanes_last_n": 10}, "LANES_LAST_N=10 must be between 0 and NUM_LAYERS=9"),
        ({"lanes_last_n": -1}, "LANES_LAST_N=-1 must be"),
        ({"lanes_last_n": 2, "parallel_last_n": 1}, "LANES_LAST_N=2 is in place of PARALLEL_LAST_N=1: set one to 0"),
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
