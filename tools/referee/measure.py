"""Lets the submission score the streams of tools.referee.streams, once for all rules, and keeps what it answered."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tools.referee.case import Case
from tools.referee.rules import RULES, Skip
from tools.referee.sandbox import Act, Broken, Session, isolation
from tools.referee.streams import (
    CUT_RANGES,
    LABEL_SECONDS,
    PRE_TOKENS,
    RELABEL_TOKENS,
    TAIL_WINDOWS,
    WINDOW_STREAMS,
    Geometry,
    Stream,
    behind_a_cut,
    choose_cuts,
    flip,
    geometry,
    labels_of,
    made_up_text,
    moved,
    one_by_one,
    relabelled,
    rest_of_a_window,
    sampled,
)

ALIKE = 1e-3  # nats: rows of a batch may differ so on a GPU
MEASURED = "_measured"  # where a case keeps its measurement


@dataclass
class Measurement:
    """What the submission was asked and what it answered. broken says why there is no more."""

    model_seed: int  # of the run whose artifact was scored
    tokens: np.ndarray
    vocab_size: int
    geometry: Geometry
    whole: bool  # whether tokens are all of the judge's text
    streams: list[Stream] = field(default_factory=list)  # that were answered
    labels: np.ndarray | None = None
    sampled_targets: np.ndarray | None = None
    sampled_nats: np.ndarray | None = None  # -ln of the chance with which each was drawn
    acts: list[Act] = field(default_factory=list)
    box: str = ""  # the folder of the last session
    broken: str = ""

    def of(self, *kinds: str) -> list[Stream]:
        return [stream for stream in self.streams if stream.kind in kinds]

    def text(self, session: int) -> np.ndarray:
        """The answer to the text in that session."""
        return next(stream.nats for stream in self.of("text") if stream.session == session)

    @property
    def nats(self) -> np.ndarray:
        return self.text(1)

    @property
    def shadow(self) -> np.ndarray | None:
        return next((stream.nats for stream in self.of("shadow")), None)

    @property
    def noise(self) -> float:
        """The largest difference in nats between two scores of one target of one stream."""
        return float(np.abs(self.text(1).astype(float) - self.text(2)).max())

    def tolerance(self, rule: str) -> float:
        limit = RULES[rule]["limit"]
        return limit["nats"] + limit["times_noise"] * min(self.noise, RULES["P20"]["limit"]["nats"])


def here() -> set[str]:
    """The kinds of device on this machine, as far as the referee can tell without torch."""
    cuda, mps = any(Path("/dev").glob("nvidia[0-9]*")), sys.platform == "darwin"
    return {"cpu"} | ({"cuda"} if cuda else set()) | ({"mps"} if mps else set())


def measured(case: Case) -> Measurement:
    """What the submission answered; it is asked once. Skip where there is nothing to ask."""
    if MEASURED not in case.__dict__:
        case.__dict__[MEASURED] = measure(case)
    return case.__dict__[MEASURED]


def complete(case: Case) -> Measurement:
    """The same, for a rule that needs every answer."""
    found = measured(case)
    if found.broken:
        raise Skip("the submission did not score every stream")
    return found


def prepare(case: Case) -> Measurement:
    """The text and what is known about the submission before it is asked."""
    if case.data is None and not case.pre:
        raise Skip("no --data folder to score")
    seeds, said = list(case.models), case.submission.get("seeds")
    if not seeds:
        raise Skip("the folder has no model_seed<seed>.bin to score with")
    seed = next((seed for seed in said if seed in seeds), seeds[0]) if isinstance(said, list) else seeds[0]
    if case.data is None:
        stated = next(iter(case.logs)).config.get("vocab_size")
        vocab_size = stated if type(stated) is int and 2 < stated <= 1 << 16 else 256
        tokens = made_up_text(vocab_size, PRE_TOKENS, case.random("text"))
    else:
        vocab_size = case.data.vocab_size
        tokens = case.data.tokens[: PRE_TOKENS + 1] if case.pre else case.data.tokens
    whole = case.data is not None and len(tokens) == len(case.data.tokens)
    return Measurement(seed, tokens, vocab_size, geometry(case, len(tokens) - 1), whole)


def plan(case: Case, found: Measurement, session: int) -> list[Stream]:
    """The requests of a session: those that share a beginning with the text, shortest first, then the others."""
    rng, tokens, shape = case.random(f"session {session}"), found.tokens, found.geometry
    tail = TAIL_WINDOWS * shape.seq_len
    first = [flip(tokens, shape, rng), flip(tokens, shape, rng)]
    first += [rest_of_a_window(tokens, shape, rng) for _ in range(WINDOW_STREAMS)]
    ranges = CUT_RANGES if session == 1 or case.pre else CUT_RANGES[:2]
    for cut in choose_cuts(len(tokens) - 1, min(shape.stride, max(1, len(tokens) // 8)), rng, ranges):
        first += behind_a_cut(tokens, cut, tail, rng)
    mixed, last = [moved(tokens, shape, rng), Stream("text", tokens, len(tokens) - 1)], []
    if session == 1:
        found.labels = labels_of(tokens, found.vocab_size, RELABEL_TOKENS // shape.slot, rng)
        mixed.append(relabelled(tokens, found.labels, shape, rng))
    else:
        stream, found.sampled_targets, found.sampled_nats = sampled(tokens, found.vocab_size, rng)
        mixed.append(stream)
        if declares_state(case) and not windows_are_alike(found):
            last = one_by_one(tokens, found.vocab_size, shape, rng)
        if case.shadow is not None and not case.pre:
            mixed.append(Stream("shadow", case.shadow.tokens))
    return sorted(first, key=lambda stream: stream.same) + rng.sample(mixed, len(mixed)) + last


def measure(case: Case) -> Measurement:
    """Let the submission score two sessions of streams."""
    found = prepare(case)
    device = case.results.get(f"train_seed{found.model_seed}.log", {}).get("device")
    server = case.script, case.models[found.model_seed], case.seconds, device if device in here() else None
    try:
        for session in (1, 2):
            streams = plan(case, found, session)
            targets = sum(len(stream.tokens) - 1 for stream in streams)
            case.say(f"session {session}: {len(streams)} streams, {targets:,} targets ({isolation()})")
            with Session(*server) as asked:
                try:
                    ask(asked, streams, session, found, LABEL_SECONDS[case.pre])
                finally:
                    found.acts += asked.box.acts()
                    found.box = str(asked.box.folder)
    except Broken as broken:
        found.broken = str(broken)
    return found


def ask(asked: Session, streams: list[Stream], session: int, found: Measurement, label_seconds: float) -> None:
    """Hand over one stream after the other; the first answer is on the clock from the start of the process."""
    began = asked.box.started
    for stream in streams:
        if stream.kind == "label" and sum(label.seconds for label in found.of("label")) > label_seconds:
            continue
        stream.session, stream.nats = session, asked.score(stream.tokens)
        stream.seconds = time.monotonic() - began
        began = time.monotonic()
        found.streams.append(stream)


def declares_state(case: Case) -> bool:
    """Whether the record says that windows know of those before them, as test-time training makes them."""
    return any(result.get("carries_state") is True for result in case.results.values())


def windows_are_alike(found: Measurement) -> bool:
    """Whether every copy of a repeated window got the scores that the text's own got, up to the label."""
    stream = found.of("relabelled")[0]
    low, place = found.geometry.alike_from, stream.begin
    pieces = rows(found)[:, low:place]
    own = found.nats[stream.end + low : stream.end + place]
    return bool(place > low and (np.abs(pieces - own.astype(float)) <= ALIKE).all())


def rows(found: Measurement) -> np.ndarray:
    """The answers to the repeated window, one row per label."""
    return found.of("relabelled")[0].nats.reshape(len(found.labels), found.geometry.slot)
