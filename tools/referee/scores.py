"""The rules on the scores of a text: its past alone decides them, each is given once, in time, and again."""

import math

import numpy as np

from tools.referee.case import Case
from tools.referee.measure import Measurement, complete, here, measured
from tools.referee.rules import RULES, Found, Skip, Table, check


def moves(found: Measurement, rule: str, kinds: tuple[str, ...]) -> tuple[list[str], Table]:
    """Where scores before a change differ from those of the text in the other session."""
    tolerance, problems = found.tolerance(rule), []
    evidence = Table("Scores before a change, compared with the text in the other session",
                     ["session", "change", "targets before it", "moved", "first moved", "nats moved"], [])
    for stream in found.of(*kinds):
        own = found.text(3 - stream.session)[: stream.same].astype(float)
        difference = np.abs(own - stream.nats[: stream.same])
        wrong = np.flatnonzero(~(difference <= tolerance))
        first = int(wrong[0]) + 1 if len(wrong) else None
        most = float(difference.max(initial=0.0))
        if stream.kind != "label" or len(wrong):
            evidence.rows.append([stream.session, stream.kind, stream.same, len(wrong), first, most])
        if len(wrong):
            what = "cutting off" if stream.kind == "cut" else "changing"
            alone = stream.kind in ("flip", "label")
            at = f"target {stream.same + 1:,} alone" if alone else f"what follows target {stream.same:,}"
            problems.append(f"{what} {at} moves {len(wrong):,} scores before it, the first of target {first:,}, by up "
                            f"to {most:.3g} nats")
    return problems, evidence


@check("P01")
def causality(case: Case) -> Found:
    found = complete(case)
    problems, evidence = moves(found, "P01", ("cut", "changed"))
    cuts = sorted({stream.same for stream in found.of("cut")})
    detail = f"nothing after target {', '.join(f'{cut:,}' for cut in cuts)} matters; noise {found.noise:.1g}"
    return Found(detail, problems, [evidence])


@check("P05")
def score_first(case: Case) -> Found:
    found = complete(case)
    problems, evidence = moves(found, "P05", ("flip", "window", "label"))
    return Found(f"{len(evidence.rows)} changes inside a window leave the scores before them", problems, [evidence])


@check("P04")
def each_once(case: Case) -> Found:
    found = measured(case)
    answered = sum(len(stream.nats) for stream in found.streams)
    problems = [found.broken] if found.broken else []
    started = [act.what for act in found.acts if act.kind == "process" and not act.allowed]
    problems += [f"it started another program: {what[:200]}" for what in started[:3]]
    return Found(f"{answered:,} scores for as many targets in {len(found.streams)} streams", problems)


@check("P11")
def eval_clock(case: Case) -> Found:
    found = measured(case)
    if not found.of("text") or not found.whole:
        raise Skip("the short check does not time the whole text" if case.pre else "the text was not scored")
    limit, first = RULES["P11"]["limit"]["seconds_10min_16mb"], {}
    for stream in found.streams:  # the first answer of a session took the start of its process, a little too much
        first.setdefault(stream.session, stream.seconds)
    seconds = max(first[stream.session] + stream.seconds for stream in found.of("text"))
    detail = f"{seconds:.1f} s from the start of a process to the last score"
    over = seconds > limit and case.submission["track"] == "10min_16mb"
    return Found(detail, [f"{detail}, the track allows {limit:g}"] if over else [])


@check("P20")
def reload(case: Case) -> Found:
    limit, found = RULES["P20"]["limit"], complete(case)
    if not found.noise <= limit["nats"]:
        return Found("", [f"scored twice, one target differs by {found.noise:.3g} nats"])
    if not found.whole:
        raise Skip("the short check does not score the whole text")
    result = case.results[f"train_seed{found.model_seed}.log"]
    val_bpb = float(found.nats.sum(dtype=np.float64)) / (math.log(2) * case.data.val_bytes)
    error = abs(val_bpb - result["val_bpb"])
    detail = f"{val_bpb:.8f} measured, {result['val_bpb']:.8f} claimed for seed {found.model_seed}"
    if limit["val_bpb"] < error <= limit["val_bpb_other_device"] and result["device"] not in here():
        raise Skip(f"{detail}; that was on {result['device']}, which is not here")
    return Found(detail, [] if error <= limit["val_bpb"] else [detail])
