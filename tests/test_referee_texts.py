"""Rules P06 and P08: the byte ledger of the validation text, and what of it stands in the training text."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from corpora import NASTY, documents, manifest_of, run, train_normalising, write_jsonl

from tools.referee.case import Case, Data, read_data
from tools.referee.rules import Found, Skip, judge
from tools.referee.texts import Spelling, ledger, overlap
from train_gpt import ByteTable

VAL = [*NASTY, *documents(12, seed=2)]
TRAIN = documents(60, seed=1)


@pytest.fixture(scope="module", params=["sp400", "byte260"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of many documents in several shards."""
    out = tmp_path_factory.mktemp("texts")
    texts = ["--jsonl", write_jsonl(out / "train.jsonl", TRAIN), "--val-jsonl", write_jsonl(out / "val.jsonl", VAL)]
    tokenizer = ["--vocab-size", "400"] if request.param == "sp400" else ["--tokenizer", "byte260"]
    assert run(*texts, *tokenizer, "--shard-tokens", "5000", "--out", str(out), "--name", request.param) == 0
    return out / request.param


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """The same, free to be spoilt."""
    return Path(shutil.copytree(prepared, tmp_path / prepared.name))


def record_on(data: Path, place: Path, **changes: object) -> Case:
    """A record that claims one nat per token of the data folder, but for the changes."""
    entry = manifest_of(data)["splits"]["val"]
    result = {"val_tokens": entry["tokens"] - 1, "val_bytes": entry["bytes"], "nats_sum": float(entry["tokens"] - 1)}
    result |= changes
    result["val_bpb"] = result["nats_sum"] / math.log(2) / result["val_bytes"]
    (place / "record/logs").mkdir(parents=True)
    (place / "record/submission.json").write_text(json.dumps(result))
    (place / "record/logs/train_seed7.log").write_text(f"config:{{}}\nresult:{json.dumps(result)}\n")
    return Case(place / "record", read_data(data))


def relist(folder: Path, split: str, change: Callable[[list[str]], list[str]]) -> None:
    """Changes a list of documents, and the manifest so that it describes the changed one."""
    path, manifest = folder / f"{split}_docs.txt", manifest_of(folder)
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    manifest["splits"][split]["documents_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def problems(found: Found) -> str:
    assert found.problems
    return "; ".join(found.problems)


def test_ledger_of_documents_with_every_kind_of_character_adds_up(prepared, tmp_path):
    found = ledger(record_on(prepared, tmp_path))
    assert found.problems == [] and f"{len(VAL)} documents" in found.detail
    rows = found.evidence[0].rows
    assert [row[4] for row in rows[:20]] == [len(text.encode()) for text in VAL[:20]]
    assert rows[-1][3:] == [sum(len(text.encode()) for text in VAL)] * 3


def test_ledger_of_an_honest_record_agrees_with_its_claim(prepared, tmp_path):
    case = record_on(prepared, tmp_path)
    scores = ledger(case).evidence[-1]
    assert all(row[2] == pytest.approx(row[3]) for row in scores.rows) and len(scores.rows) == 2


def test_referees_byte_table_is_that_of_the_script(prepared, tmp_path):
    normalising = train_normalising(tmp_path)
    options = ["--tokenizer", normalising, "--normalise", "--out", str(tmp_path), "--name", "nfkc"]
    assert run("--jsonl", write_jsonl(tmp_path / "t.jsonl", TRAIN + VAL), *options) == 0
    for place in (prepared, tmp_path / "nfkc"):
        data = read_data(place)
        counted = Spelling(data).bytes_of(data.tokens, data.bos_id)
        assert counted[0] == 0 and np.array_equal(counted[1:], ByteTable(data.tokenizer).count(data.tokens))


def test_byte_table_knows_of_spaces_that_the_decoder_drops(tmp_path):
    options = dict(model_type="bpe", vocab_size=400, byte_fallback=True, add_dummy_prefix=True, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TRAIN), model_prefix=str(tmp_path / "m"), **options)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    texts = ["one two", "three", "世界 four"]
    tokens = np.array([token for text in texts for token in (1, *model.encode(text))], np.uint16)
    about = {"file": "m.model", "vocab_size": 400, "bos_id": 1}
    counted = Spelling(Data(tmp_path, {"tokenizer": about}, "", tokens)).bytes_of(tokens, 1)
    assert counted.sum() == sum(len(text.encode()) for text in texts)
    assert np.array_equal(counted[1:], ByteTable(tmp_path / "m.model").count(tokens))


def test_ledger_says_that_a_text_was_rewritten(tmp_path):
    options = ["--tokenizer", train_normalising(tmp_path), "--normalise", "--out", str(tmp_path), "--name", "nfkc"]
    texts = ["--jsonl", write_jsonl(tmp_path / "t.jsonl", TRAIN), "--val-jsonl", write_jsonl(tmp_path / "v.jsonl", VAL)]
    assert run(*texts, *options) == 0
    found = ledger(record_on(tmp_path / "nfkc", tmp_path))
    before = manifest_of(tmp_path / "nfkc")["rewritten"]["val"]["bytes_before"]
    assert found.problems == [] and f"rewritten text ({before:,} bytes became" in found.detail


def test_ledger_names_the_document_whose_bytes_are_not_those_of_the_list(folder, tmp_path):
    relist(folder, "val", lambda lines: [*lines[:2], lines[2].split()[0] + " 5 4", *lines[3:]])
    found = ledger(record_on(folder, tmp_path))
    assert "document 2" in problems(found) and "decode to 3, val_docs.txt says 5" in problems(found)
    assert [row[0] for row in found.evidence[1].rows] == [2]


def test_ledger_names_the_document_that_decodes_to_another_text(folder, tmp_path):
    relist(folder, "val", lambda lines: ["0" * 32 + lines[0][32:], *lines[1:]])
    assert "document 0 decodes to a text of hash" in problems(ledger(record_on(folder, tmp_path)))


def test_ledger_notices_documents_that_are_not_listed(folder, tmp_path):
    relist(folder, "val", lambda lines: lines[:-1])
    assert f"val_docs.txt lists {len(VAL) - 1}" in problems(ledger(record_on(folder, tmp_path)))


def test_ledger_notices_a_total_that_the_tokens_do_not_have(folder, tmp_path):
    manifest = manifest_of(folder)
    manifest["splits"]["val"]["bytes"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json says" in problems(ledger(record_on(folder, tmp_path)))


def test_ledger_divides_the_nats_of_a_wrong_claim_by_the_right_bytes(prepared, tmp_path):
    entry = manifest_of(prepared)["splits"]["val"]
    found = problems(ledger(record_on(prepared, tmp_path, val_bytes=2 * entry["bytes"])))
    right = (entry["tokens"] - 1) / math.log(2) / entry["bytes"]
    assert f"its score of {right / 2:.6f} becomes {right:.6f}" in found
    assert "train_seed7.log divides by" in found and "submission.json divides by" in found


def test_ledger_recognises_a_leading_space_counted_twice(prepared, tmp_path):
    data = read_data(prepared)
    spelled = Spelling(data).after
    spaces = sum(spelled[token].startswith(b" ") for token in data.tokens)
    case = record_on(prepared, tmp_path, val_bytes=data.val_bytes + spaces)
    assert spaces and "(a leading space counted twice)" in problems(ledger(case))


def test_ledger_does_not_convert_the_nats_of_another_text(prepared, tmp_path):
    found = problems(ledger(record_on(prepared, tmp_path, val_tokens=9, val_bytes=20)))
    assert "scores 9 tokens" in found and "train_seed7.log divides" not in found


def test_ledger_makes_a_claim_of_the_wrong_type_a_problem(prepared, tmp_path):
    assert judge(record_on(prepared, tmp_path, val_tokens="many"), "P06").status == "FAIL"


def test_ledger_skips_a_folder_without_a_list_or_with_another_tokenizer(folder, tmp_path):
    case = record_on(folder, tmp_path)
    (folder / "val_docs.txt").unlink()
    with pytest.raises(Skip, match=r"has no val_docs\.txt"):
        ledger(case)
    case.data.tokenizer.write_bytes(b"another")
    with pytest.raises(Skip, match="is not the tokenizer"):
        ledger(case)


def test_without_data_both_rules_are_skipped(tmp_path):
    for rule in (ledger, overlap):
        with pytest.raises(Skip, match="no --data folder"):
            rule(Case(tmp_path))


def test_overlap_of_separate_documents_is_none(prepared, tmp_path):
    found = overlap(record_on(prepared, tmp_path))
    assert found.problems == [] and found.detail.startswith("0 shared documents; 0.00%")
    assert len(manifest_of(prepared)["splits"]["train"]["shards"]) > 1


def with_shared_document(folder: Path, number: int) -> None:
    """Appends a validation document to the training shards, so that it begins in one shard and ends in the next."""
    data, manifest = read_data(folder), manifest_of(folder)
    starts = [*np.flatnonzero(data.tokens == data.bos_id), len(data.tokens)]
    document, train = data.tokens[starts[number] : starts[number + 1]], manifest["splits"]["train"]
    for index, part in enumerate((document[:7], document[7:])):
        last = train["shards"][-1]
        old = np.fromfile(folder / last["file"], "<u2", offset=1024) if index == 0 else np.empty(0, "<u2")
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(old) + len(part)
        file = last["file"] if index == 0 else f"fineweb_train_{len(train['shards']):06d}.bin"
        (folder / file).write_bytes(header.tobytes() + np.concatenate((old, part)).astype("<u2").tobytes())
        shard = {"file": file, "sha256": "", "tokens": len(old) + len(part)}
        train["shards"] = [*(train["shards"][:-1] if index == 0 else train["shards"]), shard]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    listed = (folder / "val_docs.txt").read_text().splitlines()[number]
    relist(folder, "train", lambda lines: [*lines, listed])


def test_overlap_finds_a_validation_document_across_train_shards(folder, tmp_path):
    with_shared_document(folder, 14)
    found = overlap(record_on(folder, tmp_path))
    assert f"number {len(TRAIN)} in train is 14 in val" in problems(found)
    (row,) = found.evidence[0].rows
    assert row[4:] == [hashlib.sha256(VAL[14].encode()).hexdigest()[:32], len(VAL[14].encode())]
    train = np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in sorted(folder.glob("fineweb_train*"))])
    place, count = row[2], row[3]
    assert train[place] == 1 and len(train) == place + count


def test_overlap_does_not_need_the_list_to_find_it(folder, tmp_path):
    with_shared_document(folder, 14)
    relist(folder, "train", lambda lines: [*lines[:-1], "0" * 32 + lines[-1][32:]])
    assert "1 training documents are validation documents" in problems(overlap(record_on(folder, tmp_path)))


def test_overlap_finds_a_document_in_the_list_alone(folder, tmp_path):
    shared = hashlib.sha256(VAL[3].encode()).hexdigest()[:32]
    relist(folder, "train", lambda lines: [shared + lines[0][32:], *lines[1:]])
    assert "number 0 in train is 3 in val" in problems(overlap(record_on(folder, tmp_path)))


def test_overlap_allows_the_documents_that_the_manifest_lists(folder, tmp_path):
    with_shared_document(folder, 14)
    (folder / "manifest.json").write_text(json.dumps(manifest_of(folder) | {"train_documents_in_val": 1}))
    found = overlap(record_on(folder, tmp_path))
    assert found.problems == [] and found.detail.startswith("1 shared documents") and len(found.evidence) == 1


def test_overlap_notices_a_list_that_does_not_describe_the_shards(folder, tmp_path):
    case = record_on(folder, tmp_path)
    relist(folder, "train", lambda lines: [*lines[:-1], lines[-1] + "0"])
    case.data = read_data(folder)
    assert "does not list the documents" in problems(overlap(case))
    relist(folder, "train", lambda lines: lines[:-1])
    case.data = read_data(folder)
    assert "does not list the documents" in problems(overlap(case))


def test_overlap_says_how_far_it_searched(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.referee.texts.TRAIN_TOKENS", 7001)
    found = overlap(record_on(prepared, tmp_path))
    assert found.problems == [] and "the first 7,001 of" in found.detail
