"""Diffusion: what is scored is a distribution and looks back only; the NELBO is a bound; masks hide what they mask."""

import itertools

import numpy as np
import pytest
import torch
from test_architectures import CPU, shake, some_tokens, tiny
from torch import Tensor

import train_gpt
from architectures.diffusion import Config, Model, Streams, hashed, mask_counts, most_masked
from architectures.layers import LanguageModel, ModelConfig

CHAIN, BLOCK = dict(diff_eval="chain"), dict(diff_eval="block", diff_block=4)
every_denoiser = pytest.mark.parametrize("settings", [CHAIN, BLOCK], ids=["chain", "block"])


def shaken(**settings) -> Model:
    return shake(tiny("diffusion", **settings))


def gpt_of(model: Model) -> LanguageModel:
    """gpt with the weights of the causal head."""
    gpt = tiny("gpt").eval().requires_grad_(False)
    assert gpt.load_state_dict(model.state_dict(), strict=False).missing_keys == []
    return gpt


def toy(T: int, **settings) -> tuple[Model, Tensor, Tensor]:
    """A model of three words, and the inputs and targets (3^T, T) of all texts of T words after the first."""
    texts = torch.tensor(list(itertools.product(range(3), repeat=T)))
    inputs = torch.cat((torch.ones_like(texts[:, :1]), texts[:, :-1]), dim=1)
    return shake(shaken(vocab_size=3, train_seq_len=T, **settings)), inputs, texts


Found = dict[tuple[bool, ...], Tensor]


def nats_by_masks(model: Model, x: Tensor, y: Tensor, block: int = 0) -> Found:
    """Nats (rows, b) by the denoiser of every target of a block, under every choice of masked ones but none."""
    b, found = model.config.diff_block or x.size(1), {}
    for mask in itertools.product((False, True), repeat=b):
        if any(mask):
            masked = torch.zeros(len(x), x.size(1) // b, b, dtype=torch.bool)
            masked[:, block] = torch.tensor(mask)
            found[mask] = model.nats_under(masked, x, y)[:, block * b : (block + 1) * b].double()
    return found


def expected_nelbo(found: Found) -> Tensor:
    """The NELBO (rows) as the integral over t of what Bernoulli masks cost, by a quadrature that is exact here."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    total = torch.zeros(len(next(iter(found.values()))), dtype=torch.float64)
    for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        for mask, nats in found.items():
            probability = t ** sum(mask) * (1 - t) ** (len(mask) - sum(mask))
            total += weight * probability / t * nats[:, list(mask)].sum(1)
    return total


def nats_by_orders(found: Found) -> dict[tuple[int, ...], Tensor]:
    """Nats (rows) of all words of a block, revealed one by one, for every order of doing so."""
    orders, b = {}, len(next(iter(found)))
    for order in itertools.permutations(range(b)):
        steps = (found[tuple(i in order[n:] for i in range(b))][:, order[n]] for n in range(b))
        orders[order] = sum(steps)
    return orders


def is_mean_of(draws: Tensor, expected: Tensor) -> bool:
    """Whether draws (n, rows) scatter about what is expected of each row, within five standard errors."""
    return bool(((draws.mean(0) - expected).abs() < 5 * draws.std(0) / len(draws) ** 0.5 + 1e-6).all())


@pytest.mark.parametrize("settings", [{}, CHAIN, dict(BLOCK, diff_block=2)], ids=["ar", "chain", "block"])
def test_the_probabilities_of_all_texts_sum_to_one(settings):
    model, x, y = toy(4, **settings)
    p = (-model.nats(x, y).double().sum(1)).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5) and p.max() > 2 * p.min()


def test_the_nelbo_bounds_the_nats_of_every_text_under_the_process_that_it_is_of():
    model, x, y = toy(3, **CHAIN)
    found = nats_by_masks(model, x, y)
    orders, nelbo = nats_by_orders(found), expected_nelbo(found)
    nats = torch.stack(list(orders.values()))  # (orders, texts)
    exact = -(-nats).exp().mean(0).log()
    assert (-exact).exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert (nelbo > exact).all() and (nelbo - exact).max() > 1e-3
    torch.testing.assert_close(nelbo, nats.mean(0), atol=1e-6, rtol=1e-6)
    # The chain is one of the orders, another model than their mixture: the bound is none for it.
    chain = orders[0, 1, 2]
    torch.testing.assert_close(model.nats(x, y).double().sum(1), chain, atol=1e-5, rtol=1e-5)
    assert (chain > nelbo).any() and (chain < nelbo).any()


def test_in_blocks_the_nelbo_bounds_the_nats_given_the_blocks_before():
    model, x, y = toy(4, diff_eval="block", diff_block=2)
    blocks = [nats_by_masks(model, x, y, block) for block in (0, 1)]
    orders = [torch.stack(list(nats_by_orders(found).values())) for found in blocks]
    exact = -sum((-nats).exp().mean(0).log() for nats in orders)
    nelbo = sum(expected_nelbo(found) for found in blocks)
    assert (-exact).exp().sum().item() == pytest.approx(1, abs=1e-5) and (nelbo > exact).all()
    draws = model.nelbo(x.repeat(50, 1), y.repeat(50, 1), 2, torch.Generator().manual_seed(0)).view(50, -1)
    assert is_mean_of(draws, nelbo)


@pytest.mark.parametrize("samples", [1, 8])
def test_the_estimate_of_the_nelbo_has_it_as_its_mean(samples):
    model, x, y = toy(3, **CHAIN)
    draws = model.nelbo(x.repeat(200, 1), y.repeat(200, 1), samples, torch.Generator().manual_seed(0)).view(200, -1)
    assert is_mean_of(draws, expected_nelbo(nats_by_masks(model, x, y))) and draws.std(0).max() < 3 / samples**0.5


@every_denoiser
@pytest.mark.parametrize("cut", [1, 3, 4, 9, 15])
def test_what_the_denoiser_is_scored_by_looks_back_only(settings, cut):
    model, x = shaken(**settings), some_tokens(2, 16)
    y = x.clone()
    y[:, cut:] = (y[:, cut:] + 7) % 260
    before, after = model.logits(x), model.logits(y)
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert ((before - after).abs().amax(dim=2) > 1e-3)[:, cut:].all()


@every_denoiser
def test_a_score_of_the_denoiser_sends_no_gradient_to_later_tokens_or_other_rows(settings):
    model, seen = shaken(**settings), []
    hook = model.embed.register_forward_hook(lambda _, __, out: seen.append(out.detach().requires_grad_()) or seen[-1])
    model.logits(some_tokens(2, 16))[0, 9].sum().backward()
    hook.remove()
    grads = sum(out.grad.abs().amax(dim=2) for out in seen if out.grad is not None)  # of every pass, (2, 16)
    assert (grads[0, :10] > 0).all() and grads[0, 10:].max() == 0 and grads[1].max() == 0


def test_the_denoiser_fails_the_causality_probe():
    model, x = shaken(), some_tokens(2, 64)
    y, masked = x.clone(), torch.zeros(2, 1, 64, dtype=torch.bool)
    y[:, 40:], masked[..., 5::7] = (y[:, 40:] + 7) % 260, True
    before, after = (model.nats_under(masked, ids, x) for ids in (x, y))
    assert ((before - after).abs() > 1e-4)[:, :40].float().mean() > 0.9


@every_denoiser
def test_masked_tokens_are_hidden_and_visible_ones_are_not(settings):
    model, x, b = shaken(**settings), some_tokens(1, 17), settings.get("diff_block", 16)
    inputs, targets, block = x[:, :-1], x[:, 1:], torch.arange(16) // b
    masked = torch.rand(1, 16 // b, b, generator=torch.Generator().manual_seed(3)) < 0.5
    before = model.nats_under(masked, inputs, targets)[0]
    for i in range(15):
        other = inputs.clone()
        other[0, i + 1] = (other[0, i + 1] + 7) % 260  # the token of target i
        moved = (model.nats_under(masked, other, targets)[0] - before).abs() > 1e-5
        shown = not masked.flatten()[i] and (i + 1) % b > 0  # the last target of a block has no slot
        assert moved[block < i // b].sum() == 0
        assert moved[block == i // b].all() if shown else not moved[block == i // b].any()
        assert moved[block > i // b].all()  # where the blocks before are clean


@pytest.mark.parametrize("flex", [False, True])
@pytest.mark.parametrize("noisy", [1, 2])
@pytest.mark.parametrize(("T", "block"), [(1, 2), (8, 2), (10, 4), (12, 12), (12, None)])
def test_streams_see_what_they_should(T, block, noisy, flex):
    g, streams, b = torch.Generator().manual_seed(T), Streams(block, flex), block or T
    q, k, v = (torch.randn(2 + noisy, heads, T, 8, generator=g, requires_grad=not flex) for heads in (4, 2, 2))
    streams.clean, rows = 2, []
    for row, head, i in itertools.product(range(2 + noisy), range(4), range(T)):
        seen, first = [(row, s) for s in range(i + 1)], i // b * b
        if row >= 2:
            seen = [(row - 2, s) for s in range(first)] + [(row, s) for s in range(first, min(T, first + b))]
        keys, values = (torch.stack([x[r, head // 2, s] for r, s in seen]) for x in (k, v))
        rows.append((keys @ q[row, head, i] / 8**0.5).softmax(0) @ values)
    fast, slow = streams.attend(q, k, v), torch.stack(rows).view(2 + noisy, 4, T, 8)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    if not flex:  # which has no backward pass on CPU
        weights = torch.randn(fast.shape, generator=g)
        grads = [torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (fast, slow)]
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_a_block_as_long_as_the_window_is_the_window():
    x = some_tokens(2, 65)
    one, other = (shaken(**s) for s in (CHAIN, dict(diff_eval="block", diff_block=64)))
    assert one(x[:, :-1], x[:, 1:]) == other(x[:, :-1], x[:, 1:])
    assert torch.equal(one.logits(x[:, :20]), other.logits(x[:, :20]))


@every_denoiser
def test_the_chain_masks_what_it_has_not_yet_predicted(settings):
    model, x, b = shaken(**settings, train_seq_len=16), some_tokens(2, 17), settings.get("diff_block", 16)
    nats = model.nats(x[:, :-1], x[:, 1:])
    for i in range(16):
        masked = torch.zeros(2, 16 // b, b, dtype=torch.bool)
        masked[..., i % b :] = True
        there = model.nats_under(masked, x[:, :-1], x[:, 1:])[:, i]
        torch.testing.assert_close(nats[:, i], there, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.nats(x[:, :-1], x[:, 1:], 6), nats[:, 6:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plan", [(16, 16), (16, 6), (14, 14)], ids=str)
@every_denoiser
def test_a_text_scored_by_the_denoiser_has_a_score_per_target_that_later_tokens_do_not_move(settings, plan):
    model, tokens, plan = shaken(**settings, train_seq_len=16), some_tokens(60).numpy(), train_gpt.ScorePlan(*plan)
    nats = train_gpt.score_stream(model, tokens, plan, CPU, 64)
    other = train_gpt.score_stream(model, np.concatenate((tokens[:40], tokens[:9])), plan, CPU, 64)
    assert nats.shape == (59,) and (nats > 0).all()
    assert np.array_equal(nats[:39], other[:39]) and not np.array_equal(nats[39:48], other[39:])


@pytest.mark.parametrize("rows", [1, 5, 6])
@pytest.mark.parametrize(
    "settings",
    [{}, dict(diff_block=8, diff_share=1.0), dict(diff_block=8), dict(diff_weighting="flat", diff_ar_weight=0.2),
     dict(diff_share=0.25), dict(CHAIN, diff_share=0.25, diff_ar_weight=0.0)],
    ids=str,
)  # fmt: skip
def test_the_training_loss_is_its_equation(settings, rows):
    model, x = shaken(**settings), some_tokens(rows, 65)
    inputs, targets, w, b = x[:, :-1], x[:, 1:], model.config.diff_ar_weight, model.config.diff_block or 64
    noisy = {1.0: rows, 0.75: {1: 1, 5: 4, 6: 4}[rows], 0.25: {1: 1, 5: 1, 6: 2}[rows]}[model.config.diff_share]
    noisy = noisy if w else rows
    (keys, phase), N = hashed(inputs[:noisy]), 64 // b
    masked = model.draw(keys, mask_counts(noisy * N, b, phase).view(noisy, N))
    nats = model.nats_under(masked, inputs[:noisy], targets[:noisy]).view(noisy, N, b)
    cells = [nats[r, n][masked[r, n]] for r in range(noisy) for n in range(N)]
    # 1/t over the T targets is 1 / (T t): the mean over those that are masked.
    cells = [torch.cat(cells)] if model.config.diff_weighting == "flat" else cells
    expected = torch.stack([cell.mean() for cell in cells]).mean()
    causal = gpt_of(model).nats(inputs, targets).mean()
    loss = w * causal + (1 - w) * expected
    assert model(inputs, targets).item() == pytest.approx(loss.item(), abs=1e-5) and abs(causal - expected) > 1e-3
    assert w == 0 or model.gauges.tolist() == pytest.approx([causal.item(), expected.item()], abs=1e-5)


@pytest.mark.parametrize(("blocks", "b"), [(1, 4), (2, 4), (5, 4), (8, 3), (6, 64)])
def test_masks_are_as_many_in_every_batch_and_every_number_of_them_is_equally_likely(blocks, b):
    phases = (torch.arange(240) + 0.5) / 240
    counts = torch.stack([mask_counts(blocks, b, phase) for phase in phases])  # (240, blocks)
    assert set(counts.flatten().tolist()) == set(range(1, b + 1))
    each = counts.flatten().bincount(minlength=b + 1)[1:] / counts.numel()
    torch.testing.assert_close(each, torch.full((b,), 1 / b), atol=2 / 240, rtol=0)
    fixed = counts.sum(1).unique().tolist() == [most_masked(blocks, b)]
    assert fixed or (blocks % 2 and counts.sum(1).max() <= most_masked(blocks, b))


def test_masks_follow_from_the_batch_alone_and_are_spread_evenly():
    model, rows, T, batches = tiny("diffusion"), 64, 64, 20
    share, phases = torch.zeros(T), []
    for ids in torch.randint(260, (batches, rows, T), generator=torch.Generator().manual_seed(0)):
        keys, phase = hashed(ids)
        count = mask_counts(rows, T, phase)[:, None]
        masked = model.draw(keys, count)
        assert torch.equal(masked.sum(2), count) and count.flatten().tolist() == list(range(1, T + 1))
        share += masked.float().mean(dim=(0, 1)) / batches
        phases.append(float(phase))
        changed = ids.clone()
        changed[3, 10] += 1
        moved = (hashed(changed)[0] != keys).any(dim=1)
        assert moved.tolist() == [row == 3 for row in range(rows)] and hashed(changed)[1] != phase
    assert (share - (T + 1) / (2 * T)).abs().max() < 5 * 0.5 / (rows * batches) ** 0.5
    assert min(phases) < 0.25 and max(phases) > 0.75


def test_the_denoiser_is_told_how_much_is_masked_and_the_causal_head_is_not():
    model, x, hidden = shaken(), some_tokens(2, 16), torch.zeros(1, 16, dtype=torch.bool)
    some, more = (model.denoised(x, hidden, torch.full((1, 1), t), clean=True) for t in (0.2, 0.8))
    assert torch.equal(some[:2], more[:2]) and (some[2:] - more[2:]).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [{}, dict(diff_block=8), dict(diff_time_freqs=0), dict(diff_until=0.5)], ids=str)
def test_the_artifact_of_a_causal_score_is_that_of_gpt(settings):
    model, x = shaken(**settings), some_tokens(2, 64)
    stored = model.folded()
    assert set(stored.state_dict()) == set(tiny("gpt").state_dict()) and torch.equal(stored.logits(x), model.logits(x))
    assert sum(p.numel() for p in model.parameters()) == model.config.num_params() > stored.config.num_params()
    assert shaken(**CHAIN).folded().mask is not None
    assert Config(diff_ar_weight=1.0).num_params() == ModelConfig().num_params()


def test_after_the_switch_the_causal_loss_alone_is_trained():
    model, x = shaken(diff_until=0.5, diff_ar_weight=0.0), some_tokens(4, 65)
    causal, losses = gpt_of(model)(x[:, :-1], x[:, 1:]), []
    for fraction in (0.0, 0.4, 0.5, 1.0):
        model.on_progress(fraction)
        losses.append(model(x[:, :-1], x[:, 1:]).item())
    assert model.progress_switches == (0.5,) and tiny("diffusion").progress_switches == ()
    assert losses[0] == losses[1] and losses[2] == losses[3] == causal and abs(losses[1] - losses[2]) > 0.01


def test_streams_in_blocks_compile_without_graph_breaks_and_a_chain_is_not_unrolled():
    torch._dynamo.reset()
    model, x = tiny("diffusion", num_layers=1, diff_block=8), some_tokens(2, 65)
    inputs, targets = x[:, :-1].contiguous(), x[:, 1:].contiguous()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs, targets), model(inputs, targets), atol=1e-5, rtol=1e-5)
    chain, graphs = shaken(**CHAIN, num_layers=1), []
    compiled = torch.compile(chain.nats, dynamic=False, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert torch.equal(compiled(inputs, targets, 0), chain.nats(inputs, targets, 0))
    assert 0 < sum(len(graph.graph.nodes) for graph in graphs) < 64


REFUSED = [
    ({"diff_eval": "nelbo"}, "DIFF_EVAL=nelbo is a bound"),
    ({"diff_eval": "elbo"}, "DIFF_EVAL=elbo must be one of ar, chain, block"),
    ({"diff_weighting": "none"}, "DIFF_WEIGHTING=none must be one of"),
    ({"diff_ar_weight": -0.1}, "DIFF_AR_WEIGHT=-0.1 must be between"),
    ({"diff_ar_weight": float("nan")}, "DIFF_AR_WEIGHT=nan must be between"),
    ({"diff_ar_weight": 0.0}, "DIFF_AR_WEIGHT=0 must be above 0"),
    ({"diff_time_freqs": -1}, "DIFF_TIME_FREQS=-1 must be at least 0"),
    ({"diff_block": 1}, "DIFF_BLOCK=1 must be at least 2"),
    ({"diff_block": 48}, "DIFF_BLOCK=48 must be at least 2 and divide TRAIN_SEQ_LEN=1024"),
    ({"diff_until": 0.0}, "DIFF_UNTIL=0.0 must be above 0"),
    ({"diff_until": 1.0}, "DIFF_UNTIL=1.0 must be above 0 and below 1"),
    ({"diff_eval": "block"}, "DIFF_EVAL=block must be ar or chain with DIFF_BLOCK=None"),
    ({"diff_eval": "chain", "diff_block": 8}, "DIFF_EVAL=chain must be ar or block with DIFF_BLOCK=8"),
    ({"diff_eval": "chain", "diff_ar_weight": 1.0}, "DIFF_AR_WEIGHT=1.0 must be below 1"),
    ({"diff_eval": "chain", "diff_until": 0.5}, "DIFF_UNTIL=0.5 none"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=str)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)
