"""Rounding by what the matrices meet: the loss that one column's rounding causes is made good by the later ones."""

import re

import pytest
import torch
from conftest import TINY, result_of, run_script
from test_architectures import CPU, SHAPE, every_architecture, shake, some_tokens, tiny

import train_gpt


def loss(weight, values, scales, gram) -> float:
    """The squared error of all outputs, over the inputs that the gram is of."""
    error = weight.double() - values.double() * scales.double()
    return ((error @ gram.double()) * error).sum().item()


def naive_gptq(weight, gram, scales, limit: int):
    """One column after the other, the inverse of what is left computed anew each time (Frantar et al. 2022, eq. 2)."""
    weight, columns = weight.double().clone(), torch.argsort(gram.diagonal(), descending=True).tolist()
    gram = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(len(gram))
    values = torch.zeros_like(weight)
    while columns:
        inverse = torch.linalg.inv(gram[columns][:, columns])
        first, rest = columns[0], columns[1:]
        values[:, first] = (weight[:, first] / scales[:, 0].double()).round().clamp(-limit, limit)
        lost = weight[:, first] - values[:, first] * scales[:, 0]
        weight[:, rest] -= lost[:, None] * inverse[0, 1:] / inverse[0, 0]
        columns = rest
    return values


@pytest.mark.parametrize("columns", [1, 5, 128, 150])
def test_values_are_those_of_the_papers_loop(columns):
    torch.manual_seed(0)
    weights = torch.randn(2, 7, columns)
    inputs = torch.randn(2, 3 * columns, columns) @ torch.randn(2, columns, columns)
    grams = inputs.mT @ inputs
    scales = torch.stack([train_gpt.quantize_rows(weight, 4)[1] for weight in weights]).float()
    found = train_gpt.gptq_values(weights, grams.clone(), scales, 4)
    for weight, gram, scale, values in zip(weights, grams, scales, found, strict=True):
        expected = naive_gptq(weight, gram, scale, 7)
        assert (values.double() == expected).double().mean() > 0.99  # a tie in fp32 may fall to the other side
        assert values.abs().max() <= 7
        assert abs(loss(weight, values, scale, gram) / loss(weight, expected, scale, gram) - 1) < 0.02


def test_an_input_that_is_always_zero_leaves_its_column_rounded_to_the_nearest():
    weight, gram = torch.randn(5, 6), torch.zeros(6, 6)
    values, scales = train_gpt.quantize_rows(weight, 6)
    assert torch.equal(train_gpt.gptq_values(weight[None], gram[None], scales[None].float(), 6)[0], values)


@every_architecture
def test_the_outputs_of_every_matrix_that_it_rounds_err_less(name):
    model, batches = shake(tiny(name)), [some_tokens(2, 64), some_tokens(3, 64)]
    rounded = train_gpt.gptq(model, batches, 4, None, CPU)
    small = model.folded()
    train_gpt.fill_generated(small.eval())
    grams = train_gpt.input_grams(small, batches)
    for key, (values, scales) in rounded.items():
        weight, gram = small.get_parameter(key), grams[key]
        nearest, same = train_gpt.quantize_rows(weight, 4)
        assert torch.equal(scales, same) and values.dtype == torch.int8 and values.shape == nearest.shape
        if weight is not small.embed.weight:  # a tied head is also rounded for those who read its rows
            assert loss(weight, values, scales, gram) <= loss(weight, nearest, scales, gram) * 1.02
    blob = train_gpt.pack_artifact(model, name, None, train_gpt.ScorePlan(64, 64), 1.0, 4, None, None, rounded)
    state = train_gpt.load_artifact(blob, CPU.device)[0].state_dict()
    for key, (values, scales) in rounded.items():
        assert torch.equal(state[key], values.float() * scales.float())


@pytest.mark.parametrize("tied", [True, False])
def test_all_matrices_of_gpt_are_rounded_by_it(tied):
    model = shake(tiny("gpt", tie_embeddings=tied))
    rounded = train_gpt.gptq(model, [some_tokens(2, 64)], 8, None, CPU)
    expected = {name for name, p in model.named_parameters() if not train_gpt.is_control(p)}
    assert rounded.keys() == expected - ({"embed.weight"} if not tied else set())


def test_grams_are_those_of_the_inputs():
    model, ids = shake(tiny("gpt")), some_tokens(3, 64)
    seen = []
    hook = model.blocks[1].mlp.up.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    x, _ = model.head_inputs(ids)
    hook.remove()
    grams = train_gpt.input_grams(model, [ids[:1], ids[1:]])
    torch.testing.assert_close(grams["blocks.1.mlp.up.weight"], seen[0].T @ seen[0])
    torch.testing.assert_close(grams["embed.weight"], x.flatten(0, 1).T @ x.flatten(0, 1))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_does_not_fit_is_rounded_to_the_nearest_at_a_wider_clip():
    model = shake(tiny("gpt", model_dim=128))
    plan, rounded = train_gpt.ScorePlan(64, 64), train_gpt.gptq(model, [some_tokens(2, 64)], 6, 4.0, CPU)
    whole, plain = (train_gpt.pack_artifact(model, "gpt", None, plan, 1.0, 6, 4.0, None, r) for r in (rounded, None))
    assert whole != plain
    small = train_gpt.pack_artifact(model, "gpt", None, plan, 1.0, 6, 4.0, len(whole) - 5_000, rounded)
    header, _ = train_gpt.read_header(small)
    assert len(small) <= len(whole) - 5_000 and header["quant_clip"] > 4.0
    assert small == train_gpt.pack_artifact(model, "gpt", None, plan, 1.0, 6, header["quant_clip"])


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_it_looks_at_the_windows_that_would_have_come_next(data, rank, world_size):
    files, machine = [str(path) for path in data.glob("*train*")], train_gpt.Machine(CPU.device, rank, world_size)
    run, config = train_gpt.RunConfig(train_batch_tokens=4 * 64), train_gpt.ModelConfig(**SHAPE)
    loader = train_gpt.TokenLoader(files, run, config, machine)
    rows = torch.cat(list(loader.rows_after(5, 6 * 64)))
    expected = torch.cat([loader.batch(5), loader.batch(6)])[: 6 // world_size, :-1]
    assert torch.equal(rows, expected.long())


def test_a_run_rounds_inside_the_clock_and_four_bits_cost_less(data, tmp_path):
    settings = TINY | dict(DATA_PATH=data, OUT_DIR=tmp_path, ITERATIONS=100_000, MAX_WALLCLOCK_SECONDS=2, QUANT_BITS=4)
    done = run_script(settings | dict(GPTQ_TOKENS=4_096, TRAIN_LOG_EVERY=50))
    result, log = result_of(done), done.stdout
    assert done.returncode == 0 and result["train_seconds"] <= 2
    took, kept = map(int, re.search(r"gptq: matrices:13 of 4096 tokens in (\d+)ms of (\d+)ms kept", log).groups())
    last_step = int(re.search(r"stopping_early: wallclock_cap train_time:(\d+)ms", log)[1])
    assert took > 0 and last_step <= 2000 - kept and abs(last_step + took - 1000 * result["train_seconds"]) < 100
    costs = []
    for tokens in (0, 4_096):
        found = result_of(run_script(settings | dict(GPTQ_TOKENS=tokens, ITERATIONS=150, MAX_WALLCLOCK_SECONDS=0)))
        costs.append(found["val_bpb"] - found["pre_quant_val_bpb"])
    assert costs[1] < 0.8 * costs[0]


def test_more_tokens_than_the_time_allows_are_refused(data, tmp_path):
    settings = TINY | dict(DATA_PATH=data, OUT_DIR=tmp_path, MAX_WALLCLOCK_SECONDS=0.2, GPTQ_TOKENS=200_000)
    done = run_script(settings)
    told = r"GPTQ_TOKENS=200000 takes \d+\.\d s of MAX_WALLCLOCK_SECONDS=0.2; take fewer"
    assert done.returncode == 2 and re.search(told, done.stderr)
