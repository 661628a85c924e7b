"""The referee judges itself: every mutant of tests/mutants must be caught by its rule, no honest submission may fail.

Each is packed, trained for a few steps on the documentation inside Python, filed as its author would file it, and then
judged, with as many seeds of the referee as asked for.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import tools.referee.parts  # noqa: F401
from data.sources import pydocs
from tests.forked import run_forked
from tests.mutants import Mutant, all_mutants
from tools import pack
from tools.referee.case import Case, Data, read_data
from tools.referee.rules import ROOT, RULES, Finding, judge
from tools.referee.sandbox import isolation

TINY = dict(NUM_LAYERS=2, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2, TRAIN_SEQ_LEN=32, TRAIN_BATCH_TOKENS=512,
            WARMUP_STEPS=1, ITERATIONS=40, TRAIN_LOG_EVERY=1, DEVICE="cpu")
# Files a record without the referee's advice, as a cheat would.
FILE = "import sys\nfrom tools import record\nrecord.verify = lambda folder: []\nsys.exit(record.main(sys.argv[1:]))"
CALL_SECONDS = 300.0
SLOW = "P10", "P15", "P18", "P23"  # train, or start a process for every suspicious tensor
BEGIN, END = "<!-- BEGIN SELF-TEST -->", "<!-- END SELF-TEST -->"


@dataclass
class Row:
    """One submission: how often, over the referee's seeds, each rule failed or held it."""

    name: str
    rule: str
    what: str
    seeds: int = 0
    caught: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    found: dict[str, Finding] = field(default_factory=dict)  # of the last seed
    example: str = ""

    @property
    def verdict(self) -> str:
        if not self.rule:
            return "false alarm" if self.failed else "passes"
        return "caught" if self.caught == self.seeds else "missed"


class Workshop:
    """A folder in which submissions are made; data sets and the runs of one script are made once."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "notes.txt").write_text("lies where the runs are made, and in no record\n")

    def data_folders(self, vocabulary: int | None) -> tuple[Path, Path]:
        """(data set, another with the same train documents and tokenizer and other validation documents)."""
        name = f"pydocs_sp{vocabulary}" if vocabulary else "pydocs_bytes"
        folders = self.folder / name, self.folder / f"{name}_shadow"
        if not folders[1].exists():
            parts = deal_documents(self.folder)
            size = ["--vocab-size", str(vocabulary)] if vocabulary else ["--tokenizer", "byte260"]
            for folder, part in zip(folders, ("val", "shadow"), strict=True):
                texts = ["--jsonl", parts["train"], "--val-jsonl", parts[part], "--processes", 1]
                self.call("data/prepare.py", *texts, "--out", self.folder, "--name", folder.name, *size)
                size = ["--tokenizer", folder / "tokenizer.model"] if vocabulary else size
        return folders

    def data_folder(self, mutant: Mutant) -> Path:
        """The data set that it is trained and judged on."""
        folder, _ = self.data_folders(mutant.vocabulary)
        if not mutant.data:
            return folder
        changed = self.folder / mutant.name / folder.name
        if not changed.exists():
            shutil.copytree(folder, changed)
            mutant.data(changed)
        return changed

    def call(self, *words: object, env: dict[str, str] | None = None, cwd: Path = ROOT) -> None:
        """Runs a Python program as a user does, with one thread and no settings but these."""
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
        done = run_forked(words, kept | {"OMP_NUM_THREADS": "1"} | (env or {}), cwd, CALL_SECONDS)
        if done.returncode:
            raise ValueError(f"{' '.join(map(str, words[:2]))} failed: {(done.stderr or done.stdout).strip()[-500:]}")

    def script(self, mutant: Mutant) -> Path:
        """The packed script with its one change."""
        source = pack.flatten("gpt", {key: str(value) for key, value in (TINY | mutant.settings).items()})
        source = mutant.source(source) if mutant.source else source
        if mutant.carries_text:
            source = f"{source}\n# {validation_text(self.data_folder(mutant))[:2000]!r}\n"
        path = self.folder / mutant.name / "packed.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(pack.compress(source) if mutant.compressed else source)
        return path

    def build(self, mutant: Mutant) -> Path:
        """The record folder of a submission, trained and filed."""
        script, data = self.script(mutant), self.data_folder(mutant)
        home = script.parent
        for seed in mutant.seeds:
            env = {"DATA_PATH": str(data), "OUT_DIR": str(home), "RUN_ID": f"run_{seed}", "SEED": str(seed)}
            self.call(script, env=env, cwd=self.folder)
        self.call("-c", FILE, *(home / f"run_{seed}" for seed in mutant.seeds), "--script", script,
                  "--name", mutant.name, "--author", "Nobody", "--github-id", "nobody", "--blurb", mutant.what,
                  "--track", mutant.track, "--out", home / "records")
        folder = next((home / "records" / f"track_{mutant.track}").iterdir())
        if mutant.record:
            mutant.record(folder)
        return folder


def deal_documents(folder: Path) -> dict[str, Path]:
    """The documentation inside Python as three files of documents, dealt by their hashes."""
    dealt = {"train": [], "val": [], "shadow": []}
    for _, raw in pydocs():
        place = hashlib.sha256(raw).digest()[0]
        dealt["shadow" if place < 10 else "val" if place < 15 else "train"].append(json.dumps({"text": raw.decode()}))
    for part, lines in dealt.items():
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return {part: folder / f"{part}.jsonl" for part in dealt}


def validation_text(folder: Path) -> str:
    """The beginning of a data folder's validation text."""
    import sentencepiece

    data = read_data(folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(data.tokenizer))
    return model.decode([int(token) for token in data.tokens[:3000] if token != data.bos_id])


def rules_for(mutant: Mutant, alone: bool = False) -> list[str]:
    """The rules to ask about it: all if it is honest, else the quick ones and those of the kind that must catch it, or
    that one alone."""
    asked = {rule: about["needs"] for rule, about in RULES.items() if about["needs"] != "self-test"}
    if not mutant.rule:
        return list(asked)
    if alone:
        return [mutant.rule]
    kinds = {"files", "data", asked[mutant.rule]}
    return [rule for rule, needs in asked.items() if rule == mutant.rule or (needs in kinds and rule not in SLOW)]


def examine(mutant: Mutant, folder: Path, data: Data, shadow: Data, seed: int, row: Row, alone: bool) -> None:
    """Judge a submission once and add to its row what failed."""
    case = Case(folder, data, shadow if mutant.rule in ("", "P09") else None, seed=seed, seconds=mutant.answer_seconds)
    row.seeds += 1
    for rule in rules_for(mutant, alone):
        same = rule != mutant.rule and (rule in SLOW or RULES[rule]["needs"] in ("files", "data"))  # asked once
        finding = row.found.get(rule) if same else None
        finding = row.found[rule] = finding or judge(case, rule)
        if finding.status in ("FAIL", "HOLD"):
            row.failed[rule] = row.failed.get(rule, 0) + 1
            if rule == mutant.rule or not mutant.rule:
                row.caught += 1
                row.example = row.example or finding.problems[0]


def judge_one(name: str, folder: Path, seeds: list[int], alone: bool = False) -> Row:
    """Makes one submission in the workshop and judges it with every seed; runs in a process of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"  # several run beside each other
    mutant, shop = all_mutants()[name], Workshop(folder)
    row, record = Row(mutant.name, mutant.rule, mutant.what), shop.build(mutant)
    data = read_data(shop.data_folder(mutant))
    shadow = read_data(shop.data_folders(mutant.vocabulary)[1])
    for seed in seeds:
        examine(mutant, record, data, shadow, seed, row, alone)
    shutil.rmtree(record.parent.parent.parent)
    return row


def run(
    names: list[str], seeds: list[int], workers: int, say: Callable[[str], None], alone: bool = False
) -> Iterator[Row]:
    """Yields the row of every submission as it is judged; with names, of those. alone: a cheat by its own rule only."""
    known = all_mutants()
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no mutant {unknown[0]}; there are {', '.join(known)}")
    mutants = [known[name] for name in names or known]
    # Processes, not threads: parsing scripts in two threads at once fails in CPython 3.11.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory(prefix="selftest_") as folder, pool:
        for vocabulary in {mutant.vocabulary for mutant in mutants}:
            Workshop(Path(folder)).data_folders(vocabulary)
        jobs = [pool.submit(judge_one, mutant.name, Path(folder), seeds, alone) for mutant in mutants]
        for job in as_completed(jobs):
            row = job.result()
            say(f"{row.name}: {row.verdict}, {', '.join(row.failed) or 'nothing fails'}")
            yield row


def table(rows: list[Row]) -> str:
    """The table rule x mutant, as Markdown: what each is, and whether the rule about it caught it."""
    lines = ["| Rule | Submission | What it does | Found | Other rules that fail too |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row.rule or "~", row.name)):
        rule = f"{row.rule} {RULES[row.rule]['title']}" if row.rule else "none: honest"
        share = f"{row.caught if row.rule else row.seeds} of {row.seeds}"
        found = row.verdict + (f" ({share})" if row.verdict in ("caught", "passes", "missed") else "")
        others = ", ".join(rule for rule in row.failed if rule != row.rule)
        lines.append(f"| {rule} | `{row.name}` | {row.what} | {found} | {others} |")
    return "\n".join(lines)


def summary(rows: list[Row], seeds: list[int]) -> str:
    cheats, honest = [row for row in rows if row.rule], [row for row in rows if not row.rule]
    caught, passed = (sum(row.verdict in ("caught", "passes") for row in group) for group in (cheats, honest))
    return (f"{caught} of {len(cheats)} cheating submissions caught by the rule about them, {len(honest) - passed} "
            f"false alarms among {len(honest)} honest ones, {len(seeds)} seed(s) of the referee; {isolation()}")


def main(options: argparse.Namespace) -> int:
    """Runs the self-test, prints the table and returns 0 if all is caught and nothing else."""
    first = 0 if options.probes is None else options.probes
    seeds = list(range(first, first + options.seeds))
    rows = list(run(options.names, seeds, options.workers, options.say))
    text = f"{table(rows)}\n\n{summary(rows, seeds)}"
    print(text)
    if options.readme:
        publish(options.readme, text)
    return 0 if all(row.verdict in ("caught", "passes") for row in rows) else 1


def publish(readme: Path, text: str) -> None:
    """Puts the table between its marks."""
    page = readme.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{readme} needs the lines {BEGIN} and {END}, once each, around the table")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")
