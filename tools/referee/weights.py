"""Whether a submission uses all weights that it ships: rule P23.

A look inside first, then proof from outside. tools/referee/inspect_weights.py loads the script in the box and changes
one tensor after another. Since the script may lie to it, altered copies of the artifact are then scored as the artifact
itself is: one with all tensors changed that the look found unused, and some with one that it found used, among them the
largest. What the scores of these copies say decides.
"""

import json
import math
import os
import secrets
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tools.referee.artifact import Foreign, Tensor, read_artifact, write_artifact
from tools.referee.case import Case
from tools.referee.measure import Measurement, here, prepare
from tools.referee.rules import Found, Skip, Table, check
from tools.referee.sandbox import Box, Broken, Session
from tools.untrusted import load_json, text

MAX_TARGETS = 4096
LEAST = 1e-6  # nats that count as a move
INSPECTOR = Path(__file__).with_name("inspect_weights.py")
CHANGES = ("noise", "scaled", "negated")
MOST_SINGLY = 12  # tensors that are changed one by one, each in a process of its own
MOST_AT_ONCE = 4  # processes
FROM_OUTSIDE = "noise, seen from outside"
LARGE = 0.01  # of all bytes of tensors: without a look inside, every tensor above it is changed too
NAMED, SHOWN = 20, 200  # tensors in the problems and in the evidence


def changed(value: np.ndarray, how: str, draw: np.random.Generator) -> np.ndarray:
    """Another tensor in place of this one, of the same shape and type and of like size."""
    if value.dtype == bool:
        return ~value
    if value.dtype.kind != "f":
        other = draw.permutation(value.reshape(-1)).reshape(value.shape)
        return value + value.dtype.type(1) if np.array_equal(other, value) else other
    wide = value.astype(np.float64)
    if how == "shaken":
        wide = wide + draw.standard_normal(value.shape) * 0.05 * (math.sqrt(np.square(wide).mean()) or 1.0)
    elif how in ("scaled", "negated"):
        wide = wide * (1.5 if how == "scaled" else -1.0)
    else:
        wide = wide + draw.standard_normal(value.shape) * (wide.std() or 0.1)
    return np.clip(wide, -6e4, 6e4).astype(value.dtype)


class Outside:
    """Scores copies of the artifact as the artifact itself is scored, each in a process of its own."""

    def __init__(self, case: Case, found: Measurement, tokens: np.ndarray, folder: Path):
        self.case, self.tokens, self.folder = case, tokens, folder
        self.model = case.models[found.model_seed]
        self.header, tensors, self.unread = read_artifact(self.model.read_bytes())
        self.stored = tensors
        self.tensors = [tensor for tensor in tensors if tensor.data]  # those with numbers that can be changed
        self.seconds, self.bytes = case.seconds, sum(len(tensor.data) for tensor in tensors)
        stated = case.results.get(f"train_seed{found.model_seed}.log", {}).get("device")
        began, reason = time.monotonic(), ""
        # First the processor, where nothing is compiled and the same comes out twice.
        for self.device in dict.fromkeys(("cpu", stated if stated in here() else "cpu")):
            try:
                first, second = self.ask(self.model, 2)
                break
            except Broken as broken:
                reason = reason or str(broken)
        else:
            raise Skip(f"the submission does not score a short text: {reason}")
        self.seconds = min(case.seconds, 30 + 4 * (time.monotonic() - began))
        self.nats, self.least = first, max(LEAST, 4 * float(np.abs(first - second).max(initial=0.0)))

    def ask(self, model: Path, times: int = 1) -> list[np.ndarray]:
        with Session(self.case.script, model, self.seconds, self.device) as session:
            return [session.score(self.tokens).astype(float) for _ in range(times)]

    def score(self, changes: dict[str, str], shaken: bool) -> np.ndarray | None:
        """The nats with some tensors changed, by first name; None if it does not score that copy."""
        values = {}
        for number, tensor in enumerate(self.tensors):
            value = tensor.value() if shaken or tensor.name in changes else None
            if shaken and value.dtype.kind == "f":
                values[tensor.name] = value = changed(value, "shaken", np.random.default_rng(number))
            if tensor.name in changes:
                values[tensor.name] = changed(value, changes[tensor.name], np.random.default_rng(number + (1 << 20)))
        path = self.folder / f"altered_{secrets.token_hex(8)}.bin"
        path.write_bytes(write_artifact(self.header, self.stored, values))
        try:
            return self.ask(path)[0]
        except Broken:
            return None
        finally:
            path.unlink()

    def still(self, copies: list[dict[str, str]], base: np.ndarray, shaken: bool = False) -> list[bool]:
        """Whether copies, each with some tensors changed, get the scores of base; one that is not scored does not."""
        workers = min(os.cpu_count() or 1, MOST_AT_ONCE) if self.device == "cpu" else 1
        with ThreadPoolExecutor(workers) as pool:
            answers = list(pool.map(lambda changes: self.score(changes, shaken), copies))
        return [nats is not None and float(np.abs(nats - base).max()) <= self.least for nats in answers]

    def idle(self, tensors: list[Tensor], most: int, shaken: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """(those of the tensors that move no score, those that were not tried): all at once, else one by one."""
        base = self.score({}, shaken=True) if shaken and tensors else self.nats
        if not tensors or base is None or self.still([{t.name: "noise" for t in tensors}], base, shaken)[0]:
            return tensors, []
        if len(tensors) == 1:
            return [], []
        tensors = sorted(tensors, key=lambda t: -len(t.data))
        still = self.still([{t.name: "noise"} for t in tensors[:most]], base, shaken)
        return list(compress(tensors, still)), tensors[most:]


class Seen(NamedTuple):
    """What the look inside found of one tensor."""

    move: float | None  # the most nats
    how: str  # the change that moved a score, "" if none did
    shaken: bool  # whether all other tensors had to be shaken first


def look_inside(case: Case, outside: Outside, seq_len: int) -> dict[str, Seen]:
    """What the inspector says of every tensor, by first name; Broken if it cannot load or score the model."""
    names, folder, seen = [tensor.names for tensor in outside.tensors], outside.folder, {}
    (folder / "names.json").write_text(json.dumps(names))
    outside.tokens.astype("<u2").tofile(folder / "tokens.bin")
    files = {"train_gpt.py": case.script, "model.bin": outside.model, INSPECTOR.name: INSPECTOR,
             **{name: folder / name for name in ("names.json", "tokens.bin")}}
    deadline = time.monotonic() + case.seconds
    with Box(files, [outside.device, str(seq_len)], {"DEVICE": outside.device}, case.seconds,
             processes=outside.device == "cuda", program=INSPECTOR.name) as box:
        while len(seen) < len(names):
            said, _ = load_json(box.line(max(0.0, deadline - time.monotonic())).decode(errors="replace"))
            whole = isinstance(said, list) and list(map(type, said)) == [int, float, str, bool]
            if whole and 0 <= said[0] < len(names) and said[2] in ("", *CHANGES):
                seen[names[said[0]][0]] = Seen(*said[1:])
    return seen


def pretended(case: Case, outside: Outside, seen: dict[str, Seen]) -> list[Tensor]:
    """Tensors that are said to matter and do not. Tried are the largest, one drawn by its bytes and one drawn evenly,
    of those that matter as they are and of those that matter once all others are shaken."""
    rng, found = case.random("weights that matter"), []
    for shaken in (False, True):
        used = [t for t in outside.tensors if seen[t.name].how and seen[t.name].shaken == shaken]
        if not used:
            continue
        used.sort(key=lambda t: -len(t.data))
        base = outside.score({}, shaken=True) if shaken else outside.nats
        picked = [used[0], *rng.choices(used, [len(t.data) for t in used]), rng.choice(used)]
        picked = list({tensor.name: tensor for tensor in picked}.values())
        if base is not None:
            still = outside.still([{t.name: seen[t.name].how} for t in picked], base, shaken)
            found += compress(picked, still)
    return found


def short_text(found: Measurement) -> tuple[np.ndarray, int]:
    """(the first two windows of the text, at most, and the targets of one)."""
    seq_len = max(1, min(found.geometry.seq_len, MAX_TARGETS // 2))
    return np.ascontiguousarray(found.tokens[: 2 * seq_len + 1]), seq_len


@check("P23")
def weights_used(case: Case) -> Found:
    found = prepare(case)
    tokens, seq_len = short_text(found)
    with tempfile.TemporaryDirectory() as folder:
        try:
            outside = Outside(case, found, tokens, Path(folder))
        except Foreign as foreign:
            raise Skip(f"the artifact is not in the kit's format: {foreign}") from None
        case.say(f"weights: {len(outside.tensors)} tensors")
        try:
            seen = look_inside(case, outside, seq_len)
        except Broken as broken:
            return from_outside(case, outside, str(broken))
        unseen = [t for t in outside.tensors if not seen[t.name].how]
        idle, untried = outside.idle(unseen, MOST_SINGLY)
        lies = pretended(case, outside, seen)
    for tensor in unseen:
        if tensor not in idle:
            seen[tensor.name] = Seen(None, "not tried" if tensor in untried else FROM_OUTSIDE, False)
    return report(outside, seen, idle, lies, [f"{len(untried)} not tried"] if untried else [])


def from_outside(case: Case, outside: Outside, reason: str) -> Found:
    """The finding without a look inside, on some tensors only."""
    picked = case.random("weights").sample(outside.tensors, min(MOST_SINGLY, len(outside.tensors)))
    picked += [t for t in outside.tensors if len(t.data) > LARGE * outside.bytes]
    picked = list({tensor.name: tensor for tensor in picked}.values())
    still, _ = outside.idle(picked, len(picked))
    idle, _ = outside.idle(still, len(still), shaken=True)
    names = {tensor.name for tensor in picked}
    seen = {t.name: Seen(None, FROM_OUTSIDE if t.name in names else "not tried", False) for t in outside.tensors}
    seen |= {t.name: Seen(0.0, "", True) for t in idle}
    return report(outside, seen, idle, [], [f"{len(picked)} of them tried, from outside only, for no look inside was "
                                            f"possible: {reason[:200]}"])


def report(outside: Outside, seen: dict[str, Seen], idle: list[Tensor], lies: list[Tensor], notes: list[str]) -> Found:
    def describe(tensor: Tensor) -> str:
        share = len(tensor.data) / outside.bytes
        return f"{text(tensor.name)[:100]} ({len(tensor.data):,} bytes, {share:.1%} of the tensors)"

    largest = sorted(idle, key=lambda t: -len(t.data))
    problems = [f"no score depends on {describe(tensor)}" for tensor in largest[:NAMED]]
    problems += [f"and on {len(idle) - NAMED} more"] if len(idle) > NAMED else []
    problems += [f"the script pretends to use {describe(tensor)}, but when it serves scores none depends on it"
                 for tensor in lies]
    if outside.unread:
        problems.append(f"{outside.unread:,} bytes of the artifact belong to no tensor")
    table = Table("Tensors of the artifact, and the most nats that a change of each moved a score",
                  ["tensor", "bytes", "nats moved", "change"], [])
    for tensor in sorted(outside.tensors, key=lambda t: (seen[t.name].move or 0.0, -len(t.data)))[:SHOWN]:
        found = seen[tensor.name]
        how = found.how + (", after all were shaken" if found.shaken and found.how else "")
        table.rows.append([text(tensor.name)[:100], len(tensor.data), found.move, how or "none moves a score"])
    hidden = sum(found.shaken and bool(found.how) for found in seen.values())
    notes = [f"{hidden} only after all others were shaken", *notes] if hidden else notes
    detail = f"{len(outside.tensors) - len(idle)} of {len(outside.tensors)} tensors move a score"
    return Found("; ".join([detail, *notes]), problems, [table])
