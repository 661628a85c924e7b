"""Scoring as one text."""

import numpy as np
import pytest
import torch
from test_architectures import CPU, shake, some_tokens, tiny

import train_gpt
from architectures import mamba

every_kind = pytest.mark.parametrize("kind", sorted(mamba.KINDS))
PLAN = train_gpt.ScorePlan(16, 16, carry=True)


def model_of(kind: str) -> mamba.Model:
    return shake(tiny("mamba", ssm_kind=kind, ssm_attn_window=16))


@every_kind
@pytest.mark.parametrize("num_targets", [1, 15, 16, 17, 64, 65, 333])
def test_windows_that_carry_a_state_score_each_target_as_one_long_window_does(kind, num_targets):
    model, tokens = model_of(kind), some_tokens(num_targets + 1)
    nats = train_gpt.score_stream(model, tokens.numpy(), PLAN, CPU, 64)
    expected = model.nats(tokens[None, :-1], tokens[None, 1:])[0]
    np.testing.assert_allclose(nats, expected.numpy(), atol=1e-3)


@every_kind
def test_every_stream_begins_from_a_fresh_state_and_earlier_scores_ignore_later_tokens(kind):
    model, a = model_of(kind), some_tokens(700).numpy()
    b = a.copy()
    b[500:] = 7
    before, swapped, cut, again = (train_gpt.score_stream(model, x, PLAN, CPU, 64) for x in (a, b, a[:500], a))
    assert np.array_equal(before[:499], swapped[:499]) and np.array_equal(before[:499], cut)
    assert np.array_equal(before, again) and not np.array_equal(before[499:], swapped[499:])


@every_kind
def test_a_carried_score_is_the_same_for_any_number_of_rows_and_ranks(kind):
    model, tokens = model_of(kind), some_tokens(700).numpy()
    scores = [train_gpt.score_stream(model, tokens, PLAN, CPU, rows * 16) for rows in (1, 3, 50)]
    scores.append(train_gpt.score_stream(model, tokens, PLAN, train_gpt.Machine(CPU.device, 1, 3), 64))
    for other in scores[1:]:
        np.testing.assert_allclose(scores[0], other, atol=1e-3)


def test_a_state_is_carried_only_where_the_plan_says_so_and_windows_stand_side_by_side():
    model = model_of("mamba2")
    plans = [PLAN, train_gpt.ScorePlan(16, 16), train_gpt.ScorePlan(16, 8, carry=True)]
    assert [train_gpt.carries(model, plan) for plan in plans] == [True, False, False]
    assert not train_gpt.carries(tiny("gpt"), PLAN)
    blob = train_gpt.pack_artifact(model, "mamba", None, PLAN, 1.0, 8)
    assert train_gpt.load_artifact(blob, CPU.device)[1] == PLAN


@every_kind
def test_a_compiled_score_carries_the_same_state(kind):
    torch._dynamo.reset()
    model, tokens = model_of(kind), some_tokens(16 * 8 + 1)
    rows = tokens[:-1].view(2, 4, 16), tokens[1:].view(2, 4, 16)
    compiled = torch.compile(model.nats, dynamic=False, fullgraph=True, backend="aot_eager")
    found = []
    for nats in (model.nats, compiled):
        model.carry(True)
        with torch.no_grad():
            found.append(torch.cat([nats(x, y) for x, y in zip(*rows, strict=True)]))
        model.carry(False)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
