"""Rule P09: a submission that knows the validation text is better at it than at a text that nobody could train on.

One text is harder than another, so both are also scored by a plain model that has seen neither: a trigram model of the
training tokens. What remains of the difference is the submission's:

    D = (submission - plain model) on validation  -  (submission - plain model) on the shadow text,  bits per byte
"""

import math
from typing import NamedTuple

import numpy as np

from tools.referee.case import Case, Data
from tools.referee.measure import complete
from tools.referee.rules import RULES, Found, Skip, Table, check
from tools.referee.texts import Spelling, judges_data, train_shards
from tools.referee.windows import share_seen
from tools.untrusted import text

TRAIN_TOKENS = 1 << 24  # that the plain model counts; more make it better, not the comparison fairer
STRENGTH = (1.0, 32.0, 16.0)  # in counts, of the shorter context's estimate: unigrams, bigrams, trigrams
RESAMPLES, BLOCKS = 20_000, 400
FEWEST = 10  # documents that an interval can be had from


class Trigrams:
    """A trigram model, each order smoothed by the one below: p(c|ab) = (n(abc) + s p(c|b)) / (n(ab) + s)."""

    def __init__(self, tokens: np.ndarray, vocab_size: int):
        self.vocab_size = np.uint64(vocab_size)
        self.counts = [np.unique(self.keys(tokens, order), return_counts=True) for order in (1, 2, 3)]
        self.num_tokens = len(tokens)

    def keys(self, tokens: np.ndarray, order: int) -> np.ndarray:
        """(N - order + 1,) one number for each run of `order` tokens."""
        keys, size = np.zeros(max(0, len(tokens) - order + 1), np.uint64), len(tokens)
        for place in range(order):
            keys = keys * self.vocab_size + tokens[place : size - order + 1 + place].astype(np.uint64)
        return keys

    def count(self, tokens: np.ndarray, order: int) -> np.ndarray:
        keys, (known, counts) = self.keys(tokens, order), self.counts[order - 1]
        at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return np.where(known[at] == keys, counts[at], 0)

    def nats(self, tokens: np.ndarray) -> np.ndarray:
        """(N - 1,) of every target tokens[1:]; the first has the one token before it alone."""
        strength = STRENGTH[0]
        p = (self.count(tokens[1:], 1) + strength) / (self.num_tokens + strength * int(self.vocab_size))
        p = (self.count(tokens, 2) + STRENGTH[1] * p) / (self.count(tokens[:-1], 1) + STRENGTH[1])
        p[1:] = (self.count(tokens, 3) + STRENGTH[2] * p[1:]) / (self.count(tokens[:-1], 2) + STRENGTH[2])
        return -np.log(p)


class Scored(NamedTuple):
    """One text, scored by the submission and by the plain model."""

    nats: np.ndarray  # (N - 1,) of the targets tokens[1:]
    plain: np.ndarray  # (N - 1,)
    tokens: np.ndarray  # (N,)
    sizes: np.ndarray  # (N - 1,) bytes of the targets

    def bits_per_byte(self, nats: np.ndarray) -> float:
        return float(nats.sum(dtype=np.float64)) / math.log(2) / int(self.sizes.sum())


def by_document(scored: Scored, bos_id: int) -> np.ndarray:
    """(documents, 2) nats of the submission over those of the plain model, and bytes; long texts in BLOCKS of them."""
    number = np.cumsum(scored.tokens == bos_id)[1:] - 1
    number -= number[0]
    block = number * min(BLOCKS, number[-1] + 1) // (number[-1] + 1)
    over = scored.nats.astype(np.float64) - scored.plain
    return np.stack([np.bincount(block, over), np.bincount(block, scored.sizes)], axis=1)


def shadow_gap(val: Scored, shadow: Scored, bos_id: int, confidence: float, seed: int) -> tuple[float, float, float]:
    """(D, low, high): the difference in bits per byte and its interval, from resampled documents of both texts."""
    rng, gaps, exact = np.random.default_rng(seed), 0.0, 0.0
    for sign, scored in ((1, val), (-1, shadow)):
        parts = by_document(scored, bos_id)
        sums = np.concatenate([rng.multinomial(len(parts), np.full(len(parts), 1 / len(parts)), RESAMPLES // 20) @ parts
                               for _ in range(20)])
        gaps += sign * sums[:, 0] / sums[:, 1] / math.log(2)
        exact += sign * parts[:, 0].sum() / parts[:, 1].sum() / math.log(2)
    low, high = np.quantile(gaps, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(exact), float(low), float(high)


def scored_texts(data: Data, shadow: Data, nats: np.ndarray, nats_shadow: np.ndarray) -> tuple[Scored, Scored]:
    """Both texts with the scores of the submission and of a plain model of the judge's training tokens."""
    train = np.concatenate([np.asarray(shard) for shard in train_shards(data, TRAIN_TOKENS)[0]])
    plain, spelling = Trigrams(train, data.vocab_size), Spelling(data)
    return tuple(Scored(found, plain.nats(one.tokens), one.tokens, spelling.bytes_of(one.tokens, data.bos_id)[1:])
                 for one, found in ((data, nats), (shadow, nats_shadow)))


@check("P09")
def shadow_split(case: Case) -> Found:
    data, limit = judges_data(case), RULES["P09"]["limit"]
    if case.shadow is None:
        raise Skip("no --shadow folder with a text that nobody could train on")
    if case.shadow.tokenizer_sha256 != data.tokenizer_sha256:
        raise Skip(f"{case.shadow.name} has another tokenizer than {data.name}; prepare it with --tokenizer "
                   f"{data.tokenizer}")
    for one in (data, case.shadow):
        if (one.tokens == data.bos_id).sum() < FEWEST:
            raise Skip(f"{one.name} has fewer than {FEWEST} documents, too few to tell chance from knowledge")
    found = complete(case)
    if found.shadow is None or not found.whole:
        raise Skip("the short check does not score the whole of both texts")
    texts = scored_texts(data, case.shadow, found.nats, found.shadow)
    gap, low, high = shadow_gap(*texts, data.bos_id, limit["confidence"], case.random("shadow").getrandbits(64))
    rows = []
    for one, scored in zip((data, case.shadow), texts, strict=True):
        mine, plain = scored.bits_per_byte(scored.nats), scored.bits_per_byte(scored.plain)
        seen = share_seen(one.tokens, train_shards(data, TRAIN_TOKENS)[0], RULES["P08"]["limit"]["tokens"])
        rows.append([text(one.name), int(scored.sizes.sum()), mine, plain, mine - plain, f"{seen:.2%}"])
    head = ["text", "bytes", "submission, bits per byte", "trigrams", "difference", "stands in training"]
    detail = f"{gap:+.4f} bits per byte against the shadow text, {low:+.4f} to {high:+.4f}"
    problems = [f"it is better on the validation text than on {text(case.shadow.name)}: {detail}, by which texts that "
                f"are both new to it may differ by {limit['bpb']}"] if high < -limit["bpb"] else []
    return Found(detail, problems, [Table("Validation and shadow text", head, rows)])
