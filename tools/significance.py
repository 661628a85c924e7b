"""Tests, intervals and effect sizes for a few seeds' scores; lower is better, and a gain is old - new.

What cannot be computed is a ValueError, never NaN.
"""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from scipy import special, stats

CONFIDENCE = 0.95
MOST_ARRANGEMENTS = 200_000
NOISE = 1e-12  # differences below this, absolute or relative, are rounding
Count = int | float | np.ndarray


@dataclass(frozen=True)
class Sample:
    """n scores: mean, sample deviation (n-1) and the mean's t interval, in their unit; None: one has no spread."""

    n: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class TTest:
    """A t-test that new is better (lower) than old by more than a margin; gain, error and interval in their unit."""

    gain: float  # mean of old - mean of new
    error: float  # standard error of the gain
    df: float
    t: float
    p: float  # one-sided: gain > margin
    p_two_sided: float  # gain != margin
    low: float  # interval of the gain
    high: float


@dataclass(frozen=True)
class Effect:
    """Cohen's d of the gain, positive if new is better, and Hedges' g, None with one degree of freedom; no unit."""

    d: float
    g: float | None


@dataclass(frozen=True)
class Permutation:
    """An exact test over all arrangements of the scores: p for gain > 0, twice the smaller tail, and the least p."""

    gain: float
    p: float
    p_two_sided: float
    smallest_p: float  # one-sided
    arrangements: int


@dataclass(frozen=True)
class DeadKnob:
    """A setting that changes nothing: its scores are those of another, to four decimals, at all num_seeds seeds."""

    name: str
    same_as: str
    num_seeds: int


def finite(scores: list[float], least: int, name: str) -> list[float]:
    """The scores as they are; ValueError if there are too few, or one is no finite number of ordinary size."""
    for i, score in enumerate(scores):
        if not isinstance(score, int | float | np.floating) or not abs(score) < 1e15:
            raise ValueError(f"{name} score {i + 1} is {score}; it must be a finite number")
    if len(scores) < least:
        raise ValueError(f"there is too little to test: {len(scores)} {name} score(s), at least {least} needed")
    return [float(score) for score in scores]


def deviation(scores: list[float]) -> float:
    """The sample deviation (n-1); 0 if it is no more than rounding."""
    found = stdev(scores)
    return found if found > NOISE * max(1.0, *map(abs, scores)) else 0.0


def describe(scores: list[float], name: str = "new") -> Sample:
    """The mean, deviation and interval of scores; equal scores have an interval without width."""
    scores = finite(scores, 1, name)
    n, mean = len(scores), fmean(scores)
    if n == 1:
        return Sample(n, mean, None, None, None)
    spread = deviation(scores)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * spread / math.sqrt(n)
    return Sample(n, mean, spread, float(mean - reach), float(mean + reach))


def t_test(gain: float, error: float, df: float, margin: float) -> TTest:
    """The test of a gain with this standard error; df: degrees of freedom."""
    t, reach = (gain - margin) / error, float(stats.t.ppf((1 + CONFIDENCE) / 2, df)) * error
    two_sided = float(2 * stats.t.sf(abs(t), df))
    return TTest(gain, error, df, t, float(stats.t.sf(t, df)), two_sided, gain - reach, gain + reach)


def welch_error(new_deviation: float, n_new: Count, old_deviation: float, n_old: Count) -> tuple[Count, Count]:
    """The standard error of the gain and its degrees of freedom (Welch 1947); the n may be arrays."""
    a, b = new_deviation**2 / n_new, old_deviation**2 / n_old
    return np.sqrt(a + b), (a + b) ** 2 / (a**2 / (n_new - 1) + b**2 / (n_old - 1))


def welch(new: list[float], old: list[float], margin: float = 0.0) -> TTest:
    """Welch's test of independent scores; ValueError if a side has one score or neither has spread."""
    a, b = describe(finite(new, 2, "new")), describe(finite(old, 2, "old"))
    if a.deviation == b.deviation == 0:
        raise ValueError("neither the new nor the old scores have any spread; a t-test needs some")
    error, df = welch_error(a.deviation, a.n, b.deviation, b.n)
    return t_test(b.mean - a.mean, float(error), float(df), margin)


def lone(new: list[float], old: list[float], margin: float = 0.0) -> TTest:
    """The test of one score against three or more of the other side, whose deviation it is taken to have (Crawford and
    Howell 1998); ValueError if neither side is a single score or the other has no spread.
    """
    a, b = describe(finite(new, 1, "new")), describe(finite(old, 1, "old"))
    several = max(a, b, key=lambda side: side.n)
    if min(a.n, b.n) != 1 or several.n < 3:
        raise ValueError(f"{a.n} new and {b.n} old scores; this test needs one against at least three")
    if not several.deviation:
        raise ValueError("the scores have no spread; a t-test needs some")
    return t_test(b.mean - a.mean, several.deviation * math.sqrt(1 + 1 / several.n), several.n - 1, margin)


def gains(new: list[float], old: list[float]) -> list[float]:
    """old - new of each pair."""
    new, old = finite(new, 2, "new"), finite(old, 2, "old")
    if len(new) != len(old):
        raise ValueError(f"{len(new)} new and {len(old)} old scores are no pairs; give one of each seed")
    return [b - a for a, b in zip(new, old, strict=True)]


def paired(new: list[float], old: list[float], margin: float = 0.0) -> TTest:
    """The t-test of pairs, by seed; ValueError if all pairs differ by the same amount."""
    each = gains(new, old)
    if not (spread := deviation(each)):
        raise ValueError(f"all pairs differ by {each[0]:.6g}, without any spread; a t-test needs some")
    return t_test(fmean(each), spread / math.sqrt(len(each)), len(each) - 1, margin)


def effect(new: list[float], old: list[float], pairs: bool = False) -> Effect:
    """The gain over the pooled deviation, or with pairs over the deviation of the differences."""
    if pairs:
        each = gains(new, old)
        gain, spread, df = fmean(each), deviation(each), len(each) - 1
    else:
        a, b = describe(finite(new, 2, "new")), describe(finite(old, 2, "old"))
        gain, df = b.mean - a.mean, a.n + b.n - 2
        spread = math.sqrt(((a.n - 1) * a.deviation**2 + (b.n - 1) * b.deviation**2) / df)
    if not spread:
        raise ValueError("the scores have no spread; an effect size needs some")
    correction = math.exp(special.gammaln(df / 2) - special.gammaln((df - 1) / 2)) / math.sqrt(df / 2) if df > 1 else 0
    return Effect(gain / spread, gain / spread * correction if df > 1 else None)


def smallest_p(n_new: int, n_old: int | None = None) -> float:
    """The least one-sided p of an exact test: of n_new pairs or, with n_old, of independent scores."""
    return 1 / (2**n_new if n_old is None else math.comb(n_new + n_old, n_new))


def permutation(new: list[float], old: list[float], pairs: bool = False) -> Permutation:
    """The exact permutation test of the mean gain, with pairs by sign flips."""
    new, old = finite(new, 2, "new"), finite(old, 2, "old")
    least = smallest_p(len(new), None if pairs else len(old))
    if least * MOST_ARRANGEMENTS < 1:
        raise ValueError(f"{len(new)} and {len(old)} scores have too many arrangements to count; take a t-test")
    data = [np.array(gains(new, old))] if pairs else [np.array(old), np.array(new)]
    found = stats.permutation_test(
        data, lambda old, new=None, axis=-1: np.mean(old, axis) - (0.0 if new is None else np.mean(new, axis)),
        permutation_type="samples" if pairs else "independent", n_resamples=np.inf, vectorized=True,
    )  # fmt: skip
    gain, null = float(found.statistic), found.null_distribution
    tie = NOISE * max(1.0, *map(abs, new + old))  # sums in another order differ by rounding
    above, below = float(np.mean(null >= gain - tie)), float(np.mean(null <= gain + tie))
    return Permutation(gain, above, min(1.0, 2 * min(above, below)), least, len(null))


def holm(ps: list[float]) -> list[float]:
    """The p-values after Holm's correction for their number, in the order given."""
    if wrong := [p for p in ps if not 0 <= p <= 1]:
        raise ValueError(f"{wrong[0]} is no p-value; it must be from 0 to 1")
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        corrected[i] = largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
    return corrected


def dead_knobs(scores: dict[str, dict[int, float]]) -> list[DeadKnob]:
    """From setting -> seed -> score: each setting that scores as an earlier one does, to four decimals, for every seed
    that both have."""
    found, names = [], list(scores)
    for name in names:
        finite(list(scores[name].values()), 1, name)
    for i, name in enumerate(names):
        for earlier in names[:i]:
            seeds = [seed for seed in scores[name] if seed in scores[earlier]]
            if seeds and all(f"{scores[name][seed]:.4f}" == f"{scores[earlier][seed]:.4f}" for seed in seeds):
                found.append(DeadKnob(name, earlier, len(seeds)))
                break
    return found
