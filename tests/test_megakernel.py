"""Fused kernels compute what gpt computes, are used where the setting or a race says so, and in training alone.

What the kernels compute is tested in test_fused_kernels.py.
"""

import time

import pytest
import torch
from test_architectures import some_tokens, tiny, train_losses
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from architectures.layers import LanguageModel
from architectures.megakernel import FUSED, Config, Model, speedup

ALL = ",".join(FUSED)
OPS = {"ce": "softcapped_cross_entropy", "norm": "mix_norm", "mlp": "relu2_mlp", "qk": "qk_norm_rope"}
every_kernel = pytest.mark.parametrize("name", FUSED)


def shaken(kernels: str, arch: str = "megakernel", **settings) -> LanguageModel:
    """A model in training whose projections are not zero; the same numbers whatever the kernels."""
    model = tiny(arch, **settings | ({"fused_kernels": kernels} if arch == "megakernel" else {}))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def loss_and_gradients(model: LanguageModel) -> list[Tensor]:
    x = some_tokens(3, 38)  # no multiple of a tile
    loss = model(x[:, :-1], x[:, 1:])
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def distance_to_gpt(kernels: str, **settings) -> float:
    """The largest relative difference of the loss or of a parameter's gradient."""
    pairs = zip(
        loss_and_gradients(shaken(kernels, **settings)), loss_and_gradients(shaken("", "gpt", **settings)), strict=True
    )
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


class Watch(TorchDispatchMode):
    """Counts the kit's operators."""

    def __init__(self):
        super().__init__()
        self.called: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "golf":
            self.called[function.name().removeprefix("golf::")] = (
                self.called.get(function.name().removeprefix("golf::"), 0) + 1
            )
        return function(*args, **(kwargs or {}))


@every_kernel
@pytest.mark.parametrize(
    "settings", [{}, {"num_layers": 1}, {"num_layers": 5, "num_kv_heads": 4, "tie_embeddings": False}]
)
def test_loss_and_gradients_are_those_of_gpt_with_each_kernel(name, settings):
    assert distance_to_gpt(name, **settings) < 1e-5


def test_twenty_steps_with_all_kernels_lose_what_gpt_loses():
    found, wanted = (train_losses(arch, 20, **s) for arch, s in (("megakernel", {"fused_kernels": ALL}), ("gpt", {})))
    assert wanted[-1] < 0.5 * wanted[0] and max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 1e-3


@every_kernel
def test_a_listed_kernel_and_no_other_runs_forward_and_backward_in_training(name):
    with Watch() as watch:
        loss_and_gradients(shaken(name))
    layers = {"ce": 1, "norm": 2 * 4, "mlp": 4, "qk": 4}[name]
    wanted = {OPS[name]: layers} | ({} if name == "ce" else {f"{OPS[name]}_backward": layers})
    assert watch.called == wanted


def test_scoring_is_gpts_bit_for_bit_whatever_is_listed():
    x, wanted = some_tokens(2, 37), shaken("", "gpt").eval().logits(some_tokens(2, 37))
    with Watch() as watch:
        assert torch.equal(shaken(ALL).eval().logits(x), wanted)
    assert watch.called == {}


def test_training_with_all_kernels_ignores_later_tokens():
    model, x = shaken(ALL), some_tokens(2, 40)
    y = x.clone()
    y[:, 17:] = (y[:, 17:] + 7) % 260
    before, after = model.head_inputs(x)[0], model.head_inputs(y)[0]
    torch.testing.assert_close(before[:, :17], after[:, :17], atol=1e-6, rtol=0)
    assert not torch.equal(before[:, 17:], after[:, 17:])


def test_windows_longer_than_the_tables_have_positions_too():
    model, plain, x = shaken(ALL), shaken("", "gpt"), some_tokens(1, 90)
    torch.testing.assert_close(model(x[:, :-1], x[:, 1:]), plain(x[:, :-1], x[:, 1:]), atol=1e-5, rtol=0)


def test_all_kernels_compile_into_one_graph():
    torch._dynamo.reset()
    model, x = shaken(ALL), some_tokens(2, 65)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    loss, wanted = (f(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for f in (compiled, model))
    params = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss, params), torch.autograd.grad(wanted, params), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_race_says_how_many_times_as_fast_the_second_is():
    x = torch.randn(200, 200)
    assert 1.5 < speedup(lambda: x.expand(8, -1, -1) @ x, lambda: x.expand(2, -1, -1) @ x) < 8


def test_what_wins_the_race_is_used_beside_earlier_winners_and_what_is_refused_is_not():
    class Raced(Model):
        seconds = {"": 4e-3, "ce": 5e-3, "norm": 3e-3, "norm,qk": 2e-3}  # noqa: RUF012  read only

        def contender(self, kernels: list[str], rows: int, compiled: bool):
            def work() -> Tensor:
                if "mlp" in kernels:
                    raise RuntimeError("no such instruction")
                time.sleep(self.seconds[",".join(kernels)])
                return torch.ones(1)

            return work

    model = Raced(tiny("megakernel").config)
    said = model.race_kernels(1, False, lambda x: 2 * x)  # of two ranks that agree
    assert said.startswith("norm,qk (ce 0.") and "mlp 0.000x (RuntimeError)" in said
    assert (model.streamed, model.summed) == (False, True)
    assert {(b.mixer.fused, b.mlp.fused) for b in model.blocks} == {(True, False)}


def test_the_real_contenders_can_be_raced_and_leave_the_model_as_it_was():
    model, state = tiny("megakernel", train_seq_len=16), torch.get_rng_state()
    before = [p.clone() for p in model.parameters()]
    said = model.race_kernels(2, False, lambda x: x)
    assert all(f"{name} " in said for name in FUSED) and "Error" not in said
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state) and model.config.fused_kernels == "auto"


def test_off_cuda_nothing_is_raced():
    model = tiny("megakernel")
    assert model.choose_kernels(2, False, lambda x: x) == "" and model.streamed is None and not model.summed


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"fused_kernels": "norm,rope"},
            "FUSED_KERNELS=norm,rope must be auto, none, or some of ce, norm, mlp, qk .*'rope' is not",
        ),
        ({"fused_kernels": "qk,qk"}, "FUSED_KERNELS=qk,qk must be .* each once"),
        ({"fused_kernels": ""}, "FUSED_KERNELS= must be auto"),
        ({"fused_kernels": "ce", "logit_softcap": 60.0}, "LOGIT_SOFTCAP=60.0 to be at most 50.0; leave out ce"),
        ({"fused_kernels": "norm", "model_dim": 4096}, "MODEL_DIM=4096 to be at most 2048; leave out norm"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_its_value(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(**settings)
