"""What the tests of data/ share: made-up documents, and an independent reading of a data folder."""

import json
import random
import struct
from pathlib import Path

import sentencepiece

from data import prepare

NASTY = [
    "tab\tand\r\nreturn\rand\x00nul\x01",
    "  leading and trailing  ",
    "\n\n\n",
    " ",
    "\u0301\u0308 lone accents e\u0301",
    "emoji \U0001f600\U0001f468\u200d\U0001f469 \ufeff",
    "世界 नमस्ते \u00a0\u2028 \ue000\U0010ffff",
    "x" * 20_000,
    "a  b   c\n   d",
    "1234567890 3.14159 1,000,000",
    "<s></s><unk><pad><0x41>",
    "ﬁ ½ Å Ⅳ",
    "é,”said— ‘he’…1é2",
]


def documents(count: int = 80, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucm", k=rng.randint(2, 7))) for _ in range(300)]
    return [
        " ".join(rng.choices(words, k=rng.randint(50, 150))).capitalize() + f".\n\nNumber {index}!"
        for index in range(count)
    ]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> str:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return str(path)


def run(*argv: str) -> int:
    return prepare.main([*argv, "--processes", "1"] if "--processes" not in argv else list(argv))


def read_back(folder: Path, split: str) -> list[bytes]:
    """Decodes a split by an independent reading of the format and SentencePiece's own decoder."""
    tokens = []
    for path in sorted(folder.glob(f"fineweb_{split}_*.bin")):
        data = path.read_bytes()
        header = struct.unpack("<256i", data[:1024])
        assert header[:2] == (20240520, 1) and set(header[3:]) == {0} and len(data) == 1024 + 2 * header[2]
        tokens += struct.unpack(f"<{header[2]}H", data[1024:])
    assert tokens[0] == 1
    groups = [[]]
    for token in tokens[1:]:
        groups.append([]) if token == 1 else groups[-1].append(token)
    if (folder / "tokenizer.json").exists():
        return [bytes(token - 4 for token in group) for group in groups]
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return [model.decode(group).encode() for group in groups]


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def train_normalising(folder: Path) -> str:
    """Trains a model that does to text what upstream's published ones do."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents()),
        model_prefix=str(folder / "nfkc"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        add_dummy_prefix=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return str(folder / "nfkc.model")
