"""The referee: an honest record passes, and each way of breaking it fails the rule that is about it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_record import change_result, filed_record

from tools import pack, verify
from tools.referee import sandbox
from tools.referee.rules import PARTS, RULES

SERVER = """
import json, os, sys, time
import numpy as np
seen = []
for line in sys.stdin:
    request = json.loads(line)
    tokens = np.fromfile(request["tokens"], "<u2", offset=1024).astype(int)
    nats = np.ones(len(tokens) - 1)
    {body}
    nats.astype("<f4").tofile(request["nats"])
    print(json.dumps(dict(nats=request["nats"], targets=len(nats))), flush=True)
"""


@pytest.fixture
def honest(data: Path, workshop: Path) -> Path:
    return filed_record(data, workshop)


@pytest.fixture
def copy(honest: Path, tmp_path: Path) -> Path:
    """A record that is free to be spoilt."""
    return Path(shutil.copytree(honest, tmp_path / honest.parent.name / honest.name))


def change_json(folder: Path, **changes: object) -> None:
    path = folder / "submission.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def failed(folder: Path, data: Path | None = None) -> dict[str, str]:
    """Problems by the rule that failed."""
    return {f.rule: "; ".join(f.problems) for f in verify.verify(folder, data) if f.status == "FAIL"}


def problems(folder: Path, data: Path, rule: str, seconds: float = 60.0) -> str:
    finding = verify.judge(verify.open_case(folder, data, seconds=seconds), rule)
    assert finding.status == "FAIL" and finding.fix
    return "; ".join(finding.problems)


def test_an_honest_record_fails_no_rule_and_keeps_the_verdict(copy, data, capsys):
    assert verify.main([str(copy), "--data", str(data), "--write"]) in (0, 3)
    lines = capsys.readouterr().out.splitlines()
    assert {line[:4] for line in lines} <= {"PASS", "SKIP", "pass", "unve"}
    kept = json.loads((copy / "submission.json").read_text())["verdict"]
    assert kept["status"] in ("pass", "unverified") and data.name in kept["verified_with"]


def test_without_data_a_record_stays_unverified(honest, capsys):
    assert verify.main([str(honest), "--json"]) == 3
    printed = json.loads(capsys.readouterr().out)
    assert printed["status"] == "unverified"
    assert {f["rule"] for f in printed["findings"] if f["status"] == "SKIP"} >= {"P07", "P20", "P01"}


def test_a_folder_without_a_manifest_is_wrong_usage(honest, tmp_path, capsys):
    assert verify.main([str(honest), "--data", str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err


def test_rules_are_numbered_once_each_with_a_check_and_a_fix():
    assert set(RULES) == set(PARTS)
    assert all(rule["title"] and rule["checks"] for rule in RULES.values())


def first_log(folder: Path) -> Path:
    return folder / "logs/train_seed1337.log"


def train_too_long(folder: Path) -> None:
    line = next(line for line in first_log(folder).read_text().splitlines() if line.startswith("phase:train"))
    replace(first_log(folder), line, "phase:train begin_seconds:5.000 end_seconds:700.000")


def flip_a_bit(folder: Path) -> None:
    path = folder / "model_seed1337.bin"
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)


def link_away(folder: Path) -> None:
    (folder / "weights.txt").symlink_to("/etc/hostname")


BROKEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "score in a log": (lambda f: change_result(first_log(f), val_bpb=1.0), "P07", "val_bpb x ln 2 x val_bytes"),
    "bytes of text": (lambda f: change_result(first_log(f), val_bytes=20_000), "P07", "val_bpb x ln 2"),
    "score that is not a number": (lambda f: change_result(first_log(f), val_bpb=float("nan")), "P07", "nan"),
    "mean": (lambda f: change_json(f, val_bpb=1.0), "P17", "the mean of all logs"),
    "deviation": (lambda f: change_json(f, val_bpb_std=0.0), "P17", "val_bpb_std"),
    "best seed": (lambda f: change_json(f, seeds=[1337]), "P17", "seeds are 1337; there are 2 logs"),
    "seed in a file name": (lambda f: first_log(f).rename(f / "logs/train_seed7.log"), "P16", "a run of seed 1337"),
    "the same log twice": (lambda f: shutil.copy(first_log(f), f / "logs/train_seed7.log"), "P16", "seed 1337"),
    "a copied run": (
        lambda f: (
            shutil.copy(first_log(f), f / "logs/train_seed42.log"),
            change_result(f / "logs/train_seed42.log", seed=42),
            replace(f / "logs/train_seed42.log", '"seed": 1337', '"seed": 42'),
        ),
        "P16",
        "they are one run",
    ),
    "settings": (lambda f: replace(first_log(f), '"matrix_lr": 0.04', '"matrix_lr": 0.02'), "P16", "config line"),
    "log without its end": (lambda f: replace(first_log(f), "result:", "outcome:"), "P16", "result line"),
    "a comment in the script": (
        lambda f: (f / "train_gpt.py").write_text((f / "train_gpt.py").read_text() + "# later\n"),
        "P16",
        "another script",
    ),
    "a bit of the model": (flip_a_bit, "P16", "not the artifact"),
    "training past the cap": (train_too_long, "P10", "of 600.000 s"),
    "a longer cap": (lambda f: change_json(f, cap_seconds=6000.0), "P10", "caps"),
    "time in the result": (lambda f: change_result(first_log(f), train_seconds=0.01), "P10", "last step line"),
    "size in the JSON": (lambda f: change_json(f, bytes_total=1000), "P12", "bytes_total"),
    "a longer model": (lambda f: (f / "model_seed1337.bin").write_bytes(bytes(99_999)), "P12", "99,999 bytes on disk"),
    "another program": (lambda f: (f / "helper.py").write_text("pass"), "P12", "helper.py"),
    "a link": (link_away, "P12", "weights.txt"),
    "a script that is no Python": (lambda f: (f / "train_gpt.py").write_text("def"), "P13", "does not compile"),
    "a folder name": (lambda f: f.rename(f.parent / "2026-13-45_x"), "P14", "not a date"),
    "a field": (lambda f: change_json(f, val_bpb="1.2"), "P14", "val_bpb must be a number"),
    "all of the JSON": (lambda f: (f / "submission.json").write_text("[" * 10_000), "P14", "is missing"),
    "no log": (lambda f: shutil.rmtree(f / "logs"), "P14", "is missing"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_verify_notices_a_change_of(copy, what):
    spoil, rule, words = BROKEN[what]
    spoil(copy)
    assert words in failed(next(copy.parent.iterdir()))[rule]


def test_verify_rejects_what_is_over_the_cap(honest, monkeypatch):
    monkeypatch.setitem(RULES["P12"]["limit"], "bytes", 100_000)
    assert "of 100,000 bytes" in failed(honest)["P12"]


def test_verify_reads_a_compressed_script_and_rejects_a_damaged_one(copy):
    script = copy / "train_gpt.py"
    compressed = pack.compress(script.read_text())
    script.rename(copy / "train_gpt_readable.py")
    script.write_text(compressed)
    assert "P13" not in failed(copy)
    script.write_text(compressed.replace("b85decode('", "b85decode('!!"))
    assert "does not unpack" in failed(copy)["P13"]


def test_verify_rejects_runs_on_other_data(honest, data, tmp_path):
    other = Path(shutil.copytree(data, tmp_path / "other"))
    (other / "manifest.json").write_text((other / "manifest.json").read_text() + "\n")
    assert "data_sha256" in problems(honest, other, "P07")


def test_verify_rejects_a_model_that_does_not_load(copy, data):
    flip_a_bit(copy)
    assert "ended with status 2" in problems(copy, data, "P04")


def test_verify_catches_attention_that_sees_later_tokens(copy, data):
    replace(copy / "train_gpt.py", "is_causal=True", "is_causal=False")
    assert "moves" in problems(copy, data, "P01")


def test_verify_skips_the_score_of_a_record_without_a_model(copy, data):
    (copy / "model_seed1337.bin").unlink()
    assert {f.rule: f.status for f in verify.verify(copy, data)}["P20"] == "SKIP"


MISBEHAVIOUR = {
    "hangs": ("time.sleep(60)", "no answer within"),
    "crashes": ("raise ValueError('out of luck')", "ended with status 1: ValueError: out of luck"),
    "leaves": ("os._exit(0)", "ended with status 0"),
    "writes too few scores": ("nats = nats[:-1]", "bytes for"),
    "writes too many scores": ("nats = np.append(nats, 1)", "bytes for"),
    "writes no number": ("nats[3] = np.nan", "1 of its scores are not finite"),
    "is more than certain": ("nats[3] = -1", "1 of its scores are negative"),
    "floods standard output": ("print('x' * 10_000_000)", "printed more than"),
    "floods standard error": ("print('x' * 10_000_000, file=sys.stderr)", "printed more than"),
    "answers nonsense": ("print('nonsense')", "not a JSON object"),
    "links its scores elsewhere": (
        "os.symlink('/etc/hostname', request['nats']); print('{}', flush=True); continue",
        "wrote no scores" if sandbox.bubblewrap_works() else "write /etc/hostname",
    ),
    "takes all memory": ("np.empty(20 << 27)", "MemoryError"),
    "scores at random": ("nats = np.random.rand(len(nats))", "scored twice"),
    "needs the environment": ("nats[0] = float(os.environ['HOME'])", "KeyError"),
    "claims another score": ("pass", "measured"),
}


@pytest.mark.parametrize("what", MISBEHAVIOUR)
def test_verify_reports_a_script_that(copy, data, what):
    body, words = MISBEHAVIOUR[what]
    (copy / "train_gpt.py").write_text(SERVER.format(body=body))
    rule = "P20" if what in ("scores at random", "claims another score") else "P04"
    assert words in problems(copy, data, rule, seconds=1.0 if what == "hangs" else 30.0)


FORESIGHT = {
    "the token after the target": "nats[:-1] += tokens[2:] % 7",
    "the length of the text": "nats += len(tokens)",
    "all tokens": "nats += np.mean(tokens)",
    "tokens of its window": "nats[: len(nats) // 32 * 32] += np.repeat(tokens[1:][31::32][: len(nats) // 32] % 2, 32)",
    "later tokens, and remembers its answers": """nats[:-1] += tokens[2:] % 7
    for old, answer in seen:
        same = np.minimum.accumulate(old[: len(tokens)] == tokens[: len(old)])[1:]
        nats[: len(same)][same] = answer[: len(same)][same]
    seen.append((tokens, nats))""",
}


@pytest.mark.parametrize("what", FORESIGHT)
def test_verify_catches_a_script_that_looks_at(copy, data, what):
    (copy / "train_gpt.py").write_text(SERVER.format(body=FORESIGHT[what]))
    case = verify.open_case(copy, data, seconds=60.0)
    rules = ("P01", "P05") if what == "tokens of its window" else ("P01",)  # one bit of a window's end may escape P01
    found = next((f for f in (verify.judge(case, rule) for rule in rules) if f.status == "FAIL"), None)
    assert found and found.fix and "of target" in "; ".join(found.problems)


def test_verify_lets_a_script_learn_from_what_it_has_scored(copy, data):
    (copy / "train_gpt.py").write_text(SERVER.format(body="nats += np.cumsum(tokens[:-1]) / np.arange(1, len(tokens))"))
    case = verify.open_case(copy, data)
    assert verify.judge(case, "P01").status == "PASS"
