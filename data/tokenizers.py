"""Tokenizers: text to tokens and back, byte for byte, and the training of one."""

import hashlib
import heapq
import io
import json
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from data.sources import Document

BYTE260 = {"tokenizer_type": "pure_byte", "vocab_size": 260,
           "config": {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_offset": 4, "byte_count": 256}}
# A text may be cut as the first pattern says if no piece matches the second. The finer cut is tried first: its words
# end before a space, and where ASCII letters, digits and signs meet; beyond ASCII they end at spaces only.
CUTS = [(rb" *(?:[A-Za-z]+|[0-9]+|[^ A-Za-z0-9\x80-\xff]+|(?=[\x80-\xff]))(?:[\x80-\xff][^ ]*)?| +",
         ("[^▁]▁|[A-Za-z][^A-Za-z\x80-\U0010ffff]|[^A-Za-z\x80-\U0010ffff][A-Za-z]"
          "|[0-9][^0-9\x80-\U0010ffff]|[^0-9\x80-\U0010ffff][0-9]")),
        (rb" +[^ ]*|[^ ]+", "[^▁]▁")]
CACHED_WORDS = 1 << 20  # about 150 MB in each process
SAMPLE_BYTES = 16 * 1024 * 1024  # of text for training: 50 MB of enwiki give as many tokens, within 0.05 %
PROBES = ["a b", " a  b ", "a\n\nb\r\n\tc", "\x00\x7f", "ﬁ ½ Å", "e\u0301 \u200d \ufeff", "世界 \U0001f600"]


class ByteTokenizer:
    """Pure bytes, upstream's ids: byte b is token b + 4."""

    kind, vocab_size, bos_id, lossless = "byte260", 260, 1, True

    def encode(self, raw: bytes) -> np.ndarray:
        return np.frombuffer(raw, np.uint8).astype("<u2") + np.uint16(4)

    def decode(self, tokens: np.ndarray) -> bytes:
        return (tokens[tokens >= 4] - 4).astype(np.uint8).tobytes()

    def normalise(self, raw: bytes) -> bytes:
        return raw


class SentencePieceTokenizer(dict):
    """A SentencePiece model; as a dict it holds the tokens, as bytes, of the words met so far.

    Where two characters never meet inside a piece, as a letter and the space behind it, BPE never merges across, so the
    tokens of a text are those of its words, one after another, and words that were met before need no search.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError):
            raise ValueError(f"{path} is not a SentencePiece model; pass one trained by this script or by spm_train") \
                from None
        self.vocab_size, self.bos_id = self.model.vocab_size(), self.model.bos_id()
        pieces = self.model.id_to_piece(list(range(self.vocab_size)))
        self.bytes_of = [self.piece_bytes(token, piece) for token, piece in enumerate(pieces)]
        self.spelling = np.frombuffer(b"".join(self.bytes_of), np.uint8)
        self.lengths = np.array([len(spelled) for spelled in self.bytes_of])
        self.starts = np.cumsum(self.lengths) - self.lengths
        scores = np.array([self.model.get_score(token) for token in range(self.vocab_size)])
        is_bpe = (scores == scores.round()).all()  # its scores are ranks; those of a unigram model are not
        spelled = [piece for token, piece in enumerate(pieces) if len(self.bytes_of[token]) > 1]
        self.words = next((re.compile(cut) for cut, crossing in CUTS
                           if is_bpe and not any(re.search(crossing, piece) for piece in spelled)), None)
        self.shield_tokens = len(self.model.encode("x"))
        self.refuse_unusable(path)
        self.lossless = all(self.model.decode(self.model.encode(probe)) == probe for probe in PROBES)

    def piece_bytes(self, token: int, piece: str) -> bytes:
        if self.model.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        special = self.model.is_control(token) or self.model.is_unknown(token)
        return b"" if special else piece.replace("▁", " ").encode()

    def refuse_unusable(self, path: Path) -> None:
        if self.vocab_size > 1 << 16:
            raise ValueError(f"{path} has {self.vocab_size} tokens, but shards hold 16-bit numbers; use at most 65,536")
        if self.bos_id < 0:
            raise ValueError(f"{path} has no beginning-of-sequence token, which starts every document; train with one")
        if sum(map(self.model.is_byte, range(self.vocab_size))) < 256:
            raise ValueError(f"{path} has no byte tokens, so it cannot write every text; train with byte_fallback=True")
        if self.decode(np.array(self.model.encode("x"))) != b"x":
            raise ValueError(f"{path} puts a space before every document; train with add_dummy_prefix=False")

    def __missing__(self, word: bytes) -> bytes:
        # The x shields the spaces in front of a word from models that strip a text; nothing merges with it.
        shield = "x" if word.startswith(b" ") else ""
        found = self.model.encode(shield + word.decode())
        tokens = array("H", found[self.shield_tokens:] if shield else found).tobytes()
        if len(word) <= 32:
            if len(self) >= CACHED_WORDS:
                self.clear()
            self[word] = tokens
        return tokens

    def encode(self, raw: bytes) -> np.ndarray:
        """Returns the tokens that SentencePiece gives for the whole text."""
        if not self.words:
            return self.encode_whole(raw)
        return np.frombuffer(b"".join(b"".join(map(self.__getitem__, self.words.findall(part)))
                                      for part in pieces_of(raw)), "<u2")

    def encode_whole(self, raw: bytes) -> np.ndarray:
        return np.array(self.model.encode(raw.decode()), "<u2")

    def decode(self, tokens: np.ndarray) -> bytes:
        """Returns the bytes of the tokens, one after another, as model.decode does, but many times as fast."""
        parts = []
        for start in range(0, len(tokens), 1 << 20):  # in parts: the indices are eight times as large as the text
            part = tokens[start:start + (1 << 20)]
            lengths = self.lengths[part]
            ends = np.cumsum(lengths)
            parts.append(self.spelling[np.repeat(self.starts[part] - ends + lengths, lengths) + np.arange(ends[-1])])
        return b"".join(part.tobytes() for part in parts)

    def normalise(self, raw: bytes) -> bytes:
        """Returns the text that the tokens can hold: decode(encode(raw)), repeated until it no longer changes."""
        text = raw.decode()
        for _ in range(8):
            before, text = text, self.model.normalize(text).replace("▁", " ")
            if text == before:
                break
        return text.encode()


def pieces_of(raw: bytes, size: int = 1 << 24) -> Iterator[bytes]:
    """Cuts a very long text before spaces, where every cut of CUTS allows it: a list of all its words is large."""
    start = 0
    while len(raw) - start > size and (before_space := re.compile(rb"[^ ] ").search(raw, start + size)):
        yield raw[start:before_space.start() + 1]
        start = before_space.start() + 1
    yield raw[start:] if start else raw


def load_tokenizer(path: Path) -> ByteTokenizer | SentencePieceTokenizer:
    if path.suffix != ".json":
        return SentencePieceTokenizer(path)
    if json.loads(path.read_text()) != BYTE260:
        raise ValueError(f"{path} is not the byte260 tokenizer, the only one stored as JSON; pass a .model file")
    return ByteTokenizer()


def describe_tokenizer(path: Path) -> dict:
    """Returns a manifest's entry for a tokenizer's file."""
    tokenizer = load_tokenizer(path)
    return {"kind": tokenizer.kind, "file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id}


def sample_text(documents: Iterable[Document]) -> list[str]:
    """Returns the documents with the smallest hashes, as many as training needs: any order of them gives the same."""
    kept, size = [], 0
    for _, raw in documents:
        part = raw[:SAMPLE_BYTES]
        heapq.heappush(kept, (-int(hashlib.sha256(raw).hexdigest(), 16), part))
        size += len(part)
        while len(kept) > 1 and size - len(kept[0][1]) >= SAMPLE_BYTES:
            size -= len(heapq.heappop(kept)[1])
    return [raw.decode("utf-8", "ignore") for _, raw in sorted(kept)]


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> bytes:
    """Returns a byte-fallback BPE model that leaves every text as it is."""
    if not 260 < vocab_size <= 1 << 16:
        raise ValueError(f"--vocab-size {vocab_size} must be above 260 (256 bytes and 4 specials), at most 65,536")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(sample_text(documents)), model_writer=model, model_type="bpe",
            vocab_size=vocab_size, byte_fallback=True, split_digits=True, character_coverage=0.999,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            pad_id=0, bos_id=1, eos_id=2, unk_id=3, max_sentence_length=1 << 16, minloglevel=2)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"--vocab-size {vocab_size} {explain(str(error))}") from None
    return model.getvalue()


def explain(message: str) -> str:
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"is too small: 4 specials, 256 bytes and the characters of this text need at least {found[1]}"
    if found := re.search(r"size too high .*<= (\d+)", message):
        return f"is too large: this text has pieces for {found[1]} at most; lower it or add text"
    if "sentences_.empty()" in message:
        return "cannot be trained: the training documents hold nothing but line breaks; add text"
    return f"cannot be trained ({message}); choose another size or pass --tokenizer"


def sentences(texts: list[str], length: int = 4000) -> Iterator[str]:
    """Cuts texts before line feeds, where the trainer (which drops those at the end of a sentence) sees them all."""
    for text in texts:
        start = 0
        while start < len(text):
            end = start + length
            if end < len(text):
                end = max(text.rfind("\n", start + 1, end), text.rfind(" ", start + 1, end)) + 1 or end + 1
                end -= 1
            yield text[start:end]
            start = end
