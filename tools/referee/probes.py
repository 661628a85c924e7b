"""The rules on single scores: one distribution over the vocabulary, of its past alone, from its own files alone."""

import math
from typing import NamedTuple

import numpy as np

from tools.referee.case import Case
from tools.referee.measure import Measurement, complete, declares_state, measured, rows, windows_are_alike
from tools.referee.rules import RULES, Found, Skip, Table, check
from tools.referee.sandbox import Act
from tools.untrusted import text

SHOWN = 50  # rows of evidence
FLAT = 1e-6  # nats: the deviation of scores that do not tell tokens apart


class Row(NamedTuple):
    """The submission's scores of labels at one place of the text, whose past is fixed."""

    labels: np.ndarray
    nats: np.ndarray
    true: int  # the text's own token there
    reported: float  # its nats in the text
    alone: bool  # each label had a stream of its own


def one_row(found: Measurement) -> Row | None:
    """From the repeated window; where windows carry a state, from one stream per label; else there is no fixed past."""
    if windows_are_alike(found):
        stream = found.of("relabelled")[0]
        labels, nats, target = found.labels, rows(found)[:, stream.begin], stream.end + stream.begin
    elif streams := found.of("label"):
        target = streams[0].same
        labels = np.array([stream.end for stream in streams])
        nats = np.array([stream.nats[target] for stream in streams])
    else:
        return None
    return Row(labels, nats, int(found.tokens[target + 1]), float(found.nats[target]), not windows_are_alike(found))


@check("P02")
def row(case: Case) -> Found:
    found = complete(case)
    if (one := one_row(found)) is None:
        raise Skip("a repeated window is not scored alike, which P21 is about, so no place has a fixed past")
    labels, nats, true, reported, _ = one
    tolerance, problems = RULES["P02"]["limit"]["nats"] + 2 * found.noise, []
    own = nats[labels == true]
    if len(own) and not abs(own[0] - reported) <= tolerance:
        problems.append(f"the true token has {own[0]:.6f} nats in the row and {reported:.6f} in the text")
    if len(labels) > 2 and nats.std() < FLAT:
        problems.append(f"all {len(labels)} tokens have {nats[0]:.6f} nats: the score does not depend on its target")
    later = [np.abs(stream.nats[stream.same + 1 :] - found.text(3 - stream.session)[stream.same + 1 :][
        : len(stream.nats) - stream.same - 1].astype(float)).max(initial=0.0) for stream in found.of("flip")]
    if later and max(later) < FLAT:
        problems.append(f"{len(later)} replaced tokens change no later score: the score does not depend on its past")
    order = np.argsort(nats)[:SHOWN]
    evidence = Table("Most probable tokens at the place", ["token", "nats", "true"],
                     [[int(labels[i]), float(nats[i]), bool(labels[i] == true)] for i in order])
    return Found(f"{len(labels):,} tokens scored at one place, deviation {nats.std():.3g} nats", problems, [evidence])


@check("P03")
def normalised(case: Case) -> Found:
    found, limit = complete(case), RULES["P03"]["limit"]
    problems, details, table = [], [], []
    if (one := one_row(found)) is not None:
        total = float(np.exp(-one.nats.astype(float)).sum())
        which = f"{len(one.labels):,} of {found.vocab_size:,} tokens{', each in a stream of its own' * one.alone}"
        details.append(f"{which}: their probabilities sum to {total:.6f}")
        problems += [f"{details[0]}, more than one"] if not total <= 1 + limit["sum"] else []
        which = "every label" if len(one.labels) == found.vocab_size else "some labels"
        table.append([which, len(one.labels), total, 0.0])
    drawn = found.of("sampled")[0].nats[found.sampled_targets].astype(float)
    weights = np.exp(found.sampled_nats - drawn)
    mean, error = float(weights.mean()), float(weights.std() / math.sqrt(len(weights)))
    gained = float((found.sampled_nats - drawn).sum())
    if not mean <= 1 + limit["sum"] + limit["sampled_sum_sigmas"] * error:
        problems.append(f"at {len(weights):,} places with drawn tokens the probabilities sum to {mean:.3f} on average, "
                        f"with a standard error of {error:.3f}")
    if not gained <= limit["sampled_nats"]:
        problems.append(f"drawn tokens are predicted {gained:.1f} nats better than their own distribution does: chance "
                        f"e^-{gained:.0f}")
    details.append(f"{mean:.3f} ± {error:.3f} at {len(weights):,} drawn tokens")
    table.append(["drawn tokens, average", len(weights), mean, error])
    head = ["how", "tokens or places", "sum", "standard error"]
    return Found("; ".join(details), problems, [Table("Sums of probabilities", head, table)])


@check("P21")
def isolation(case: Case) -> Found:
    found = complete(case)
    if declares_state(case):
        return Found("the record declares that it carries a state from window to window")
    tolerance, problems, table = found.tolerance("P21"), [], []
    if not windows_are_alike(found):
        problems.append("a window that is repeated gets other scores than the same window in the text, and the record "
                        "declares no state")
    for stream in found.of("moved"):
        begin = stream.end + found.geometry.seq_len
        own = found.text(3 - stream.session)[begin : len(stream.nats)].astype(float)
        difference = np.abs(own - stream.nats[begin:])
        wrong = np.flatnonzero(~(difference <= tolerance))
        table.append([stream.session, stream.begin + 1, stream.end, len(own), len(wrong),
                      float(difference.max(initial=0.0))])
        if len(wrong):
            problems.append(f"other tokens at targets {stream.begin + 1:,} to {stream.end:,} move {len(wrong):,} "
                            f"scores in later windows, the first of target {begin + int(wrong[0]) + 1:,}, by up to "
                            f"{difference.max():.3g} nats, and the record declares no state")
    head = ["session", "first changed", "last changed", "targets compared", "moved", "nats moved"]
    evidence = Table("Scores more than a window behind a change", head, table)
    return Found("an early window does not matter to later ones", problems, [evidence])


def describe(act: Act) -> str:
    return f"{act.kind} {text(act.what)[:200]}"


@check("P19")
def shut_in(case: Case) -> Found:
    found = measured(case)
    outside = [act for act in found.acts if not act.allowed and act.kind != "process"]
    problems = [f"while scoring it tried to {describe(act)}" for act in outside[:5]]
    problems += [f"and {len(outside) - 5} more"] if len(outside) > 5 else []
    table = Table("What it opened", ["act", "what", "allowed"],
                  [[act.kind, text(act.what)[:200], act.allowed] for act in found.acts[:SHOWN]])
    return Found(f"{len(found.acts)} files of its own opened, nothing outside", problems, [table])


@check("P12")
def opened(case: Case) -> Found:
    found = measured(case)
    names = {act.what.removeprefix(found.box + "/") for act in found.acts
             if act.kind == "read" and act.what.startswith(found.box + "/")}
    declared = {"train_gpt.py": case.script, "model.bin": case.models[found.model_seed]}
    rows = [[name, path.stat().st_size, name in names] for name, path in declared.items()]
    table = Table("Files that count", ["file", "bytes", "opened"], rows)
    return Found(f"it scores from {' and '.join(declared)} alone", [], [table])
