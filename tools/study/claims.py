"""Judges a study's claims: holds, does not hold, not resolved, not run.

lower, higher: the paired difference arm - against; significant if p < 0.05 after Holm's correction over the study's
claims. ratio: against / arm, geometric mean over the pairs; its 95 % interval against `at_least`. Pairs are runs of one
seed, or rounds in which steps took turns. Parameter counts are exact and need no test.
"""

import math
from dataclasses import dataclass, replace

from tools import significance as sig
from tools.study.pairs import LEVEL, Pair, compare, holm_of, smallest_effect
from tools.study.results import METRICS, Arm, Group, Study, check_claim

HOLDS, FAILS, OPEN, NOT_RUN = "holds", "does not hold", "not resolved", "not run"


@dataclass(frozen=True)
class Finding:
    """A claim, what was measured for it, and the verdict; low and high: 95 % interval of the value."""

    claim: str
    published: str
    group: str
    arm: str
    against: str
    metric: str
    expect: str
    at_least: float | None
    verdict: str = NOT_RUN
    words: str = ""
    value: float | None = None  # the difference arm - against, or the ratio against / arm
    arm_mean: float | None = None
    against_mean: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    n: int = 0
    num_wanted: int | None = None  # seeds; None where no seeds are counted
    smallest_effect: float | None = None  # a true difference found with a power of 0.8 at the strictest level of Holm's

    @property
    def unit(self) -> str:
        return "x" if self.expect == "ratio" else METRICS[self.metric]

    def shown(self, value: float) -> str:
        """A value in the claim's unit."""
        if self.expect == "ratio":
            return f"{value:.2f}x" if abs(value) < 100 else f"{value:,.0f}x"
        return show(value, self.metric, sign="+")


def show(value: float, metric: str, sign: str = "") -> str:
    """A value with its unit: bits per byte to four decimals, counts whole, times to two decimals."""
    places = {"bits per byte": 4, "ms": 2}.get(METRICS[metric], 0)
    return f"{value:{sign},.{places}f} {METRICS[metric]}"


def read_claim(table: dict, study: Study) -> tuple[Finding, Group]:
    """The claim, not yet measured, and its group; ValueError says what is wrong with it."""
    arms = {group.name: [arm.name for arm in group.arms] for group in study.groups}
    check_claim(table, arms, f'{study.folder / "plan.json"}: claim "{table.get("claim", "?")}"')
    own = {name: table[name] for name in ("claim", "group", "arm", "against", "metric", "expect")}
    finding = Finding(published=str(table.get("published", "")), at_least=table.get("at_least"), **own)
    return finding, study.group(finding.group)


def ratio_of(finding: Finding, arm: Arm, against: Arm, pair: Pair) -> Finding:
    """The geometric mean of against / arm and its interval, from the t interval of the logarithms."""
    a, b = arm.values(finding.metric), against.values(finding.metric)
    if min(*a.values(), *b.values()) <= 0:
        return replace(finding, verdict=OPEN, words="a ratio of values that are not all above 0 says nothing")
    logs = sig.describe([math.log(b[key] / a[key]) for key in pair.keys])
    ends = (logs.low, logs.high) if logs.n > 1 else (logs.mean, logs.mean) if finding.metric == "params" else None
    low, high = (math.exp(end) for end in ends) if ends else (None, None)
    return replace(finding, value=math.exp(logs.mean), low=low, high=high)


def measured(finding: Finding, group: Group) -> tuple[Finding, Pair | None]:
    """The claim with its numbers, and the pair that they are of: None if there is nothing to compare."""
    arm, against = group.arm(finding.arm), group.arm(finding.against)
    timed = finding.metric == "step_ms"
    if timed and not (group.in_turns(arm) and group.in_turns(against)):
        words = "were not timed in turns" if arm.costs and against.costs else "have no step time"
        return replace(finding, words=f"{arm.name} and {against.name} {words}"), None
    pair = compare(arm, against, finding.metric)
    if not pair.n:
        none = [one.name for one in (arm, against) if not one.values(finding.metric)]
        return replace(finding, words=f"no runs of {' and '.join(none)}" if none else "no seed in common"), None
    wanted = len(set(arm.seeds) & set(against.seeds))
    means = [sig.describe([*one.values(finding.metric).values()]).mean for one in (arm, against)]
    finding = replace(
        finding, arm_mean=means[0], against_mean=means[1], n=pair.n, num_wanted=None if timed else wanted
    )
    if finding.expect == "ratio":
        return ratio_of(finding, arm, against, pair), pair
    if finding.metric == "params":
        return replace(finding, value=pair.difference, low=pair.difference, high=pair.difference), pair
    test = pair.paired
    ends = {"low": test.low, "high": test.high, "p": test.p_two_sided} if test else {}
    return replace(finding, value=pair.difference, **ends), pair


def decided_ratio(finding: Finding) -> Finding:
    if finding.verdict == OPEN:
        return finding
    ratio = f"{finding.against} over {finding.arm}: {finding.shown(finding.value)}"
    words = f"{ratio}, claimed at least {finding.at_least:g}x"
    if finding.low is None:
        return replace(finding, verdict=OPEN, words=f"{words}; one pair has no interval")
    verdict = HOLDS if finding.low >= finding.at_least else FAILS if finding.high < finding.at_least else OPEN
    return replace(finding, verdict=verdict, words=words)


def decided_difference(finding: Finding, pair: Pair, num_tests: int) -> Finding:
    means = ", ".join(
        f"{name} {show(mean, finding.metric)}"
        for name, mean in ((finding.arm, finding.arm_mean), (finding.against, finding.against_mean))
    )
    as_claimed = (finding.value < 0) == (finding.expect == "lower")
    if finding.metric == "params":
        return replace(finding, verdict=HOLDS if as_claimed and finding.value else FAILS, words=f"{means}; exact")
    if pair.dead:
        why = "one run under two names" if pair.same_runs else "a dead knob: equal to four decimals at every seed"
        return replace(finding, verdict=OPEN, words=f"{means}; {why}, no finding")
    if finding.p is None:
        return replace(finding, verdict=OPEN, words=f"{means}; {pair.why}")
    if finding.p_holm < LEVEL:
        return replace(finding, verdict=HOLDS if as_claimed else FAILS, words=means)
    least = smallest_effect(pair.paired, LEVEL / num_tests)
    such = f"{pair.n} pairs find" if pair.n > 1 else "one score finds"
    shown = f"{means}; {such} a true difference of {show(least, finding.metric)} in four of five studies"
    return replace(finding, verdict=OPEN, smallest_effect=least, words=shown)


def judge(study: Study) -> list[Finding]:
    """The verdict on each of the study's claims, in their order."""
    found = [measured(*read_claim(table, study)) for table in study.claims]
    tests = [pair.paired if pair and not pair.dead and finding.p is not None else None for finding, pair in found]
    num_tests = sum(test is not None for test in tests)
    judged = []
    for (finding, pair), p_holm in zip(found, holm_of(tests), strict=True):
        finding = replace(finding, p_holm=p_holm)
        if pair is None:
            judged.append(finding)
        elif finding.expect == "ratio":
            judged.append(decided_ratio(finding))
        else:
            judged.append(decided_difference(finding, pair, num_tests))
    return judged
