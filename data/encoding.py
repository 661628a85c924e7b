"""Documents to tokens on all cores, each checked by decoding it again; and shards back to documents."""

import hashlib
import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
from tqdm import tqdm

from data.shards import read_shard
from data.sources import Document
from data.tokenizers import SentencePieceTokenizer, load_tokenizer

BATCH_BYTES = 1 << 17  # small enough that few documents still keep all cores busy


class Encoded(NamedTuple):
    """A document as it goes into a shard."""

    digest: str  # first 32 hex digits of the sha256 of the text that the tokens hold
    bytes_before: int  # before --normalise
    bytes_raw: int
    changed: bool
    tokens: bytes  # uint16, BOS first


def encode_document(tokenizer, normalise: bool, where: str, original: bytes) -> Encoded:
    """Returns a document's tokens, having decoded them again: an error names a document that does not survive."""
    raw = tokenizer.normalise(original) if normalise else original
    digest = hashlib.sha256(raw).hexdigest()
    ids = tokenizer.encode(raw)
    decoded = tokenizer.decode(ids)
    if decoded != raw:
        at = next((i for i, (a, b) in enumerate(zip(raw, decoded, strict=False)) if a != b),
                  min(len(raw), len(decoded)))
        raise ValueError(f"{where} (sha256 {digest[:32]}) does not survive the tokenizer: from byte {at} on "
                         f"{excerpt(raw, at)} comes back as {excerpt(decoded, at)}; pass --normalise to rewrite such "
                         "documents first, or --tokenizer byte260")
    if digest.startswith("00") and isinstance(tokenizer, SentencePieceTokenizer):  # 1 in 256, for the price of it
        assert np.array_equal(ids, tokenizer.encode_whole(raw)), f"{where}: word-wise tokens are not SentencePiece's"
    tokens = np.uint16(tokenizer.bos_id).astype("<u2").tobytes() + ids.tobytes()
    return Encoded(digest[:32], len(original), len(raw), raw != original, tokens)


def excerpt(raw: bytes, at: int) -> str:
    return repr(raw[at:at + 24].decode("utf-8", "backslashreplace"))


def end_with_parent() -> None:
    """Ends this process when its parent is killed; a pool's processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def start_worker(path: Path, normalise: bool) -> None:
    """Loads the tokenizer once in each process."""
    global _worker
    _worker = load_tokenizer(path), normalise
    end_with_parent()


def encode_batch(batch: list[Document]) -> list[Encoded]:
    tokenizer, normalise = _worker
    return [encode_document(tokenizer, normalise, where, raw) for where, raw in batch]


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, filled = [], 0
    for document in documents:
        batch.append(document)
        filled += len(document[1]) + 64
        if filled >= BATCH_BYTES:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


class Encoder:
    """Encodes streams of documents in order on several processes, a bounded number of batches at a time."""

    def __init__(self, path: Path, normalise: bool, processes: int):
        self.tokenizer, self.normalise, self.processes = load_tokenizer(path), normalise, processes
        self.pool = None
        if processes > 1:
            self.pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start_worker,
                                            (path, normalise))

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def encode(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        if not self.pool:
            for where, raw in documents:
                yield encode_document(self.tokenizer, self.normalise, where, raw)
            return
        waiting = deque()
        try:
            for batch in batches(documents):
                waiting.append(self.pool.submit(encode_batch, batch))
                if len(waiting) > 3 * self.processes:  # bounded: the text is not read faster than it is encoded
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise ValueError(f"one of {self.processes} processes was killed, perhaps for want of memory; pass a "
                             "smaller --processes") from None


def read_documents(paths: list[Path], tokenizer_path: Path, processes: int) -> Iterator[tuple[str, int, int]]:
    """Yields (hash, bytes, tokens with BOS) of the documents in shards, where one may end in a later shard."""
    tokenizer, waiting = load_tokenizer(tokenizer_path), b""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        parts = (pool.map if processes > 1 else map)(partial(split_shard, tokenizer_path), paths)
        progress = tqdm(parts, "listing documents", len(paths), unit=" shards", disable=not sys.stderr.isatty())
        for path, (head, whole, tail) in zip(paths, progress, strict=True):
            if head and not waiting:
                raise ValueError(f"{path.name} does not start with a document; report this to whoever made it")
            waiting += head
            if tail is not None:
                if waiting:
                    yield describe_document(tokenizer, np.frombuffer(waiting, "<u2"))
                yield from whole
                waiting = tail
    yield describe_document(tokenizer, np.frombuffer(waiting, "<u2"))


def split_shard(tokenizer_path: Path, path: Path) -> tuple[bytes, list[tuple[str, int, int]], bytes | None]:
    """Returns the tokens before the first document of a shard, its whole documents, and the tokens of its last one."""
    tokenizer, tokens = load_tokenizer(tokenizer_path), read_shard(path)
    if tokens.max() >= tokenizer.vocab_size:
        raise ValueError(f"{path.name} has token {tokens.max()}, but its tokenizer {tokenizer.vocab_size} tokens; "
                         "report this to whoever made it")
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    if not len(starts):
        return tokens.tobytes(), [], None
    whole = [describe_document(tokenizer, tokens[start:end]) for start, end in pairwise(starts)]
    return tokens[:starts[0]].tobytes(), whole, tokens[starts[-1]:].tobytes()


def describe_document(tokenizer, tokens: np.ndarray) -> tuple[str, int, int]:
    raw = tokenizer.decode(tokens)
    return hashlib.sha256(raw).hexdigest()[:32], len(raw), len(tokens)


def benchmark(documents: list[Document], tokenizer_path: Path, rounds: int = 4, processes: int | None = None) -> dict:
    """Returns documents per second of the plain one-process loop and of Encoder (check included), taken in turns.

    The processes are started, and the tokenizers loaded, before the clock; no round sees a document of another."""
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    processes = processes or os.cpu_count()
    plain_seconds = kit_seconds = 0.0
    with Encoder(tokenizer_path, False, processes) as encoder:
        list(encoder.encode([("warm-up", b"warm up" * size) for size in [1 << 17] * processes]))
        for part in range(rounds):
            chosen = documents[part::rounds]
            texts = [raw.decode() for _, raw in chosen]
            start = time.perf_counter()
            for text in texts:
                plain.encode(text)
            middle = time.perf_counter()
            for _ in encoder.encode(chosen):
                pass
            plain_seconds += middle - start
            kit_seconds += time.perf_counter() - middle
    size = sum(len(raw) for _, raw in documents)
    return {"documents": len(documents), "bytes": size, "processes": processes,
            "plain_documents_per_second": len(documents) / plain_seconds,
            "kit_documents_per_second": len(documents) / kit_seconds,
            "plain_bytes_per_second": size / plain_seconds, "kit_bytes_per_second": size / kit_seconds,
            "speedup": plain_seconds / kit_seconds}
