"""Rule P09: a submission that knows the validation text is better at it than at a text that nobody could train on."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from corpora import documents, run, write_jsonl

from tools.referee.case import Case, Data, read_data
from tools.referee.measure import MEASURED
from tools.referee.rules import RULES, Skip
from tools.referee.shadow import STRENGTH, Scored, Trigrams, scored_texts, shadow_gap, shadow_split

TEXTS = documents(150, seed=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data folder, and one with the same tokenizer and other validation documents."""
    out = tmp_path_factory.mktemp("shadow")
    train = ["--jsonl", write_jsonl(out / "train.jsonl", TEXTS[:90]), "--out", str(out)]
    for name, part in (("val", TEXTS[90:120]), ("shadow", TEXTS[120:])):
        options = ["--tokenizer", str(out / "val/tokenizer.model")] if name == "shadow" else ["--vocab-size", "400"]
        assert run(*train, "--val-jsonl", write_jsonl(out / f"{name}.jsonl", part), "--name", name, *options) == 0
    return out / "val", out / "shadow"


@pytest.fixture
def judged(folders: tuple[Path, Path]) -> Data:
    return read_data(folders[0])


@pytest.fixture
def case(folders: tuple[Path, Path], tmp_path: Path) -> Case:
    return Case(tmp_path, read_data(folders[0]), read_data(folders[1]))


def test_plain_model_is_a_distribution(judged):
    model, context = Trigrams(judged.tokens[:4000], judged.vocab_size), judged.tokens[5000:5003]
    rows = np.array([model.nats(np.append(context, token)) for token in range(judged.vocab_size)])
    assert np.exp(-rows[:, -1]).sum() == pytest.approx(1)
    firsts = [model.nats(np.array([context[0], token]))[0] for token in range(judged.vocab_size)]
    assert np.exp(-np.array(firsts)).sum() == pytest.approx(1)


def test_plain_model_counts_as_a_slow_one_does(judged):
    train, text = judged.tokens[:3000].tolist(), judged.tokens[3000:3040].tolist()
    model = Trigrams(judged.tokens[:3000], judged.vocab_size)

    def chance(past: list[int], token: int) -> float:
        n, strength = len(past), STRENGTH[len(past)]
        runs = [train[i : i + n + 1] for i in range(len(train) - n)]
        lower = chance(past[1:], token) if n else 1 / judged.vocab_size
        same = sum(run[:n] == past for run in runs) if n else len(train)
        total = strength if n else strength * judged.vocab_size
        return (runs.count([*past, token]) + total * lower) / (same + total)

    expected = [-np.log(chance(text[max(0, i - 2) : i], text[i])) for i in range(1, len(text))]
    assert model.nats(judged.tokens[3000:3040]) == pytest.approx(np.array(expected), rel=0.02)


def texts_scored_by(folders: tuple[Path, Path], model: Trigrams, weight: float = 1.0) -> tuple[Scored, Scored]:
    """Both texts as scored by the plain model blended with another."""
    data, shadow = (read_data(folder) for folder in folders)
    plain = Trigrams(train_tokens(data), data.vocab_size)
    nats = [-np.log((1 - weight) * np.exp(-plain.nats(one.tokens)) + weight * np.exp(-model.nats(one.tokens)))
            for one in (data, shadow)]
    return scored_texts(data, shadow, *nats)


def train_tokens(data: Data) -> np.ndarray:
    return np.fromfile(data.folder / "fineweb_train_000000.bin", "<u2", offset=1024)


def test_a_model_of_half_the_training_text_knows_neither_text(folders, judged):
    train = train_tokens(judged)
    texts = texts_scored_by(folders, Trigrams(train[: len(train) // 2], judged.vocab_size))
    gap, low, high = shadow_gap(*texts, judged.bos_id, 0.999, seed=1)
    assert low < 0 < high and abs(gap) < 0.05


@pytest.mark.parametrize("weight", [0.05, 0.2, 0.8])
def test_a_model_of_the_validation_text_gives_itself_away(folders, judged, weight):
    texts = texts_scored_by(folders, Trigrams(judged.tokens, judged.vocab_size), weight)
    gap, low, high = shadow_gap(*texts, judged.bos_id, 0.999, seed=1)
    assert low < gap < high < -RULES["P09"]["limit"]["bpb"]


def test_gap_is_the_difference_of_two_differences(folders, judged):
    val, shadow = texts_scored_by(folders, Trigrams(judged.tokens, judged.vocab_size), 0.5)
    gap, *_ = shadow_gap(val, shadow, judged.bos_id, 0.9, seed=1)
    mine, plain = ([one.bits_per_byte(nats) for one, nats in ((val, a), (shadow, b))]
                   for a, b in ((val.nats, shadow.nats), (val.plain, shadow.plain)))
    assert gap == pytest.approx((mine[0] - plain[0]) - (mine[1] - plain[1]))
    assert gap == -shadow_gap(shadow, val, judged.bos_id, 0.9, seed=1)[0]


def finding(case: Case, model: Trigrams):
    """What the rule finds where a submission has answered with the scores of the model."""
    nats, shadow = model.nats(case.data.tokens), model.nats(case.shadow.tokens)
    case.__dict__[MEASURED] = SimpleNamespace(nats=nats, shadow=shadow, whole=True, broken="")
    return shadow_split(case)


def test_rule_passes_a_model_of_training_text(case):
    found = finding(case, Trigrams(train_tokens(case.data)[:9000], case.data.vocab_size))
    assert found.problems == [] and [row[0] for row in found.evidence[0].rows] == ["val", "shadow"]


def test_rule_catches_a_model_of_training_and_validation_text(case):
    both = np.concatenate((train_tokens(case.data), case.data.tokens))
    found = finding(case, Trigrams(both, case.data.vocab_size))
    assert "better on the validation text than on shadow" in found.problems[0]


def test_rule_is_skipped_without_a_shadow_that_fits(case, data):
    fitting = case.data, case.shadow
    case.shadow = None
    with pytest.raises(Skip, match="no --shadow folder"):
        shadow_split(case)
    case.shadow = read_data(data)
    with pytest.raises(Skip, match="another tokenizer"):
        shadow_split(case)
    case.data = case.shadow
    with pytest.raises(Skip, match="fewer than 10 documents"):
        shadow_split(case)
    case.data, case.shadow = fitting
    case.__dict__[MEASURED] = SimpleNamespace(shadow=None, whole=False, broken="")
    with pytest.raises(Skip, match="does not score the whole"):
        shadow_split(case)
