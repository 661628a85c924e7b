"""What every file in architectures/ promises. A new file is tested by existing: there is no list to extend."""

import ast
import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script, write_shard

import train_gpt
from architectures import SHELF, load_architecture, names
from architectures.layers import LanguageModel, ModelConfig
from tools import pack

every_architecture = pytest.mark.parametrize("name", names())
FOLDER = Path(__file__).parent.parent / "architectures"
SHAPE = dict(vocab_size=260, train_seq_len=64, num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2)
CPU = train_gpt.Machine(torch.device("cpu"))


def tiny(name: str, **settings) -> LanguageModel:
    Model, Config = load_architecture(name)
    torch.manual_seed(0)
    model = Model(Config(**SHAPE | settings))
    train_gpt.fill_generated(model)
    return model


def shake(model: LanguageModel) -> LanguageModel:
    """Move zero-initialised projections off zero, or a leaking mixer would hide behind them."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    train_gpt.fill_generated(model)
    return model.eval().requires_grad_(False)


def some_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(260, shape, generator=torch.Generator().manual_seed(1))


def losses_one_by_one(name: str, steps: int = 3, tokens: torch.Tensor | None = None, **settings) -> Iterator[float]:
    """The losses of a few steps of the real trainer, without its clock, and the score after them."""
    model = tiny(name, **settings)
    trainer = train_gpt.Trainer(model, train_gpt.RunConfig(), CPU, micro_batches=1)
    batch = some_tokens(4, model.config.train_seq_len + 1) if tokens is None else tokens
    for step in range(steps):
        yield trainer.train_step(batch, step, 1.0, lambda: [0.0, 0.0, 0.0])[0].item()
    train_gpt.fill_generated(model.eval())
    yield model.nats(batch[:, :-1], batch[:, 1:]).double().mean().item()


def train_losses(name: str, steps: int = 3, tokens: torch.Tensor | None = None, **settings) -> list[float]:
    return list(losses_one_by_one(name, steps, tokens, **settings))


@every_architecture
def test_memory_of_a_token_is_found_without_a_trace(name):
    model = tiny(name).train()
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert train_gpt.kept_bytes(model) > 4 * SHAPE["model_dim"] * SHAPE["num_layers"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, weights[key]) for key, x in model.state_dict().items())


def test_memory_of_a_token_grows_by_as_much_with_every_layer_and_step():
    for name, knob, numbers in (("gpt", "num_layers", (2, 4, 8)), ("nca", "nca_steps", (4, 8, 16))):
        few, some, many = (train_gpt.kept_bytes(tiny(name, **{knob: n})) for n in numbers)
        assert some - few > 500 and many - some == pytest.approx(2 * (some - few), rel=0.05)


@pytest.mark.parametrize(("most", "parts"), [(10_000, 1), (8 * 64, 1), (8 * 64 - 1, 2), (4 * 64, 2), (150, 4), (1, 8)])
def test_a_batch_goes_into_equal_parts_that_fit(most, parts):
    run = train_gpt.RunConfig(train_batch_tokens=8 * 64, micro_batch_tokens=most)
    assert train_gpt.micro_batch_count(run, tiny("gpt"), CPU) == parts


@every_architecture
@pytest.mark.parametrize("cut", [1, 2, 16, 32, 63])
def test_logits_ignore_later_tokens(name, cut):
    model, x = shake(tiny(name)), some_tokens(2, 64)
    y = x.clone()
    y[:, cut:] = (y[:, cut:] + 7) % 260
    before, after = model.logits(x), model.logits(y)
    torch.testing.assert_close(before[:, :cut], after[:, :cut], atol=1e-5, rtol=0)
    assert not torch.equal(before[:, cut:], after[:, cut:])


@every_architecture
def test_gradients_never_flow_from_an_earlier_score_to_a_later_token(name):
    model, seen = shake(tiny(name)), []
    hook = model.embed.register_forward_hook(lambda _, __, out: seen.append(out.detach().requires_grad_()) or seen[-1])
    model.logits(some_tokens(1, 64))[:, 20].sum().backward()
    hook.remove()
    assert seen[0].grad[:, 21:].abs().max() == 0 and seen[0].grad[:, :21].abs().max() > 0


@every_architecture
def test_logits_ignore_other_rows(name):
    model, x = shake(tiny(name)), some_tokens(3, 64)
    y = x.clone()
    y[1:] = 5
    assert torch.equal(model.logits(x)[0], model.logits(y)[0])


@every_architecture
def test_logits_from_a_start_are_the_end_of_all_logits(name):
    model, x = shake(tiny(name)), some_tokens(2, 64)
    torch.testing.assert_close(model.logits(x, 40), model.logits(x)[:, 40:], atol=1e-5, rtol=1e-5)


@every_architecture
def test_starts_at_the_uniform_guess(name):
    x = some_tokens(8, 65)
    assert abs(tiny(name).eval().nats(x[:, :-1], x[:, 1:]).mean().item() - math.log(260)) < 0.1


@every_architecture
def test_every_parameter_gets_a_gradient_within_two_steps(name):
    """Within the first two steps of a run or the last two: what ends early and what begins late is trained all the
    same."""
    still = {n for n, _ in tiny(name).named_parameters()}
    for fraction in (0.0, 1.0):
        model = tiny(name)
        model.on_progress(fraction)
        trainer = train_gpt.Trainer(model, train_gpt.RunConfig(), CPU, micro_batches=1)
        trainer.train_step(some_tokens(4, 65), 0, 1.0, lambda: [0.0, 0.0, 0.0])
        trainer.backward(some_tokens(4, 65))
        still -= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert not still


@every_architecture
def test_every_knob_changes_the_loss_within_three_steps(name):
    Config, dead = load_architecture(name)[1], []
    base = train_losses(name)
    for f in dataclasses.fields(Config):
        if f.name in ("vocab_size", "train_seq_len"):
            continue
        now = SHAPE.get(f.name, f.default)
        other = f.metadata["other"] if "other" in f.metadata else not now if isinstance(now, bool) else now * 2
        changed = losses_one_by_one(name, **{f.name: other})  # no more of them are computed than up to the first
        if all(new == old for new, old in zip(changed, base, strict=True)):
            dead.append(f.name)
    assert dead == []


@every_architecture
def test_neutral_settings_equal_gpt_bit_for_bit(name):
    neutral = load_architecture(name)[1].neutral
    if neutral is None and name != "gpt":
        pytest.skip("no setting of it is gpt")
    assert train_losses(name, **(neutral or {})) == train_losses("gpt")


@every_architecture
def test_parameter_count_equals_its_closed_form(name):
    for settings in ({}, {"tie_embeddings": False}, {"num_layers": 1}, {"num_kv_heads": 4, "mlp_mult": 3}):
        model = tiny(name, **settings)
        assert sum(p.numel() for p in model.parameters()) == model.config.num_params()


def test_gpt_at_its_defaults_is_the_published_baseline():
    assert ModelConfig().num_params() == 17_059_912


@every_architecture
def test_artifact_reloads_in_a_fresh_process_to_the_same_score(name, tmp_path):
    model = shake(tiny(name))
    plan = train_gpt.ScorePlan(64, 64)
    blob = train_gpt.pack_artifact(model, name, None, plan, 1.0, 8)
    tokens = some_tokens(1000).numpy()
    (tmp_path / "model.bin").write_bytes(blob)
    shard, nats = write_shard(tmp_path / "tokens.bin", tokens), tmp_path / "nats.f32"
    request = json.dumps({"tokens": str(shard), "nats": str(nats)})
    done = run_script({}, "score", str(tmp_path / "model.bin"), given=request)
    assert json.loads(done.stdout) == {"nats": str(nats), "targets": 999}, done.stderr
    reloaded, plan, _ = train_gpt.load_artifact(blob, CPU.device)
    here = train_gpt.score_stream(reloaded, tokens, plan, CPU)
    assert abs(here - np.fromfile(nats, dtype="<f4")).max() < 1e-6
    assert abs(here.mean() - train_gpt.score_stream(model, tokens, plan, CPU).mean()) < 0.01


@every_architecture
def test_training_on_real_text_soon_beats_the_unigram_table(name, text):
    train, val = (
        np.frombuffer(part, dtype=np.uint8).astype(np.int64) + 4 for part in (text[:200_000], text[200_000:208_000])
    )
    counts = np.bincount(train, minlength=260) + 0.1
    unigram = -np.log(counts / counts.sum())[val[1:]].mean()
    model, rng = tiny(name), np.random.default_rng(0)
    trainer = train_gpt.Trainer(model, train_gpt.RunConfig(muon_momentum_warmup_steps=0), CPU, micro_batches=1)
    for step in range(120):
        starts = rng.integers(len(train) - 65, size=4)
        batch = torch.from_numpy(np.stack([train[s : s + 65] for s in starts]))
        trainer.train_step(batch, step, 1 - step / 120, lambda: [0.0, 0.0, 0.0])
    train_gpt.fill_generated(model)
    assert train_gpt.score_stream(model.eval(), val, train_gpt.ScorePlan(64, 64), CPU).mean() < unigram - 0.2


@every_architecture
def test_compiles_without_graph_breaks(name):
    torch._dynamo.reset()  # the models share code, and dynamo stops at so many versions of one function
    model, x = tiny(name), some_tokens(2, 65)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    loss = compiled(x[:, :-1].contiguous(), x[:, 1:].contiguous())
    torch.testing.assert_close(loss, model(x[:, :-1], x[:, 1:]), atol=1e-4, rtol=1e-4)


@every_architecture
def test_every_mode_compiles_without_graph_breaks(name):
    broken, x = [], some_tokens(2, 65)
    for f in dataclasses.fields(load_architecture(name)[1]):
        if not isinstance(f.default, str):
            continue
        torch._dynamo.reset()
        model = tiny(name, **{f.name: f.metadata["other"]})
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
        try:
            compiled(x[:, :-1].contiguous(), x[:, 1:].contiguous())
        except torch._dynamo.exc.Unsupported as error:
            broken.append(f"{f.name}={f.metadata['other']}: {str(error).splitlines()[0]}")
    assert broken == []


@every_architecture
def test_packs_into_one_file_that_compiles(name):
    source = pack.flatten(name)
    compile(source, name, "exec")
    assert "from architectures" not in source and pack.unpack(pack.compress(source)) == source


@every_architecture
def test_cites_its_source(name):
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    assert "http" in docstring.splitlines()[0], (
        f"architectures/{name}.py: the docstring's first line must link the paper"
    )


@every_architecture
def test_imports_only_the_shelf_and_kernels(name):
    kit = {node.module for node in pack.kit_imports((FOLDER / f"{name}.py").read_text())}
    shelf = {f"architectures.{module}" for module in SHELF}
    assert all(m in shelf or m.startswith("architectures.kernels") for m in kit)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean ARCH=gpt"):
        load_architecture("gtp")


def test_a_model_streams_its_loss_and_scores_the_same_unless_it_has_logits_of_its_own():
    class Own(type(tiny("gpt"))):
        def logits(self, input_ids: torch.Tensor, start: int = 0) -> torch.Tensor:
            return 2 * super().logits(input_ids, start)

    model, x = shake(tiny("gpt")), some_tokens(3, 65)
    assert model.has_fused_loss() and not Own(model.config).has_fused_loss()
    loss, nats = model.training_loss(x[:, :-1], x[:, 1:]), model.nats(x[:, :-1], x[:, 1:])
    torch.testing.assert_close(loss, nats.mean(), atol=1e-5, rtol=0)
