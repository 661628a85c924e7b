"""Finds where windows of one sequence, of bytes or of tokens, stand in another."""

from collections.abc import Iterable, Iterator

import numpy as np

CHUNK = 1 << 20  # values that are hashed at a time
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing
MIX = np.random.default_rng(0).integers(1 << 64, size=1 << 16, dtype=np.uint64)


def rolling(values: np.ndarray, length: int) -> np.ndarray:
    """A hash of every window of `length` values: the sum of MIX[value] * BASE ** places to its end, mod 2 ** 64."""
    windows = len(values) - length + 1
    if windows < 1:
        return np.empty(0, np.uint64)
    if values.itemsize > 2:  # larger numbers are no tokens; what they are mixed up with is the caller's to tell apart
        values = np.minimum(values, len(MIX) - 1)
    part, size, found, done = MIX[values], 1, None, 0
    while True:  # windows of 1, 2, 4 ... values; those that make up the length are joined
        power = np.uint64(pow(int(BASE), size, 1 << 64))
        if length & size:
            joined = part[done : done + windows]
            found = joined if found is None else found * power + joined
            done += size
        if done == length:
            return found
        part = part[: len(part) - size] * power + part[size:]
        size *= 2


class Windows:
    """Windows of a sequence, by hash: finds where in another sequence they stand."""

    def __init__(self, values: np.ndarray, length: int, step: int = 1):
        self.length = length
        hashes = np.concatenate([np.empty(0, np.uint64), *(rolling(part, length)[::step] for _, part in
                                                           self.parts(values, CHUNK // step * step))])
        self.order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.order]
        bits = min(max(16, len(hashes).bit_length() + 4), 27)
        self.shift = np.uint64(64 - bits)
        self.filter = np.zeros(1 << bits, bool)  # most windows of another text stop here, before the binary search
        self.filter[self.hashes >> self.shift] = True

    def parts(self, values: np.ndarray, size: int = CHUNK) -> Iterator[tuple[int, np.ndarray]]:
        for begin in range(0, len(values) - self.length + 1, size):
            yield begin, values[begin : begin + size + self.length - 1]

    def found_in(self, values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (places in values, first index in self.hashes) of windows that stand in both, part by part."""
        for begin, part in self.parts(values if len(self.hashes) else values[:0]):
            hashes = rolling(part, self.length)
            places = np.flatnonzero(self.filter[hashes >> self.shift])
            at = np.searchsorted(self.hashes, hashes[places])
            same = self.hashes[np.minimum(at, len(self.hashes) - 1)] == hashes[places]
            yield places[same] + begin, at[same]

    def seen_in(self, sequences: Iterable[np.ndarray]) -> np.ndarray:
        """Which windows, in the order of self.hashes, stand in one of the sequences."""
        seen = np.zeros(len(self.hashes), bool)
        for sequence in sequences:
            for _, at in self.found_in(sequence):
                seen[at] = True
        return seen[np.searchsorted(self.hashes, self.hashes)]  # equal windows share the mark of the first

    def forget(self, known: np.ndarray) -> None:
        self.hashes, self.order = self.hashes[~known], self.order[~known]


def share_seen(tokens: np.ndarray, shards: list[np.ndarray], length: int) -> float:
    """The share of tokens that lie in a window of `length` tokens which occurs in the shards."""
    windows, edges = Windows(tokens, length), np.zeros(len(tokens) + 1, np.int64)
    begins = windows.order[windows.seen_in(shards)]
    edges[begins] += 1
    edges[begins + length] -= 1
    return float((np.cumsum(edges[:-1]) > 0).mean())
