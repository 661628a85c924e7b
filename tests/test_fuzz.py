"""Hostile input of every kind to every tool that reads a stranger's files: a clean status, in time, nothing written.

The inputs are mutations of a real record, of its runs and of a data folder, drawn from their numbers.
"""

import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import ROOT
from test_record import file_runs, filed_record, packed_runs

from tools import leaderboard, verify
from tools.referee import code, constants, logs_only
from tools.untrusted import load_json, text

SECONDS = 30  # for one input; the slowest takes one
STATUSES = {"PASS", "FAIL", "HOLD", "SKIP"}
NOT_LISTED = {".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", "records", "runs"}
DEEP = "[" * 60 + "]" * 60
SOURCES = (".py", ".md", ".json", ".toml", ".html", ".sh")  # somebody may be writing one meanwhile
ODD = (None, True, -1, 0, 1e308, float("nan"), float("inf"), 10**30, -(2**63), "", "\ud800", "\x1b[31m\u202ered\x00\n",
       "9" * 5000, "1e999", [], {}, [[[]]], {"a": {"b": None}}, [None] * 500, "x" * 100_000, [1, "a", {}], 1e-320)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.symlink": 1, "os.link": 1, "os.chmod": 0,
           "os.truncate": 0, "shutil.rmtree": 0}  # audit event -> which argument is the path
watched: dict[str, list] = {"allowed": [], "seen": []}


class TookTooLong(BaseException):
    """Not an Exception, so that no tool can take it for an error of the input."""


def audit(event: str, args: tuple) -> None:
    """Notes every write of this process outside the allowed folders; hooks cannot be removed, so it stays, idle."""
    if not watched["allowed"] or not (event in CHANGES or event == "open"):
        return
    if event == "open" and not (isinstance(args[2], int) and args[2] & WRITES):
        return
    path, is_whole = args[CHANGES.get(event, 0)], event == "open" or args[-1] in (-1, None)
    if isinstance(path, str | bytes | os.PathLike) and (is_whole or os.path.isabs(path)):
        place = os.path.realpath(os.fsdecode(path))
        if place != os.devnull and not any(place.startswith(folder) for folder in watched["allowed"]):
            watched["seen"].append((event, place))


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_in_the_repository() -> Iterator[None]:
    def names() -> set[str]:
        found = set()
        for folder, folders, files in os.walk(ROOT):
            folders[:] = [name for name in folders if name not in NOT_LISTED]
            found |= {os.path.join(folder, name) for name in files if not name.endswith(SOURCES)}
        return found

    sys.addaudithook(audit)
    before = names()
    yield
    assert names() - before == set()


@pytest.fixture(autouse=True)
def each_script_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most inputs have one script, and to read it takes a process: its answer is kept, by the script's content."""
    monkeypatch.setattr(code, "answer_about", answer_about)
    monkeypatch.setattr(constants, "answer_about", answer_about)


ask = code.answer_about


@functools.cache
def answer_to(module: str, digest: str, script: Path) -> tuple[dict, str]:
    return ask(module, script)


def answer_about(module: str, script: Path, seconds: float = 60.0) -> tuple[dict, str]:
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    same = answers.setdefault((module, digest), script)
    return answer_to(module, digest, same)


answers: dict[tuple[str, str], Path] = {}


@contextmanager
def guarded(*allowed: Path) -> Iterator[None]:
    """Within: no more than SECONDS, no write but in these folders, and nothing left in the one for temporary files."""

    def stop(*_: object) -> None:
        raise TookTooLong

    temporary = Path(tempfile.gettempdir())
    before, old = set(os.listdir(temporary)), signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    watched["allowed"], watched["seen"] = [str(folder.resolve()) for folder in (*allowed, temporary)], []
    try:
        yield
    finally:
        watched["allowed"] = []
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert watched["seen"] == [] and set(os.listdir(temporary)) == before


@pytest.fixture(autouse=True)
def private_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


@pytest.fixture
def record(data: Path, workshop: Path, tmp_path: Path) -> Path:
    honest = filed_record(data, workshop)
    return Path(shutil.copytree(honest, tmp_path / "records" / honest.parent.name / honest.name))


def mutated(raw: bytes, draw: random.Random) -> bytes:
    """Bytes that are a little or much broken."""
    ways: list[Callable[[], bytes]] = [
        lambda: raw[: draw.randrange(len(raw) + 1)],
        lambda: flipped(raw, draw, draw.choice((1, 8, 200))),
        lambda: b"",
        lambda: raw.replace(b"\n", draw.choice((b"\r", b"\0", b"", b"\n\n", "\u2028".encode()))),
        lambda: re.sub(rb"\d+", lambda found: draw.choice((found[0], b"9" * 400, b"1e999", b"NaN", b"-0")), raw),
        lambda: spliced(raw, draw, draw.choice((b"\xed\xa0\x80", b"\xff\xfe", b"\x1b[2J\0", "\u202e".encode() * 9))),
        lambda: spliced(raw, draw, draw.randbytes(300)),
        lambda: raw.decode(errors="replace").encode("utf-16"),
        lambda: raw + DEEP.encode() * 2_000,
        lambda: raw * 3,
        lambda: b"\n".join(draw.sample(lines := raw.split(b"\n"), len(lines))),
        lambda: b"\n".join(line for line in raw.split(b"\n") if draw.random() < 0.8),
        lambda: b"[" * 200_000,
        lambda: raw[:-1] + b" " * 300_000,
    ]
    return draw.choice(ways)()


def flipped(raw: bytes, draw: random.Random, times: int) -> bytes:
    changed = bytearray(raw)
    for _ in range(times if raw else 0):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def spliced(raw: bytes, draw: random.Random, piece: bytes) -> bytes:
    place = draw.randrange(len(raw) + 1)
    return raw[:place] + piece + raw[place + len(piece) * draw.randrange(2):]


def twisted(value: object, draw: random.Random) -> object:
    """A value from JSON with one of its parts missing, or of another type or size."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return draw.choice(ODD)
    value = value.copy()
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if draw.random() < 0.2:
        del value[key]
    elif isinstance(value, dict) and draw.random() < 0.2:
        value[draw.choice(("\ud800", "x" * 5000, "", "val_bpb\x00"))] = value.pop(key)
    else:
        value[key] = twisted(value[key], draw)
    return value


def twist_json(path: Path, draw: random.Random) -> None:
    value, _ = load_json(path.read_text())
    for _ in range(draw.choice((1, 1, 3))):
        value = twisted(value, draw)
    path.write_text(json.dumps(value))


def twist_log(path: Path, draw: random.Random) -> None:
    """Breaks the JSON of the first or the last line, or any byte."""
    lines = path.read_text().splitlines()
    index = draw.choice((0, -1, None))
    if index is None:
        path.write_bytes(mutated(path.read_bytes(), draw))
        return
    name, _, value = lines[index].partition(":")
    lines[index] = f"{name}:{json.dumps(twisted(json.loads(value), draw))}"
    path.write_text("\n".join(lines))


def deep_tree(folder: Path) -> None:
    home = os.getcwd()
    try:
        for _ in range(600):  # its path is longer than the system lets a program say
            os.mkdir(folder / "deep" if folder.name != "." else "deep")
            os.chdir(folder / "deep" if folder.name != "." else "deep")
            folder = Path(".")
        Path("train_seed9.log").write_text("step:1/2 val_bpb:1.0")
    finally:
        os.chdir(home)


def in_place_of(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        make(path)

    return change


def open_socket(path: Path) -> None:
    home = os.getcwd()
    os.chdir(path.parent)  # the name of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(home)


def strange_name(folder: Path, name: bytes) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text("step:1/2 train_loss:1 train_time:3ms\nval_bpb:1.2")


def large(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


STRANGE_NAMES = (b"\xff\xfe.log", b"a\nb.txt", b"\x1b[31m_seed7.log", b"seed" + b"9" * 99 + b".log")
FILES = ("submission.json", "train_gpt.py", "logs/train_seed42.log", "model_seed1337.bin")
SPECIAL: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir, "a pipe": os.mkfifo, "a socket": open_socket, "an endless device":
    lambda path: path.symlink_to("/dev/zero"), "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"), "an empty file": Path.touch,
}
FOLDERS: dict[str, Callable[[Path], object]] = {
    f"{what} in place of {name}": in_place_of(name, make) for name in FILES for what, make in SPECIAL.items()
} | {
    "logs is a file": in_place_of("logs", Path.touch),
    "logs is a link to itself": in_place_of("logs", lambda path: path.symlink_to(path)),
    "a deep tree": deep_tree,
    "a folder that links to itself": lambda folder: (folder / "again").symlink_to(folder),
    "thousands of files": lambda folder: [(folder / f"{i}.log").touch() for i in range(2_500)],
    "names that are no text": lambda folder: [strange_name(folder, name) for name in STRANGE_NAMES],
    "a large model": lambda folder: large(folder / "model_seed1337.bin", 40_000_000),
    "a large log": lambda folder: large(folder / "logs/train_seed42.log", 100_000_000),
    "a large submission.json": lambda folder: (folder / FILES[0]).write_text('{"a":[' + "1," * 900_000 + "1]}"),
    "nothing": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "a file in place of the folder": lambda folder: (shutil.rmtree(folder), folder.touch()),
    "no folder": lambda folder: shutil.rmtree(folder),
}


def check(folder: Path, out: Path, capsys: pytest.CaptureFixture, number: int) -> None:
    """Every reader of records gives a clean answer about this folder."""
    with guarded(out):
        if folder.is_dir():
            findings = verify.verify(folder)
            assert {finding.status for finding in findings} <= STATUSES
            assert verify.status_of(findings) in verify.EXIT_STATUS
            json.dumps([finding.as_json() for finding in findings])
            assert {finding.status for finding in logs_only.examine(folder)} <= STATUSES
        if number % 4 == 0 or not folder.is_dir():
            more = (["--json"], ["--logs-only"], [])[number % 3]
            assert verify.main([str(folder), *more]) in (0, 1, 2, 3)
        readme = out / "board.md"
        readme.write_text(f"{leaderboard.BEGIN}\n{leaderboard.END}\n")
        places = ["--records", str(folder.parent.parent), "--readme", str(readme), "--html", str(out / "board.html")]
        assert leaderboard.main(places) in (0, 1)
    shown = capsys.readouterr()
    assert [line for line in (shown.out + shown.err).split("\n") if not line.isprintable()] == []


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("number", range(80))
def test_submission_json_of_any_content_gets_a_clean_verdict(record, out, capsys, number):
    draw, path = random.Random(f"json {number}"), record / "submission.json"
    twist_json(path, draw) if number % 3 else path.write_bytes(mutated(path.read_bytes(), draw))
    check(record, out, capsys, number)


@pytest.mark.parametrize("number", range(60))
def test_log_of_any_content_gets_a_clean_verdict(record, out, capsys, number):
    draw = random.Random(f"log {number}")
    for path in sorted(record.glob("logs/*.log"))[: draw.choice((1, 2))]:
        twist_log(path, draw)
    check(record, out, capsys, number)


@pytest.mark.parametrize("number", range(24))
def test_artifact_of_any_content_gets_a_clean_verdict(record, out, capsys, number):
    draw, path = random.Random(f"model {number}"), record / "model_seed1337.bin"
    path.write_bytes(mutated(path.read_bytes(), draw))
    check(record, out, capsys, number)


SCRIPTS: dict[str, Callable[[str], bytes]] = {
    "bits flipped": lambda source: flipped(source.encode(), random.Random(0), 8),
    "a zero byte": lambda source: source.encode() + b"\0",
    "brackets": lambda source: b"x = " + b"[" * 100_000,
    "signs": lambda source: b"x = " + b"-" * 100_000 + b"1",
    "a long sum": lambda source: b"x = 1" + b"+1" * 50_000,
    "a long chain": lambda source: b"x = a" + b".a" * 50_000,
    "blocks in blocks": lambda source: b"".join(b" " * i + b"if x:\n" for i in range(120)),
    "a number": lambda source: b"x = " + b"9" * 100_000,
    "another encoding": lambda source: b"# coding: utf-7\n" + source.encode(),
    "a packed text that is cut": lambda source: b"import base64,lzma,linecache\nb85decode('{Wp48S^xk9=GL@E0stWa')\n",
    "a surrogate": lambda source: b"x = '\xed\xa0\x80'\n",
    "carriage returns": lambda source: source.replace("\n", "\r").encode(),
}


@pytest.mark.parametrize("what", SCRIPTS)
def test_script_of_any_content_gets_a_clean_verdict(record, out, capsys, what):
    path = record / "train_gpt.py"
    path.write_bytes(SCRIPTS[what](path.read_text()))
    check(record, out, capsys, 1)


@pytest.mark.parametrize("what", FOLDERS)
def test_folder_of_any_shape_gets_a_clean_verdict(record, out, capsys, what):
    FOLDERS[what](record)
    check(record, out, capsys, list(FOLDERS).index(what))


DATA = {"manifest.json": 26, "fineweb_val_000000.bin": 14, "tokenizer.json": 8}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, times in DATA.items() for i in range(times)])
def test_data_of_any_content_is_refused_or_used(record, data, tmp_path, capsys, name, number):
    draw, folder = random.Random(f"{name} {number}"), Path(shutil.copytree(data, tmp_path / "judge" / data.name))
    path = folder / name
    if name.endswith("json") and number % 2:
        twist_json(path, draw)
    else:
        path.write_bytes(mutated(path.read_bytes(), draw))
    (record / "train_gpt.py").unlink()  # so that nothing is trained or scored on data that is still whole
    with guarded():
        assert verify.main([str(record), "--data", str(folder)]) in (1, 2)
        with suppress(ValueError):  # it says that the data are not whole
            assert {finding.status for finding in verify.verify(record, folder)} <= STATUSES
    shown = capsys.readouterr()
    assert [line for line in (shown.out + shown.err).split("\n") if not line.isprintable()] == []


@pytest.mark.parametrize("number", range(36))
def test_run_of_any_content_is_filed_or_refused(data, workshop, tmp_path, out, capsys, number):
    script, runs = packed_runs(data, workshop)
    copied = [Path(shutil.copytree(run, tmp_path / run.name)) for run in runs]
    draw = random.Random(f"run {number}")
    path = copied[draw.randrange(2)] / draw.choice(("train.log", "train.log", "model.bin"))
    if number < len(SPECIAL):
        in_place_of(path.name, list(SPECIAL.values())[number])(path.parent)
    elif path.name == "train.log":
        twist_log(path, draw)
    else:
        path.write_bytes(mutated(path.read_bytes(), draw))
    with guarded(out):
        assert file_runs(script, copied, out / "records") in (0, 1)
    assert not capsys.readouterr().err.count("\n") > 1


SERVED: dict[str, Callable[[Path], object]] = {
    "bits flipped": lambda path: path.write_bytes(flipped(path.read_bytes(), random.Random(1), 200)),
    "half of it": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "an absurd header": lambda path: path.write_bytes(path.read_bytes()[:8] + b"\xff" * 64),
}


@pytest.mark.parametrize("what", SERVED)
def test_damaged_model_ends_the_score_server_with_a_finding(record, data, capsys, what):
    SERVED[what](record / "model_seed1337.bin")
    with guarded():
        finding = verify.judge(verify.open_case(record, data, pre=True, seconds=20.0), "P04")
    assert finding.status == "FAIL" and text(str(finding.problems[0])) == finding.problems[0]
