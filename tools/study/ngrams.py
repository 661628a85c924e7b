"""Count tables of the training text, scored on the validation text: what a model must beat to have learnt anything."""

from pathlib import Path

import numpy as np

from train_gpt import Dataset, read_shard

BACKOFF = 1.0  # pseudo-counts that the shorter context's table adds to each row


def ngram_bpb(folder: Path) -> dict[str, float]:
    """Bits per byte of the unigram and the bigram table of a data folder, each smoothed by the one below it."""
    dataset = Dataset(str(folder), None)
    V = dataset.vocab_size
    unigram, bigram = np.zeros(V), np.zeros((V, V))
    for path in dataset.train_files:
        tokens = np.array(read_shard(path)).astype(np.int64)
        unigram += np.bincount(tokens, minlength=V)
        bigram += np.bincount(tokens[:-1] * V + tokens[1:], minlength=V * V).reshape(V, V)
    uniform = np.full(V, 1 / V)
    p1 = (unigram + BACKOFF * uniform) / (unigram.sum() + BACKOFF)
    p2 = (bigram + BACKOFF * p1) / (bigram.sum(axis=1, keepdims=True) + BACKOFF)
    tokens, num_bytes, _ = dataset.validation(None)
    tokens = tokens.astype(np.int64)
    nats = {"unigram": -np.log(p1[tokens[1:]]).sum(), "bigram": -np.log(p2[tokens[:-1], tokens[1:]]).sum()}
    return {name: float(total / np.log(2) / num_bytes) for name, total in nats.items()}
