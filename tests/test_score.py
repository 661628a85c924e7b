"""Scoring: every target once, the byte table, sliding windows, the score server, test-time training."""

import io
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_script, write_shard
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from test_architectures import CPU, shake, some_tokens, tiny

import train_gpt
from architectures import load_architecture


class Uniform(torch.nn.Module):
    """A model that knows nothing."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size

    observe = train_gpt.LanguageModel.observe

    def nats(self, input_ids, target_ids, start=0):
        logits = torch.zeros(*input_ids[:, start:].shape, self.vocab_size)
        return F.cross_entropy(logits.flatten(0, 1), target_ids[:, start:].flatten(), reduction="none").view(
            len(input_ids), -1
        )


def test_uniform_logits_score_log2_of_the_vocabulary_times_tokens_over_bytes():
    tokens = some_tokens(5000).numpy()
    found = train_gpt.score(Uniform(1024), tokens, 12_345, train_gpt.ScorePlan(64, 64), CPU, None)
    assert math.isclose(found.val_bpb, 10 * 4999 / 12_345, rel_tol=1e-7)


@pytest.mark.parametrize("stride", [1, 7, 16, 32])
@pytest.mark.parametrize("num_targets", [1, 5, 31, 32, 33, 64, 100, 257])
def test_every_target_is_scored_once(num_targets, stride):
    times = np.zeros(num_targets, dtype=int)
    for begin, start in train_gpt.ScorePlan(32, stride).windows(num_targets):
        assert begin + start < num_targets
        times[begin + start : begin + 32] += 1
    assert (times == 1).all()


@pytest.mark.parametrize("stride", [8, 20, 32])
def test_a_stream_is_scored_as_one_window_at_a_time_would_be(stride):
    model, tokens, plan = shake(tiny("gpt")), some_tokens(150).numpy(), train_gpt.ScorePlan(32, stride)
    expected = np.zeros(149)
    for begin, start in plan.windows(149):
        window = torch.from_numpy(tokens[begin : begin + 33].astype(np.int64))[None]
        nats = F.cross_entropy(model.logits(window[:, :-1])[0], window[0, 1:], reduction="none")
        expected[begin + start : begin + 32] = nats[start:]
    np.testing.assert_allclose(train_gpt.score_stream(model, tokens, plan, CPU), expected, atol=1e-5)


def test_sliding_windows_score_better_than_windows_side_by_side(finished, data):
    model, _plan, _ = train_gpt.load_artifact((finished[1] / "model.bin").read_bytes(), CPU.device)
    tokens = train_gpt.read_shard(data / "fineweb_val_000000.bin")[:3000]
    plain, sliding = (train_gpt.score_stream(model, tokens, train_gpt.ScorePlan(32, s), CPU).mean() for s in (32, 4))
    assert sliding < plain


def test_earlier_scores_do_not_move_by_a_bit_when_the_suffix_changes():
    model, plan = shake(tiny("gpt")), train_gpt.ScorePlan(64, 64)
    a = some_tokens(1000).numpy()
    b = a.copy()
    b[500:] = 7
    before, swapped, cut = (train_gpt.score_stream(model, x, plan, CPU) for x in (a, b, a[:500]))
    assert np.array_equal(before[:499], swapped[:499]) and np.array_equal(before[:499], cut)


def test_ranks_share_the_work_and_together_score_everything():
    model, tokens, plan = shake(tiny("gpt")), some_tokens(700).numpy(), train_gpt.ScorePlan(16, 16)
    alone = train_gpt.score_stream(model, tokens, plan, CPU, 64)
    parts = [
        train_gpt.score_stream(model, tokens, plan, train_gpt.Machine(CPU.device, rank, 3), 64) for rank in range(3)
    ]
    assert np.array_equal(sum(parts), alone) and all((part == 0).any() for part in parts)


def test_run_packed_run_and_score_request_agree(finished, data, tmp_path):
    result, folder, _ = finished
    nats = tmp_path / "nats"
    request = json.dumps({"tokens": str(data / "fineweb_val_000000.bin"), "nats": str(nats)})
    done = run_script({}, "score", str(folder / "model.bin"), given=request + "\n")
    assert json.loads(done.stdout)["targets"] == result["val_tokens"]
    total = np.fromfile(nats, dtype="<f4").sum(dtype=np.float64)
    assert abs(total / (math.log(2) * result["val_bytes"]) - result["val_bpb"]) < 1e-6


def test_score_server_answers_bad_requests_and_goes_on(finished, data, tmp_path):
    good = {"tokens": str(data / "fineweb_val_000000.bin"), "nats": str(tmp_path / "n")}
    wild = write_shard(tmp_path / "wild.bin", np.array([1, 60_000, 5]))
    lines = [
        "not json",
        "[]",
        "{}",
        json.dumps(good | {"tokens": "/nowhere"}),
        json.dumps(good | {"tokens": __file__}),
        json.dumps(good | {"tokens": str(wild)}),
        json.dumps(good),
    ]
    done = run_script({}, "score", str(finished[1] / "model.bin"), given="\n".join(lines))
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["error" in a for a in answers] == [True] * 6 + [False] and done.returncode == 0


def test_a_stream_of_one_token_has_no_score():
    assert len(train_gpt.score_stream(shake(tiny("gpt")), np.array([1]), train_gpt.ScorePlan(16, 16), CPU)) == 0


class Observer(load_architecture("gpt")[0]):
    """Remembers what it was told, and when."""

    def __init__(self, config):
        super().__init__(config)
        self.told, self.events = [], []

    def logits(self, input_ids, start=0):
        self.events.append("score")
        return super().logits(input_ids, start)

    def observe(self, target_ids):
        self.events.append("observe")
        self.told += target_ids.flatten().tolist()


@pytest.mark.parametrize("stride", [8, 32])
def test_a_model_observes_each_target_once_in_order_and_only_after_its_score(stride):
    torch.manual_seed(0)
    config = load_architecture("gpt")[1](vocab_size=260, train_seq_len=32, num_layers=2, model_dim=32, num_heads=4)
    model, tokens = Observer(config), some_tokens(101).numpy()
    train_gpt.score_stream(model, tokens, train_gpt.ScorePlan(32, stride), CPU)
    assert model.told == tokens[1:].tolist()
    assert model.events == ["score", "observe"] * (len(model.events) // 2)


NASTY = [
    "plain words",
    "  two leading spaces",
    "tabs\tand\nlines\r\n\n",
    "emoji 🙂 and ‮ marks",
    "ünï çödé",
    "a" * 300,
    "1234 5678",
    " ",
]


@pytest.fixture(scope="module")
def lossless(tmp_path_factory, text):
    return spm(
        tmp_path_factory,
        text,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    )


@pytest.fixture(scope="module")
def normalising(tmp_path_factory, text):
    return spm(tmp_path_factory, text)


def spm(tmp_path_factory, text: bytes, **options) -> str:
    path, model = tmp_path_factory.mktemp("spm") / "t.model", io.BytesIO()
    lines = iter(text[:200_000].decode(errors="ignore").splitlines())
    SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return str(path)


def stream(sp: SentencePieceProcessor, documents: list[str]) -> np.ndarray:
    return np.array([t for document in documents for t in [sp.bos_id(), *sp.encode(document)]] + [sp.bos_id()])


def test_byte_table_counts_every_byte_of_a_lossless_tokenizer(lossless):
    sp = SentencePieceProcessor(model_file=lossless)
    assert [sp.decode(sp.encode(document)) for document in NASTY] == NASTY
    counted = train_gpt.ByteTable(lossless).count(stream(sp, NASTY))
    assert counted.sum() == sum(len(document.encode()) for document in NASTY)


def test_byte_table_counts_what_a_normalising_tokenizer_decodes(normalising):
    sp = SentencePieceProcessor(model_file=normalising)
    documents = [sp.decode(sp.encode(document)) for document in NASTY[:-1]]
    counted = train_gpt.ByteTable(normalising).count(stream(sp, documents))
    assert counted.sum() == sum(len(document.encode()) for document in documents)


def test_byte_table_of_bytes_counts_one_each(data):
    table = train_gpt.ByteTable(data / "tokenizer.json")
    assert table.count(np.array([1, 4, 259, 1, 100])).tolist() == [1, 1, 0, 1]


def test_a_wrong_stride_is_refused():
    with pytest.raises(ValueError, match="EVAL_STRIDE=33 must be between 1 and EVAL_SEQ_LEN=32"):
        train_gpt.ScorePlan(32, 33)
