"""tools.analyze: every measurement against a computation by brute force, and the command on every architecture."""

import json
import math

import pytest
import torch
from conftest import write_bytes_data
from scipy.optimize import linear_sum_assignment
from test_architectures import every_architecture, shake, some_tokens, tiny
from torch import Tensor, nn

import train_gpt
from architectures.layers import CausalSelfAttention, LanguageModel, Linear, ModelConfig
from tools import analyze
from tools.analysis import figures, gates
from tools.analysis.calls import layers
from tools.analysis.spectra import spectra

SMALL = dict(train_seq_len=6, num_layers=4, model_dim=16, num_heads=2, num_kv_heads=1)
MODELS = (
    *[("gpt", {}), ("ti_mlp", {}), ("ti_ssm", {"ssm_mode": "selective", "d_state": 4, "ssm_attn_every": 2})],
    *[("ti_ssm", {"ssm_mode": "lti", "d_state": 4, "ssm_attn_every": 2}), ("tong_ode", {})],
    *[("ti_ode", {}), ("ti_ode", {"ode_solver": "heun"}), ("shared", {"ti_blocks": 1})],
    ("strong", {"lanes_last_n": 3, "skip_gates": True}),
)
every_model = pytest.mark.parametrize(("name", "settings"), MODELS, ids=str)


def same_multiset(found: Tensor, expected: Tensor) -> bool:
    """Whether two lists of complex numbers agree up to their order."""
    distance = (found[:, None] - expected[None, :]).abs()
    return distance[linear_sum_assignment(distance.numpy())].max() < 1e-7 * expected.abs().max()


@every_model
def test_spectra_are_the_dense_eigenvalues_of_the_weights_that_run(name, settings):
    model = shake(tiny(name, **settings))
    ran = [m for block in model.blocks for m in block.modules() if isinstance(m, CausalSelfAttention)]
    heads = spectra(model, some_tokens(1, 8))
    assert len(heads) == 4 * len(ran) and heads[0]["kv_head"] == 0 and heads[3]["kv_head"] == 1
    for i, attention in enumerate(ran):
        query, out = (
            attention.query.weight.double().unflatten(0, (4, 8)),
            attention.out.weight.double().T.view(4, 8, -1),
        )
        key, value = (
            m.weight.double().unflatten(0, (2, 8)).repeat_interleave(2, 0) for m in (attention.key, attention.value)
        )
        for head in range(4):
            entry = heads[4 * i + head]
            for kind, dense in (("qk", query[head].T @ key[head]), ("ov", out[head].T @ value[head])):
                values = torch.view_as_complex(torch.tensor(entry[f"{kind}_eigenvalues"], dtype=torch.float64))
                every = torch.linalg.eigvals(dense)  # D of them, all but K of which are zero
                assert same_multiset(values, every[every.abs().argsort(descending=True)[:8]])
                assert entry[f"{kind}_radius"] == pytest.approx(every.abs().max().item())
                assert entry[f"{kind}_trace"] == pytest.approx(dense.trace().item(), abs=1e-9)
                assert entry[f"{kind}_complex_share"] == (every[every.abs() > 1e-9].imag.abs() > 1e-9).sum() / 8


def test_ov_traces_add_up_to_that_of_attention_to_oneself():
    model = shake(tiny("gpt"))
    attention, x = model.blocks[0].mixer, torch.randn(1, 1, 32)
    whole = torch.autograd.functional.jacobian(attention, x).view(32, 32)  # one token: heads read their own value
    traces = [head["ov_trace"] for head in spectra(model, some_tokens(1, 8))[:4]]
    assert sum(traces) == pytest.approx(whole.trace().item(), rel=1e-4)


def test_layers_are_counted_as_they_run():
    model = shake(tiny("tong_ode", num_layers=4, eval_layers=8))
    assert len(layers(model, some_tokens(1, 8))) == 8
    assert [h["layer"] for h in spectra(model, some_tokens(1, 8))[::4]] == list(range(8))
    shared = shake(tiny("shared", num_layers=4, ti_blocks=1))
    assert layers(shared, some_tokens(1, 8)) == [shared.blocks[0]] * 4


class Outside(LanguageModel):
    """Attention in the blocks, and once more after them."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.last = CausalSelfAttention(config)

    def make_mixer(self, layer_idx: int) -> nn.Module:
        return CausalSelfAttention(self.config)

    def backbone(self, x: Tensor) -> Tensor:
        return self.last(super().backbone(x))


def test_attention_outside_the_blocks_is_in_no_layer():
    heads = spectra(shake(Outside(ModelConfig(vocab_size=260, **SMALL))), some_tokens(1, 6))
    assert [(head["layer"], head["module"]) for head in heads[-3:]] == [(3, "blocks.3.mixer")] + 2 * [(None, "last")]


class Odd(nn.Module):
    """A mixer that looks ahead, has no forward derivative, and holds a state-space model's tensors unused."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return 2 * grad

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.A_log = nn.Parameter(torch.arange(6.0).view(2, 3))
        self.dt_bias = nn.Parameter(torch.tensor([-1.0, 2.0]))
        self.out = Linear(config.model_dim, config.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.Double.apply(x.flip(1)))


class OddModel(LanguageModel):
    def make_mixer(self, layer_idx: int) -> nn.Module:
        return Odd(self.config)


def test_analysis_goes_on_without_attention_and_shows_a_leak():
    model = shake(OddModel(ModelConfig(vocab_size=260, **SMALL)))
    found = analyze.analyze(model, some_tokens(2, 7))
    assert found["attention"] == [] and found["lyapunov"] is None and found["sensitivity"]["max_future"] > 0
    assert found["notes"][:2] == ["no attention", "no gates"] and "forward mode" in found["notes"][2]
    ssm = model.blocks[1].mixer  # Delta was not seen: that of an input of zeros
    tau = 1 / (torch.log1p(ssm.dt_bias.double().exp())[:, None] * ssm.A_log.double().exp())
    assert not found["ssm"][1]["measured"]
    torch.testing.assert_close(
        torch.tensor(found["ssm"][1]["tau_p50"], dtype=torch.float64), tau.flatten(), rtol=1e-5, atol=0
    )


def test_time_constants_of_a_filter_are_those_of_its_answer_to_an_impulse():
    model = shake(tiny("ti_ssm", ssm_mode="lti", ssm_gate=False, d_state=8))
    entry, ssm = gates.time_constants(model, some_tokens(1, 8))[1], model.blocks[1].parts["ssm"]
    ssm.skip.zero_()
    ssm.write.weight = torch.eye(32, 8)  # what comes out are the states
    answer = ssm(torch.randn(1, 1, 32) * (torch.arange(20) == 0)[:, None])[0, :, :8].double().abs()
    assert entry["layer"] == 1 and entry["tau_p05"] == entry["tau_p95"]
    torch.testing.assert_close(
        1 / (answer[1] / answer[2]).log(), torch.tensor(entry["tau_p50"]).double(), rtol=1e-3, atol=0
    )


def test_time_constants_of_a_selective_model_are_quantiles_over_the_text():
    model, x, read = shake(tiny("ti_ssm")), some_tokens(1, 41), []
    ssm = model.blocks[3].parts["ssm"]
    handle = ssm.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    entries = gates.time_constants(model, x)
    handle.remove()
    delta = torch.log1p((read[0][0] @ ssm.step.weight.T + ssm.dt_bias).exp())  # (41, H)
    tau = (1 / (delta * ssm.A_log.exp())).sort(dim=0)[0].double()
    for word, place in (("p05", 2), ("p50", 20), ("p95", 38)):
        torch.testing.assert_close(torch.tensor(entries[3][f"tau_{word}"]).double(), tau[place], rtol=1e-4, atol=0)
    assert all(entry["measured"] and entry["layer"] == i for i, entry in enumerate(entries))


def test_gates_are_what_the_weights_of_a_layer_are_multiplied_by():
    model = shake(tiny("ti_mlp", ti_blocks=1)).folded()
    train_gpt.fill_generated(model)
    found = {group.name: group for group in gates.groups(model, layers(model, some_tokens(1, 8)))}
    for i, block in enumerate(model.blocks):
        ratio = (block.mixer.out.weight / model.base[0].mixer.out.weight)[:, 0]
        torch.testing.assert_close(found["attention_out"].values[i], ratio, atol=1e-4, rtol=1e-4)
    assert found["mixer_scale"].kind == "scale" and found["resid_mix.1"].values.shape == (4, 32)


def test_gates_are_listed_in_those_layers_that_use_them():
    model = shake(tiny("ti_ssm", ti_gate="lora2", num_layers=6))
    found = {group.name: group.layers for group in gates.groups(model, layers(model, some_tokens(1, 8)))}
    assert found["parts.attention.out.weight"] == [2, 5] == found["scales.attention"]
    assert found["parts.ssm.out.weight"] == found["ssm_A"] == list(range(6))


@pytest.mark.parametrize("settings", [{}, {"ti_feat": "legendre"}, {"tong_bases": 6}], ids=str)
def test_coefficients_are_what_the_bases_are_weighed_by(settings):
    model = shake(tiny("tong_ode", **{"tong_bases": 3} | settings)).folded()
    train_gpt.fill_generated(model)
    weights, bases = gates.groups(model, [])[0].values, model.bases["mlp_up"]
    for i, block in enumerate(model.blocks):
        torch.testing.assert_close(block.mlp.up.weight, bases[0] + torch.einsum("k,kij->ij", weights[i], bases[1:]))


def test_variance_over_depth_and_between_channels_add_up():
    values = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    entry = gates.summary(gates.Group("g", "gate", list(range(5)), values))
    between = values.mean(dim=0).var(correction=0).item()
    assert entry["depth_variance"] + between == pytest.approx(entry["total_variance"])
    assert entry["depth_share"] == pytest.approx(1 - between / entry["total_variance"])
    still = gates.summary(gates.Group("g", "gate", [0, 1], torch.arange(3.0).expand(2, 3)))
    assert still["depth_variance"] == still["depth_share"] == 0


def stored(name: str, folder, sha256: str | None = None, **settings):
    """The path of the artifact of a tiny shaken model."""
    model = shake(tiny(name, **dict(train_seq_len=24) | settings))
    path = folder / "model.bin"
    path.write_bytes(train_gpt.pack_artifact(model, name, sha256, train_gpt.ScorePlan(24, 24), 1.0, 8))
    return path


@every_architecture
def test_every_architecture_can_be_analysed_and_drawn(name):
    found = analyze.rounded({"arch": name} | analyze.analyze(shake(tiny(name)), some_tokens(2, 25), count=2))
    json.dumps(found, allow_nan=False)
    assert found["lyapunov"] and found["num_layers"] == len(found["lyapunov"]["stream_by_layer"])
    assert found["sensitivity"]["max_future"] == 0 and len(analyze.table(found)) > found["num_layers"]
    assert {figure for figure, _ in figures.drawn(found)} >= {"lyapunov", "sensitivity"}


@pytest.mark.parametrize("name", ["gpt", "ti_ssm"])
def test_command_writes_what_applies_to_the_architecture(name, data, tmp_path, capsys):
    path = stored(name, tmp_path)
    assert analyze.main([str(path), "--data", str(data), "--windows", "2", "--exponents", "2"]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "analysis/analysis.json").read_text())
    assert said.startswith(f"{name}: 4 layers x 32, 2 windows of 24, validation text of {data.name}\n")
    assert len(found["lyapunov"]["exponents_error"]) == 2
    assert ("no ssm" in said) == (name == "gpt") == (not found["ssm"]) and "no attention" not in said
    expected = {"spectra", "lyapunov", "sensitivity", "gates"} | ({"time_constants"} if name == "ti_ssm" else set())
    drawn = {p.name for p in (tmp_path / "analysis").iterdir()} - {"analysis.json"}
    assert drawn == {f"{figure}.{suffix}" for figure in expected for suffix in ("png", "pdf")}


def test_command_without_text_says_so_and_prints_its_json(tmp_path, capsys):
    path = stored("tong_ode", tmp_path)
    assert analyze.main([str(path), "--windows", "1", "--exponents", "1", "--json", "--out", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "a/analysis.json").read_text() and json.loads(printed)["text"] is None
    assert analyze.main([str(path), "--windows", "1", "--exponents", "1", "--out", str(tmp_path / "b")]) == 0
    assert "random tokens" in capsys.readouterr().out
    for first in (tmp_path / "a").iterdir():
        assert first.read_bytes() == (tmp_path / "b" / first.name).read_bytes()


def test_command_refuses_what_it_cannot_measure(data, tmp_path, capsys):
    other = stored("gpt", tmp_path, sha256="0" * 64)
    short = write_bytes_data(tmp_path / "short", b"a" * 99, b"b" * 9)
    wrong = {"tokenizer": [str(other), "--data", str(data)], "artifact": [str(short / "manifest.json")]}
    wrong["No such file"] = [str(tmp_path / "none.bin")]
    assert all(analyze.main(argv) == 2 and words in capsys.readouterr().err for words, argv in wrong.items())
    assert analyze.main([str(stored("gpt", tmp_path)), "--data", str(short)]) == 2
    assert "10 validation tokens; --seq-len 24 needs 25" in capsys.readouterr().err
    broken = shake(tiny("gpt"))
    broken.embed.weight[3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        analyze.analyze(broken, torch.full((1, 9), 3))
