"""Weight sharing over depth: gates, time features, solvers and what is stored of them."""

import itertools
import math

import pytest
import torch
from test_architectures import CPU, shake, some_tokens, tiny, train_losses
from torch import nn

import train_gpt
from architectures import load_architecture, ti_ssm
from architectures.kernels import scan
from architectures.layers import rms_norm
from architectures.time_index import FEATURES, time_features

GATED = ("ti_mlp", "ti_ssm", "ti_ode")
TIMED = (*GATED, "tong_ode")
every_timed = pytest.mark.parametrize("name", TIMED)
SETTINGS = (
    *[(name, {"ti_feat": feat}) for name in TIMED for feat in FEATURES],
    *[(name, {"ti_gate": gate}) for name in GATED for gate in ("head", "rank2", "lora2")],
    *[
        ("ti_ssm", {"ssm_mode": mode, "ssm_layout": layout})
        for mode in ("lti", "selective")
        for layout in ti_ssm.LAYOUTS
    ],
    *[
        ("ti_ssm", {"ti_blocks": None}),
        ("ti_ssm", {"ti_order": "cycle", "ti_gate": "lora2"}),
        ("ti_ssm", {"expand": 2}),
    ],
    *[("ti_ssm", {"ssm_gate": False}), ("ti_ssm", {"ssm_gate": False, "ssm_mode": "lti"})],
    *[("ti_mlp", {"ti_blocks": n, "unet_skips": False}) for n in (1, None)],
    *[("tong_ode", {"tong_bases": bases, "tong_rank": rank}) for bases in (1, 2, 3, 6) for rank in (None, 2)],
    *[("ti_ode", {"ti_where": "all", "ode_dt": dt}) for dt in ("1/sqrt(L)", "learn")],
    *[(name, {"ode_solver": solver}) for name in ("ti_ode", "tong_ode") for solver in ("heun", "rk4")],
    *[
        (name, {"eval_layers": n, "ode_dt": dt})
        for name in ("ti_ode", "tong_ode")
        for n in (2, 8)
        for dt in ("1", "learn")
    ],
)
every_setting = pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)


def fill_alike(*models) -> None:
    """The same random numbers in the weights of all models, those that make gates left as they are."""
    for model in models:
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if not name.startswith(("time.", "factors.")) and name.rpartition(".")[2] != "resid_mix":
                    p.add_(0.1 * torch.randn(p.shape, generator=g))
        train_gpt.fill_generated(model.eval().requires_grad_(False))


def far_gated(name: str, **settings):
    """A shaken model whose gates are far from 1."""
    model = tiny(name, **settings)
    with torch.no_grad():
        for p in model.time.parameters():
            p.add_(2 * torch.randn_like(p))
    return shake(model)


@every_setting
def test_count_of_parameters_is_the_closed_form(name, settings):
    model = tiny(name, **settings)
    assert sum(p.numel() for p in model.parameters()) == model.config.num_params()


@every_setting
def test_stored_model_is_the_trained_one_without_its_time_network(name, settings):
    model, x = shake(tiny(name, **settings)), some_tokens(2, 64)
    stored = model.train().folded()
    for each in (model.eval(), stored):  # in eval mode, where depth is that of scoring
        train_gpt.fill_generated(each)
    torch.testing.assert_close(stored.logits(x), model.logits(x), atol=1e-5, rtol=1e-5)
    assert {n for n in stored.state_dict() if n.startswith("time.")} <= {"time.free"}
    rebuilt = load_architecture(name)[0](stored.config)
    rebuilt.load_state_dict(stored.state_dict())


@pytest.mark.parametrize("gate", ["channel", "head", "rank2", "lora2"])
@pytest.mark.parametrize("name", GATED)
def test_gates_change_nothing_at_first(name, gate):
    gated, plain = tiny(name, ti_gate=gate), tiny(name, ti_feat="none")
    fill_alike(gated, plain)
    assert torch.equal(gated.logits(some_tokens(2, 64)), plain.logits(some_tokens(2, 64)))


OF_BLOCK = "attention_in attention_out mlp_in mlp_hidden mlp_out"
OF_SSM = "ssm_in ssm_dt ssm_A ssm_skip ssm_out"


@pytest.mark.parametrize(
    ("name", "settings", "names"),
    [
        ("ti_mlp", {}, OF_BLOCK),
        ("ti_mlp", {"ti_gate": "head", "ti_order": "cycle"}, OF_BLOCK),
        ("ti_ssm", {}, f"{OF_BLOCK} {OF_SSM} ssm_keys"),
        ("ti_ssm", {"ssm_mode": "lti"}, f"{OF_BLOCK} {OF_SSM} ssm_B ssm_C"),
        ("ti_ode", {}, "slope"),
        ("ti_ode", {"ti_where": "all"}, "attention_in mlp_in mlp_hidden slope"),
    ],
    ids=str,
)
def test_a_layer_s_tensors_are_the_shared_ones_between_two_diagonals_of_gates(name, settings, names):
    model = far_gated(name, **settings)
    gates, made = model.gates(), model.materialize()
    assert set(gates) == set(names.split()) and all((gate - 1).abs().amax() > 0.1 for gate in gates.values())
    for i in range(4):
        for key, gate in model.config.gated(i).items():
            shared = model.base[model.config.block_of(i)].get_parameter(key)
            wanted = shared.exp() if gate.log else shared
            wanted = wanted if gate.rows is None else torch.diag(gates[gate.rows][i]) @ wanted
            wanted = wanted if gate.columns is None else wanted @ torch.diag(gates[gate.columns][i])
            torch.testing.assert_close(made.pop(f"blocks.{i}.{key}"), wanted.log() if gate.log else wanted)
    assert not made


@pytest.mark.parametrize("gate", ["rank2", "lora2"])
@pytest.mark.parametrize("name", GATED)
def test_a_low_rank_gate_is_a_weighted_sum_of_two_outer_products(name, gate):
    model = far_gated(name, ti_gate=gate)
    gates, made = model.gates(), model.materialize()
    for i in range(4):
        block = model.config.block_of(i)
        for key in [key for key in model.config.gated(i) if key.endswith("weight")]:
            u, v = (model.factors[f"{block}_{key.replace('.', '_')}_{side}"] for side in "uv")
            product = sum(gates[key][i, r] * torch.outer(u[:, r], v[:, r]) for r in range(2))
            shared = model.base[block].get_parameter(key)
            wanted = shared * 2 * product.sigmoid() if gate == "rank2" else shared + product
            torch.testing.assert_close(made[f"blocks.{i}.{key}"], wanted)
            assert (wanted - shared).abs().max() > 1e-3


@pytest.mark.parametrize("gate", ["channel", "head", "rank2", "lora2"])
@pytest.mark.parametrize("name", GATED)
def test_every_output_of_the_time_network_gets_a_gradient(name, gate):
    model = far_gated(name, ti_gate=gate).requires_grad_(True).train()
    train_gpt.Trainer(model, train_gpt.RunConfig(), CPU, micro_batches=1).backward(some_tokens(4, 65))
    assert model.time.head.grad.any(dim=-1).all()


@pytest.mark.parametrize(("dt", "step"), [("1/L", 0.25), ("1", 1.0)])
def test_ti_ode_takes_euler_steps_along_attention_and_mlp_gated_alike(dt, step):
    model, x = far_gated("ti_ode", ode_dt=dt), torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    f, y = model.base[0], x
    for m in model.gates()["slope"]:
        y = y + step * m * (f.mixer(rms_norm(y), f.mixer_scale) + f.mlp(rms_norm(y), f.mlp_scale))
    torch.testing.assert_close(model.backbone(x), y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"ti_blocks": 1}, {"ti_order": "cycle"}, {"unet_skips": False}], ids=str)
def test_ti_mlp_without_time_is_shared(settings):
    assert train_losses("ti_mlp", ti_feat="none", **settings) == train_losses("shared", **settings)


@pytest.mark.parametrize("name", ["ti_ode", "tong_ode"])
def test_ode_with_a_whole_step_and_without_time_is_one_looped_block(name):
    ode = tiny(name, ti_feat="none", ode_dt="1", ode_res="seq")
    loop = tiny("shared", ti_blocks=1, unet_skips=False)
    fill_alike(loop)
    block = loop.blocks[0].state_dict()
    with torch.no_grad():
        ode.embed.weight.copy_(loop.embed.weight)
        for layer in ode.blocks:  # all of them hold the same scales and gains, those of ti_ode the same matrices too
            layer.load_state_dict(block, strict=False)
        for key in ode.bases if name == "tong_ode" else ():
            ode.bases[key].copy_(block[key.replace("_", ".", 1) + ".weight"][None])
    train_gpt.fill_generated(ode)
    torch.testing.assert_close(ode.logits(some_tokens(2, 64)), loop.logits(some_tokens(2, 64)), atol=1e-5, rtol=1e-5)


@every_timed
def test_every_feature_of_time_trains_differently(name):
    losses = {feat: train_losses(name, steps=4, ti_feat=feat) for feat in FEATURES}
    assert [pair for pair in itertools.combinations(losses, 2) if losses[pair[0]] == losses[pair[1]]] == []


@every_timed
@pytest.mark.parametrize(("feat", "alike"), [("const", True), ("table", False), ("shuffle", False), ("fourier", False)])
def test_layers_are_alike_when_time_stands_still_and_only_then(name, feat, alike):
    made = shake(tiny(name, ti_feat=feat, **({"ti_blocks": 1} if name in ("ti_mlp", "ti_ssm") else {}))).materialize()
    name = next(n for n in made if n.startswith("blocks.0.") and n.endswith("out.weight"))
    assert torch.equal(made[name], made[name.replace("blocks.0", "blocks.3")]) is alike


def test_shuffle_gives_the_layers_the_same_features_in_another_order():
    t = torch.arange(1, 10) / 9
    ordered, shuffled = time_features(t, "fourier", 6), time_features(t, "shuffle", 6)
    assert not torch.equal(ordered, shuffled)
    assert sorted(ordered.tolist()) == sorted(shuffled.tolist())


def test_legendre_features_are_orthogonal():
    n = 20_000
    features = time_features((torch.arange(n) + 0.5) / n, "legendre", 5).double()
    torch.testing.assert_close(
        features.T @ features / n, torch.diag(1 / (2 * torch.arange(6.0) + 1)).double(), atol=1e-4, rtol=0
    )


@every_timed
def test_permuting_the_past_changes_what_comes_next(name):
    model, x = shake(tiny(name)), some_tokens(1, 64)
    y = torch.cat((x[:, :60].flip(1), x[:, 60:]), dim=1)
    assert (model.logits(x)[:, -1] - model.logits(y)[:, -1]).abs().max() > 1e-4


@pytest.mark.parametrize("cut", [63, 64, 65, 128])
@pytest.mark.parametrize("mode", ["selective", "lti"])
@pytest.mark.parametrize("layout", ["ssm+mlp", "parallel"])
def test_ti_ssm_never_looks_over_the_edge_of_a_chunk(mode, layout, cut):
    model, x = shake(tiny("ti_ssm", ssm_mode=mode, ssm_layout=layout)), some_tokens(1, 140)
    y = x.clone()
    y[:, cut:] = (y[:, cut:] + 7) % 260
    before, after = model.logits(x), model.logits(y)
    torch.testing.assert_close(before[:, :cut], after[:, :cut], atol=1e-5, rtol=0)
    assert (before[:, cut:] - after[:, cut:]).abs().amin(dim=1).max() > 1e-4


@pytest.mark.parametrize("mode", ["selective", "lti"])
def test_ti_ssm_equals_its_recurrence(mode, monkeypatch):
    model, x = shake(tiny("ti_ssm", ssm_mode=mode)), some_tokens(2, 140)
    fast = model.logits(x)
    monkeypatch.setattr(ti_ssm, "chunked_scan", scan.naive_scan)
    monkeypatch.setattr(ti_ssm, "diagonal_scan", scan.naive_diagonal_scan)
    torch.testing.assert_close(model.logits(x), fast, atol=2e-4, rtol=1e-4)


def test_short_conv_is_a_causal_depthwise_convolution():
    x, taps = torch.randn(2, 20, 6), torch.randn(6, 4)
    full = nn.functional.conv1d(x.mT, taps[:, None], padding=3, groups=6)[..., :20].mT
    torch.testing.assert_close(ti_ssm.short_conv(x, taps), full)


def test_lti_remembers_from_one_token_to_the_whole_context():
    ssm = tiny("ti_ssm", ssm_mode="lti").base[0].parts["ssm"]
    constants = 1 / (nn.functional.softplus(ssm.dt_bias) * ssm.A_log.exp())
    assert abs(constants[0] - 1) < 1e-3 and abs(constants[-1] - 64) < 0.1


def test_attention_stands_in_every_third_layer():
    blocks = tiny("ti_ssm", num_layers=9).blocks
    assert [i for i, block in enumerate(blocks) if "attention" in block.parts] == [2, 5, 8]


def test_low_rank_bases_are_products():
    model = shake(tiny("tong_ode", tong_rank=2))
    stack = model.stack("mlp.up")
    assert stack.shape == (6, 64, 32) and all(torch.linalg.matrix_rank(w, rtol=1e-4) == 2 for w in stack[1:])


def test_layers_of_tong_are_sums_of_bases():
    model = shake(tiny("tong_ode"))
    weights, bases = model.coefficients(), model.bases["mlp_down"]
    wanted = sum(c * basis for c, basis in zip(weights[2], bases, strict=True))
    torch.testing.assert_close(model.blocks[2].mlp.down.weight, wanted)


class Linear(nn.Module):
    """dx/dt = x."""

    def forward(self, x, step):
        return x


@pytest.mark.parametrize(
    ("solver", "growth"),
    [("euler", 1.25**4), ("heun", (1 + 1 / 2 + 1 / 8) ** 2), ("rk4", 1 + 1 + 1 / 2 + 1 / 6 + 1 / 24)],
)
def test_solvers_with_four_evaluations_reach_their_order(solver, growth):
    model, x = tiny("ti_ode", ode_solver=solver), torch.ones(1, 1, 32)
    model.blocks = nn.ModuleList(Linear() for _ in range(4))
    torch.testing.assert_close(model.backbone(x), growth * x)


def test_scoring_with_more_layers_covers_the_same_time():
    model, x = tiny("ti_ode", eval_layers=400).eval(), torch.ones(1, 1, 32)
    model.blocks = nn.ModuleList(Linear() for _ in range(400))
    assert (
        abs(model.backbone(x)[0, 0, 0].item() - math.e) < 0.01 and model.times()[-1] == 1 and len(model.times()) == 400
    )


@pytest.mark.parametrize("name", ["ti_ode", "tong_ode"])
def test_another_depth_scores_close_to_the_trained_one(name):
    same, more = tiny(name), tiny(name, eval_layers=8)
    fill_alike(same, more)
    x, y = some_tokens(2, 64), some_tokens(2, 64)
    gap = (more.nats(x, y) - same.nats(x, y)).abs().mean()
    assert 0 < gap < 0.5


@pytest.mark.parametrize("name", ["shared", *TIMED])
def test_default_size_is_stored_in_less_than_sixteen_megabytes(name):
    Model, Config = load_architecture(name)
    stored = Model(Config()).folded()
    matrices = {id(p): p for p in stored.parameters()}.values()
    incompressible = sum(
        4 * p.numel() if train_gpt.is_control(p) else p.numel() + 2 * p.numel() // p.size(-1) for p in matrices
    )
    assert incompressible < 15_500_000


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ti_mlp", {"ti_feat": "fourrier"}, "TI_FEAT=fourrier"),
        ("ti_mlp", {"ti_gate": "rank"}, "TI_GATE=rank"),
        ("ti_mlp", {"ti_blocks": 0}, "TI_BLOCKS=0"),
        ("ti_ssm", {"ssm_layout": "mlp"}, "SSM_LAYOUT=mlp"),
        ("ti_ode", {"ode_solver": "rk4", "num_layers": 6}, "NUM_LAYERS=6"),
        ("tong_ode", {"ti_feat": "table", "eval_layers": 8}, "EVAL_LAYERS"),
        ("tong_ode", {"tong_bases": 0}, "TONG_BASES=0"),
    ],
)
def test_bad_settings_are_refused_by_name(name, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(name, **settings)


@every_timed
def test_training_in_micro_batches_is_the_same(name):
    grads = []
    for micro_batches in (1, 2):
        model = tiny(name)
        fill_alike(model)
        trainer = train_gpt.Trainer(model.train().requires_grad_(True), train_gpt.RunConfig(), CPU, micro_batches)
        trainer.backward(some_tokens(4, 65))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
