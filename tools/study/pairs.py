"""Tests and effect sizes for the pairs of arms in a group: runs of one seed are pairs. An arm meant to have one run is
tested against all runs of an arm that has three or more.

Every difference is arm - against: below 0, the arm has the lower loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import numpy as np
from scipy import optimize
from scipy import stats as scipy_stats

from tools import significance as sig
from tools.study.results import Arm, Group

LEVEL = 1 - sig.CONFIDENCE
POWER = 0.8


@dataclass(frozen=True)
class Pair:
    """arm - against in one metric. What could not be computed is None, and `why` says why."""

    arm: str
    against: str
    keys: tuple[int, ...]  # seeds that both have (rounds, for step times)
    difference: float | None  # mean over the pairs; of a single score, to the mean of the other arm's
    paired: sig.TTest | None  # its gain is the difference; of a single score, the test against all of the other arm's
    welch: sig.TTest | None
    d_z: float | None  # the difference over the deviation of the differences
    hedges_g: float | None  # over the pooled deviation, corrected for few seeds
    permutation_p: float | None  # exact, two-sided, by sign flips
    smallest_p: float | None  # that so many pairs can reach, two-sided
    dead: bool  # the same scores to four decimals
    same_runs: bool  # one run filed under both: equal settings
    why: str = ""
    p_holm: float | None = None
    welch_p_holm: float | None = None

    @property
    def n(self) -> int:
        return len(self.keys)


def tried(function: Callable, *args, **options) -> tuple[object, str]:
    """(what a function of tools.significance finds, "") or (None, why there is nothing to find)."""
    try:
        return function(*args, **options), ""
    except ValueError as error:
        return None, str(error)


def compare(arm: Arm, against: Arm, metric: str = "val_bpb") -> Pair:
    """The pair of two arms, not yet corrected for how many there are."""
    a, b = arm.values(metric), against.values(metric)
    keys = tuple(key for key in a if key in b)
    mine, other = [a[key] for key in keys], [b[key] for key in keys]
    # significance counts a gain as old - new, so the difference arm - against is the gain of `against` over `arm`
    paired, why = tried(sig.paired, other, mine)
    single = len(keys) == 1 == min(len(arm.seeds), len(against.seeds))
    alone, _ = tried(sig.lone, [*b.values()], [*a.values()]) if single else (None, "")
    welch, _ = tried(sig.welch, [*b.values()], [*a.values()])
    within, _ = tried(sig.effect, other, mine, pairs=True)
    pooled, _ = tried(sig.effect, [*b.values()], [*a.values()])
    exact, _ = tried(sig.permutation, other, mine, pairs=True)
    scored = metric == "val_bpb" and bool(keys)
    difference = alone.gain if alone else float(np.mean(mine) - np.mean(other)) if keys else None
    return Pair(
        arm.name, against.name, keys, difference, paired or alone, welch,
        within and within.d, pooled and pooled.g, exact and exact.p_two_sided,
        min(1.0, 2 * sig.smallest_p(len(keys))) if keys else None,
        scored and bool(sig.dead_knobs({against.name: b, arm.name: a})),
        scored and all(arm.runs[seed].key == against.runs[seed].key for seed in keys), why,
    )  # fmt: skip


def holm_of(tests: list[sig.TTest | None]) -> list[float | None]:
    """Two-sided p-values after Holm's correction for those that exist."""
    corrected = iter(sig.holm([test.p_two_sided for test in tests if test]))
    return [next(corrected) if test else None for test in tests]


def corrected(pairs: list[Pair]) -> list[Pair]:
    """The same pairs with Holm's p-values for their number, paired and Welch's each for itself."""
    by_pairs, by_welch = holm_of([pair.paired for pair in pairs]), holm_of([pair.welch for pair in pairs])
    return [replace(pair, p_holm=p, welch_p_holm=w) for pair, p, w in zip(pairs, by_pairs, by_welch, strict=True)]


def all_pairs(group: Group) -> list[Pair]:
    """Every pair of a group's arms in val_bpb, each arm against those before it; Holm over all of them."""
    return corrected([compare(arm, against) for against, arm in combinations(group.arms, 2)])


def to_baseline(group: Group) -> dict[str, Pair]:
    """Arm -> its comparison with the baseline in val_bpb; Holm over the group's comparisons with it."""
    base = group.arm(group.baseline)
    pairs = corrected([compare(arm, base) for arm in group.arms if arm is not base])
    return {pair.arm: pair for pair in pairs}


def dead_pairs(group: Group) -> list[Pair]:
    """Each arm that scores as an earlier one does, to four decimals, with the first such."""
    scores = {arm.name: arm.values("val_bpb") for arm in group.arms if arm.values("val_bpb")}
    return [compare(group.arm(knob.name), group.arm(knob.same_as)) for knob in sig.dead_knobs(scores)]


@cache
def detectable(df: float, level: float) -> float:
    """The true mean, in standard errors, that a two-sided t-test at this level finds with a power of 0.8.

    T is (Z + shift) / S with S^2 a chi-squared over its degrees of freedom; the power is averaged over the quantiles of
    S, which stays accurate where scipy's noncentral t does not: few seeds, small levels.
    """
    critical = scipy_stats.t.ppf(1 - level / 2, df)
    scale = critical * np.sqrt(scipy_stats.chi2.ppf((np.arange(1000) + 0.5) / 1000, df) / df)

    def lacking(shift: float) -> float:
        return float(np.mean(scipy_stats.norm.sf(scale - shift) + scipy_stats.norm.cdf(-scale - shift))) - POWER

    return optimize.brentq(lacking, 0, float(scale.max()) + 10)


def smallest_effect(test: sig.TTest, level: float = LEVEL) -> float:
    """The true difference that a test with this error finds at this level with a power of 0.8."""
    return test.error * detectable(test.df, level)
