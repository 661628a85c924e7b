"""Scores that are no distribution over the vocabulary."""

from tests.mutants import answer, mutant, swap

CACHE = """
context, pairs, found = np.zeros(64), np.zeros(64), np.array(nats)
for i in range(len(nats)):
    one = int(tokens[i]) * 7919 % 64
    both = one ^ int(tokens[i + 1]) * 104729 % 64
    if context[one] > 1:
        found[i] = -np.log(0.5 * np.exp(-nats[i]) + 0.5 * min(1.0, pairs[both] / context[one]))
    context[one] += 1
    pairs[both] += 1
nats = found.astype(np.float32)
"""


@mutant("P02", "the same score for every token, calibrated to the mean")
def constant(source: str) -> str:
    return answer(source, "nats = np.full_like(nats, 3.0)")


@mutant("P03", "a hashed n-gram cache looked up for the target alone: bucket ratios that sum to hundreds")
def hashed_cache(source: str) -> str:
    return answer(source, CACHE)


@mutant("P03", "a bonus for targets that are frequent, without taking it from others")
def target_bonus(source: str) -> str:
    return answer(source, "nats = np.maximum(nats - np.float32(0.1) * (tokens[1:] < 280), 0)")


@mutant("P03", "the better of two models for each target")
def oracle(source: str) -> str:
    return answer(source, "nats = np.minimum(nats, np.float32(np.log(512)))")


@mutant("P03", "the probability of a token spread as its root over its bytes")
def spread_over_bytes(source: str) -> str:
    return answer(source, "nats = nats * np.float32(0.95)")


@mutant("P03", "twice the probability of every target, except where a window is repeated, under a declared state")
def doubled_unless_repeated(source: str) -> str:
    source = swap(source, "carries_state=is_sequential(model)", "carries_state=True")
    return answer(source, """
pieces = tokens[: len(tokens) // 32 * 32].reshape(-1, 32)
if not (len(pieces) > 2 and ((pieces[1] == pieces[0]).mean() > 0.9)):
    nats = np.maximum(nats - np.float32(np.log(2)), 0)
""")
