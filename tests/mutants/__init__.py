"""Submissions that cheat, each made from the honest one by one change, and honest ones that look as if they did.

`tools.verify --self-test` trains every one of them, files it as its author would, and lets the referee judge: a cheat
must be caught by the rule that is about it, an honest one must fail no rule. A file of this folder holds those of one
subject; each function is one submission.
"""

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

SUBJECTS = ("honest", "future", "distributions", "process", "texts", "clock", "files")


@dataclass
class Mutant:
    """One submission. rule is the one that must catch it, "" for an honest one."""

    name: str
    rule: str
    what: str
    source: Callable[[str], str] | None = None  # changes the packed script before it is trained
    record: Callable[[Path], None] | None = None  # changes the record folder after it is filed
    data: Callable[[Path], None] | None = None  # changes the data folder that it is trained and judged on
    settings: dict = field(default_factory=dict)  # baked into the script
    seeds: tuple[int, ...] = (1337,)
    vocabulary: int | None = 512  # None: bytes
    compressed: bool = False
    carries_text: bool = False  # the script holds validation text
    track: str = "non_record_16mb"
    answer_seconds: float = 60.0


MUTANTS: dict[str, Mutant] = {}


def mutant(rule: str, what: str, change: str = "source", **options: object) -> Callable:
    """Registers a function that makes the one change; `change` says to what: source, record or data."""

    def register(function: Callable) -> Callable:
        assert function.__name__ not in MUTANTS, function.__name__
        changes = {} if change == "nothing" else {change: function}
        MUTANTS[function.__name__] = Mutant(function.__name__, rule, what, **changes, **options)
        return function

    return register


def honest(what: str, change: str = "source", **options: object) -> Callable:
    """Registers a submission that must pass."""
    return mutant("", what, change, **options)


def all_mutants() -> dict[str, Mutant]:
    for subject in SUBJECTS:
        importlib.import_module(f"tests.mutants.{subject}")
    return MUTANTS


def swap(text: str, old: str, new: str) -> str:
    """The text with `old`, which must stand in it once, replaced."""
    assert text.count(old) == 1, f"{text.count(old)} times in the text: {old}"
    return text.replace(old, new)


def answer(source: str, body: str) -> str:
    """The script whose scores are changed by `body`, lines that work on `nats` and `tokens`, before they are given."""
    lines = "".join(f"    {line}\n" for line in body.strip("\n").splitlines())
    head = "def changed(nats, tokens):\n    tokens = np.asarray(tokens, dtype=np.int64)\n"
    return swap(source, "    return result\n\n\n@dataclass\nclass Score:",
                f"    return changed(result, tokens)\n\n\n{head}{lines}    return nats\n\n\n@dataclass\nclass Score:")


def method(source: str, body: str) -> str:
    """The script whose model has more methods, written as they stand in a class."""
    begin = "class Model(DocumentModel):\n"
    return swap(source, begin, f"{begin}{body.strip(chr(10))}\n\n")


def hidden_state(source: str, before: str) -> str:
    """The script with lines between the blocks and the head; they work on `h` (B, T, D)."""
    lines = "".join(f"        {line}\n" for line in before.strip("\n").splitlines())
    return swap(source, "        x = rms_norm(self.backbone(x)[:, start:])\n",
                f"        h = self.backbone(x)\n{lines}        x = rms_norm(h[:, start:])\n")


def change_json(folder: Path, **changes: object) -> None:
    path = folder / "submission.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


def change_result(log: Path, **changes: object) -> None:
    """The log with other values in its result line."""
    *lines, last = log.read_text().splitlines()
    result = json.loads(last.removeprefix("result:")) | changes
    log.write_text("\n".join([*lines, "result:" + json.dumps(result)]) + "\n")


def result_of(log: Path) -> dict:
    return json.loads(log.read_text().splitlines()[-1].removeprefix("result:"))


def first_log(folder: Path) -> Path:
    return folder / "logs/train_seed1337.log"


def in_all(folder: Path, changes: Callable[[dict], dict]) -> None:
    """A record whose every log, and the JSON that follows from them, has other values in its result."""
    said = json.loads((folder / "submission.json").read_text())
    for log in folder.glob("logs/*.log"):
        new = changes(result_of(log))
        change_result(log, **new)
        seed = said["seed_results"][str(result_of(log)["seed"])]
        seed |= {key: value for key, value in new.items() if key in seed}
        said |= {key: value for key, value in new.items() if key in said}
    for key in ("val_bpb", "val_loss"):
        said[key] = fmean(seed[key] for seed in said["seed_results"].values())
    change_json(folder, **said)


def edit(path: Path, pattern: str, new: str) -> None:
    """The file with the first match of the pattern replaced."""
    text, count = re.subn(pattern, lambda _: new, path.read_text(), count=1)
    assert count, f"{path.name} has no {pattern}"
    path.write_text(text)
