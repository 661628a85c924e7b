"""The rules that need the submission to score: tools.verify lets it run twice and compares its answers.

    session 1   the validation text
    session 2   prefixes of it, shortest first, each cut off and each with other tokens behind it; then the whole again

Each session is a new process that, where there is bubblewrap, shares nothing with the other. What session 1 wrote
cannot depend on the secret cuts, what session 2 wrote cannot depend on the tokens behind a cut, so where both agree no
score used later tokens. One session for all would prove nothing: a submission could remember and repeat its answers.

A score that uses its own target and nothing after it passes here; only relabelling the target shows that.
"""

import math
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tools.referee.case import Case
from tools.referee.rules import RULES, Found, Skip, check
from tools.referee.sandbox import Broken, Session, isolation

CUT_RANGES = ((0.0, 0.05), (0.05, 0.25), (0.25, 1.0))  # of the text; early cuts are cheap, so one is enough late
_MEASURED = "measured"
TAIL_WINDOWS = 4  # of other tokens behind a cut


@dataclass
class Probe:
    """Scores of a stream whose targets before `cut` have the same past as in the validation text."""

    change: str
    cut: int
    nats: np.ndarray


@dataclass
class Measurement:
    """What the submission answered. broken says why there is no more."""

    seed: int  # of the run whose artifact was scored
    nats: np.ndarray | None = None
    probes: list[Probe] = field(default_factory=list)
    again: np.ndarray | None = None
    broken: str = ""


def choose_cuts(num_targets: int, stride: int, rng: random.Random) -> list[int]:
    """Places in the text, ascending: one on a window's edge, the others well inside, where a leak within it shows."""
    on_edge, cuts = rng.randrange(len(CUT_RANGES)), set()
    for number, (low, high) in enumerate(CUT_RANGES):
        window = max(1, rng.randrange(int(low * num_targets) // stride, max(1, int(high * num_targets) // stride)))
        inside = 0 if number == on_edge else rng.randint(stride // 4, 3 * stride // 4)
        cuts.add(min(max(window * stride + inside, 1), num_targets - 1))
    return sorted(cuts)


def other_tail(tokens: np.ndarray, cut: int, length: int, rng: random.Random) -> np.ndarray:
    """The tokens of the first `cut` targets, then others, taken from the text so that they look like it."""
    length = min(length, len(tokens) - cut - 1)
    begin = rng.randrange(len(tokens) - length + 1)
    tail = tokens[begin : begin + length].copy()
    different = tokens[tokens != tokens[cut + 1]]
    if len(different):
        tail[0] = rng.choice(different)
    return np.concatenate((tokens[: cut + 1], tail))


def measured(case: Case) -> Measurement:
    """What the submission answered; it is asked once."""
    if _MEASURED not in case.__dict__:
        case.__dict__[_MEASURED] = measure(case)
    return case.__dict__[_MEASURED]


def measure(case: Case) -> Measurement:
    """Let the submission score the validation text, prefixes of it, and the text again."""
    if case.data is None:
        raise Skip("no --data folder to score")
    seed = next((seed for seed in case.submission["seeds"] if seed in case.models), None)
    if seed is None:
        raise Skip("the folder has no model_seed<seed>.bin to score with")
    result, tokens, rng = case.results[f"train_seed{seed}.log"], case.data.tokens, case.random("cuts")
    num_targets = len(tokens) - 1
    tail = TAIL_WINDOWS * min(result["eval_seq_len"], num_targets)
    streams = []
    for cut in choose_cuts(num_targets, min(max(result["eval_stride"], 1), max(1, num_targets // 8)), rng):
        pair = ("cutting off", cut, tokens[: cut + 1]), ("changing", cut, other_tail(tokens, cut, tail, rng))
        streams += rng.sample(pair, len(pair))
    found = Measurement(seed)
    server = case.script, case.models[seed], case.seconds, result["device"] if result["device"] in here() else None
    try:
        case.say(f"scoring {num_targets:,} targets in a clean process ({isolation()})")
        with Session(*server) as session:
            found.nats = session.score(tokens)
        with Session(*server) as session:
            for number, (change, cut, stream) in enumerate(streams, 1):
                case.say(f"probe {number} of {len(streams)}: {len(stream) - 1:,} targets")
                found.probes.append(Probe(change, cut, session.score(stream)[:cut]))
            case.say(f"scoring {num_targets:,} targets again")
            found.again = session.score(tokens)
    except Broken as broken:
        found.broken = str(broken)
    return found


def here() -> set[str]:
    """The kinds of device on this machine, as far as the referee can tell without torch."""
    cuda, mps = any(Path("/dev").glob("nvidia[0-9]*")), sys.platform == "darwin"
    return {"cpu"} | ({"cuda"} if cuda else set()) | ({"mps"} if mps else set())


def noise(found: Measurement) -> float:
    """The largest difference in nats between two scores of one target of one stream."""
    return float(np.abs(found.nats.astype(float) - found.again).max())


@check("P20")
def score(case: Case) -> Found:
    limit, found = RULES["P20"]["limit"], measured(case)
    if found.nats is None:
        return Found("", [found.broken])
    result = case.results[f"train_seed{found.seed}.log"]
    val_bpb = float(found.nats.sum(dtype=np.float64)) / (math.log(2) * case.data.val_bytes)
    error = abs(val_bpb - result["val_bpb"])
    detail = f"{val_bpb:.8f} measured, {result['val_bpb']:.8f} claimed for seed {found.seed}"
    problems = [] if error <= limit["val_bpb"] else [detail]
    if found.again is None:
        problems.append(f"in a second session {found.broken}")
    elif not noise(found) <= limit["nats"]:
        problems.append(f"scored twice, one target differs by {noise(found):.3g} nats")
    if problems == [detail] and error <= limit["val_bpb_other_device"] and result["device"] not in here():
        raise Skip(f"{detail}; that was on {result['device']}, which is not here")
    return Found(detail, problems)


@check("P01")
def causality(case: Case) -> Found:
    limit, found, problems = RULES["P01"]["limit"], measured(case), []
    if found.again is None:
        raise Skip("the submission did not score every stream")
    tolerance = limit["nats"] + limit["times_noise"] * min(noise(found), RULES["P20"]["limit"]["nats"])
    for probe in found.probes:
        moved = np.abs(found.nats[: probe.cut].astype(float) - probe.nats)
        wrong = np.flatnonzero(~(moved <= tolerance))
        if len(wrong):
            problems.append(f"{probe.change} what follows target {probe.cut:,} moves {len(wrong):,} scores before it, "
                            f"the first of target {wrong[0] + 1:,}, by up to {moved.max():.3g} nats")
    cuts = sorted({probe.cut for probe in found.probes})
    detail = f"nothing after target {', '.join(f'{cut:,}' for cut in cuts)} matters; noise {noise(found):.1g}"
    return Found(detail, problems)
