"""data/prepare.py: each mistake gives one sentence that names it and what to do, and leaves no files."""

import hashlib
import os
from pathlib import Path

import pytest

from data.shards import partial_folder
from tests.corpora import documents, run, train_normalising, write_jsonl

ERRORS = {
    "argument --jsonl: not allowed with argument --text": ["--text", "a", "--jsonl", "b"],
    "argument --tokenizer: not allowed with argument --vocab-size": ["--vocab-size", "300", "--tokenizer", "byte260"],
    "nothing.txt is not a file": ["--text", "nothing.txt"],
    "--split-at cuts --text files": ["--split-at", "x"],
    "is not a regular expression": ["--text", "good.txt", "--split-at", "("],
    "--val-fraction 2.0 must lie between 0 and 1": ["--val-fraction", "2"],
    "--shard-tokens 0 must be at least 1": ["--shard-tokens", "0"],
    "--name 'a/b' must be a folder name": ["--name", "a/b"],
    "--vocab-size 260 must be above 260": ["--text", "good.txt", "--split-at", "^", "--vocab-size", "260"],
    "need at least 2": ["--text", "good.txt", "--split-at", "^", "--vocab-size", "261"],
    "is too large: this text has pieces for": ["--text", "good.txt", "--split-at", "^", "--vocab-size", "9999"],
    "nothing but line breaks": ["--text", "breaks.txt", "--val-text", "good.txt"],
    "good.txt is not a SentencePiece model": ["--text", "good.txt", "--tokenizer", "good.txt"],
    "pass --normalise to rewrite": ["--text", "good.txt", "--tokenizer", "nfkc.model"],
    "leaves no train document; cut the text into documents with --split-at": [
        "--text",
        "good.txt",
        "--val-documents",
        "1",
        "--tokenizer",
        "byte260",
    ],
    "--val-fraction 1e-09 leaves no val document": [
        "--text",
        "good.txt",
        "--split-at",
        "^",
        "--val-fraction",
        "1e-9",
        "--tokenizer",
        "byte260",
    ],
    "empty.txt holds no documents": ["--text", "good.txt", "--val-text", "empty.txt", "--tokenizer", "byte260"],
    "latin.txt document 0 is not UTF-8: byte 3 is 0xe9": ["--text", "latin.txt", "--tokenizer", "byte260"],
    "bad.jsonl line 2 is not JSON": ["--jsonl", "bad.jsonl", "--tokenizer", "byte260"],
    "good.jsonl line 1 has no field 'body'": ["--jsonl", "good.jsonl", "--field", "body", "--tokenizer", "byte260"],
    "good.jsonl line 1: field 'number' holds int": [
        "--jsonl",
        "good.jsonl",
        "--field",
        "number",
        "--tokenizer",
        "byte260",
    ],
    "half of a surrogate pair": ["--jsonl", "half.jsonl", "--tokenizer", "byte260"],
    "--hf ./nowhere cannot be read": ["--hf", "./nowhere"],
}


@pytest.mark.parametrize("message", ERRORS)
def test_mistakes_give_one_sentence_and_no_files(message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text("\n".join(documents(20)))
    Path("breaks.txt").write_text("\n\n")
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("good.jsonl").write_text('{"text": "x", "number": 1}\n')
    Path("bad.jsonl").write_text('{"text": "x"}\n{"text": \n')
    Path("half.jsonl").write_text('{"text": "\\ud800"}\n')
    if "nfkc.model" in ERRORS[message]:
        train_normalising(tmp_path)
    try:
        status = run(*ERRORS[message], "--out", "out")
    except SystemExit as exit_of_argparse:
        status = exit_of_argparse.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.splitlines()[-1].count("error: ") == 1
    assert not Path("out").exists() or not os.listdir("out")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_space_mark_of_sentencepiece_is_a_named_error(tmp_path, capsys, processes):
    file = write_jsonl(tmp_path / "x.jsonl", [*documents(40), "good until\u2581here"])
    assert (
        run(
            "--jsonl",
            file,
            "--vocab-size",
            "300",
            "--val-fraction",
            "0.2",
            "--out",
            str(tmp_path),
            "--processes",
            processes,
        )
        == 2
    )
    message = capsys.readouterr().err
    digest = hashlib.sha256("good until\u2581here".encode()).hexdigest()[:32]
    assert f"x.jsonl line 41 (sha256 {digest}) does not survive" in message and "from byte 10 on '▁here'" in message
    assert os.listdir(tmp_path) == ["x.jsonl"]


def test_two_writers_do_not_mix(tmp_path, capsys):
    file = write_jsonl(tmp_path / "x.jsonl", ["one", "two"])
    with partial_folder(tmp_path / "x_byte260"):
        assert run("--jsonl", file, "--val-documents", "1", "--tokenizer", "byte260", "--out", str(tmp_path)) == 2
    assert "is being written by another process" in capsys.readouterr().err
