"""The token streams that a submission is asked to score, and what is known about each answer before it comes.

    session 1   beginnings of the text, cut off or changed behind a secret place; then the whole text and others, mixed
    session 2   the same with other places

Each session is a new process that, where there is bubblewrap, shares nothing with the other, so what one answered
cannot depend on what the other was asked. A score is compared with that of the same target in the other session: where
both agree, nothing behind the places that differ was used. In a single session a submission could remember its answers
and repeat them. Both sessions hold the text and the same kinds of streams, so no stream says whether it is the one that
counts.
"""

import random
from dataclasses import dataclass

import numpy as np

from tools.referee.case import Case

CUT_RANGES = ((0.0, 0.05), (0.05, 0.25), (0.25, 1.0))  # of the text; early cuts are cheap, so one is enough late
TAIL_WINDOWS = 4  # of other tokens behind a cut
WINDOW_STREAMS = 5  # of a session: what looks at one bit of a later token is seen by half of them
PRE_TOKENS = 1 << 15  # of the text in the short check
RELABEL_TOKENS = 1 << 19  # of the stream that holds one window many times
MOVED_WINDOWS = 48  # more than are scored at once, so that the change and what it must not reach share a batch
LABEL_SECONDS = 60.0, 10.0  # whole and short check: for labels one by one, where windows are not alike
SAMPLED = 0.03  # of the tokens are replaced by drawn ones
MADE_UP_DOCUMENT = 400  # tokens


@dataclass
class Stream:
    """One request. `same` of its first targets have the same past and value as in the text."""

    kind: str
    tokens: np.ndarray
    same: int = 0
    begin: int = 0  # of the change, a target
    end: int = 0
    nats: np.ndarray | None = None  # the answer
    seconds: float = 0.0  # until it came
    session: int = 0


@dataclass
class Geometry:
    """How the submission says that it cuts a stream into windows; a hint where to look, nothing that is believed."""

    seq_len: int
    stride: int

    @property
    def slot(self) -> int:
        """Tokens after which a repeated piece meets the windows as before and has all of its context in itself."""
        return self.seq_len if self.stride == self.seq_len else -(-2 * self.seq_len // self.stride) * self.stride

    @property
    def alike_from(self) -> int:
        """The first target of such a piece that has its whole window inside."""
        return 0 if self.stride == self.seq_len else self.seq_len


def geometry(case: Case, num_targets: int) -> Geometry:
    """From the first log with numbers that make sense, never larger than the text."""
    for result in case.results.values():
        seq_len, stride = result.get("eval_seq_len"), result.get("eval_stride")
        if type(seq_len) is int and type(stride) is int and 1 <= stride <= seq_len:
            seq_len = min(seq_len, num_targets)
            return Geometry(seq_len, min(stride, seq_len))
    return Geometry(min(256, num_targets), min(256, num_targets))


def made_up_text(vocab_size: int, length: int, rng: random.Random) -> np.ndarray:
    """Tokens with frequencies and repeated phrases as in a language, for a short check without a text."""
    draw = np.random.default_rng(rng.randrange(2**32))
    ranks = np.minimum(draw.zipf(1.2, length), vocab_size - 1)
    tokens = draw.permutation(np.arange(1, vocab_size))[ranks - 1]
    for _ in range(length // 64):  # a phrase that stood before
        size = min(int(draw.integers(4, 16)), length // 2)
        source, place = draw.integers(length - size + 1, size=2)
        tokens[place : place + size] = tokens[source : source + size]
    tokens[::MADE_UP_DOCUMENT] = 1
    return tokens.astype(np.uint16)


def choose_cuts(num_targets: int, stride: int, rng: random.Random, ranges: tuple = CUT_RANGES) -> list[int]:
    """Places in the text, ascending: one on a window's edge, the others well inside, where a leak within it shows."""
    on_edge, cuts = rng.randrange(len(ranges)), set()
    for number, (low, high) in enumerate(ranges):
        window = max(1, rng.randrange(int(low * num_targets) // stride, max(1, int(high * num_targets) // stride)))
        inside = 0 if number == on_edge else rng.randint(stride // 4, 3 * stride // 4)
        cuts.add(min(max(window * stride + inside, 1), num_targets - 1))
    return sorted(cuts)


def other_tokens(tokens: np.ndarray, length: int, unlike: int, rng: random.Random) -> np.ndarray:
    """A piece of the text, so that it looks like it, whose first token is not `unlike`."""
    begin = rng.randrange(len(tokens) - length + 1)
    piece = tokens[begin : begin + length].copy()
    different = tokens[tokens != unlike]
    if len(piece) and piece[0] == unlike and len(different):
        piece[0] = different[rng.randrange(len(different))]
    return piece


def behind_a_cut(tokens: np.ndarray, cut: int, tail: int, rng: random.Random) -> list[Stream]:
    """The first `cut` targets of the text with nothing, and with other tokens, behind them."""
    length = min(tail, len(tokens) - cut - 1)
    changed = np.concatenate((tokens[: cut + 1], other_tokens(tokens, length, tokens[cut + 1], rng)))
    pair = [Stream("cut", tokens[: cut + 1], cut, cut, cut), Stream("changed", changed, cut, cut, cut + length)]
    return rng.sample(pair, 2)


def flip(tokens: np.ndarray, geometry: Geometry, rng: random.Random) -> Stream:
    """A beginning of the text with one token replaced, well inside a window; the rest of the window follows."""
    stride = geometry.stride
    window = rng.randrange(max(1, min(24, len(tokens) // stride - 2)))
    target = min(window * stride + rng.randint(stride // 4, max(stride // 4, 3 * stride // 4)), len(tokens) - 3)
    end = min(target + stride, len(tokens) - 1)
    flipped = tokens[: end + 1].copy()
    flipped[target + 1] = other_tokens(tokens, 1, tokens[target + 1], rng)[0]
    return Stream("flip", flipped, target, target, target + 1)


def rest_of_a_window(tokens: np.ndarray, geometry: Geometry, rng: random.Random) -> Stream:
    """A beginning of the text that ends with its window, of which the later part is replaced."""
    stride = geometry.stride
    window = rng.randrange(max(1, min(24, len(tokens) // stride - 2)))
    end = min((window + 1) * stride, len(tokens) - 1)
    begin = max(1, min(end - 2, window * stride + rng.randint(stride // 4, max(stride // 4, 3 * stride // 4))))
    changed = tokens[: end + 1].copy()
    changed[begin + 1 :] = other_tokens(tokens, end - begin, tokens[begin + 1], rng)
    return Stream("window", changed, begin, begin, end)


def moved(tokens: np.ndarray, geometry: Geometry, rng: random.Random) -> Stream:
    """A beginning of the text with an early window replaced: what is more than a window behind it must not notice."""
    stride, length = geometry.stride, min(len(tokens), MOVED_WINDOWS * geometry.seq_len + 1)
    first = rng.randrange(max(1, min(4, length // stride - 2)))
    begin, end = first * stride, min((first + 1) * stride, length - 1)
    changed = tokens[:length].copy()
    changed[begin + 1 : end] = other_tokens(tokens, end - begin - 1, tokens[begin + 1], rng)
    return Stream("moved", changed, begin, begin, end)


def relabelled(tokens: np.ndarray, labels: np.ndarray, geometry: Geometry, rng: random.Random) -> Stream:
    """One piece of the text once per label, in a row; one token, `begin` of each piece, is the label.

    The text has the same piece at `same`, so wherever windows do not know of each other the answers are one row of
    the submission's distribution."""
    slot = geometry.slot
    start = rng.randrange(max(1, (len(tokens) - slot - 1) // geometry.stride)) * geometry.stride
    low = geometry.alike_from + (slot - geometry.alike_from) // 4
    place = rng.randint(min(low, slot - 2), slot - 2)
    pieces = np.tile(tokens[start : start + slot], (len(labels), 1))
    pieces[:, place + 1] = labels
    stream = np.append(pieces.reshape(-1), tokens[start])
    return Stream("relabelled", stream, begin=place, end=start)


def labels_of(tokens: np.ndarray, vocab_size: int, limit: int, rng: random.Random) -> np.ndarray:
    """All labels, or where these are too many half of them the most frequent ones and half drawn from the others."""
    if vocab_size <= limit:
        return np.arange(vocab_size)
    often = np.argsort(-np.bincount(tokens, minlength=vocab_size), kind="stable")
    half = max(1, limit // 2)
    return np.concatenate((often[:half], sorted(rng.sample(list(often[half:]), limit - half))))


def one_by_one(tokens: np.ndarray, vocab_size: int, geometry: Geometry, rng: random.Random) -> list[Stream]:
    """A beginning of the text once per label, a stream each, with the label as its last target; frequent ones first."""
    target = min(rng.randint(geometry.seq_len // 2, 2 * geometry.seq_len), len(tokens) - 2)
    labels = np.argsort(-np.bincount(tokens, minlength=vocab_size), kind="stable")
    return [Stream("label", np.append(tokens[: target + 1], label), target, target, int(label)) for label in labels]


class Draws:
    """What replaced tokens are drawn from: the text's own pairs, mixed with its frequencies and with all tokens."""

    PAIRS, SINGLES = 0.8, 0.15

    def __init__(self, tokens: np.ndarray, vocab_size: int):
        self.tokens, self.vocab_size = tokens, vocab_size
        self.order = np.argsort(tokens[:-1], kind="stable")
        self.sorted = tokens[:-1][self.order]
        self.singles = np.bincount(tokens, minlength=vocab_size) / len(tokens)

    def followers(self, previous: int) -> np.ndarray:
        """The tokens that follow `previous` in the text, one for each time."""
        low, high = np.searchsorted(self.sorted, (previous, previous + 1))
        return self.tokens[self.order[low:high] + 1]

    def draw(self, previous: int, rng: random.Random) -> int:
        kind, followers = rng.random(), self.followers(previous)
        if kind < self.PAIRS and len(followers):
            return int(followers[rng.randrange(len(followers))])
        if kind < self.PAIRS + self.SINGLES:
            return int(self.tokens[rng.randrange(len(self.tokens))])
        return rng.randrange(self.vocab_size)

    def probability(self, token: int, previous: int) -> float:
        followers = self.followers(previous)
        pairs = float(np.mean(followers == token)) if len(followers) else 0.0
        rest = 1 - self.PAIRS - self.SINGLES
        lost = 0.0 if len(followers) else self.PAIRS  # then a single or any token is drawn in its place
        return self.PAIRS * pairs + (self.SINGLES + lost) * self.singles[token] + rest / self.vocab_size


def sampled(tokens: np.ndarray, vocab_size: int, rng: random.Random) -> tuple[Stream, np.ndarray, np.ndarray]:
    """The text with some tokens replaced by draws from a known distribution; their targets and -ln of their chance."""
    draws, changed = Draws(tokens, vocab_size), tokens.copy()
    places = np.array(sorted(rng.sample(range(1, len(tokens)), max(1, int(SAMPLED * len(tokens))))))
    nats = np.empty(len(places))
    for number, place in enumerate(places):
        previous = int(changed[place - 1])
        changed[place] = draws.draw(previous, rng)
        nats[number] = -np.log(draws.probability(int(changed[place]), previous))
    return Stream("sampled", changed, int(places[0]) - 1), places - 1, nats
