"""H-Net: where chunks begin, what runs over them, and that none of it looks ahead, full slots included."""

import math
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from test_architectures import CPU, shake, some_tokens, tiny
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from architectures.hnet import MAX_P, Config, Model, chunks_begun, naive_chunks, naive_smooth, smooth
from architectures.layers import rms_norm
from tools import pack
from tools.costs import stored_bytes

SHAPES = [{"hnet_main_dim": 48, "hnet_target": 8.0, "hnet_outer_mlp": 2}, {"hnet_enc": 0, "hnet_dec": 2}]
REFUSED = dict(hnet_target=1.0, hnet_cap=0.9, hnet_ratio_w=-0.1, hnet_enc=-1, hnet_dec=8, hnet_outer_mlp=0)


def routed(model: Model, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(p, chunks begun) of the model for ids, both (B, T); a gradient in p, by the sum of their nats as targets."""
    seen = []
    hook = model.router.register_forward_hook(lambda _, __, p: seen.append(p.detach().requires_grad_()) or seen[-1])
    model.nats(ids, ids).sum().backward()
    hook.remove()
    return seen[0], chunks_begun(seen[0] >= 0.5, model.config.slot_rate)


def crowded(**settings) -> Model:
    """A model, far from its beginning, that wants more chunks than it has slots for, but few in monotonous text."""
    model = shake(tiny("hnet", **{"hnet_target": 12.0} | settings))
    for ids, fewest, most in ((some_tokens(2, 64), 1.5, math.inf), (torch.full((1, 64), 5), 0, 1)):
        p, begun = routed(model, ids)
        assert fewest * begun[:, -1].sum() < (p >= 0.5).sum() <= most * begun[:, -1].sum()
    return model


def by_hand(model: Model, x: Tensor) -> Tensor:
    """The backbone for one row x (T, D) as in the equation: a list of chunks, no slots, one position after another."""
    x0 = h = x[None]
    for block in model.encoder:
        h = block(h, x0)
    h = rms_norm(h)
    q, k = h @ model.router.query.weight.T, h @ model.router.key.weight.T
    p = [torch.tensor(1.0)] + [(1 - F.cosine_similarity(q[0, t], k[0, t - 1], dim=0)) / 2 for t in range(1, len(x))]
    starts = []
    for t in range(len(x)):
        if p[t] >= 0.5 and len(starts) < math.ceil(model.config.hnet_cap * (t + 1) / model.config.hnet_target - 1e-9):
            starts.append(t)
    z, state, rows = dict(zip(starts, model.run_main(h[:, starts])[0], strict=True)), torch.zeros(x.size(1)), []
    for t in range(len(x)):
        sure, P = p[t] if t in z else 1 - p[t], p[t].clamp(max=MAX_P)
        state = P * z[t] + (1 - P) * state if t in z else state
        rows.append(state * (1 + sure - sure.detach()))
    y = torch.stack(rows)[None] + model.residual(h)
    for block in model.decoder:
        y = block(y, x0)
    return y[0]


def train(model: Model, batches: Iterable[Tensor], lr_scale: float = 1.0) -> Model:
    trainer = train_gpt.Trainer(model, train_gpt.RunConfig(muon_momentum_warmup_steps=0), CPU, micro_batches=1)
    for step, batch in enumerate(batches):
        trainer.train_step(batch, step, lr_scale, lambda: [0.0, 0.0, 0.0])
    return model.eval().requires_grad_(False)


def trained(text: bytes, steps: int = 60, **settings) -> tuple[Tensor, Tensor]:
    """(p, chunks begun) in 16 windows of text, after a few steps on other text."""
    tokens, rng = torch.tensor(list(text[:201_024])) + 4, torch.Generator().manual_seed(0)
    starts = torch.randint(199_000, (steps, 8, 1), generator=rng)
    model = train(tiny("hnet", **settings), tokens[starts + torch.arange(65)])
    return routed(model, tokens[200_000:].view(16, 64))


@pytest.mark.parametrize("T", [1, 2, 63, 256])
@pytest.mark.parametrize("wish", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("settings", [{}, {"hnet_target": 3.7, "hnet_cap": 1.0}, {"hnet_target": 1.5}])
def test_boundaries_that_find_a_slot_are_those_of_the_loop_over_positions(T, wish, settings):
    config, g = Config(**settings), torch.Generator().manual_seed(T)
    wanted = torch.rand(3, T, generator=g) < wish
    begun = chunks_begun(wanted, config.slot_rate)
    assert torch.equal(begun, naive_chunks(wanted, config)) and begun.max() <= config.slots(T)


@pytest.mark.parametrize("C", [1, 63, 256])
@pytest.mark.parametrize(("most", "tolerance"), [(0.99, 1e-4), (MAX_P, 5e-3)])  # log(1 - p) is steep near 1
def test_smoothing_equals_the_loop_over_chunks_forward_and_gradient(C, most, tolerance):
    g = torch.Generator().manual_seed(C)
    p = 0.5 + 0.49 * torch.rand(2, C, generator=g)
    p[:, ::5] = most
    tensors = [torch.randn(2, C, 12, generator=g).requires_grad_(), p.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    weights = torch.randn(2, C, 12, generator=g)
    fast, slow = smooth(*tensors), naive_smooth(*exact)
    grads = [torch.autograd.grad((y * weights).sum(), x) for y, x in ((fast, tensors), (slow, exact))]
    for got, wanted in zip((fast, *grads[0]), (slow, *grads[1]), strict=True):
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    certain = smooth(tensors[0], torch.full((2, C), MAX_P))
    torch.testing.assert_close(certain, tensors[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 99])
def test_smoothing_uses_past_chunks_only(cut):
    z, p = torch.randn(2, 100, 8, requires_grad=True), (0.5 + 0.4 * torch.rand(2, 100)).requires_grad_()
    smooth(z, p)[:, cut - 1].sum().backward()
    for grad in (z.grad, p.grad):
        assert grad[:, cut:].abs().max() == 0 and grad[:, :cut].abs().max() > 0


@pytest.mark.parametrize("make", [crowded, lambda **settings: shake(tiny("hnet", **settings))], ids=["full", "free"])
@pytest.mark.parametrize("settings", [{}, *SHAPES])
def test_whole_model_and_its_gradients_equal_the_equation(make, settings):
    model = make(**settings)
    model.requires_grad_()
    x, params = rms_norm(torch.randn(2, 40, 32)), [*model.encoder.parameters(), *model.router.parameters()]
    params += [*model.blocks.parameters(), *model.decoder.parameters(), model.residual.weight]
    fast, slow = model.backbone(x), torch.stack([by_hand(model, row) for row in x])
    weights = torch.randn_like(fast)
    grads = [torch.autograd.grad((y * weights).sum(), params) for y in (fast, slow)]
    for got, wanted in zip((fast, *grads[0]), (slow, *grads[1]), strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-4 * wanted.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("cut", [1, 2, 9, 16, 33, 62, 63])
@pytest.mark.parametrize("later", ["same", "random"])
def test_logits_ignore_later_boundaries_when_slots_are_full(cut, later):
    model, x = crowded(), some_tokens(2, 64)
    y = x.clone()
    y[:, cut:] = x[:, cut - 1 : cut] if later == "same" else (y[:, cut:] * 7 + 5) % 260
    torch.testing.assert_close(model.logits(x)[:, :cut], model.logits(y)[:, :cut], atol=1e-5, rtol=0)
    (p, before), (q, after) = routed(model, x), routed(model, y)
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert cut > 60 or (p >= 0.5).sum() != (q >= 0.5).sum()  # how many come later differs


@pytest.mark.parametrize("position", [0, 20, 62])
def test_gradients_reach_no_later_token_when_slots_are_full(position):
    model, x = crowded(), rms_norm(torch.randn(1, 64, 32)).requires_grad_()
    model.backbone(x)[:, position].sum().backward()
    assert x.grad[:, position + 1 :].abs().max() == 0 and x.grad[:, : position + 1].abs().max() > 0


@pytest.mark.parametrize("T", [1, 2, 7, 16, 41, 63])
def test_a_shorter_window_is_the_beginning_of_a_longer_one_when_slots_are_full(T):
    model, x = crowded(), some_tokens(2, 64)
    torch.testing.assert_close(model.logits(x[:, :T]), model.logits(x)[:, :T], atol=1e-5, rtol=1e-5)


def test_a_row_ignores_how_many_chunks_other_rows_have():
    model, x = crowded(), some_tokens(3, 64)
    y = torch.cat((x[:1], torch.full((2, 64), 5)))
    assert torch.equal(model.logits(x)[0], model.logits(y)[0])


@pytest.mark.parametrize("target", [3.0, 6.0, 12.0])
def test_main_network_runs_at_the_shorter_length(target):
    model, seen = tiny("hnet", hnet_target=target), []
    for block in [*model.encoder, *model.blocks, *model.decoder]:
        block.register_forward_hook(lambda _, __, y: seen.append(tuple(y.shape)))
    model.logits(some_tokens(2, 64))
    slots = math.ceil(64 * 1.5 / target)
    assert seen == [(2, 64, 32), (2, slots, 32), (2, slots, 32), (2, 64, 32)]


def test_work_falls_with_the_target_and_is_less_than_that_of_gpt():
    def work(name: str, **settings) -> int:
        with FlopCounterMode(display=False) as counter:
            tiny(name, num_layers=8, **settings)(some_tokens(1, 64), some_tokens(1, 64)).backward()
        return counter.get_total_flops()

    dense, usual, sparse = (work("hnet", hnet_target=target) for target in (3.0, 6.0, 12.0))
    assert dense > usual > sparse and usual < 0.8 * work("gpt")


def test_confidence_changes_no_output_and_gives_every_position_a_say():
    free, bound = (shake(tiny("hnet", hnet_ste=ste)) for ste in (False, True))
    x = some_tokens(2, 64)
    assert torch.equal(bound.logits(x), free.logits(x))
    (told, begun), (told_through_smoothing, _) = routed(bound, x), routed(free, x)
    assert (told.grad != 0).all()
    assert torch.equal(told_through_smoothing.grad[:, 1:] != 0, begun.diff(dim=1) > 0)


def test_nats_alone_teach_the_router():
    model = tiny("hnet", hnet_ratio_w=0.0)
    trainer = train_gpt.Trainer(model, train_gpt.RunConfig(), CPU, micro_batches=1)
    trainer.train_step(some_tokens(4, 65), 0, 1.0, lambda: [0.0, 0.0, 0.0])  # at first, what is read weighs nothing
    trainer.backward(some_tokens(4, 65))
    assert model.router.query.weight.grad.abs().max() > 0 and model.router.key.weight.grad.abs().max() > 0


def test_ratio_loss_is_in_the_training_loss_and_nowhere_else():
    model, x, y = shake(tiny("hnet", hnet_ratio_w=0.3)), some_tokens(2, 64), some_tokens(2, 65)[:, 1:]
    nats, (p, begun) = model.nats(x, y).mean().item(), routed(model, x)
    assert model(x, y).item() == pytest.approx(nats, abs=1e-5)
    share, mean, N = (p >= 0.5).float().mean().item(), p.mean().item(), model.config.hnet_target
    ratio = N / (N - 1) * ((N - 1) * share * mean + (1 - share) * (1 - mean))
    assert model.train()(x, y).item() == pytest.approx(nats + 0.3 * ratio, abs=1e-5) and ratio > 1.01
    chunks, wanted = begun[:, -1].sum().item(), (p >= 0.5).sum().item()
    assert model.gauges.tolist() == pytest.approx([nats, 128 / chunks, 1 - chunks / wanted], abs=1e-5)
    assert model.nats(x, y).mean().item() == pytest.approx(nats, abs=1e-6)


@pytest.mark.parametrize("N", [2.0, 6.0])
def test_ratio_loss_is_one_at_the_target_and_pushes_towards_it(N):
    model = tiny("hnet", hnet_target=N)
    for share, pushes in ((1 / N, 0), (2 / N, 1), (0, -1)):
        p = torch.full((60,), 1 / N, requires_grad=True)
        loss = model.ratio_loss(torch.arange(60) < round(60 * share), p)
        slope = torch.autograd.grad(loss, p)[0].sum().item()
        assert (abs(slope) < 1e-5) if pushes == 0 else slope * pushes > 0.1
        assert pushes or loss.item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("target", [3.0, 8.0])
def test_mean_inner_length_follows_the_target_and_chunks_follow_the_text(target, text):
    p, begun = trained(text, hnet_target=target, hnet_ratio_w=0.3)
    share = begun[:, -1].sum().item() / begun.numel()
    assert 0.6 / target < share < 1.4 / target and (p >= 0.5).sum() < 1.2 * begun[:, -1].sum()
    lengths = torch.cat([row.diff().nonzero().flatten().diff() for row in begun]).float()
    assert lengths.unique().numel() >= 4 and lengths.std() > 0.3 * lengths.mean()  # no constant stride
    assert len({tuple(row.tolist()) for row in begun}) == len(begun)  # no pattern of positions


def test_ratio_weight_changes_how_many_chunks_there_are(text):
    free, bound = (trained(text, 30, hnet_target=12.0, hnet_ratio_w=weight)[0] >= 0.5 for weight in (0.0, 0.3))
    assert bound.float().mean() < free.float().mean() - 0.05


def test_random_text_is_not_predicted_better_than_at_random():
    *batches, last = torch.randint(260, (31, 8, 65), generator=torch.Generator().manual_seed(3))
    model = train(tiny("hnet", hnet_target=2.0), batches, 0.3)
    assert model.nats(last[:, :-1], last[:, 1:]).mean() > math.log(260) - 0.01


@pytest.mark.parametrize("settings", [*SHAPES, {"num_layers": 8, "hnet_main_dim": 64}])
def test_parameters_of_other_shapes_are_counted(settings):
    model = tiny("hnet", **settings)
    assert sum(p.numel() for p in model.parameters()) == model.config.num_params()


def test_default_model_fits_with_its_code():
    code = len(pack.compress(pack.flatten("hnet")))
    assert stored_bytes("hnet", {}, 1024) + code < 16_000_000


@pytest.mark.parametrize(("name", "value"), [*REFUSED.items(), ("hnet_main_dim", 256), ("hnet_main_dim", 520)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name.upper()}={value} (and .*)?must be"):
        Config(**{name: value})
