"""Test-time training: the score comes first, the step after it, and the next stream begins from the stored weights."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import TINY, result_of, run_script
from test_architectures import CPU, every_architecture, shake, some_tokens, tiny

import train_gpt

T, PLAN = 16, train_gpt.ScorePlan(16, 16, ttt_lr=0.5, ttt_tokens=48)
OFF = dataclasses.replace(PLAN, ttt_lr=0.0)


def naive_scores(model, tokens, lr: float, chunk: int, stride: int) -> np.ndarray:
    """Window by window with torch's own SGD: score what is new, then learn once `chunk` targets are scored."""
    sgd, found, learned = torch.optim.SGD(model.requires_grad_(True).parameters(), lr=lr), [], 0
    num_targets, since = len(tokens) - 1, 0
    while len(found) < num_targets:
        begin = max(0, len(found) + stride - T) if found else 0
        x, y = tokens[None, begin : begin + T], tokens[None, begin + 1 : begin + T + 1]
        with torch.no_grad():
            new = model.nats(x[:, : y.size(1)], y)[0, len(found) - begin :].tolist()
        found += new
        since += 1 if begin or stride == T else chunk // stride  # the first window of a slide is a chunk of its own
        if since < chunk // stride and len(found) < num_targets:
            continue
        since, whole = 0, range(learned, len(found) - T + 1, T)
        for b in whole:
            (model.nats(tokens[None, b : b + T], tokens[None, b + 1 : b + T + 1]).mean() / len(whole)).backward()
            learned = b + T
        sgd.step()
        sgd.zero_grad()
    return np.array(found)


@pytest.mark.parametrize("stride", [T, 4])
@pytest.mark.parametrize("num_targets", [10, 16, 49, 333])
def test_scores_are_those_of_a_plain_loop_of_score_and_sgd(stride, num_targets):
    plan = dataclasses.replace(PLAN, stride=stride, ttt_tokens=12 * stride)
    tokens = some_tokens(num_targets + 1)
    nats = train_gpt.score_stream(shake(tiny("gpt", train_seq_len=T)), tokens.numpy(), plan, CPU)
    expected = naive_scores(shake(tiny("gpt", train_seq_len=T)), tokens, 0.5, 12 * stride, stride)
    np.testing.assert_allclose(nats, expected, atol=2e-4)


@every_architecture
def test_every_architecture_learns_from_what_was_scored_and_forgets_it_with_the_stream(name):
    model, tokens = shake(tiny(name, train_seq_len=64)), some_tokens(400).numpy()
    plan = dataclasses.replace(PLAN, seq_len=64, stride=64, ttt_tokens=128)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    plain, taught = (train_gpt.score_stream(model, tokens, p, CPU) for p in (dataclasses.replace(plan, ttt_lr=0), plan))
    assert np.allclose(plain[:128], taught[:128], atol=1e-5)
    assert np.abs(plain[128:] - taught[128:]).max() > 1e-4
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert np.array_equal(taught, train_gpt.score_stream(model, tokens, plan, CPU))


@pytest.mark.parametrize("stride", [T, 4])
def test_earlier_scores_ignore_later_tokens(stride):
    model, a = shake(tiny("gpt", train_seq_len=T)), some_tokens(700).numpy()
    plan = dataclasses.replace(PLAN, stride=stride)
    for cut in (480, 493):  # at a step and between two
        b = a.copy()
        b[cut + 1 :] = 7
        before, swapped, short = (train_gpt.score_stream(model, x, plan, CPU) for x in (a, b, a[: cut + 1]))
        assert np.array_equal(before[:cut], swapped[:cut]) and not np.array_equal(before[cut:], swapped[cut:])
        np.testing.assert_allclose(before[:cut], short, atol=1e-5)  # its last chunk may be one of fewer rows


def test_a_text_that_repeats_itself_is_learned():
    model, tokens = shake(tiny("gpt", train_seq_len=T)), np.tile(some_tokens(48).numpy(), 20)
    plain, taught = (train_gpt.score_stream(model, tokens, plan, CPU).mean() for plan in (OFF, PLAN))
    assert taught < plain - 0.5


def test_no_state_is_carried_beside_it_and_the_artifact_says_how_to_score():
    model, plan = tiny("mamba"), train_gpt.ScorePlan(16, 16, True, 0.5, 48)
    assert not train_gpt.carries(model, plan) and train_gpt.carries(model, dataclasses.replace(plan, ttt_lr=0.0))
    assert train_gpt.load_artifact(train_gpt.pack_artifact(model, "mamba", None, plan, 1.0, 8), CPU.device)[1] == plan


def test_a_run_says_what_it_scored_before_and_that_it_carries_what_it_learns(data, tmp_path):
    settings = TINY | dict(DATA_PATH=data, OUT_DIR=tmp_path, ITERATIONS=30, VAL_LOSS_EVERY=15)
    plain, taught = (result_of(run_script(settings | dict(TTT_LR=lr, TTT_TOKENS=256, RUN_ID=lr))) for lr in (0, 0.3))
    assert taught["carries_state"] and not plain["carries_state"]
    assert taught["pre_ttt_val_bpb"] == plain["val_bpb"] and taught["pre_quant_val_bpb"] == plain["pre_quant_val_bpb"]
    assert taught["val_bpb"] < plain["val_bpb"] - 0.05
    assert taught["artifact_sha256"] != plain["artifact_sha256"] and "pre_ttt_val_bpb" not in plain
