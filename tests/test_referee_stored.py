"""Rule P20: no piece of the validation text stands in a record's files; and the search for pieces of a text."""

import base64
import bz2
import gzip
import lzma
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard
from corpora import documents, run, write_jsonl
from test_record import filed_record

from tools.pack import compress
from tools.referee import stored
from tools.referee.case import Case, Data, read_data
from tools.referee.stored import kept_text
from tools.referee.windows import Windows, rolling, share_seen
from train_gpt import shuffled

TEXTS = documents(120, seed=3)
LICENCE = "Permission is hereby granted, free of charge, to any person who obtains a copy of this documentation."
TRAIN, VAL = [*TEXTS[:90], f"One. {LICENCE} Two."], [*TEXTS[90:], f"Three! {LICENCE} Four!"]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Data:
    out = tmp_path_factory.mktemp("stored")
    texts = ["--jsonl", write_jsonl(out / "train.jsonl", TRAIN), "--val-jsonl", write_jsonl(out / "val.jsonl", VAL)]
    assert run(*texts, "--vocab-size", "400", "--out", str(out), "--name", "val") == 0
    return read_data(out / "val")


@pytest.fixture
def case(data: Path, tmp_path: Path, workshop: Path, judged: Data) -> Case:
    """An honest record, free to be spoilt, before a judge with this validation text."""
    return Case(Path(shutil.copytree(filed_record(data, workshop), tmp_path / "record")), judged)


def test_an_honest_record_holds_no_validation_text(case):
    found = kept_text(case)
    assert found.problems == [] and found.evidence == []
    size = sum(path.stat().st_size for path in case.folder.rglob("*") if path.is_file())
    assert int(found.detail.split()[-5].replace(",", "")) > size


def test_an_honest_record_holds_no_text_of_its_own_data(case, data):
    case.data = read_data(data)  # Python's language reference, in the vocabulary of which the script is written
    assert kept_text(case).problems == []


PIECE = "".join(VAL[3:8])[700:2700].encode()
WRAPPED = base64.b64encode(bz2.compress(PIECE)).decode()
IN_SCRIPT = {
    "plain": f"X = {PIECE.decode()!r}",
    "32 bytes": f"X = {PIECE[40:72]!r}",
    "base64 of zlib": f"X = {base64.b64encode(zlib.compress(PIECE))!r}",
    "base64 for addresses": f"X = {base64.urlsafe_b64encode(zlib.compress(PIECE))!r}",
    "base64 in lines": "X = (\n" + "\n".join(f"    '{WRAPPED[i:i + 76]}'" for i in range(0, len(WRAPPED), 76)) + ")",
    "base85 of xz": f"X = {base64.b85encode(lzma.compress(PIECE))!r}",
    "ascii85": f"X = {base64.a85encode(PIECE)!r}",
    "base16": f"# {PIECE.hex()}",
    "bytes of zlib": f"X = {zlib.compress(PIECE)!r}",
}
AS_TOKENS = {
    "list": lambda tokens: f"X = {tokens.tolist()}",
    "list, one a line": lambda tokens: "X = [\n" + "".join(f"    {token},\n" for token in tokens) + "]",
    "bytes": lambda tokens: f"X = {tokens.tobytes()!r}",
    "base85 of lzma": lambda tokens: f"X = {base64.b85encode(lzma.compress(tokens.tobytes()))!r}",
}


def append(path: Path, more: bytes) -> None:
    path.write_bytes(path.read_bytes() + more)


@pytest.mark.parametrize("what", IN_SCRIPT)
def test_text_is_found_in_a_script_as(case, what):
    append(case.script, f"\n{IN_SCRIPT[what]}\n".encode())
    (found,) = kept_text(case).problems
    assert found.startswith("train_gpt.py") and "validation bytes" in found


@pytest.mark.parametrize("what", AS_TOKENS)
def test_tokens_are_found_in_a_script_as(case, what):
    append(case.script, f"\n{AS_TOKENS[what](case.data.tokens[1000:1800])}\n".encode())
    (found,) = kept_text(case).problems
    assert "800 validation tokens" in found


def test_text_is_found_in_a_compressed_script(case):
    case.script.write_text(compress(f"{case.script.read_text()}\nX = {PIECE!r}\n"))
    (found,) = kept_text(case).problems
    assert found.startswith("train_gpt.py, unpacked")


def planes(tokens: np.ndarray) -> bytes:
    """The tokens as the script stores a tensor of whole numbers: all first bytes first."""
    import torch

    return shuffled(torch.from_numpy(tokens.astype(np.int32)))


NOISE = np.random.default_rng(0).integers(0, 256, 30_000, dtype=np.uint8).tobytes()
IN_MODEL = {
    "text": lambda tokens: PIECE,
    "16 bits": lambda tokens: tokens.tobytes(),
    "32 bits, at an odd place": lambda tokens: b"x" + tokens.astype("<u4").tobytes(),
    "64 bits": lambda tokens: tokens.astype("<u8").tobytes(),
    "8 bits": lambda tokens: tokens.astype(np.uint8).tobytes(),
    "zstd": lambda tokens: zstandard.compress(NOISE + zlib.compress(PIECE)),
    "planes in zstd": lambda tokens: zstandard.compress(NOISE + planes(tokens)),
    "gzip": lambda tokens: gzip.compress(NOISE + tokens.tobytes()),
    "bzip2": lambda tokens: bz2.compress(PIECE),
    "lzma": lambda tokens: lzma.compress(PIECE, format=lzma.FORMAT_ALONE),
    "a stream without its end": lambda tokens: zlib.compress(NOISE * 40 + PIECE + NOISE[::-1])[:-2000],
}


@pytest.mark.parametrize("what", IN_MODEL)
def test_text_is_found_in_a_model_as(case, what):
    append(case.folder / "model_seed1337.bin", IN_MODEL[what](case.data.tokens[1000:1800]))
    (found,) = kept_text(case).problems
    assert found.startswith("model_seed1337.bin") and "validation" in found


def test_text_is_found_in_the_readme_with_its_place(case):
    before = (case.folder / "README.md").stat().st_size
    append(case.folder / "README.md", b"\n" + PIECE)
    found = kept_text(case)
    assert "2,000 validation bytes" in found.problems[0]
    row = next(row for row in found.evidence[0].rows if row[0] == "README.md")
    assert row[1:4] == [before + 1, "bytes", 2000]
    assert "".join(VAL).encode()[row[4] :].startswith(PIECE[:32])


def test_short_pieces_repetitions_and_training_text_are_no_validation_text(case):
    append(case.script, f"\n# {PIECE[:31]!r} {PIECE[100:131]!r} {' ' * 999} {LICENCE}\n".encode())
    assert kept_text(case).problems == []


def test_repetition_in_the_validation_text_is_none_of_it(case, tmp_path):
    train, val = write_jsonl(tmp_path / "t.jsonl", TRAIN), write_jsonl(tmp_path / "v.jsonl", [VAL[0] + "-=" * 80])
    options = ["--tokenizer", "byte260", "--out", str(tmp_path), "--name", "dashes"]
    assert run("--jsonl", train, "--val-jsonl", val, *options) == 0
    case.data = read_data(tmp_path / "dashes")
    append(case.script, b"\n# " + b"-=" * 60 + b"\n")
    assert kept_text(case).problems == []


@pytest.mark.parametrize("what", ["a bomb", "a bomb within", "many beginnings"])
def test_files_that_hold_too_much_are_a_problem(case, monkeypatch, what):
    monkeypatch.setattr(stored, "MAX_BYTES", 1 << 23)
    bomb = zstandard.compress(bytes(1 << 25))
    blob = {"a bomb": bomb, "a bomb within": gzip.compress(bomb), "many beginnings": b"x\x9c" * 20_000}[what]
    append(case.folder / "model_seed1337.bin", blob)
    (found,) = kept_text(case).problems
    assert "unpack to more than" in found or "places that look like zlib streams" in found


def test_files_that_are_broken_are_read_as_far_as_they_go(case):
    broken = b"BZh91AY&SYnonsense", b"\xfd7zXZ\x00nonsense", b"\x28\xb5\x2f\xfdnonsense", b"\x1f\x8b\x08", b"\x78\x9c"
    literals = b"'" + b"\\x" * 40 + b"'\n" + b"A" * 41 + b"\n'" + b"\\" * 80 + b"\n" + b"'\\N{nonsense}" * 9 + b"'\n"
    append(case.script, b"\n".join(broken) + b"\n" + literals)
    assert kept_text(case).problems == []
    append(case.script, zlib.compress(PIECE + NOISE)[:-9000])
    (found,) = kept_text(case).problems
    assert found.startswith("train_gpt.py > zlib: 2,000 validation bytes")


def test_share_seen_is_that_of_a_plain_search():
    rng = np.random.default_rng(1)
    train, val = rng.integers(0, 900, 3000).astype(np.uint16), rng.integers(0, 900, 1000).astype(np.uint16)
    val[100:190], val[300:363], val[936:] = train[50:140], train[400:463], train[2000:2064]
    val[500:600] = val[100:200]  # the same window twice in the text
    windows = {train[begin : begin + 64].tobytes() for begin in range(len(train) - 63)}
    covered = np.zeros(len(val), bool)
    for begin in range(len(val) - 63):
        if val[begin : begin + 64].tobytes() in windows:
            covered[begin : begin + 64] = True
    assert covered.sum() == 90 + 64 + 90
    assert share_seen(val, [train[:1700], train[1700:]], 64) == covered.mean()


def test_hashes_of_parts_are_those_of_the_whole(monkeypatch):
    values = np.random.default_rng(0).integers(0, 50, 1000).astype(np.uint16)
    whole = Windows(values, 25, 8)
    monkeypatch.setattr("tools.referee.windows.CHUNK", 64)
    parts = Windows(values, 25, 8)
    assert np.array_equal(whole.hashes, parts.hashes) and np.array_equal(whole.order, parts.order)
    assert np.array_equal(np.sort(rolling(values, 25)[::8]), whole.hashes)
    places = np.concatenate([places for places, _ in parts.found_in(values)])
    assert set(range(0, 976, 8)) <= set(places.tolist())
