"""data/prepare.py: nothing lost, nothing leaked, nothing that looks complete and is not."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data import encoding, prepare, tokenizers
from tests.corpora import NASTY, documents, manifest_of, read_back, run, train_normalising, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
NASTY_OPTIONS = ["--vocab-size", "400", "--shard-tokens", "5000", "--val-fraction", "0.2", "--name", "nasty"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "plain.jsonl", documents())
    write_jsonl(folder / "nasty.jsonl", documents() + NASTY)
    return folder


@pytest.fixture(scope="module")
def prepared(corpus) -> Path:
    assert run(*NASTY_OPTIONS, "--jsonl", str(corpus / "nasty.jsonl"), "--out", str(corpus)) == 0
    return corpus / "nasty"


@pytest.fixture(scope="module")
def normalising(corpus) -> str:
    return train_normalising(corpus)


def test_every_document_comes_back_byte_for_byte(prepared):
    wanted = [text.encode() for text in documents() + NASTY]
    assert sorted(read_back(prepared, "train") + read_back(prepared, "val")) == sorted(wanted)


def test_manifest_counts_what_the_shards_hold(prepared):
    manifest = manifest_of(prepared)
    assert len(manifest["splits"]["train"]["shards"]) > 2
    for split, entry in manifest["splits"].items():
        texts = read_back(prepared, split)
        lines = [line.split() for line in (prepared / entry["documents_file"]).read_text().splitlines()]
        assert [line[0] for line in lines] == [hashlib.sha256(text).hexdigest()[:32] for text in texts]
        assert [int(line[1]) for line in lines] == [len(text) for text in texts]
        assert entry["documents"] == len(texts) and entry["bytes"] == sum(map(len, texts))
        assert entry["tokens"] == sum(int(line[2]) for line in lines) == sum(s["tokens"] for s in entry["shards"])
        for shard in entry["shards"]:
            assert hashlib.sha256((prepared / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


def test_shards_are_full_but_for_the_last(prepared):
    assert {shard["tokens"] for shard in manifest_of(prepared)["splits"]["train"]["shards"][:-1]} == {5000}


def test_special_tokens_are_upstreams(prepared):
    model = sentencepiece.SentencePieceProcessor(model_file=str(prepared / "tokenizer.model"))
    assert (model.pad_id(), model.bos_id(), model.eos_id(), model.unk_id()) == (0, 1, 2, 3)
    assert [model.id_to_piece(4 + byte) for byte in range(256)] == [f"<0x{byte:02X}>" for byte in range(256)]


def test_no_train_document_is_in_validation(prepared):
    assert not set(read_back(prepared, "train")) & set(read_back(prepared, "val"))


def test_words_give_the_tokens_of_the_whole_text(prepared, normalising):
    for path in (prepared / "tokenizer.model", Path(normalising)):
        tokenizer = tokenizers.load_tokenizer(path)
        assert tokenizer.words
        for text in documents(20, seed=2) + NASTY:
            raw = tokenizer.normalise(text.encode())
            assert np.array_equal(tokenizer.encode(raw), tokenizer.model.encode(raw.decode())), text[:40]


def test_table_of_bytes_decodes_as_sentencepiece_does(prepared, normalising):
    for path in (prepared / "tokenizer.model", Path(normalising)):
        tokenizer = tokenizers.load_tokenizer(path)
        for text in documents(20, seed=3) + NASTY:
            ids = tokenizer.model.encode(text)
            assert tokenizer.decode(np.array(ids, int)).decode() == tokenizer.model.decode(ids)


def test_long_texts_are_cut_without_a_change():
    raw = b"  ab c  \n d" * 50
    parts = list(tokenizers.pieces_of(raw, size=37))
    assert b"".join(parts) == raw and len(parts) > 5
    assert all(part.startswith(b" ") and not part.endswith(b" ") for part in parts[1:])


def test_one_and_two_processes_write_the_same_files(corpus, prepared, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_BYTES", 3000)
    assert (
        run(*NASTY_OPTIONS, "--jsonl", str(corpus / "nasty.jsonl"), "--out", str(corpus / "two"), "--processes", "2")
        == 0
    )
    for path in prepared.iterdir():
        assert (corpus / "two" / "nasty" / path.name).read_bytes() == path.read_bytes(), path.name


def test_tokenizer_does_not_depend_on_the_order_of_documents():
    texts = [("", text.encode()) for text in documents(30)]
    assert tokenizers.train_tokenizer(texts, 300) == tokenizers.train_tokenizer(texts[::-1], 300)


def test_tokenizer_sample_is_bounded(monkeypatch):
    monkeypatch.setattr(tokenizers, "SAMPLE_BYTES", 5000)
    texts = [("", text.encode()) for text in documents(200)]
    assert 5000 <= sum(map(len, tokenizers.sample_text(texts))) < 7000


def test_tokenizer_has_not_seen_validation_text(corpus, tmp_path):
    write_jsonl(tmp_path / "val.jsonl", ["QQQQ " * 300])
    run(
        "--jsonl",
        str(corpus / "plain.jsonl"),
        "--val-jsonl",
        str(tmp_path / "val.jsonl"),
        "--vocab-size",
        "300",
        "--out",
        str(tmp_path),
        "--name",
        "x",
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "x" / "tokenizer.model"))
    assert not any("Q" in model.id_to_piece(token) for token in range(260, 300))


def test_split_stays_when_documents_are_added(tmp_path):
    validation = []
    for count in (60, 80):
        file = write_jsonl(tmp_path / f"{count}.jsonl", documents(80)[:count][::-1])
        run("--jsonl", file, "--tokenizer", "byte260", "--val-fraction", "0.2", "--out", str(tmp_path))
        validation.append(set(read_back(tmp_path / f"{count}_byte260", "val")))
    assert validation[0] == validation[1] & {text.encode() for text in documents(80)[:60]} and validation[0]


def test_val_documents_takes_the_first(corpus, tmp_path):
    run(
        "--jsonl",
        str(corpus / "plain.jsonl"),
        "--tokenizer",
        "byte260",
        "--val-documents",
        "3",
        "--max-documents",
        "10",
        "--out",
        str(tmp_path),
        "--name",
        "x",
    )
    texts = [text.encode() for text in documents()]
    assert read_back(tmp_path / "x", "val") == texts[:3] and read_back(tmp_path / "x", "train") == texts[3:10]


@pytest.mark.parametrize("dedupe", [False, True])
def test_copies_of_validation_are_dropped_and_copies_in_train_counted(tmp_path, dedupe):
    train = write_jsonl(tmp_path / "train.jsonl", ["one", "held out", "", "two", "one", "held out", ""])
    val = write_jsonl(tmp_path / "val.jsonl", ["held out"])
    run(
        "--jsonl",
        train,
        "--val-jsonl",
        val,
        "--tokenizer",
        "byte260",
        "--out",
        str(tmp_path),
        "--name",
        "x",
        *["--dedupe"] * dedupe,
    )
    manifest = manifest_of(tmp_path / "x")
    assert read_back(tmp_path / "x", "train") == [b"one", b"two"] + [b"one"] * (not dedupe)
    assert (manifest["dropped_duplicates"], manifest["kept_duplicates"]) == ((3, 0) if dedupe else (2, 1))
    assert manifest["empty_documents"] == 2


def test_byte260_stores_bytes_plus_four(corpus, tmp_path):
    run("--jsonl", str(corpus / "nasty.jsonl"), "--tokenizer", "byte260", "--out", str(tmp_path))
    folder = tmp_path / "nasty_byte260"
    found = read_back(folder, "train") + read_back(folder, "val")
    assert sorted(found) == sorted(text.encode() for text in documents() + NASTY)
    assert json.loads((folder / "tokenizer.json").read_text())["vocab_size"] == 260


def test_normalise_rewrites_counts_and_says_so(corpus, tmp_path, normalising, capsys):
    assert (
        run(
            "--jsonl",
            str(corpus / "nasty.jsonl"),
            "--tokenizer",
            normalising,
            "--normalise",
            "--val-documents",
            "9",
            "--out",
            str(tmp_path),
            "--name",
            "x",
        )
        == 0
    )
    manifest, model = manifest_of(tmp_path / "x"), sentencepiece.SentencePieceProcessor(model_file=normalising)
    rewritten = []
    for text in documents() + NASTY:
        for _ in range(4):
            text = model.decode(model.encode(text))
        rewritten.append(text.encode())
    kept = [text for text in rewritten if text]
    assert read_back(tmp_path / "x", "val") + read_back(tmp_path / "x", "train") == kept
    assert manifest["normalised"] and manifest["empty_documents"] == len(rewritten) - len(kept) == 2
    before = {
        split: [t.encode() for t in texts]
        for split, texts in {"val": documents()[:9], "train": documents()[9:] + NASTY}.items()
    }
    after = {"val": rewritten[:9], "train": rewritten[9:]}
    for split, counts in manifest["rewritten"].items():
        changed = [(a, b) for a, b in zip(before[split], after[split], strict=True) if a != b]
        assert counts == {
            "documents": len(changed),
            "bytes_before": sum(len(a) for a, _ in changed),
            "bytes_after": sum(len(b) for _, b in changed),
        }
    assert manifest["rewritten_bytes"] == sum(counts["bytes_before"] for counts in manifest["rewritten"].values())
    assert "a score on this text is not one on the original" in capsys.readouterr().out


def test_copies_that_normalise_makes_equal_are_dropped(tmp_path, normalising):
    file = write_jsonl(tmp_path / "x.jsonl", ["same  text", "other text", "same\ntext"])
    run("--jsonl", file, "--val-documents", "1", "--tokenizer", normalising, "--normalise", "--out", str(tmp_path))
    assert read_back(tmp_path / "x_sp400", "train") == [b"other text"]


def test_second_call_finds_it_prepared(corpus, prepared, capsys):
    before = (prepared / "manifest.json").stat().st_mtime_ns
    same = [*NASTY_OPTIONS, "--jsonl", str(corpus / "nasty.jsonl"), "--out", str(corpus)]
    assert run(*same) == 0 and "already prepared" in capsys.readouterr().out
    assert run(*same, "--val-fraction", "0.3") == 2
    assert "prepared from something else (other val_fraction)" in capsys.readouterr().err
    assert (prepared / "manifest.json").stat().st_mtime_ns == before


def test_force_replaces_what_is_there(tmp_path, capsys):
    file = write_jsonl(tmp_path / "x.jsonl", ["one", "two", "three"])
    arguments = ["--jsonl", file, "--tokenizer", "byte260", "--out", str(tmp_path)]
    assert run(*arguments, "--val-documents", "1") == 0
    shard = tmp_path / "x_byte260" / "fineweb_train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run(*arguments, "--val-documents", "1") == 2 and "--force" in capsys.readouterr().err
    assert run(*arguments, "--val-documents", "2", "--force") == 0
    assert manifest_of(tmp_path / "x_byte260")["splits"]["val"]["documents"] == 2


def test_killed_run_leaves_nothing_that_looks_complete(tmp_path):
    file = write_jsonl(tmp_path / "big.jsonl", [" ".join(map(str, range(i, i + 10_000))) for i in range(300)])
    command = [
        sys.executable,
        str(ROOT / "data" / "prepare.py"),
        "--jsonl",
        file,
        "--tokenizer",
        "byte260",
        "--out",
        str(tmp_path / "out"),
        "--processes",
        "2",
        "--shard-tokens",
        "100000",
    ]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / "out" / "big_byte260.partial"
    while not list(partial.glob("fineweb_*.bin")):
        assert running.poll() is None
        time.sleep(0.002)
    workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert os.listdir(tmp_path / "out") == ["big_byte260.partial"] and not (partial / "manifest.json").exists()
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert os.listdir(tmp_path / "out") == ["big_byte260"] and len(workers) >= 2
    assert manifest_of(tmp_path / "out" / "big_byte260")["splits"]["train"]["documents"] > 200
    assert not [
        pid
        for pid in workers
        if Path(f"/proc/{pid}/cmdline").exists() and b"multiprocessing" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def test_prepare_runs_from_any_folder_and_names_the_next_command(corpus, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "data" / "prepare.py"),
            "--jsonl",
            str(corpus / "plain.jsonl"),
            "--tokenizer",
            "byte260",
            "--out",
            str(tmp_path),
            "--processes",
            "1",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("next: DATA_PATH=plain_byte260 python train_gpt.py\n") and not done.stderr


def test_benchmark_compares_the_two_loops(prepared):
    texts = [("", text.encode()) for text in documents(40)]
    result = prepare.benchmark(texts, prepared / "tokenizer.model", rounds=2, processes=1)
    assert result["documents"] == 40 and result["speedup"] == pytest.approx(
        result["kit_documents_per_second"] / result["plain_documents_per_second"]
    )
