"""Reads packed scripts without running them: the texts inside a script's long literals, layer by layer.

A packed script decodes and decompresses a literal and runs it. Which functions it calls for that does not matter here:
every long literal is tried with every decoder, under limits, and what comes out as Python is the next layer.
"""

import ast
import base64
import bz2
import lzma
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tools.untrusted import text

MAX_SOURCE_BYTES = 4 * 1024 * 1024  # of one layer; the largest real script has a twentieth of it
MAX_LAYERS = 8
MAX_LITERALS = 32  # of one layer
SHORTEST_LITERAL = 200
LZMA2 = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 24}]
DECODERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "b85": base64.b85decode,
    "b64": lambda raw: base64.b64decode(raw, validate=True),
    "a85": base64.a85decode,
    "hex": lambda raw: bytes.fromhex(raw.decode()),
}
OPENERS: dict[str, Callable] = {
    "": lambda: None,
    "lzma": lambda: lzma.LZMADecompressor(memlimit=1 << 28),
    "zlib": lambda: zlib.decompressobj(47),  # zlib or gzip, by its header
    "bz2": bz2.BZ2Decompressor,
    "raw lzma": lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, None, LZMA2),
    "raw zlib": lambda: zlib.decompressobj(-15),
}


class TooLarge(ValueError):
    """A literal unpacks to more than any script."""


@dataclass
class Script:
    """What a script says: (how it was reached, its text) for the file itself and every text that it unpacks."""

    layers: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(source for _, source in self.layers)


def read_script(raw: bytes) -> Script:
    """Returns all layers of a script; a problem for each that is no Python or runs what cannot be read in it."""
    script = Script([("on disk", raw.decode("utf-8-sig", errors="replace"))])
    for depth, (how, source) in enumerate(script.layers):  # grows while it is walked
        tree, problem = parse(source)
        if problem:
            script.problems.append(f"{how}: {problem}")
            continue
        inside: list[tuple[str, str]] = []
        for literal in literals(tree)[:MAX_LITERALS]:
            try:
                inside += [(f"{how}, {way}", found) for way, found in texts_in(literal)]
            except TooLarge as error:
                script.problems.append(f"{how}: {error}")
        script.problems += [f"{how}: {problem}" for problem in problems_of_exec(tree, bool(inside))]
        if depth + len(inside) >= MAX_LAYERS:
            script.problems.append(f"it is packed more than {MAX_LAYERS} times; what lies deeper was not read")
            break
        script.layers += inside
    return script


def parse(source: str) -> tuple[ast.AST, str]:
    """(the syntax tree, "") or (an empty one, why there is none)."""
    empty = ast.Module([], [])
    if len(source) > MAX_SOURCE_BYTES:
        return empty, f"it has more than {MAX_SOURCE_BYTES:,} letters and was not read"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's advice on a stranger's code
            return ast.parse(source), ""
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        return empty, f"it is no Python {python}: {text(str(error))[:120] or type(error).__name__}"


def literals(tree: ast.AST) -> list[str | bytes]:
    """The long texts of a tree that are no prose, the longest first; texts that are joined by + or join() are one."""
    found, seen = [], set()
    for node in ast.walk(tree):
        if id(node) in seen:
            continue
        parts = joined(node)
        if parts and all(isinstance(part, ast.Constant) for part in parts):
            seen |= {id(part) for part in parts}
            values = [part.value for part in parts]
            if all(isinstance(value, str) for value in values) or all(isinstance(value, bytes) for value in values):
                found.append(type(values[0])().join(values))
    dense = [value for value in found if len(value) >= SHORTEST_LITERAL and 40 * len(value.split()) < len(value) + 400]
    return sorted(dense, key=len, reverse=True)


def joined(node: ast.AST) -> list[ast.AST]:
    """The parts of an expression that puts texts together, in order; the expression itself if it is one text."""
    if isinstance(node, ast.BinOp):
        parts: list[ast.AST] = []
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            parts.append(node.right)
            node = node.left
        return [node, *reversed(parts)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        first = node.args[0] if node.args else None
        return first.elts if isinstance(first, ast.List | ast.Tuple) else []
    return [node] if isinstance(node, ast.Constant) else []


def texts_in(literal: str | bytes) -> Iterator[tuple[str, str]]:
    """(decoders, text) for the first way in which a literal is Python; TooLarge if it unpacks to more than that."""
    raw = literal if isinstance(literal, bytes) else "".join(literal.split()).encode("utf-8", "replace")
    for code, decode in DECODERS.items():
        try:
            packed = decode(raw)
        except ValueError:
            continue
        for name, make in OPENERS.items():
            if not (code or name):
                continue
            try:
                opener = make()
                unpacked = opener.decompress(packed, MAX_SOURCE_BYTES + 1) if opener else packed
                source = unpacked[:MAX_SOURCE_BYTES].decode()
            except (ValueError, EOFError, OSError, MemoryError, zlib.error, lzma.LZMAError):
                continue
            way = " and ".join(filter(None, (code, name)))
            if len(unpacked) > MAX_SOURCE_BYTES:
                raise TooLarge(f"{len(raw):,} letters of {way} unpack to more than {MAX_SOURCE_BYTES:,} bytes")
            if looks_like_code(source):
                yield way, source
                return


def looks_like_code(source: str) -> bool:
    """Whether a text is Python with a statement of its own, not a word or a number that also parses."""
    tree, problem = parse(source)
    return not problem and any(not isinstance(node, ast.Expr | ast.Assign) or isinstance(node.value, ast.Call)
                               for node in getattr(tree, "body", []))


def problems_of_exec(tree: ast.AST, unpacked: bool) -> Iterator[str]:
    """What a layer runs as a program that is not in it: another file, or a text that nothing here could unpack."""
    for node in ast.walk(tree):
        name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else \
            node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
        if name not in ("exec", "run_path", "execfile") or not node.args:
            continue
        inner = [part for argument in node.args for part in ast.walk(argument)]
        words = [part.value for part in inner if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        files = [text(word) for word in words if word.endswith((".py", ".txt", ".bin", ".json"))]
        called = {getattr(part, "id", getattr(part, "attr", "")) for part in inner}
        opens = called & {"open", "read_text", "read_bytes"}
        if opens or name == "run_path":
            yield f"line {node.lineno} runs another file, {' or '.join(files[-1:]) or 'which it opens'}, as its code"
        elif not unpacked and not isinstance(node.args[0], ast.Constant):
            yield f"line {node.lineno} runs a text that could not be unpacked without running it"
