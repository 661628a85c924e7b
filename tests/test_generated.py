"""Weights made from a small code: hypernet, siren, seed_model, and the numbers that follow from a seed."""

import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from test_architectures import CPU, shake, some_tokens, tiny

import train_gpt
from architectures import load_architecture, seed_model, siren
from architectures.generated import WRITERS, hashed, hashed_signs, hashed_uniform, usual_std

NETWORKS = ("hypernet", "siren")
SETTINGS = (
    *[("hypernet", {"hyper_mode": mode, "hyper_tile": tile}) for mode in ("tile", "lowrank") for tile in (8, 12, 64)],
    *[("siren", {"siren_code": code, "siren_base": base}) for code in (0, 8) for base in ("none", "seed")],
    ("siren", {"siren_layers": 1}),
    *[("seed_model", {"seed_dim": d, "seed_train_embed": train}) for d in (1, 100, 2048) for train in (True, False)],
    ("seed_model", {"tie_embeddings": False, "seed_train_embed": False}),
)
every_network = pytest.mark.parametrize("name", NETWORKS)
every_generator = pytest.mark.parametrize("name", [*NETWORKS, "seed_model"])
every_setting = pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)


def generator_of(model: torch.nn.Module) -> torch.nn.Module:
    """The module that all its weights are made by."""
    return next(getattr(model, name) for name in ("subspace", "time", "generator") if hasattr(model, name))


def at_normal_width(name: str, **settings):
    """One layer of the kit's normal width."""
    Model, Config = load_architecture(name)
    torch.manual_seed(0)
    return Model(Config(num_layers=1, **settings))


def artifact(model) -> bytes:
    name = type(model).__module__.rpartition(".")[2]
    return train_gpt.pack_artifact(model, name, None, train_gpt.ScorePlan(64, 64), 1.0, 8)


def generated(model) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return model.materialize()


def splitmix64(seed: int, stream: int, count: int) -> list[int]:
    """`hashed` in Python's own integers."""
    mask = 2**64 - 1

    def mixed(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    start = mixed((mixed(seed & mask) + stream) & mask)
    return [mixed((start + i * 0x9E3779B97F4A7C15) & mask) for i in range(1, count + 1)]


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (42, 7), (-1, 3), (2**63, 1)])
def test_hash_is_splitmix64(seed, stream):
    words = splitmix64(seed, stream, 70)
    assert hashed(seed, stream, 70).tolist() == words
    assert hashed_signs(seed, stream, 2, 65)[0].tolist() == [2 * (words[i // 64] >> i % 64 & 1) - 1 for i in range(65)]
    wanted = [((w >> 40) + 0.5) / 2**23 - 1 for w in words]
    np.testing.assert_allclose(hashed_uniform(seed, stream, 7, 10).flatten(), np.sqrt(3) * np.array(wanted), rtol=1e-6)


def test_hashed_numbers_are_as_good_as_random_ones():
    draws = [hashed_uniform(seed, stream, 100_000) for seed in (0, 1) for stream in (0, 1)]
    assert all(abs(x.mean()) < 0.02 and abs(x.var() - 1) < 0.02 for x in draws)
    assert all(abs((x * y).mean()) < 0.02 for x, y in itertools.combinations(draws, 2))
    assert abs(hashed_signs(0, 0, 100_000).float().mean()) < 0.02
    assert abs((draws[0][1:] * draws[0][:-1]).mean()) < 0.02


@every_setting
def test_count_of_parameters_is_the_closed_form(name, settings):
    model = tiny(name, **settings)
    assert sum(p.numel() for p in model.parameters()) == model.config.num_params()


@every_setting
def test_generated_weights_cost_no_bytes(name, settings):
    model = tiny(name, **settings)
    assert not set(model.state_dict()) & set(model.materialize())
    assert set(model.state_dict()) == set(dict(model.named_parameters()))


@every_generator
def test_default_size_is_far_below_what_it_generates(name):
    config = load_architecture(name)[1]()
    made_of = config.seed_dim if name == "seed_model" else config.generator_params()
    assert config.num_generated() > 4 * made_of and 4 * config.num_params() < 15_500_000


@every_generator
def test_rebuilt_weights_are_equal_to_the_bit(name):
    blob, rebuilt = artifact(shake(tiny(name))), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        rebuilt.append(dict(train_gpt.load_artifact(blob, CPU.device)[0].named_buffers()))
    assert rebuilt[0].keys() == rebuilt[1].keys()
    assert all(torch.equal(t, rebuilt[1][name]) for name, t in rebuilt[0].items())


@every_generator
def test_weights_are_generated_once_per_optimizer_step(name):
    grads, calls = [], []
    for micro_batches in (1, 4):
        model = shake(tiny(name)).train().requires_grad_(True)
        generator = generator_of(model)
        generator.register_forward_hook(lambda *_: calls.append(1))
        train_gpt.Trainer(model, train_gpt.RunConfig(), CPU, micro_batches).backward(some_tokens(4, 65))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert len(calls) == 2
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", [*NETWORKS, "seed_model", "ti_mlp", "tong_ode"])
def test_weights_are_generated_in_full_precision(name):
    model, seen = tiny(name), []
    generator = generator_of(model)
    generator.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        model.materialize()
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "settings", [{}, {"hyper_mode": "lowrank"}, {"siren_code": 8}, {"siren_base": "seed"}], ids=str
)
@every_network
def test_generated_weights_begin_at_the_usual_scale(name, settings):
    if not all(key.startswith(name[:5]) for key in settings):
        pytest.skip("a setting of the other network")
    model = tiny(name, **settings)
    for key, w in generated(model).items():
        matrix = key.split(".", 2)[2].removesuffix(".weight")
        wanted = 0.0 if matrix in WRITERS else usual_std(w.size(1))
        assert abs(w.square().mean().sqrt() - wanted) < 1e-4


@every_network
def test_generated_matrices_have_high_rank_and_differ_between_layers(name):
    model = at_normal_width(name)
    with torch.no_grad():
        model.scale.gains.fill_(1.0)
    for w in generated(model).values():
        singular = torch.linalg.svdvals(w)
        assert singular.square().sum() / singular[0] ** 2 > 32
    model = tiny(name)
    with torch.no_grad():
        model.scale.gains.fill_(1.0)
    made = generated(model)
    for matrix in model.config.matrices():
        layers = torch.stack([made[f"blocks.{i}.{matrix}.weight"].flatten() for i in range(4)])
        alike = torch.corrcoef(layers) - torch.eye(4)
        assert alike.abs().max() < 0.9


@every_generator
def test_depth_stores_nothing_but_codes_and_scales(name):
    few, many = (load_architecture(name)[1](num_layers=n) for n in (9, 18))
    more = many.num_params() - few.num_params()
    if name == "seed_model":
        assert more == 0
    else:
        scales = 9 * (4 * 512 + 8) + 5 * 512  # of the blocks and of the skips
        assert more == scales + 9 * (6 + (few.hyper_dim if name == "hypernet" else 0))


def test_hypernet_code_of_a_layer_changes_that_layer_alone():
    model = shake(tiny("hypernet"))
    before = generated(model)
    model.generator.layer_codes[2] += 1.0
    after = generated(model)
    assert {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])} == {"2"}


@pytest.mark.parametrize("rank", [1, 5])
def test_hypernet_rank_is_that_of_every_matrix_or_the_number_of_shared_tiles(rank):
    low = shake(tiny("hypernet", hyper_mode="lowrank", hyper_rank=rank, hyper_tile=8))
    assert {torch.linalg.matrix_rank(w, rtol=1e-4).item() for w in generated(low).values()} == {rank}
    tiled = shake(tiny("hypernet", hyper_rank=rank, hyper_tile=8))
    up = [generated(tiled)[f"blocks.{i}.mlp.up.weight"] for i in range(4)]
    tiles = torch.cat([(w / w.norm()).view(8, 8, 4, 8).transpose(1, 2).reshape(-1, 64) for w in up])
    assert torch.linalg.matrix_rank(tiles, rtol=1e-4) == rank


def test_hypernet_rows_and_columns_beyond_the_last_tile_are_cut_off():
    cut, whole = tiny("hypernet", hyper_tile=48), tiny("hypernet", hyper_tile=48, model_dim=48)
    whole.generator.load_state_dict(cut.generator.state_dict())  # as many tiles, of which more is used
    small, large = cut.generator(), whole.generator()
    for name, w in small.items():
        torch.testing.assert_close(w, large[name][:, : w.size(1), : w.size(2)])


def test_siren_stores_as_much_at_any_width():
    narrow, wide = (tiny("siren", model_dim=n, siren_code=0).generator.state_dict() for n in (32, 64))
    assert {name: t.shape for name, t in narrow.items()} == {name: t.shape for name, t in wide.items()}
    narrow, wide = (tiny("siren", model_dim=n, siren_code=5).config.generator_params() for n in (32, 64))
    assert wide - narrow == 5 * (32 + 32 + 16 + 16 + 64)


def test_siren_is_the_network_of_the_equation():
    model = shake(tiny("siren", siren_layers=3))
    net, made = model.generator, model.generator()
    h = siren.waves(4, 12, 64)[2, 9, 5]  # layer 2, columns of mlp.up, index 5
    for layer, bias in zip(net.layers, net.biases, strict=True):
        h = torch.sin(layer.weight @ h / siren.SLOWER + bias)
    v = net.out.weight @ h
    g = siren.waves(4, 12, 64)[2, 8, 60]
    for layer, bias in zip(net.layers, net.biases, strict=True):
        g = torch.sin(layer.weight @ g / siren.SLOWER + bias)
    u = net.out.weight @ g
    torch.testing.assert_close(made["mlp.up"][2, 60, 5], u @ v, atol=1e-4, rtol=1e-4)


def test_siren_coordinates_tell_all_points_apart():
    points = siren.waves(4, 12, 64).flatten(0, 2)
    unit = points / points.norm(dim=-1, keepdim=True)
    assert (unit @ unit.T - torch.eye(len(unit))).max() < 0.7


def test_siren_base_follows_from_its_seed_and_is_not_stored():
    plain, based = (tiny("siren", siren_base=base) for base in ("none", "seed"))
    assert plain.state_dict().keys() == based.state_dict().keys()
    up, seeded = "blocks.0.mlp.up.weight", hashed_uniform(siren.BASE_SEED, 4, 4, 64, 32)[0]
    alike = [torch.corrcoef(torch.stack((generated(m)[up].flatten(), seeded.flatten())))[0, 1] for m in (plain, based)]
    assert abs(alike[0]) < 0.1 and abs(alike[1] - 0.5**0.5) < 0.1


def test_seed_model_begins_where_the_seed_says_whatever_was_drawn_before():
    model, (Model, _) = tiny("seed_model"), load_architecture("seed_model")
    torch.manual_seed(123)
    other = Model(model.config)
    assert torch.equal(model.start, other.start) and torch.equal(model.subspace.signs, other.subspace.signs)
    made = generated(model)
    query = torch.tensor([((w >> 40) + 0.5) / 2**23 - 1 for w in splitmix64(42, 6, 32 * 32)], dtype=torch.float64)
    torch.testing.assert_close(made["blocks.0.mixer.query.weight"].flatten().double(), query / 32**0.5)
    assert not made["blocks.3.mlp.down.weight"].any() and (made["blocks.2.mixer_scale"] == 1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no second device to compare with")
def test_seed_model_is_the_same_on_the_gpu():
    here, there = shake(tiny("seed_model")), shake(tiny("seed_model")).cuda()
    torch.testing.assert_close(
        {name: w.cpu() for name, w in generated(there).items()}, generated(here), atol=1e-6, rtol=1e-5
    )


def test_seed_model_of_another_seed_has_other_weights_in_as_many_bytes():
    one, other = (shake(tiny("seed_model", seed_prng=seed)) for seed in (42, 43))
    assert len(artifact(one)) == len(artifact(other))
    assert all(not torch.equal(w, generated(other)[name]) for name, w in generated(one).items())


def test_seed_model_stores_up_to_four_bytes_a_dimension_at_any_depth():
    def size(**settings) -> int:
        return len(artifact(shake(tiny("seed_model", **settings))))

    sizes = [size(seed_dim=n) for n in (2000, 6000, 10_000)]
    assert all(3 * 4000 < b - a < 4 * 4000 for a, b in itertools.pairwise(sizes))
    assert abs((sizes[2] - sizes[1]) / (sizes[1] - sizes[0]) - 1) < 0.05
    assert abs(size(num_layers=8) - size(num_layers=2)) < 200


def test_seed_model_stores_phi_and_the_embedding_alone():
    assert set(tiny("seed_model").state_dict()) == {"embed.weight", "phi"}
    assert set(tiny("seed_model", seed_train_embed=False).state_dict()) == {"phi"}
    assert set(tiny("seed_model").materialize()) == {n for n, _ in tiny("gpt").named_parameters()} - {"embed.weight"}


@pytest.mark.parametrize("size", [1, 2, 16, 128, 256, 1024])
def test_subspace_transform_is_the_hadamard_matrix(size):
    subspace = seed_model.Subspace(tiny("seed_model", seed_dim=size).config)
    x = torch.randn(3, size)
    wanted = x @ torch.from_numpy(hadamard(size)).float() / size**0.5
    torch.testing.assert_close(subspace.hadamard(x), wanted, atol=1e-5, rtol=1e-5)


def test_seed_model_moves_along_orthogonal_columns():
    model = tiny("seed_model", seed_dim=16)  # 16 divides the number of weights
    columns = torch.stack([model.subspace(e) for e in torch.eye(16)], dim=1)
    blocks = model.config.num_generated() / 16
    torch.testing.assert_close(columns.T @ columns, blocks * torch.eye(16), atol=1e-2, rtol=0)
    phi = torch.randn(16)
    torch.testing.assert_close(model.subspace(phi), columns @ phi, atol=1e-5, rtol=1e-5)


def test_seed_model_has_as_many_directions_as_dimensions():
    subspace = tiny("seed_model", seed_dim=200).subspace
    columns = torch.stack([subspace(e) for e in torch.eye(200)], dim=1)
    assert torch.linalg.matrix_rank(columns[:3000]) == 200


@pytest.mark.parametrize("name", ["blocks.1.mixer.query.weight", "blocks.1.mlp.down.weight", "blocks.1.mlp_scale"])
def test_seed_model_moves_every_tensor_by_the_declared_step(name):
    model = tiny("seed_model")
    before = generated(model)
    with torch.no_grad():
        model.phi.copy_(torch.randn(2048))
    moved = (generated(model)[name] - before[name]).square().mean().sqrt()
    step = seed_model.CONTROL_STEP if before[name].ndim < 2 else usual_std(before[name].size(1))
    assert 0.7 < moved / step < 1.4


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("hypernet", {"hyper_mode": "tiles"}, "HYPER_MODE=tiles"),
        ("hypernet", {"hyper_rank": 0}, "HYPER_RANK=0"),
        ("siren", {"siren_base": "random"}, "SIREN_BASE=random"),
        ("siren", {"siren_layers": 0}, "SIREN_LAYERS=0"),
        ("siren", {"siren_omega": -1.0}, "SIREN_OMEGA=-1.0"),
        ("seed_model", {"seed_dim": 10**6}, "SEED_DIM=1000000"),
    ],
)
def test_bad_settings_are_refused_by_name(name, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(name, **settings)
