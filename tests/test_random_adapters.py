"""Random adapters: what is frozen costs no bytes and follows from the seed, what is learned has its rank, its size and
its turn."""

import pytest
import torch
from test_architectures import CPU, shake, some_tokens, tiny
from test_generated import artifact

import train_gpt
from architectures.generated import usual_std
from architectures.random_adapters import NAMES, WRITERS, Config, random_map
from tools.costs import stored_bytes

ALL = ",".join(NAMES)
KINDS = ("uniform", "sign", "hadamard")


def made(model) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: stack.clone() for name, stack in model.generate().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_maps_follow_from_seed_and_stream_and_have_the_usual_scale(kind):
    one = random_map(kind, 7, 0, 128, 64)
    assert torch.equal(one, random_map(kind, 7, 0, 128, 64))
    assert not torch.equal(one, random_map(kind, 8, 0, 128, 64))
    assert not torch.equal(one, random_map(kind, 7, 1, 128, 64))
    assert one.std().item() == pytest.approx(usual_std(64), rel=0.03) and abs(one.mean()) < 0.1 * usual_std(64)


def test_hadamard_maps_are_orthogonal_in_blocks_and_no_two_blocks_alike():
    R = random_map("hadamard", 7, 0, 128, 64) / usual_std(64)
    for block in R.split(64):
        torch.testing.assert_close(block @ block.T, 64 * torch.eye(64), rtol=0, atol=1e-3)
    assert (R[:64] @ R[64:].T).abs().max() > 8  # of one sign pattern they would be orthogonal too
    assert random_map("hadamard", 7, 0, 96, 48).shape == (96, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_maps_cost_no_bytes_and_come_back_in_another_process_state(kind):
    model = shake(tiny("random_adapters", rand_base=kind, rand_targets=ALL))
    torch.manual_seed(99)
    loaded = train_gpt.load_artifact(artifact(model), CPU.device)[0]
    for mine, other in zip(model.adapters, loaded.adapters, strict=True):
        assert torch.equal(mine.base, other.base)
    assert not any("base" in name for name in model.state_dict())


def test_the_seed_changes_weights_and_no_bytes():
    models = [tiny("random_adapters", rand_seed=seed) for seed in (1, 2)]
    weights = [made(model)["mlp.up"] for model in models]
    assert not torch.equal(*weights)
    assert len({stored_bytes("random_adapters", {"RAND_SEED": seed}, 1024) for seed in ("1", "2")}) == 1


@pytest.mark.parametrize("targets", ["up,down", "query", ALL])
@pytest.mark.parametrize(("rank", "diag"), [(0, True), (3, True), (3, False)])
def test_size_is_the_closed_form(targets, rank, diag):
    model = tiny("random_adapters", rand_targets=targets, rand_rank=rank, rand_diag=diag)
    shapes = {"query": (32, 32), "key": (16, 32), "value": (16, 32), "out": (32, 32), "up": (64, 32), "down": (32, 64)}
    chosen = [shapes[name] for name in targets.split(",")]
    adapters = 4 * sum(rank * (m + n) + diag * m for m, n in chosen)
    dense = sum(p.numel() for p in tiny("gpt").parameters()) - 4 * sum(m * n for m, n in chosen)
    assert sum(p.numel() for p in model.parameters()) == dense + adapters == model.config.num_params()
    assert model.config.adapter_params() == adapters


@pytest.mark.parametrize("rank", [1, 5])
def test_what_is_learned_beside_the_diagonal_has_the_rank(rank):
    model = shake(tiny("random_adapters", rand_targets=ALL, rand_rank=rank))
    for (_, stack), adapter in zip(made(model).items(), model.adapters, strict=True):
        moved = stack - adapter.gain[..., None] * adapter.base
        singular = torch.linalg.svdvals(moved.double())
        assert (singular[:, rank - 1] > 1e-3).all() and (singular[:, rank:] < 1e-4 * singular[:, :1]).all()


def test_merged_and_factored_matrices_give_one_output():
    model = shake(tiny("random_adapters", rand_rank=5))
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    up = model.adapters[0]
    for layer, weight in enumerate(made(model)["mlp.up"]):
        factored = (x @ up.base[layer].T) * up.gain[layer] + (x @ up.A[layer].T) @ up.B[layer]
        torch.testing.assert_close(x @ weight.T, factored, rtol=1e-4, atol=1e-5)


def test_factors_lie_on_their_side_for_muon_steps_further_in_what_stands():
    for adapter in tiny("random_adapters", rand_targets=ALL).adapters:
        assert all(p.size(-2) <= p.size(-1) for p in (adapter.A, adapter.B))


def test_training_leaves_the_maps_alone_and_moves_only_the_rest():
    model = tiny("random_adapters", rand_targets=ALL)
    before = [adapter.base.clone() for adapter in model.adapters]
    trainer = train_gpt.Trainer(model, train_gpt.RunConfig(), CPU, micro_batches=1)
    for step in range(3):
        trainer.train_step(some_tokens(4, 65), step, 1.0, lambda: [0.0, 0.0, 0.0])
    assert all(torch.equal(a.base, b) for a, b in zip(model.adapters, before, strict=True))
    assert all((adapter.B != 0).any() for adapter in model.adapters)


def layers_that_moved(fraction: float) -> list[int]:
    model = tiny("random_adapters", rand_unfreeze=0.6, rand_targets=ALL)
    model.on_progress(fraction)
    trainer = train_gpt.Trainer(model, train_gpt.RunConfig(), CPU, micro_batches=1)
    before = [adapter.gain.detach().clone() for adapter in model.adapters]
    for step in range(2):
        trainer.train_step(some_tokens(4, 65), step, 1.0, lambda: [0.0, 0.0, 0.0])
    moved = torch.stack([(a.gain != b).any(dim=1) for a, b in zip(model.adapters, before, strict=True)]).any(dim=0)
    return moved.nonzero().flatten().tolist()


def test_layers_thaw_from_the_last_to_the_first():
    found = {fraction: layers_that_moved(fraction) for fraction in (0.0, 0.19, 0.2, 0.41, 0.6, 1.0)}
    assert found == {0.0: [3], 0.19: [3], 0.2: [2, 3], 0.41: [1, 2, 3], 0.6: [0, 1, 2, 3], 1.0: [0, 1, 2, 3]}


def test_writers_begin_at_zero_and_readers_do_not():
    for name, stack in made(tiny("random_adapters", rand_targets=ALL)).items():
        assert stack.any() != (name in WRITERS)


def test_default_size_leaves_room_under_the_cap():
    assert stored_bytes("random_adapters", {}, 1024) < 15_000_000


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rand_targets": "up,mlp"}, "RAND_TARGETS=up,mlp must be some of query,key,value,out,up,down, each"),
        ({"rand_targets": "up,up"}, "'up' is not"),
        ({"rand_rank": -1}, "RAND_RANK=-1 must be at least 0"),
        ({"rand_rank": 0, "rand_diag": False}, "leave nothing to train"),
        ({"rand_base": "ortho"}, "RAND_BASE=ortho must be one of uniform, sign, hadamard"),
        ({"rand_unfreeze": 1.5}, "RAND_UNFREEZE=1.5 must be between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        Config(**settings)
