"""The rules on single scores: one distribution over the vocabulary, of its past alone, from its own files alone."""

import math

import numpy as np

from tools.referee.case import Case
from tools.referee.rules import RULES, Found, Table, check
from tools.referee.sandbox import Act
from tools.referee.scores import Measurement, complete, measured, rows, windows_are_alike
from tools.untrusted import text

SHOWN = 50  # rows of evidence
FLAT = 1e-6  # nats: the deviation of scores that do not tell tokens apart


def label_scores(found: Measurement) -> tuple[np.ndarray, np.ndarray, int, float]:
    """(labels, their nats at one place, the true token there, its nats in the text)."""
    if windows_are_alike(found):
        stream = found.of("relabelled")[0]
        target = stream.end + stream.begin
        return found.labels, rows(found)[:, stream.begin], int(found.tokens[target + 1]), float(found.nats[target])
    streams = found.of("label")
    target = streams[0].same
    labels = np.array([stream.end for stream in streams])
    nats = np.array([stream.nats[target] for stream in streams])
    return labels, nats, int(found.tokens[target + 1]), float(found.nats[target])


@check("P02")
def row(case: Case) -> Found:
    found = complete(case)
    labels, nats, true, reported = label_scores(found)
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
    labels, nats, _, _ = label_scores(found)
    total, every = float(np.exp(-nats.astype(float)).sum()), len(labels) == found.vocab_size
    alone = "" if windows_are_alike(found) else ", each in a stream of its own"
    detail = f"{len(labels):,} of {found.vocab_size:,} tokens{alone}: their probabilities sum to {total:.6f}"
    problems = [f"{detail}, more than one"] if not total <= 1 + limit["sum"] else []
    weights = np.exp(found.sampled_nats - drawn_nats(found))
    mean, error = float(weights.mean()), float(weights.std() / math.sqrt(len(weights)))
    gained = float((found.sampled_nats - drawn_nats(found)).sum())
    if not mean <= 1 + limit["sum"] + limit["sampled_sum_sigmas"] * error:
        problems.append(f"at {len(weights):,} places with drawn tokens the probabilities sum to {mean:.3f} on average, "
                        f"with a standard error of {error:.3f}")
    if not gained <= limit["sampled_nats"]:
        problems.append(f"drawn tokens are predicted {gained:.1f} nats better than their own distribution does: chance "
                        f"e^-{gained:.0f}")
    table = Table("Sums of probabilities", ["how", "tokens or places", "sum", "standard error"],
                  [["every label" if every else "some labels", len(labels), total, 0.0],
                   ["drawn tokens, average", len(weights), mean, error]])
    return Found(f"{detail}; {mean:.3f} ± {error:.3f} at {len(weights):,} drawn tokens", problems, [table])


def drawn_nats(found: Measurement) -> np.ndarray:
    """The submission's nats of the tokens that the referee drew."""
    return found.of("sampled")[0].nats[found.sampled_targets].astype(float)


@check("P21")
def isolation(case: Case) -> Found:
    found = complete(case)
    if any(result.get("carries_state") is True for result in case.results.values()):
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
