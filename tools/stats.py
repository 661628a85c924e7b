"""Decides by its seeds whether a record is better than the best so far: record, tie or worse.

    python -m tools.stats RECORD                                         against the best ranked record in records/
    python -m tools.stats RECORD --against FOLDER --json                 against this one; --records DIR looks elsewhere
    python -m tools.stats --scores 1.21,1.22,1.20 --against-scores 1.25,1.24,1.26        bare scores, bits per byte

record: at least three seeds, better by more than 0.005 nats per byte at p < 0.01 in Welch's one-sided test. worse: the
old mean is better, at the same p and without a margin. tie: all else. The first record on a text needs three seeds.
Scores are those of the result lines in logs/*.log, not of submission.json. Its all_runs names runs without a log: those
that finished can take a verdict away, never better it. A seed counts once, with the mean of its runs.

Exit status: 0 for a record without doubts, 1 for a tie, a worse one or doubts, 2 for wrong usage.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from tools.referee.rules import RULES
from tools.rivals import Runs, read_both
from tools.significance import Sample, TTest, describe, deviation, gains, paired, welch, welch_error
from tools.untrusted import number, text

LIMIT = RULES["P17"]["limit"]
MARGIN_NATS, MARGIN_P, RECORD_SEEDS = LIMIT["margin_nats"], LIMIT["margin_p"], LIMIT["seeds_10min_16mb"]  # per byte
MOST_SEEDS = 10_000
VERDICTS = ("worse", "tie", "record")  # least favourable first


@dataclass(frozen=True)
class Seeds:
    """Seeds in all at which the observed gain would be a record: of new if old stays, of each if both grow. None: no
    number up to MOST_SEEDS, or unknown."""

    n_new: int | None
    n_each: int | None
    words: str


@dataclass(frozen=True)
class Verdict:
    """record, tie or worse; samples, gain and margin in bits per byte, gain_nats in nats per byte. The tests are None
    where they do not exist: no old score, one score, no spread."""

    verdict: str
    reason: str
    new: Sample
    old: Sample | None = None
    gain_bpb: float | None = None
    gain_nats: float | None = None
    margin_bpb: float | None = None
    better: TTest | None = None  # by more than the margin
    worse: TTest | None = None  # old better than new, by more than 0
    seeds: Seeds | None = None


def smallest_n(new: Sample, old: Sample, margin: float, p: float, both: bool) -> int | None:
    """The least number of seeds, from those that there are, at which this gain is above the margin at p."""
    if old.n < 2 and not both:
        return None
    n = np.arange(max(RECORD_SEEDS, new.n, old.n if both else 0), MOST_SEEDS + 1)
    spread_new = old.deviation if new.deviation is None else new.deviation
    spread_old = new.deviation if old.deviation is None else old.deviation
    error, df = welch_error(spread_new, n, spread_old, n if both else old.n)
    reached = n[stats.t.sf((old.mean - new.mean - margin) / error, df) < p]  # not monotone: df may fall while n grows
    return int(reached[0]) if len(reached) else None


def seeds_needed(new: Sample, old: Sample, margin: float, p: float) -> Seeds:
    """How many seeds a record would take if the gain and the deviations stay as they are."""
    if old.mean - new.mean <= margin:
        return Seeds(None, None, "no number of seeds: the gain is not above the margin, if it stays as observed")
    if not (new.deviation or old.deviation):
        return Seeds(None, None, "unknown: there is no deviation to reckon with")
    alone, each = (smallest_n(new, old, margin, p, both) for both in (False, True))
    if alone is None:
        words = f"no number of new seeds up to {MOST_SEEDS:,} beside {old.n} old"
    else:
        words = f"{alone:,} new seeds, {alone - new.n:,} more, beside {old.n} old"
    words += f"; or {f'{each:,}' if each else f'more than {MOST_SEEDS:,}'} of each"
    one = [name for name, sample in (("new", new), ("old", old)) if sample.deviation is None]
    taken = f", the {one[0]} one taken from the other side" if one else ""
    return Seeds(alone, each, f"{words}, if the gain and both deviations stay as observed{taken}")


def compare(new: list[float], old: list[float], margin_nats: float = MARGIN_NATS, p: float = MARGIN_P) -> Verdict:
    """The verdict on scores in bits per byte, lower is better; the margin is in nats per byte."""
    if not (0 <= margin_nats < math.inf and 0 < p < 1):
        raise ValueError(f"a margin of {margin_nats} nats at p {p} is none; take one from 0 and a p between 0 and 1")
    a, b, margin = describe(new, "new"), describe(old, "old"), margin_nats / math.log(2)
    gain, seeds = b.mean - a.mean, seeds_needed(a, b, margin, p)
    better = worse = None
    if min(a.n, b.n) > 1 and (a.deviation or b.deviation):
        better, worse = welch(new, old, margin), welch(old, new)
    if better and a.n >= RECORD_SEEDS and better.p < p:
        verdict, reason = "record", f"better by more than the margin, p = {better.p:.2g} < {p}"
    elif worse and worse.p < p:
        verdict, reason = "worse", f"worse, p = {worse.p:.2g} < {p}"
    elif a.n < RECORD_SEEDS or b.n < 2:
        verdict, reason = "tie", f"too few seeds: {a.n} new and {b.n} old, needed are {RECORD_SEEDS} and 2"
    elif not better:
        verdict, reason = "tie", "all new scores are equal and so are all old ones: without spread there is no test"
    elif gain <= margin:
        verdict, reason = "tie", f"the gain of {gain:.4f} is not above the margin of {margin:.4f} bits per byte"
    else:
        verdict, reason = "tie", f"the gain is above the margin, but not significantly: p = {better.p:.2g}, not < {p}"
    return Verdict(verdict, reason, a, b, gain, gain * math.log(2), margin, better, worse, seeds)


def first(new: list[float]) -> Verdict:
    """The verdict on scores that have nothing to be compared with."""
    a = describe(new)
    if a.n >= RECORD_SEEDS:
        return Verdict("record", "the first on this text", a)
    return Verdict("tie", f"too few seeds: the first on this text needs {RECORD_SEEDS}, it has {a.n}", a)


def decide(new: Runs, old: Runs | None) -> Verdict:
    """The verdict on all completed runs or, where it is less favourable, on those with a log: nobody can check the
    others, so they must not help."""
    sides = (new.scores, old and old.scores), (new.logged, old and old.logged)
    whole, logged = (compare([*a.values()], [*b.values()]) if b else first([*a.values()]) for a, b in sides)
    if VERDICTS.index(whole.verdict) <= VERDICTS.index(logged.verdict):
        return whole
    return replace(logged, reason=f"by the runs that have a log alone: {logged.reason}")


def paired_by_seed(new: Runs, old: Runs | None) -> tuple[TTest, TTest] | None:
    """The paired tests for any gain and for more than the margin; None if the seeds are not the same or the gain of
    each is. They are shown, but the verdict is Welch's."""
    if old is None or len(new.scores) < 2 or new.scores.keys() != old.scores.keys():
        return None
    sides = list(new.scores.values()), [old.scores[seed] for seed in new.scores]
    if not deviation(gains(*sides)):
        return None
    return paired(*sides), paired(*sides, MARGIN_NATS / math.log(2))


def lines(verdict: Verdict, new: Runs, old: Runs | None, pair: tuple[TTest, TTest] | None) -> list[str]:
    """The report, a finding per line."""
    said = []
    for side, runs, sample in (("new", new, verdict.new), ("old", old, verdict.old)):
        if runs is None:
            said.append("old: none; no other ranked record of this track is on this text")
            continue
        spread = "" if sample.n == 1 else (f", deviation (n-1) {sample.deviation:.4f}, 95% interval {sample.low:.4f} "
                                           f"to {sample.high:.4f}")
        said.append(f"{side}: {runs.name}, n {sample.n}, mean {sample.mean:.4f}{spread} bits per byte")
        if runs.num_missing or runs.num_failed:
            said.append(f"{side}: {runs.num_missing} completed run(s) missing from the logs, which can take a verdict "
                        f"away but not better it; {runs.num_failed} not completed and not counted")
        said += [f"{side}: doubt: {text(doubt)}" for doubt in runs.doubts]
    if old is not None:
        said.append(f"gain: {verdict.gain_bpb:+.4f} bits per byte, {verdict.gain_nats:+.4f} nats per byte; "
                    f"the margin is {verdict.margin_bpb:.4f} and {MARGIN_NATS}")
    if verdict.better:
        better, worse = verdict.better, verdict.worse
        said.append(f"welch: t {better.t:.3f}, df {better.df:.2f}, one-sided p = {better.p:.2g} for better by more "
                    f"than the margin; p = {worse.p:.2g} for worse")
    if pair:
        any_gain, beyond = pair
        said.append(f"paired by seed: 95% interval of the gain {any_gain.low:+.4f} to {any_gain.high:+.4f}, one-sided "
                    f"p = {beyond.p:.2g} for better by more than the margin; two-sided p = {any_gain.p_two_sided:.2g} "
                    "for any difference")
    said += [f"seeds: {verdict.seeds.words}"] if verdict.seeds else []
    held = "; not ranked until its doubts are settled" if new.doubts else ""
    return [*said, f"{verdict.verdict}: {verdict.reason}{held}"]


def bare(words: str, option: str) -> Runs:
    """Scores from the command line, as if each were the run of a seed of its own."""
    found = [number(word) for word in words.split(",")]
    for word, score in zip(words.split(","), found, strict=True):
        if score is None or not 0 < score < 100:
            raise ValueError(f"{option} has {text(word)!r}; write bits per byte with commas between, 1.21,1.22,1.20")
    scores = dict(enumerate(found))
    return Runs(option.removeprefix("--"), scores, scores)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", type=Path, metavar="RECORD")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="the record to compare with")
    parser.add_argument("--records", type=Path, default=Path("records"), metavar="DIR")
    parser.add_argument("--scores", metavar="BPB,BPB,...")
    parser.add_argument("--against-scores", metavar="BPB,BPB,...")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if (args.scores is None) != (args.against_scores is None) or (args.record is None) == (args.scores is None):
        parser.error("name either a RECORD or both --scores and --against-scores")
    if args.scores is not None and args.against:
        parser.error("--against goes with a RECORD, not with --scores")
    try:
        if args.record is not None:
            new, old = read_both(args.record, args.against, args.records)
        else:
            new, old = bare(args.scores, "--scores"), bare(args.against_scores, "--against-scores")
        verdict = decide(new, old)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pair = paired_by_seed(new, old) if args.record is not None else None  # bare scores do not tell their seeds
    if args.json:
        runs = {"new": asdict(new), "old": asdict(old) if old else None}
        print(json.dumps(asdict(verdict) | {"runs": runs, "paired": [asdict(test) for test in pair or ()]}))
    else:
        print("\n".join(lines(verdict, new, old, pair)))
    return 0 if verdict.verdict == "record" and not new.doubts else 1


if __name__ == "__main__":
    sys.exit(main())
