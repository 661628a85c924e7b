"""Muon, Adam and the groups; generated weights; switches in mid-run."""

import dataclasses

import pytest
import torch
from test_architectures import CPU, SHAPE, some_tokens, tiny
from torch import nn

import train_gpt
from architectures import load_architecture
from architectures.layers import ModelConfig, control

Gpt, GptConfig = load_architecture("gpt")


def test_every_parameter_is_in_exactly_one_group():
    model = tiny("gpt", tie_embeddings=False)
    groups = train_gpt.parameter_groups(model)
    assert sum(len(g) for g in groups.values()) == len(list(model.parameters()))
    assert {p.ndim for p in groups["matrix"]} == {2} and groups["head"] == [model.head.weight]
    assert any(p is model.skip_weights for p in groups["scalar"])


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (1, 8, 100)])
def test_orthogonalised_updates_have_singular_values_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(train_gpt.orthogonalize(x, 10, "jordan"))
    assert values.min() > 0.5 and values.max() < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_five_steps_of_polar_express_reach_singular_values_that_five_of_jordan_s_do_not(dtype):
    u, _, v = torch.linalg.svd(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    x = ((u * torch.logspace(0, -2, 64)) @ v)[None].to(dtype)
    polar, jordan = (torch.linalg.svdvals(train_gpt.orthogonalize(x, 5, p).float()) for p in ("polar", "jordan"))
    assert (polar - 1).abs().max() < 0.2 < 0.3 < (jordan - 1).abs().max()


def test_polar_express_does_not_explode_in_bf16_on_matrices_of_low_rank():
    g = torch.Generator().manual_seed(0)
    for rows, columns in ((64, 64), (64, 128), (256, 256)):
        for rank in (1, 2, 16):  # the first singular value is nearly the norm, and rounding lifts it over 1
            x = torch.rand(rows, rank, generator=g) @ torch.rand(rank, columns, generator=g)
            updated = train_gpt.orthogonalize(x[None].bfloat16(), 5, "polar").float()
            assert 0.7 < torch.linalg.svdvals(updated).max() < 1.25


@pytest.mark.parametrize("shape", [(4, 128, 128), (4, 64, 128), (4, 128, 256)])
def test_bf16_costs_an_update_little(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = train_gpt.orthogonalize(x.double(), 5, "polar")
    error = (train_gpt.orthogonalize(x, 5, "polar").double() - exact).norm() / exact.norm()
    assert error < 0.02  # 0.03 to 0.04 where products are rounded before they are added up


JORDAN = dataclasses.replace(train_gpt.RunConfig(), matrix_lr=0.1, muon_polynomial="jordan")


def looped_muon_update(p: torch.Tensor, buffer: torch.Tensor, lr: float, momentum: float, row_norm: bool) -> None:
    """One matrix at a time, as in the post that introduced Muon; row_norm: of rows of norm 1, as in MuonEq-R."""
    buffer.mul_(momentum).add_(p.grad)
    update = p.grad + momentum * buffer
    if row_norm:
        update = torch.stack([row / (row.norm() or 1.0) for row in update])
    x = update / (update.norm() + 1e-7)
    x = x.T if p.size(0) > p.size(1) else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if p.size(0) > p.size(1) else x
    p.data.add_(x, alpha=-lr * max(1, p.size(0) / p.size(1)) ** 0.5)


@pytest.mark.parametrize("row_norm", [False, True])
def test_batched_muon_equals_one_matrix_at_a_time(row_norm):
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 16), (16, 8), (16, 8), (8, 8), (24, 4)]
    ours = [nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    stack = nn.Parameter(torch.stack([theirs[0].detach(), theirs[4].detach()]))  # a stack is as many matrices
    run = dataclasses.replace(JORDAN, muon_row_norm=row_norm)
    muon, buffers = train_gpt.Muon([*ours, stack], run, CPU), [torch.zeros(s) for s in shapes]
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad = torch.randn(p.shape) * torch.logspace(-2, 2, len(p))[:, None]  # rows of unequal norms
            p.grad[0] = 0.0
        stack.grad = torch.stack([ours[0].grad, ours[4].grad])
        muon.collect()
        muon.step()
        for q, buffer in zip(theirs, buffers, strict=True):
            looped_muon_update(q, buffer, 0.1, 0.95, row_norm)
    for p, q in zip([*ours, *stack], [*theirs, theirs[0], theirs[4]], strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)


def test_rows_are_made_equal_for_wide_tall_and_square_matrices_and_not_unless_asked_for():
    assert not train_gpt.RunConfig().muon_row_norm
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(s)) for s in [(8, 16), (16, 8), (8, 8), (2, 16, 8)]]
    seen = {}
    for row_norm in (False, True):
        muon, parts = train_gpt.Muon(params, dataclasses.replace(JORDAN, muon_row_norm=row_norm), CPU), []
        muon.orthogonalize = lambda x, *_, parts=parts: parts.append(x.clone()) or x
        for p in params:
            p.grad = torch.arange(1.0, p.numel() + 1).view(p.shape)
        muon.collect()
        muon.step()
        views = [muon.upright(batch, of) for batch, of in zip(parts, muon.batches.values(), strict=True)]
        seen[row_norm] = [x for group in views for x in group]
    assert [x.shape for x in seen[True]] == [(8, 16), (16, 8), (2, 16, 8), (8, 8)]
    for plain, equal in zip(seen[False], seen[True], strict=True):
        torch.testing.assert_close(equal.norm(dim=-1), torch.ones(equal.shape[:-1]))
        torch.testing.assert_close(equal * plain.norm(dim=-1, keepdim=True), plain)


def test_weights_decay_by_their_rate_times_the_setting_and_control_tensors_do_not():
    batch, after = some_tokens(4, 65), {}
    for decay in (0.0, 0.5):
        run = train_gpt.RunConfig(muon_wd=decay, embed_wd=decay / 5)
        trainer = train_gpt.Trainer(tiny("gpt", tie_embeddings=False), run, CPU, micro_batches=1)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train_step(batch, 0, 0.5, lambda: [0.0, 0.0, 0.0])
        after[decay] = dict(trainer.model.named_parameters())
    decays = {"embed.weight": 0.6 * 0.1, "head.weight": 0.008 * 0.1}  # rate times setting
    for name, p in before.items():
        decay = decays.get(name, 0.0 if train_gpt.is_control(after[0.0][name]) else 0.04 * 0.5)
        lost = after[0.0][name] - after[0.5][name]
        torch.testing.assert_close(lost, 0.5 * decay * p, atol=1e-6, rtol=1e-4, msg=name)


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    batch, grads = some_tokens(8, 65), []
    for count in (1, 4):
        trainer = train_gpt.Trainer(tiny("gpt"), train_gpt.RunConfig(), CPU, micro_batches=count)
        trainer.backward(batch)
        grads.append([p.grad for p in trainer.optimizers.params])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("make", [lambda: tiny("gpt"), lambda: generated_model()])
def test_cuda_graphs_gradients_are_added_to_tensors_of_the_trainers_own(make):
    batch, found = some_tokens(8, 65), []
    for run in (train_gpt.RunConfig(), train_gpt.RunConfig(cuda_graphs=True)):
        trainer = train_gpt.Trainer(make(), run, CPU, micro_batches=2)
        losses = [trainer.train_step(batch, step, 1.0, lambda: [0.0, 0.0, 0.0])[0].item() for step in range(3)]
        params, loss, seen = trainer.optimizers.params, trainer.loss, []

        def watched(*inputs, params=params, loss=loss, seen=seen):
            seen.append([p.grad.data_ptr() if p.grad is not None else None for p in params])
            return loss(*inputs)

        trainer.loss = watched
        trainer.backward(batch)
        own = [p.grad.data_ptr() for p in params]
        assert (seen == [own, own]) == run.cuda_graphs  # before either part of the batch had a gradient
        found.append((losses, [p.grad for p in params]))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)


class Large(Gpt):
    """Has room for two rows."""

    def training_loss(self, input_ids, target_ids):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().training_loss(input_ids, target_ids)


def test_a_batch_that_does_not_fit_the_memory_is_cut_into_more_parts():
    torch.manual_seed(0)
    trainer, lines = train_gpt.Trainer(Large(GptConfig(**SHAPE)), train_gpt.RunConfig(), CPU, micro_batches=1), []
    trainer.make_fit(some_tokens(12, 65), lines.append)
    assert [line.split()[0] for line in lines] == [f"micro_batches:{count}" for count in (2, 3, 4, 6)]
    assert all(p.grad is None for p in trainer.optimizers.params)
    trainer.model.training_loss = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(ValueError, match="one row of TRAIN_SEQ_LEN=64 is too much for the memory of cpu"):
        trainer.make_fit(some_tokens(12, 65), lines.append)


def test_warm_up_leaves_no_trace():
    model = tiny("gpt")
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    trainer = train_gpt.Trainer(model, train_gpt.RunConfig(warmup_steps=2), CPU, micro_batches=1)
    assert trainer.warm_up(4, train_gpt.RunLog(None)) > 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(
        torch.get_rng_state(), state
    )
    assert not trainer.optimizers.muon.buffers and not trainer.optimizers.adam.state
    assert trainer.update_seconds == 0  # that of compilation would end a run early


class Generated(Gpt):
    """The MLPs' first matrices come from one small code per layer: made anew for every optimizer step."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.calls = 0
        self.code = control(nn.Parameter(torch.randn(config.num_layers, 8)))
        self.basis = nn.Parameter(torch.randn(8, config.mlp_mult * config.model_dim * config.model_dim) * 0.02)
        for block in self.blocks:
            del block.mlp.up.weight
            block.mlp.up.register_buffer("weight", torch.empty(0), persistent=False)

    def materialize(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        shape = (-1, self.config.mlp_mult * self.config.model_dim, self.config.model_dim)
        weights = (self.code @ self.basis).view(shape)
        return {f"blocks.{i}.mlp.up.weight": w for i, w in enumerate(weights)}


def generated_model() -> Generated:
    torch.manual_seed(0)
    return Generated(GptConfig(**SHAPE))


def test_generated_weights_are_made_once_a_step_and_their_generator_is_trained():
    model, batch = generated_model(), some_tokens(8, 65)
    trainer = train_gpt.Trainer(model, train_gpt.RunConfig(), CPU, micro_batches=4)
    trainer.train_step(batch, 0, 1.0, lambda: [0.0, 0.0, 0.0])  # the zero-initialised projections hide the MLP at first
    trainer.backward(batch)
    assert model.calls == 2
    ours = model.code.grad.clone(), model.basis.grad.clone()
    trainer.optimizers.params = [setattr(p, "grad", None) or p for p in trainer.optimizers.params]
    torch.func.functional_call(model, model.materialize(), (batch[:, :-1], batch[:, 1:])).backward()
    torch.testing.assert_close(ours, (model.code.grad, model.basis.grad), atol=1e-6, rtol=1e-3)
    assert ours[0].abs().max() > 0


def test_generated_weights_cost_no_bytes_and_are_there_after_loading(monkeypatch):
    model = generated_model()
    train_gpt.fill_generated(model)
    plan = train_gpt.ScorePlan(64, 64)
    blob = train_gpt.pack_artifact(model, "gpt", None, plan, 1.0, 8)
    assert not any("mlp.up" in entry[0] for entry in train_gpt.read_header(blob)[0]["tensors"])
    monkeypatch.setattr(train_gpt, "load_architecture", lambda name: (Generated, GptConfig))
    loaded, _, _ = train_gpt.load_artifact(blob, CPU.device)
    x = some_tokens(2, 64)
    torch.testing.assert_close(loaded.logits(x), model.logits(x), atol=0.05, rtol=0)


def test_generated_weights_compile_into_one_graph():
    model, batch = generated_model(), some_tokens(2, 65)
    trainer = train_gpt.Trainer(model, train_gpt.RunConfig(), CPU, micro_batches=1)
    weights = model.materialize()
    args = weights, batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    compiled = torch.compile(trainer.loss, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), trainer.loss(*args), atol=1e-5, rtol=1e-5)


class Switched(Gpt):
    """Runs its last block twice in the second half of the run."""

    progress_switches = (0.5,)
    twice = False

    def on_progress(self, fraction: float) -> None:
        self.twice = fraction >= 0.5

    def backbone(self, x: torch.Tensor) -> torch.Tensor:
        y = super().backbone(x)
        return self.blocks[-1](y, x) if self.twice else y


def test_a_switch_in_mid_run_fires_under_compile_without_a_graph_break():
    torch.manual_seed(0)
    model, batch = Switched(GptConfig(**SHAPE)), some_tokens(2, 65)
    trainer = train_gpt.Trainer(model, train_gpt.RunConfig(), CPU, micro_batches=1)
    trainer.train_step(batch, 0, 1.0, lambda: [0.0, 0.0, 0.0])
    compiled = torch.compile(trainer.loss, fullgraph=True, dynamic=False, backend="aot_eager")
    losses = []
    for fraction in (0.0, 0.6, 0.1):
        model.on_progress(fraction)
        losses.append(compiled({}, batch[:, :-1].contiguous(), batch[:, 1:].contiguous()).item())
    assert losses[0] == losses[2] != losses[1]


def test_the_artifact_remembers_how_far_the_run_was(monkeypatch):
    model = Switched(GptConfig(**SHAPE))
    monkeypatch.setattr(train_gpt, "load_architecture", lambda name: (Switched, GptConfig))
    for progress in (0.2, 0.9):
        blob = train_gpt.pack_artifact(model, "gpt", None, train_gpt.ScorePlan(64, 64), progress, 8)
        assert train_gpt.load_artifact(blob, CPU.device)[0].twice is (progress > 0.5)


def test_warm_up_runs_every_switch_position():
    class Seen(Switched):
        def on_progress(self, fraction):
            self.__dict__.setdefault("seen", []).append(fraction)

    torch.manual_seed(0)
    trainer = train_gpt.Trainer(Seen(GptConfig(**SHAPE)), train_gpt.RunConfig(warmup_steps=1), CPU, micro_batches=1)
    trainer.warm_up(2, train_gpt.RunLog(None))
    assert trainer.model.seen == [0.0, 0.5, 0.0]


def test_gradients_are_clipped_to_the_norm():
    model = tiny("gpt")
    trainer = train_gpt.Trainer(model, dataclasses.replace(train_gpt.RunConfig(), grad_clip_norm=1e-9), CPU, 1)
    before = model.embed.weight.detach().clone()
    trainer.optimizers.adam.param_groups[0]["eps"] = 1.0  # Adam undoes the scale of a gradient that dwarfs eps
    trainer.train_step(some_tokens(4, 65), 0, 1.0, lambda: [0.0, 0.0, 0.0])
    assert (model.embed.weight - before).abs().max() < 1e-8


def test_the_average_of_the_weights_is_that_of_its_steps_and_takes_their_place():
    run = train_gpt.RunConfig(ema_decay=0.5, ema_start=0.5)
    trainer = train_gpt.Trainer(tiny("gpt"), run, CPU, micro_batches=1)
    seen = []
    for step in range(4):
        trainer.train_step(some_tokens(4, 65), step, 1.0, lambda: [0.0, 0.0, 0.0])
        trainer.optimizers.follow(step / 4)
        seen.append(trainer.model.embed.weight.detach().clone())
    trainer.optimizers.install_average()
    torch.testing.assert_close(trainer.model.embed.weight.detach(), (seen[2] + seen[3]) / 2)
    assert not torch.equal(trainer.model.embed.weight, seen[3])


def test_without_an_average_the_weights_stay():
    trainer = train_gpt.Trainer(tiny("gpt"), train_gpt.RunConfig(), CPU, micro_batches=1)
    before = trainer.model.embed.weight.data_ptr()
    trainer.optimizers.follow(1.0)
    trainer.optimizers.install_average()
    assert trainer.model.embed.weight.data_ptr() == before
