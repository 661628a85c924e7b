"""The whole pipeline on a source whose entropy is known: text to tokens to training to a score that can be checked."""

import math
import subprocess

import numpy as np
import pytest
from conftest import ROOT, TINY, environment, result_of, run_script, sys

WORDS = [
    "sun",
    "moon",
    "star",
    "wind",
    "rain",
    "snow",
    "leaf",
    "root",
    "seed",
    "bark",
    "stone",
    "river",
    "lake",
    "hill",
]


class WordChain:
    """A Markov chain over words, three successors each; writes a word and a space at a time."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.successors = np.stack([rng.permutation(len(WORDS))[:3] for _ in WORDS])
        self.probabilities = np.array([0.6, 0.3, 0.1])

    def write(self, count: int, rng: np.random.Generator) -> tuple[str, float]:
        """(text of `count` words, -log2 of its probability)."""
        word, written, bits = int(rng.integers(len(WORDS))), [], math.log2(len(WORDS))
        choices = rng.choice(3, size=count, p=self.probabilities)
        for choice in choices:
            written.append(WORDS[word])
            bits -= math.log2(self.probabilities[choice])
            word = int(self.successors[word, choice])
        return " ".join(written) + " ", bits


@pytest.mark.parametrize("tokenizer", [["--tokenizer", "byte260"], ["--vocab-size", "300"]])
def test_val_bpb_approaches_the_entropy_of_the_source_from_above(tmp_path, tokenizer):
    chain, rng = WordChain(0), np.random.default_rng(1)
    val, bits = chain.write(3000, rng)
    (tmp_path / "val.txt").write_text(val)
    (tmp_path / "train.txt").write_text(chain.write(100_000, rng)[0])
    prepare = [
        sys.executable,
        "data/prepare.py",
        "--text",
        str(tmp_path / "train.txt"),
        "--val-text",
        str(tmp_path / "val.txt"),
    ]
    prepare += [*tokenizer, "--name", "chain", "--out", str(tmp_path)]
    subprocess.run(prepare, cwd=ROOT, env=environment({}), check=True, capture_output=True)
    settings = TINY | dict(
        DATA_PATH=tmp_path / "chain", OUT_DIR=tmp_path, RUN_ID="run", ITERATIONS=300, TRAIN_SEQ_LEN=64
    )
    settings |= dict(MODEL_DIM=64, TRAIN_BATCH_TOKENS=2048, TRAIN_LOG_EVERY=100, MUON_MOMENTUM_WARMUP_STEPS=50)
    result = result_of(run_script(settings))
    assert result["val_bytes"] == len(val)
    entropy = bits / len(val)
    assert entropy < result["val_bpb"] < 1.25 * entropy
