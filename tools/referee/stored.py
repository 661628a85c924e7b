"""What a submission kept of the validation text, word for word: the part of rule P20 that looks into its files.

A piece counts if it is long enough, is no mere repetition, and if training text, which may be stored, does not have
it. Looked at are files as they are, text in base64, base85, base16 or as decimal numbers, zstd, zlib, gzip, bzip2, xz
and lzma streams, the tensors of artifacts, and what those hold in turn; in each, text and token numbers. Encryption it
does not see through.
"""

import ast
import base64
import bz2
import io
import lzma
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

import numpy as np
import zstandard

from tools.referee.artifact import MAGIC, Foreign, read_artifact
from tools.referee.case import Case, Data, is_plain
from tools.referee.rules import RULES, Found, Table, check
from tools.referee.texts import SHOWN, Spelling, judges_data, train_shards
from tools.referee.windows import Windows
from tools.untrusted import text

MAX_BYTES = 256 << 20  # that all files of a record together are unpacked to
MAX_STREAMS = 1 << 14  # places that may begin a stream; random bytes have one in 16,384
MAX_HITS = 10_000  # in one file; more make the verdict no clearer
PART = 1 << 20
DEPTH = 4  # streams within streams
DISTINCT = 0.4  # of a window's values; a row of spaces or of dashes is no piece of text
KNOWN_TOKENS = 1 << 26  # of training text, whose pieces may be stored
BAD_DATA = (ValueError, SyntaxError, EOFError, OSError, MemoryError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class TooMuch(Exception):
    """The files hold more than the referee looks at."""


class Needle(NamedTuple):
    """One way to write the validation text, and the windows of it that every long enough piece must contain."""

    name: str
    values: np.ndarray
    least: int  # values in the shortest piece that counts
    windows: Windows
    types: tuple[str, ...]  # that a file's bytes are read as


def make_needle(name: str, least: int, types: tuple[str, ...], val: np.ndarray, train: list[np.ndarray]) -> Needle:
    step = least // 4
    windows = Windows(val, least - step + 1, step)  # a piece of `least` values holds a whole one, wherever it begins
    windows.forget(windows.seen_in(train))
    distinct = np.empty(len(windows.order), np.uint8)
    for begin in range(0, len(distinct), PART):
        rows = val[windows.order[begin : begin + PART, None] * step + np.arange(windows.length)]
        distinct[begin : begin + PART] = 1 + (np.diff(np.sort(rows, axis=1), axis=1) != 0).sum(axis=1)
    windows.forget(distinct < DISTINCT * windows.length)
    return Needle(name, val, least, windows, types)


def spell(spelling: Spelling, tokens: np.ndarray) -> np.ndarray:
    """The bytes of the tokens, one after another."""
    parts = (b"".join(map(spelling.after.__getitem__, tokens[begin : begin + PART].tolist()))
             for begin in range(0, len(tokens), PART))
    return np.frombuffer(b"".join(parts), np.uint8)


def make_needles(data: Data, least: int) -> list[Needle]:
    train, spelling = train_shards(data, KNOWN_TOKENS)[0], Spelling(data)
    low = (data.tokens & 255).astype(np.uint8), [(shard & 255).astype(np.uint8) for shard in train]
    return [make_needle("bytes", least, ("u1",), spell(spelling, data.tokens), [spell(spelling, s) for s in train]),
            make_needle("tokens", least // 2, ("<u2", "<u4", "<u8"), data.tokens, train),
            make_needle("tokens (low bytes)", least, ("u1",), *low)]  # 8-bit tokens, or a plane of larger ones


def zlib_parts(data: memoryview) -> Iterator[bytes]:
    opener, rest = zlib.decompressobj(47), data  # 47: zlib or gzip, as the first bytes say
    while not opener.eof and (part := opener.decompress(rest, PART)):
        yield part
        rest = opener.unconsumed_tail


def lzma_parts(data: memoryview, make: Callable = lambda: lzma.LZMADecompressor(memlimit=1 << 28)) -> Iterator[bytes]:
    opener = make()
    while not opener.eof and (part := opener.decompress(data, PART)):
        yield part
        data = b""


def bzip2_parts(data: memoryview) -> Iterator[bytes]:
    yield from lzma_parts(data, bz2.BZ2Decompressor)


def zstd_parts(data: memoryview) -> Iterator[bytes]:
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(io.BytesIO(data))
    while part := reader.read(PART):
        yield part


def literal(source: bytes) -> bytes:
    """The bytes of a Python string or bytes literal."""
    with warnings.catch_warnings(action="ignore"):
        value = ast.literal_eval(source.decode("utf-8", "replace"))
    return value if isinstance(value, bytes) else value.encode("utf-8", "replace")


def from_base64(run: bytes) -> bytes:
    return base64.b64decode(run.translate(bytes.maketrans(b"-_", b"+/")) + b"=" * (-len(run) % 4))


def from_decimal(run: bytes) -> bytes:
    return np.array([int(word) for word in re.findall(rb"\d+", run)], "<u4").tobytes()


STREAMS = {
    "zstd": (rb"\x28\xb5\x2f\xfd", zstd_parts),
    "zlib": (rb"\x78[\x01\x5e\x9c\xda]|\x1f\x8b\x08", zlib_parts),
    "bzip2": (rb"BZh[1-9]1AY&SY", bzip2_parts),
    "lzma": (rb"\xfd7zXZ\x00|\x5d\x00\x00..(?:\xff{8}|.{4}\x00{4})", lzma_parts),
}
TEXTS = {  # no pattern may look at a byte again and again: they are tried on what strangers wrote
    "literal": (rb"\\.|[bB]?(?:\"(?:[^\"\\\n]|\\.){32,}+\"|'(?:[^'\\\n]|\\.){32,}+')", literal),
    "base16": (rb"(?:[0-9a-fA-F]{2}){32,}", lambda run: bytes.fromhex(run.decode())),
    "base64": (rb"[A-Za-z0-9+/_-]{40,}", from_base64),
    "base85": (rb"[0-9A-Za-z!#$%&()*+;<=>?@^_`{|}~-]{40,}", base64.b85decode),
    "ascii85": (rb"[!-uz]{40,}", base64.a85decode),
    "decimal": (rb"\d{1,5}(?:[\s,;]+\d{1,5}){15,}", from_decimal),
}


def join_lines(blob: bytes) -> bytes:
    """The blob as one line, without the quotes in which its lines may stand."""
    lines = (line.strip() for line in blob.split(b"\n"))
    return b"".join((line[1:] if line[:2] in (b"b'", b'b"') else line).strip(b"\"'\\ ,") for line in lines)


class Files:
    """The bytes of a record's files, and those that they unpack to; TooMuch if these are more than MAX_BYTES."""

    def __init__(self):
        self.room = MAX_BYTES

    def take(self, parts: Iterator[bytes]) -> bytes:
        """All that can be had of some parts, up to the first that is damaged."""
        taken = bytearray()
        with suppress(*BAD_DATA):
            for part in parts:
                self.room -= len(part)
                if self.room < 0:
                    raise TooMuch(f"unpack to more than {MAX_BYTES:,} bytes")
                taken += part
        return bytes(taken)

    def inside(self, blob: bytes) -> Iterator[tuple[str, bytes]]:
        """(kind, bytes) of what a blob holds in another form, all of one kind joined."""
        for kind, (magic, parts) in STREAMS.items():
            places = [match.start() for match in re.finditer(magic, blob, re.DOTALL)]
            if len(places) > MAX_STREAMS:
                raise TooMuch(f"have {len(places):,} places that look like {kind} streams")
            yield kind, b"".join(self.take(parts(memoryview(blob)[place:])) for place in places)
        if blob.startswith(MAGIC):
            with suppress(Foreign):
                yield "tensors", self.take(tensor.data for tensor in read_artifact(blob)[1])
        if b"\0" in blob:
            return
        for kind, (pattern, decode) in TEXTS.items():
            for whole in dict.fromkeys((blob, join_lines(blob))):
                yield kind, b"\n".join(self.take(map(decode, [run[0]])) for run in re.finditer(pattern, whole))

    def unpacked(self, name: str, blob: bytes, depth: int = DEPTH) -> Iterator[tuple[str, bytes]]:
        yield name, blob
        for kind, found in self.inside(blob) if depth else ():
            if len(found) >= 32:
                yield from self.unpacked(f"{name} > {kind}", found, depth - 1)

    def of_record(self, case: Case) -> Iterator[tuple[str, bytes]]:
        for path in sorted(case.folder.rglob("*")):
            if is_plain(path):
                with path.open("rb") as file:
                    blob = self.take(iter(lambda: file.read(PART), b""))
                yield from self.unpacked(path.relative_to(case.folder).as_posix(), blob)
        if case.source and case.source.encode() != case.script.read_bytes():
            yield from self.unpacked("train_gpt.py, unpacked", case.source.encode())


def matching(needle: Needle, values: np.ndarray) -> Iterator[tuple[int, int]]:
    """(place in values, place in the text) of pieces of needle.least values that stand in both."""
    windows, least, step = needle.windows, needle.least, needle.least // 4
    for places, at in windows.found_in(values):
        for _ in range(16):  # one window may stand at several places of the text
            if not len(places):
                break
            starts = windows.order[at] * step
            for shift in range(1 - step, 1):  # where the piece begins, next to its window
                a, b = places + shift, starts + shift
                fits = (a >= 0) & (b >= 0) & (a + least <= len(values)) & (b + least <= len(needle.values))
                a, b = a[fits], b[fits]
                same = np.ones(len(a), bool)
                for k in range(least if len(a) else 0):  # by columns: rows would take `least` times the memory
                    same[same] = values[a[same] + k] == needle.values[b[same] + k]
                yield from zip(a[same].tolist(), b[same].tolist(), strict=True)
            more = (at + 1 < len(windows.hashes)) & (
                windows.hashes[np.minimum(at + 1, len(windows.hashes) - 1)] == windows.hashes[at])
            places, at = places[more], at[more] + 1


def pieces(needle: Needle, blob: bytes) -> list[tuple[int, int, int]]:
    """(place in the blob in bytes, values, place in the text) of the pieces that stand there, the longest first."""
    least = needle.least
    found = []
    for kind in needle.types:
        size = np.dtype(kind).itemsize
        for offset in range(min(size, len(blob))):
            values, last = np.frombuffer(blob, kind, (len(blob) - offset) // size, offset), None
            for begin, start in sorted(islice(matching(needle, values), MAX_HITS)):
                if last and begin * size + offset <= last[0] + last[1] * size:
                    last[1] = begin + least - (last[0] - offset) // size
                else:
                    found.append(last := [begin * size + offset, least, start])
    return sorted(map(tuple, found), key=lambda piece: -piece[1])


@check("P20")
def kept_text(case: Case) -> Found:
    least, files, looked_at = RULES["P20"]["limit"]["bytes"], Files(), 0
    needles = make_needles(judges_data(case), least)
    rows, problems = [], {}  # one for each file, whatever it holds
    try:
        for name, blob in files.of_record(case):
            looked_at += len(blob)
            for needle in needles:
                found = pieces(needle, blob)
                rows += [[text(name), place, needle.name, count, start] for place, count, start in found[:SHOWN]]
                if found:
                    place, count, _ = found[0]
                    problems.setdefault(name.split(" > ")[0], (
                        f"{text(name)}: {sum(piece[1] for piece in found):,} validation {needle.name}, in "
                        f"{len(found):,} piece(s), the longest of {count:,} at byte {place:,}"))
    except TooMuch as much:
        problems["all"] = f"its files {much}; none that a record needs do"
    head = ["file", "at byte", "as validation", "values", "place in the text"]
    evidence = [Table("Validation text in the record's files", head, rows[:200])] if rows else []
    detail = f"no {least} bytes of validation text in {looked_at:,} bytes of its files"
    return Found("" if problems else detail, list(problems.values()), evidence)
