"""Basis sharing: what layers share, what they keep to themselves, and what is stored."""

import itertools
import json

import pytest
import torch
from test_architectures import CPU, shake, some_tokens, tiny

import train_gpt
from architectures import load_architecture
from architectures.basis_sharing import TYPES
from architectures.generated import WRITERS, usual_std

SIDES = ("in", "out", "both")
EVERY_TYPE = "query,key,value,out,up,down"
every_side = pytest.mark.parametrize("side", SIDES)


def factored(side: str, **settings):
    return shake(tiny("basis_sharing", **dict(basis_side=side, basis_rank=4, basis_group=2) | settings))


def layers_of(model, name: str) -> list[torch.Tensor]:
    return [block.get_submodule(name).weight.double() for block in model.blocks]


def rank(w: torch.Tensor) -> int:
    return torch.linalg.matrix_rank(w, rtol=1e-5).item()


def header_of(model) -> tuple[dict, int]:
    """(header, bytes) of the model's artifact."""
    blob = train_gpt.pack_artifact(model, "basis_sharing", None, train_gpt.ScorePlan(64, 64), 1.0, 8)
    return train_gpt.read_header(blob)[0], len(blob)


@pytest.mark.parametrize(
    ("side", "group", "types", "rank"),
    itertools.product(SIDES, (1, 2, 3, 9), ("query", EVERY_TYPE), (None, 3, 12, 20, 512)),
)
def test_count_of_parameters_is_the_closed_form(side, group, types, rank):
    model = tiny("basis_sharing", basis_side=side, basis_group=group, basis_types=types, basis_rank=rank)
    assert sum(p.numel() for p in model.parameters()) == model.config.num_params()
    assert model.config.num_params() <= tiny("gpt").config.num_params()


@every_side
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("name", TYPES.values())
def test_layers_of_a_group_span_no_more_than_their_basis(side, group, name):
    layers = layers_of(factored(side, basis_group=group, basis_types=EVERY_TYPE), name)
    assert all(rank(w) == 4 for w in layers)
    read, written = torch.cat(layers), torch.cat(layers, dim=1)
    spanned, most = 4 * 4 // group, min(16, *layers[0].shape)
    if side != "out":
        assert rank(read) == min(spanned, most)
    if side != "in":
        assert rank(written) == min(spanned, most)
    if side == "in" and "key" not in name and "value" not in name:
        assert rank(written) == 16  # every layer writes where it likes


def test_every_layer_writes_in_directions_of_its_own_by_default():
    written = [w for name in WRITERS for w in layers_of(factored("in", basis_group=4), name)]
    assert rank(torch.cat(written, dim=1)) == 32 > 2 * 4
    narrow = [w for name in WRITERS for w in layers_of(factored("out", basis_group=4, basis_types=EVERY_TYPE), name)]
    assert rank(torch.cat(narrow, dim=1)) == 2 * 4


@every_side
def test_gradient_of_a_basis_is_the_sum_over_its_layers(side):
    model = factored(side, num_layers=3).requires_grad_(True)  # a group of two layers and one of a single layer
    made = model.materialize()
    grads = {name: torch.randn_like(w) for name, w in made.items()}
    torch.autograd.backward(list(made.values()), list(grads.values()))
    f = {s: model.factors[f"mlp_up_{s}"] for s in model.config.factors("mlp.up")}
    G = [grads[f"blocks.{i}.mlp.up.weight"] for i in range(3)]
    with torch.no_grad():
        for g, layers in enumerate([(0, 1), (2,)]):
            if side != "out":
                left = {"in": lambda i: f["own"][i], "both": lambda i: f["own"][i].T @ f["write"][i // 2]}[side]
                torch.testing.assert_close(f["read"].grad[g], sum(left(i) @ G[i] for i in layers))
            if side != "in":
                right = {"out": lambda i: f["own"][i], "both": lambda i: f["own"][i] @ f["read"][i // 2]}[side]
                torch.testing.assert_close(f["write"].grad[g], sum(right(i) @ G[i].T for i in layers))


def test_a_basis_for_every_layer_is_eigenweight():
    shared = factored("in", basis_group=1)
    eigen = shake(tiny("eigenweight", eigen_rank=4, recur_repeats=1))
    eigen.load_state_dict(shared.state_dict(), strict=False)
    for i, name in itertools.product(range(4), shared.config.generated()):
        m = eigen.blocks[i].get_submodule(name)
        m.u.copy_(shared.factors[shared.key(name, "own")][i])
        m.v.copy_(shared.factors[shared.key(name, "read")][i])
        m.s.fill_(1.0)
    train_gpt.fill_generated(eigen)
    x = some_tokens(2, 64)
    torch.testing.assert_close(shared.logits(x), eigen.logits(x), atol=1e-5, rtol=1e-5)


@every_side
def test_every_basis_is_stored_once(side):
    model = factored(side)
    state = model.state_dict()
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    header, size = header_of(model)
    assert [kind for _, kind, _ in header["tensors"] if kind == "same"] == []
    stored = sum(4 * p.numel() if train_gpt.is_control(p) else p.numel() for p in model.parameters())
    scales = sum(2 * p.numel() // p.size(-1) for p in model.parameters() if not train_gpt.is_control(p))
    assert size < 1.1 * (stored + scales) + len(json.dumps(header))


@every_side
def test_another_layer_of_a_group_adds_what_is_its_own_alone(side):
    def params(n: int) -> int:
        config = tiny("basis_sharing", num_layers=n, basis_group=9, basis_side=side, basis_types=EVERY_TYPE).config
        return config.num_params() - config.kept_params()

    own = {"in": 32 + 16 + 16 + 32 + 64 + 32, "out": 32 + 32 + 32 + 32 + 32 + 64, "both": 6 * 8}[side]
    assert params(4) - params(3) == params(3) - params(2) == 8 * own


@every_side
def test_matrices_begin_at_the_usual_scale_and_bases_orthonormal(side):
    Model, Config = load_architecture("basis_sharing")
    model = Model(Config(num_layers=2, model_dim=256, basis_side=side))
    made = model.materialize()
    for name, (_, columns) in model.config.matrices().items():
        wanted = 0.0 if name in WRITERS else usual_std(columns)
        assert abs(made[f"blocks.1.{name}.weight"].square().mean().sqrt() - wanted) < 0.05 * usual_std(columns)
        for factor in [model.factors[model.key(name, s)][0] for s in model.config.factors(name) if s != "own"]:
            torch.testing.assert_close(factor @ factor.T, torch.eye(64), atol=1e-5, rtol=0)


def test_training_in_micro_batches_is_the_same():
    grads = []
    for micro_batches in (1, 4):
        model = factored("in").train().requires_grad_(True)
        train_gpt.Trainer(model, train_gpt.RunConfig(), CPU, micro_batches).backward(some_tokens(4, 65))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [64, 128, 256])
def test_size_of_the_artifact_grows_with_the_rank_and_stays_below_the_limit(rank):
    def size(rank: int | None) -> int:
        return load_architecture("basis_sharing")[1](basis_rank=rank).num_params()

    assert size(rank // 2) < size(rank) < 15_000_000 and size(None) == size(128)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"basis_side": "input"}, "BASIS_SIDE=input"),
        ({"basis_types": "query,fc"}, "'fc' must be one of query"),
        ({"basis_group": 0}, "BASIS_GROUP=0"),
        ({"basis_rank": 0}, "BASIS_RANK=0"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny("basis_sharing", **settings)
