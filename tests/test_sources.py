"""data/sources.py: documents as they are, from wherever they come."""

import gzip
from pathlib import Path

import pytest
import zstandard

from data import sources
from tests.corpora import NASTY, documents, read_back, run, write_jsonl


def test_split_at_loses_nothing(tmp_path):
    text = b" \n = One = \n\n a b \r\n = = Section = = \n = Two = \nc\n = Three = \n = Four = \nno line feed at the end"
    (tmp_path / "wiki.txt").write_bytes(text)
    found = [raw for _, raw in sources.text_documents(tmp_path / "wiki.txt", "^ = [^=].* = $")]
    assert b"".join(found) == text
    assert [raw.strip()[:7] for raw in found] == [b"= One =", b"= Two =", b"= Three", b"= Four "]


def test_text_files_are_one_document_each(tmp_path):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_bytes(b"first\n")
    files[1].write_bytes(b"second")
    run(
        "--text",
        *map(str, files),
        "--val-documents",
        "1",
        "--tokenizer",
        "byte260",
        "--out",
        str(tmp_path),
        "--name",
        "x",
    )
    assert read_back(tmp_path / "x", "val") == [b"first\n"] and read_back(tmp_path / "x", "train") == [b"second"]


@pytest.mark.parametrize(
    "compress",
    [
        gzip.compress,
        lambda data: b"".join(
            zstandard.compress(data[start : start + 70_000]) for start in range(0, len(data), 70_000)
        ),
    ],
    ids=["gz", "zst"],
)
def test_compressed_files_read_like_plain_ones(tmp_path, compress):
    plain = Path(write_jsonl(tmp_path / "x.jsonl", documents() + NASTY)).read_bytes()
    packed = tmp_path / ("x.jsonl.gz" if compress is gzip.compress else "x.jsonl.zst")
    packed.write_bytes(compress(plain))
    assert b"".join(sources.read_lines(packed)) == plain
    packed.write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"x\.jsonl\.\w+ is damaged or cut short"):
        list(sources.read_lines(packed))


def test_pydocs_are_megabytes_of_prose_without_copies():
    found = sources.pydocs()
    assert sum(len(raw) for _, raw in found) > 1_500_000 and len({raw for _, raw in found}) == len(found)
    assert not [where for where, _ in found if "/test" in where or "site-packages" in where]


def test_hub_data_sets_are_streamed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", ["one", "", "two", "three"], "body")
    run(
        "--hf",
        str(tmp_path / "set"),
        "--field",
        "body",
        "--val-documents",
        "1",
        "--max-documents",
        "2",
        "--tokenizer",
        "byte260",
        "--out",
        str(tmp_path),
    )
    folder = tmp_path / "set_byte260"
    assert read_back(folder, "val") == [b"one"] and read_back(folder, "train") == [b"two"]
    assert not list(folder.glob("documents*"))
