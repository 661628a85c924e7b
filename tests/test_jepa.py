"""JEPA: what the latent loss predicts, what keeps it from collapsing, when it ends, and that it is not stored."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_architectures import CPU, SHAPE, shake, some_tokens, tiny
from test_generated import artifact

import train_gpt
from architectures import jepa
from architectures.layers import rms_norm

DIRECTIONS = F.normalize(torch.randn(64, 16, generator=torch.Generator().manual_seed(3)), dim=1)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def gradients(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_weight_changes_the_trunk_and_the_target_gets_no_gradient_of_the_error():
    tokens = some_tokens(2, 65)
    settings = {"jepa_context": 1, "jepa_target": 2, "jepa_reg": "none", "jepa_nats": 0.0, "jepa_schedule": "phases"}
    found = {}
    for weight in (0.1, 0.5):
        torch.manual_seed(0)
        found[weight] = gradients(shake(tiny("jepa", jepa_weight=weight, **settings)).requires_grad_(True), tokens)
    of_context, of_target = "blocks.1.mlp.up.weight", "blocks.2.mlp.up.weight"
    torch.testing.assert_close(5 * found[0.1][of_context], found[0.5][of_context])
    assert found[0.1][of_context].any() and not found[0.1][of_target].any()


@pytest.mark.parametrize("reg", ["sigreg", "vicreg"])
def test_the_regulariser_s_gradient_reaches_the_target_s_layer(reg):
    settings = {"jepa_context": 1, "jepa_target": 2, "jepa_nats": 0.0, "jepa_schedule": "phases"}
    model = shake(tiny("jepa", jepa_reg=reg, **settings)).requires_grad_(True)
    assert gradients(model, some_tokens(2, 65))["blocks.2.mlp.up.weight"].any()


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("offsets", ["1", "6", "5,7"])
def test_the_error_is_the_distance_of_each_guess_to_the_states_so_many_tokens_later(offsets, pool):
    settings = {"jepa_reg": "none", "jepa_nats": 0.0, "jepa_weight": 1.0, "jepa_schedule": "phases", "jepa_pool": pool}
    model, tokens = shake(tiny("jepa", jepa_offsets=offsets, **settings)).train(), some_tokens(3, 65)
    states, errors = {}, []
    for layer in (model.config.context, model.config.target):
        model.blocks[layer].register_forward_hook(lambda m, args, x, layer=layer: states.update({layer: x}))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    u, z = rms_norm(states[model.config.context]), rms_norm(states[model.config.target])
    for k, ahead in zip(model.config.offsets(), model.predictor.ahead, strict=True):
        present = range(0, 64 - k, model.config.jepa_stride)
        first = 1 if pool else k
        later = torch.stack([torch.stack([z[:, t + j] for j in range(first, k + 1)]).mean(dim=0) for t in present])
        later = (later - later.mean(dim=(0, 1))) / later.var(dim=(0, 1), correction=0).sqrt()
        for t, y in zip(present, later, strict=True):
            guess = rms_norm(F.relu(u[:, t] @ model.predictor.up.weight.T).square()) @ ahead.weight.T
            errors.append((guess - y).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean(), atol=0, rtol=1e-4)


def test_a_copy_of_the_present_state_is_a_bad_guess_and_the_mean_one_of_1():
    model = shake(tiny("jepa"))
    states = []
    model.blocks[model.config.target].register_forward_hook(lambda m, args, y: states.append(y))
    model.logits(some_tokens(4, 64))
    y = jepa.whitened(rms_norm(states[0].float()))
    assert all(F.mse_loss(y[:, :-k], y[:, k:]) > 0.5 for k in model.config.offsets())
    assert F.mse_loss(torch.zeros_like(y), y).item() == pytest.approx(1, rel=0.01)


def test_regularisers_tell_normal_states_from_collapsed_ones():
    good = normal(1024, 16)
    line = good[:, :1].expand(-1, 16)
    for reg in (jepa.vicreg, lambda z: jepa.sigreg(z, DIRECTIONS)):
        assert reg(good) < 0.1 * min(reg(torch.zeros_like(good)), reg(line)), reg
    assert jepa.effective_dimensions(good[:256]) > 10 > 1.5 > jepa.effective_dimensions(line[:256])


@pytest.mark.parametrize("seed", [0, 1])
def test_states_collapse_without_a_regulariser_and_not_with_one(seed, text):
    batches = torch.tensor(list(text[: 80 * 4 * 65])).add(4).view(80, 4, 65)
    dimensions = {}
    for reg in ("none", "sigreg", "vicreg"):
        settings = SHAPE | {"num_layers": 2, "jepa_nats": 0.0, "jepa_schedule": "phases", "jepa_until": 1.0}
        torch.manual_seed(seed)
        model, late = jepa.Model(jepa.Config(**settings, jepa_reg=reg)), []
        trainer = train_gpt.Trainer(model, train_gpt.RunConfig(), CPU, micro_batches=1)
        for step, batch in enumerate(batches):
            trainer.train_step(batch, step, 1.0, lambda: [0.0, 0.0, 0.0])
            late.append(dict(zip(model.gauge_names, model.gauges.tolist(), strict=True))["jepa_dimensions"])
        dimensions[reg] = sum(late[-10:]) / 10
    assert dimensions["none"] < 6 < min(dimensions["sigreg"], dimensions["vicreg"]), dimensions


def test_the_schedule_ends_in_the_nats_alone():
    tokens = some_tokens(2, 65)
    model, plain = tiny("jepa", jepa_until=0.6).train(), tiny("gpt").train()
    losses = {}
    for fraction in (0.0, 0.3, 0.6, 1.0):
        model.on_progress(fraction)
        losses[fraction] = model(tokens[:, :-1], tokens[:, 1:]).item()
    want = plain(tokens[:, :-1], tokens[:, 1:]).item()
    assert losses[0.6] == losses[1.0] == want and losses[0.0] > losses[0.3] > want
    assert model.progress_switches == (0.6,)


def test_phases_have_the_latents_first():
    model = tiny("jepa", jepa_schedule="phases", jepa_nats=0.0, jepa_weight=1.0).train()
    tokens = some_tokens(2, 65)
    model.on_progress(0.0)
    first = gradients(model, tokens)
    model.on_progress(1.0)
    second = gradients(model, tokens)
    assert first["predictor.ahead.0.weight"].any() and not first["blocks.3.mlp.down.weight"].any()
    assert "predictor.ahead.0.weight" not in second and second["blocks.3.mlp.down.weight"].any()


def test_the_predictor_is_not_stored_and_scores_are_those_of_the_trained_model():
    model, tokens = shake(tiny("jepa")), some_tokens(2, 64)
    stored = train_gpt.load_artifact(artifact(model.folded()), CPU.device)[0]
    assert not any("predictor" in name for name, _ in stored.named_parameters())
    assert torch.equal(model.folded().logits(tokens), model.logits(tokens))


def test_scoring_never_evaluates_the_latents(monkeypatch):
    monkeypatch.setattr(jepa.Model, "auxiliary", lambda *args: pytest.fail("evaluated"))
    model, tokens = tiny("jepa").eval(), some_tokens(2, 65)
    model.nats(tokens[:, :-1], tokens[:, 1:])
    model(tokens[:, :-1], tokens[:, 1:])


def test_gauges_say_after_a_step_what_the_states_are():
    model = tiny("jepa")
    trainer = train_gpt.Trainer(model, train_gpt.RunConfig(), CPU, micro_batches=1)
    trainer.train_step(some_tokens(4, 65), 0, 1.0, lambda: [0.0, 0.0, 0.0])
    nats, error, least, dimensions = model.gauges.tolist()
    assert nats == pytest.approx(math.log(260), abs=0.1)
    assert error == pytest.approx(1, rel=0.05) and least > 0 and 1 < dimensions < 32
    model.on_progress(0.9)  # past JEPA_UNTIL
    trainer.train_step(some_tokens(4, 65), 1, 1.0, lambda: [0.0, 0.0, 0.0])
    assert model.gauges.isnan().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"jepa_reg": "l2"}, "JEPA_REG=l2 must be one of"),
        ({"jepa_offsets": "8,4"}, "JEPA_OFFSETS=8,4 must be ascending"),
        ({"jepa_until": 0.0}, "JEPA_UNTIL=0.0 must be above 0"),
        ({"jepa_context": 99}, "JEPA_CONTEXT=99 must be a layer"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        jepa.Config(**settings)
