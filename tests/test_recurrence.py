"""Layers that run more than once: their order, what they share, and the switch in mid-run."""

import copy
from collections import Counter

import pytest
import torch
from test_architectures import CPU, shake, some_tokens, tiny

import train_gpt
from architectures.depth_recurrence import Config
from architectures.layers import LanguageModel


def alike(**settings) -> LanguageModel:
    """A shaken model; models of the same shape get the same weights."""
    model = tiny("depth_recurrence", **settings)
    torch.manual_seed(1)
    return shake(model)


@pytest.mark.parametrize(
    ("layers", "repeats", "order", "expected"),
    [
        ("3,4", 2, "layer", [0, 1, 2, 3, 3, 4, 4, 5, 6, 7, 8]),
        ("3,4,5", 2, "layer", [0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8]),
        ("3,4", 3, "layer", [0, 1, 2, 3, 3, 3, 4, 4, 4, 5, 6, 7, 8]),
        ("3,4,5", 2, "segment", [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8]),
        (None, 2, "segment", [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8]),
        ("8", 2, "segment", [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]),
    ],
)
def test_layers_run_in_the_published_order(layers, repeats, order, expected):
    config = Config(num_layers=9, recur_layers=layers, recur_repeats=repeats, recur_order=order)
    assert config.layer_order() == expected


@pytest.mark.parametrize("order", ["segment", "layer"])
def test_each_repeated_block_is_called_as_often_as_asked(order):
    model, calls = alike(recur_layers="1,2", recur_repeats=3, recur_order=order), Counter()
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.update([i]))
    model.logits(some_tokens(1, 8))
    assert calls == {0: 1, 1: 3, 2: 3, 3: 1} and sum(calls.values()) == len(model.config.layer_order())


def test_artifact_is_as_large_for_any_number_of_repeats():
    plan = train_gpt.ScorePlan(64, 64)
    models = [alike(recur_repeats=n) for n in (1, 2, 3)]
    sizes = {len(train_gpt.pack_artifact(model, "depth_recurrence", None, plan, 1.0, 8)) for model in models}
    assert len(sizes) == 1
    logits = [model.logits(some_tokens(1, 32)) for model in models]
    assert not torch.allclose(logits[0], logits[1], atol=1e-2) and not torch.allclose(logits[1], logits[2], atol=1e-2)


def test_gradient_of_a_repeated_block_is_the_sum_over_untied_copies():
    looped = alike(recur_layers="1,2").requires_grad_()
    b0, b1, b2, b3, b1_again, b2_again = untied = [*copy.deepcopy(looped.blocks), *copy.deepcopy(looped.blocks[1:3])]
    near, far = looped.skip_weights.detach()
    x = torch.randn(2, 16, 32)
    first = b0(x, x)
    second = b1(first, x)
    again = b1_again(b2(second + near * second, x), x)  # the skip from layer 1 to 2 belongs to each pass
    expected = b3(b2_again(again + near * again, x) + far * first, x)
    actual = looped.backbone(x)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    expected.square().mean().backward()
    actual.square().mean().backward()
    for layer, copies in enumerate([(b0,), (b1, b1_again), (b2, b2_again), (b3,)]):
        for name, p in looped.blocks[layer].named_parameters():
            total = sum(block.get_parameter(name).grad for block in copies)
            torch.testing.assert_close(p.grad, total, atol=1e-5, rtol=1e-4)
    assert len(untied) == len(looped.layer_order)


def test_recurrence_begins_in_mid_run_under_compile():
    shape = dict(num_layers=2, recur_layers="1")
    model, batch = alike(**shape, recur_start=0.35), some_tokens(2, 65)
    ids = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    trainer = train_gpt.Trainer(model.requires_grad_(), train_gpt.RunConfig(), CPU, micro_batches=1)
    compiled = torch.compile(trainer.loss, fullgraph=True, dynamic=False, backend="aot_eager")
    losses = []
    for fraction in (0.0, 0.34, 0.35, 1.0):
        model.on_progress(fraction)
        losses.append(compiled({}, *ids).item())
    plain, looped = (alike(**shape, recur_repeats=n)(*ids).item() for n in (1, 2))
    assert losses == pytest.approx([plain, plain, looped, looped], rel=1e-5) and abs(plain - looped) > 1e-3


@pytest.mark.parametrize(
    ("settings", "switches"),
    [
        ({"recur_start": 0.35}, (0.35,)),
        ({}, ()),
        ({"recur_start": 0.35, "recur_repeats": 1}, ()),
        ({"recur_start": 1.0}, ()),
    ],
)
def test_warm_up_is_told_of_the_switch_if_there_is_one(settings, switches):
    assert tiny("depth_recurrence", **settings).progress_switches == switches


def test_artifact_of_a_run_that_ended_before_the_switch_does_not_repeat():
    plan = train_gpt.ScorePlan(64, 64)
    for start, progress, repeats in ((0.5, 0.2, False), (0.5, 0.9, True), (1.0, 1.0, False)):
        blob = train_gpt.pack_artifact(alike(recur_start=start), "depth_recurrence", None, plan, progress, 8)
        model, _, _ = train_gpt.load_artifact(blob, CPU.device)
        calls = []
        model.blocks[1].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.logits(some_tokens(1, 8))
        assert len(calls) == 1 + repeats


@pytest.mark.parametrize("layers", ["4", "2,1", "1,1", "-1", "one", ",", "0.5"])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match=f"RECUR_LAYERS={layers} must be ascending layer numbers from 0 to 3"):
        Config(num_layers=4, recur_layers=layers)


@pytest.mark.parametrize(
    "settings", [{"recur_repeats": 0}, {"recur_start": 1.5}, {"recur_start": -0.1}, {"recur_order": "x"}]
)
def test_settings_out_of_range_are_refused_by_name(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name.upper()}={value} must be"):
        Config(**settings)
