"""Eigenweight: rank, size and the two ways to run its matrices, with recurrence and without."""

import itertools

import pytest
import torch
from test_architectures import CPU, shake, some_tokens, tiny

import train_gpt
from architectures.eigenweight import Config, LowRank, Model
from architectures.generated import WRITERS

RECURRENCE = ({"recur_repeats": 1}, {}, {"recur_layers": "0,3", "recur_repeats": 3, "recur_order": "layer"})


def eigen(**settings):
    return shake(tiny("eigenweight", **dict(eigen_rank=4) | settings))


def products(model) -> dict[str, torch.Tensor]:
    """Every factored matrix, by the name of its module."""
    return {name: m.product() for name, m in model.named_modules() if isinstance(m, LowRank)}


def artifact_bytes(**settings) -> int:
    model = shake(tiny("eigenweight", **dict(recur_repeats=1) | settings))
    return len(train_gpt.pack_artifact(model, "eigenweight", None, train_gpt.ScorePlan(64, 64), 1.0, 8))


@pytest.mark.parametrize(("attn", "mlp"), [(None, None), (2, None), (None, 7), (3, 9), (1, 1)])
def test_every_matrix_has_its_rank_exactly(attn, mlp):
    made = products(eigen(eigen_attn_rank=attn, eigen_mlp_rank=mlp))
    assert len(made) == 4 * 6
    for name, w in made.items():
        r = (attn if "mixer" in name else mlp) or 4
        singular = torch.linalg.svdvals(w.double())
        assert singular[r - 1] > 1e-3 * singular[0] and singular[r] < 1e-6 * singular[0]


@pytest.mark.parametrize("recurrence", RECURRENCE, ids=str)
@pytest.mark.parametrize("settings", [{}, {"eigen_rank": 12}, {"eigen_attn_rank": 2}], ids=str)
def test_factored_and_merged_paths_agree(recurrence, settings, monkeypatch):
    logits, grads, x, y = [], [], some_tokens(4, 65)[:, :-1], some_tokens(4, 65)
    for how in ("factored", "merged"):
        monkeypatch.setattr(Config, "merges", lambda self, name, how=how: how == "merged")
        model = eigen(**settings, **recurrence).train().requires_grad_(True)
        logits.append(model.logits(x))
        train_gpt.Trainer(model, train_gpt.RunConfig(), CPU, micro_batches=2).backward(y)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert bool(model.materialize()) == (how == "merged")
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("recurrence", RECURRENCE, ids=str)
def test_it_is_depth_recurrence_with_matrices_of_low_rank(recurrence):
    low = eigen(**recurrence)
    full = shake(tiny("depth_recurrence", **recurrence))
    weights = {f"{name}.weight": w for name, w in products(low).items()}
    full.load_state_dict({n: v for n, v in low.state_dict().items() if n in full.state_dict()} | weights)
    x = some_tokens(2, 64)
    torch.testing.assert_close(low.logits(x), full.logits(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("attn", "mlp", "rank"),
    [(None, None, r) for r in (None, 1, 5, 11, 20, 64)] + [(2, 9, 4), (9, 2, 4), (40, 3, None)],
)
def test_count_of_parameters_is_the_formula_matrix_by_matrix(attn, mlp, rank):
    model = tiny("eigenweight", eigen_rank=rank, eigen_attn_rank=attn, eigen_mlp_rank=mlp)
    assert sum(p.numel() for p in model.parameters()) == model.config.num_params()
    for name, (m, n) in model.config.matrices().items():
        r = (attn if name.startswith("mixer") else mlp) or rank or 8
        params = sum(p.numel() for p in model.blocks[1].get_submodule(name).parameters())
        assert params == min(r * (m + n + 1), m * n)


@pytest.mark.parametrize(
    ("settings", "in_a_layer"),
    [
        ({"eigen_rank": 64}, 425_984),
        ({"eigen_attn_rank": 32, "eigen_mlp_rank": 96}, 409_600),
        ({"eigen_attn_rank": 96, "eigen_mlp_rank": 32}, 442_368),
        ({"eigen_attn_rank": 128, "eigen_mlp_rank": 32}, 557_056),
    ],
    ids=str,
)
def test_factors_at_the_normal_size_are_as_large_as_published(settings, in_a_layer):
    config = Config(**settings)
    values = 4 * config.rank("mixer.query") + 2 * config.rank("mlp.up")  # the s, which the published counts leave out
    assert config.num_params() - config.kept_params() == 9 * (in_a_layer + values)


def test_published_ranks_and_widths_fit_the_limit():
    sizes = [Config(eigen_rank=r).num_params() for r in (64, 128, 256)]
    wide = [Config(model_dim=d, eigen_rank=r).num_params() for d, r in ((1024, 32), (768, 48), (1024, 64))]
    assert sizes == sorted(sizes) and max(*sizes, *wide) < 15_000_000
    assert Config().num_params() == Config(eigen_rank=128).num_params()


def test_a_matrix_that_factors_would_not_shrink_stays_whole():
    config = Config(eigen_rank=256)
    assert set(config.generated()) == {"mlp.up", "mlp.down"}
    assert Config(eigen_rank=170).generated().keys() >= {"mixer.key", "mixer.value"}
    assert "mixer.key" not in Config(eigen_rank=171).generated()


def test_artifact_grows_with_the_rank_and_stays_below_the_whole_matrices():
    sizes = [artifact_bytes(eigen_rank=r) for r in (1, 2, 4, 8, 10, 512)]
    assert all(a < b for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize(("knob", "changed"), [("eigen_attn_rank", "mixer"), ("eigen_mlp_rank", "mlp")])
def test_either_rank_leaves_the_other_matrices_alone(knob, changed):
    shapes = [{n: p.shape for n, p in tiny("eigenweight", **{knob: r}).named_parameters()} for r in (2, 5)]
    differ = {n for n in shapes[0] if shapes[0][n] != shapes[1][n]}
    assert differ and all(f".{changed}." in n for n in differ)


def test_matrices_are_multiplied_out_where_that_is_cheaper():
    config = Config(eigen_rank=64)
    assert {name for name in config.generated() if config.merges(name)} == {"mixer.key", "mixer.value"}
    config = Config(eigen_rank=128)
    assert all(config.merges(name) for name in config.generated())


def test_repeated_layers_are_multiplied_out_once():
    once, thrice = (tiny("eigenweight", recur_repeats=n).materialize() for n in (1, 3))
    assert once.keys() == thrice.keys() and len(once) == 4 * 6


def test_begins_at_the_usual_scale_with_orthonormal_factors():
    model = Model(Config(num_layers=1, model_dim=256))
    for name, (rows, _) in model.config.matrices().items():
        m = model.blocks[0].get_submodule(name)
        for factor in (m.v,) if name in WRITERS else (m.u, m.v):
            torch.testing.assert_close(factor @ factor.T, torch.eye(64), atol=1e-5, rtol=0)
        wanted = 0.0 if name in WRITERS else (rows / 3) ** 0.5  # nn.Linear's
        torch.testing.assert_close(m.product().norm(), torch.tensor(wanted), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eigen_rank": 0}, "EIGEN_RANK=0"),
        ({"eigen_mlp_rank": -3}, "EIGEN_MLP_RANK=-3"),
        ({"recur_layers": "3,9"}, "RECUR_LAYERS=3,9"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny("eigenweight", **settings)
