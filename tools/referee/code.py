"""P12 and P13 from the files: nothing but the one script can run, and all that it runs can be read in it.

    python -m tools.referee.code SCRIPT     what the script, once unpacked, says that it does, as JSON

A stranger's script may be a bomb, so it is unpacked, compiled and read in that process, under limits; it never runs.
"""

import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path

from tools.pack import LZMA_FILTERS, STUB, unpack
from tools.referee.acts import examine
from tools.referee.case import Case, is_plain
from tools.referee.rules import ROOT, Found, Table, check
from tools.referee.sandbox import FILE_BYTES, limited
from tools.untrusted import load_json, read_text, text

OWN_FILE = re.compile(r"README\.md|submission\.json|train_gpt\.py|logs/train_seed\d+\.log|model_seed\d+\.bin")
READABLE = "train_gpt_readable.py"  # beside a compressed script; no run can open it, so it is not counted
PASSIVE = (".md", ".txt", ".csv", ".json", ".toml", ".log", ".png", ".jpg", ".svg")
TURNING = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # characters that change the reading direction
MOST_ROWS = 150


class Unreadable(ValueError):
    """A script is not what Python and a reader would both read; the message says why."""


def check_wrapper(packed: str) -> None:
    """Raises ValueError if a compressed script would run anything but what tools.pack unpacks from it."""
    payload = re.search(r"b85decode\('(.*)'\)", packed)[1]
    if packed != STUB.format(payload=payload, filters=LZMA_FILTERS):
        raise ValueError("its wrapper is not the one that tools.pack writes; pack again")


def readable(raw: bytes) -> str:
    """The text of a script, unpacked if tools.pack has compressed it; Unreadable if it is no Python."""
    try:
        packed = raw.decode()
        declared, _ = tokenize.detect_encoding(iter(raw.splitlines(keepends=True)).__next__)
        if declared != "utf-8":
            raise ValueError(f"it declares the encoding {declared}; write it in plain utf-8")
        source = unpack(packed)
        if source != packed:
            check_wrapper(packed)
    except (ValueError, SyntaxError) as error:
        raise Unreadable(f"does not unpack: {error}") from None
    try:
        compile(source, "train_gpt.py", "exec", dont_inherit=True)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise Unreadable(f"does not compile: {type(error).__name__}: {error}") from None
    if turning := TURNING.search(source):
        line = source.count("\n", 0, turning.start()) + 1
        raise Unreadable(f"holds U+{ord(turning[0]):04X} in line {line}, so it does not read as it runs")
    return source


def answer_about(module: str, script: Path, seconds: float = 60.0) -> tuple[dict, str]:
    """(what a module of the referee prints about a script, "") or ({}, why there is no answer)."""
    command = limited([sys.executable, "-m", module, str(script)], seconds, file_bytes=FILE_BYTES >> 4)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {}, f"cannot be read within {seconds:g} seconds"
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
        return {}, ("" if done.returncode == 2 else "cannot be read: ") + text(said[-1])[:300]
    value, reason = load_json(done.stdout.decode())
    return (value, "") if isinstance(value, dict) else ({}, f"cannot be read: {reason}")


def is_compressed(case: Case) -> bool:
    return is_plain(case.script) and case.source not in ("", read_text(case.script, []))


@check("P12")
def uncounted(case: Case) -> Found:
    problems, compressed = [], is_compressed(case)
    for path in sorted(case.folder.rglob("*")):
        name = path.relative_to(case.folder).as_posix()
        own = OWN_FILE.fullmatch(name) or (name == READABLE and compressed)
        if (path.is_dir() and not path.is_symlink()) or (own and is_plain(path)):
            continue
        if not is_plain(path):
            problems.append(f"{text(name)} is a link or not a plain file")
        elif path.suffix.lower() not in PASSIVE or path.stat().st_mode & 0o111:
            problems.append(f"{text(name)} is not one of a record's files and may be code that nobody counted")
    return Found("", problems)


@check("P13")
def wrapper(case: Case) -> Found:
    if not is_plain(case.script):
        return Found("", ["train_gpt.py is missing"])
    seen, reason = answer_about("tools.referee.code", case.script)
    if reason:
        return Found("", [f"train_gpt.py {reason}"])
    problems, copy, compressed = [], case.folder / READABLE, is_compressed(case)
    if compressed and not is_plain(copy):
        problems.append(f"train_gpt.py is compressed and {READABLE} is missing; "
                        f"`python -m tools.pack --unpack train_gpt.py > {READABLE}` writes it")
    elif compressed and copy.read_bytes() != case.source.encode():
        problems.append(f"{READABLE} is not the text inside train_gpt.py")
    acts = [[line, text(what), text(why), "yes" if refused else "no"] for line, what, why, refused in seen["acts"]]
    problems += [f"line {line}: {what} {why}" for line, what, why, refused in acts if refused == "yes"][:20]
    lineage = [[line, failure, what, text(words)] for line, failure, what, words in seen["lineage"]]
    tables = [Table("what the script says that it does", ["line", "what", "why", "refused"], acts[:MOST_ROWS]),
              Table("lines like those that made earlier entries wrong", ["line", "failure", "there it was", "here"],
                    lineage[:MOST_ROWS])]
    imports = ", ".join(map(text, seen["imports"][:20])) or "nothing"
    history = f", {len(lineage)} line(s) like those of earlier wrong entries" if lineage else ""
    kind = f"unpacks to {READABLE}" if compressed else "is readable"
    return Found(f"train_gpt.py {kind}, hides nothing plainly, imports {imports}{history}", problems,
                 [table for table in tables if table.rows])


def main(argv: list[str], about: Callable[[str], dict]) -> int:
    """Prints what a function finds in the text of a script."""
    try:
        print(json.dumps(about(readable(Path(argv[0]).read_bytes()))))
    except Unreadable as error:
        print(text(str(error)), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], examine))
