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

MAX_SOURCE_BYTES = 512 * 1024  # of one layer; the largest real script has a third of it
MAX_PARSED = 4 * MAX_SOURCE_BYTES  # of all that is tried
MAX_LAYERS, MAX_DEPTH = 8, 4
MAX_LITERALS, MAX_EXECS = 32, 32  # of one layer
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
    letters_left: int = MAX_PARSED  # that may still be parsed

    @property
    def text(self) -> str:
        return "\n".join(source for _, source in self.layers)


def read_script(raw: bytes) -> Script:
    """Returns all layers of a script; a problem for each that is no Python or runs what cannot be read in it."""
    script = Script([("on disk", raw.decode("utf-8-sig", errors="replace"))])
    nodes, problem = parse(script, script.layers[0][1])
    script.problems += [f"on disk: {problem}"] if problem else []
    waiting = [(0, "on disk", nodes)]
    while waiting:
        depth, how, nodes = waiting.pop()
        inside = []
        for literal in literals(nodes)[:MAX_LITERALS]:
            try:
                inside += texts_in(script, literal)
            except TooLarge as error:
                script.problems.append(f"{how}: {error}")
        script.problems += [f"{how}: {problem}" for problem in problems_of_exec(nodes, bool(inside))]
        if inside and (depth == MAX_DEPTH or len(script.layers) + len(inside) > MAX_LAYERS):
            script.problems.append(f"{how}: it holds more than {MAX_LAYERS} packed texts; the rest was not read")
            break
        script.layers += [(f"{how}, {way}", source) for way, source, _ in inside]
        waiting += [(depth + 1, f"{how}, {way}", nodes) for way, _, nodes in inside]
    return script


def parse(script: Script, source: str) -> tuple[list[ast.AST], str]:
    """(every node of the syntax tree, the module first; "") or ([], why there is no tree)."""
    if len(source) > min(MAX_SOURCE_BYTES, script.letters_left):
        return [], f"its {len(source):,} letters are too many and were not read"
    script.letters_left -= len(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's advice on a stranger's code
            return list(ast.walk(ast.parse(source))), ""
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        return [], f"it is no Python {python}: {text(str(error))[:120] or type(error).__name__}"


def literals(nodes: list[ast.AST]) -> list[str | bytes]:
    """The long texts among the nodes that are no prose, the longest first; what + or join() put together is one."""
    found, seen = [], set()
    for node in nodes:
        if id(node) in seen or not isinstance(node, ast.BinOp | ast.Call | ast.Constant):
            continue
        parts, inner = joined(node), getattr(node, "left", None)
        while isinstance(inner, ast.BinOp):  # a part of this sum is not looked at again
            seen.add(id(inner))
            inner = inner.left
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


def texts_in(script: Script, literal: str | bytes) -> Iterator[tuple[str, str, list[ast.AST]]]:
    """(decoders, text, its nodes) for the first way in which a literal is Python; TooLarge if it is a bomb."""
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
            nodes, _ = parse(script, source)
            if looks_like_code(nodes):
                yield way, source, nodes
                return


def looks_like_code(nodes: list[ast.AST]) -> bool:
    """Whether a text is Python with a statement of its own, not a word or a number that also parses."""
    return any(not isinstance(node, ast.Expr | ast.Assign) or isinstance(node.value, ast.Call)
               for module in nodes[:1] for node in module.body)


def problems_of_exec(nodes: list[ast.AST], unpacked: bool) -> Iterator[str]:
    """What a layer runs as a program that is not in it: another file, or a text that nothing here could unpack."""
    called = [(node, getattr(node.func, "id", getattr(node.func, "attr", ""))) for node in nodes
              if isinstance(node, ast.Call) and node.args]
    runs = [(node, name) for node, name in called if name in ("exec", "run_path", "execfile")]
    for node, name in runs[:MAX_EXECS]:
        inner = [part for argument in node.args for part in ast.walk(argument)]
        words = [part.value for part in inner if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        files = [text(word) for word in words if word.endswith((".py", ".txt", ".bin", ".json"))]
        opens = {getattr(part, "id", getattr(part, "attr", "")) for part in inner} & {"open", "read_text", "read_bytes"}
        if opens or name == "run_path":
            yield f"line {node.lineno} runs another file, {' or '.join(files[-1:]) or 'which it opens'}, as its code"
        elif not unpacked and not isinstance(node.args[0], ast.Constant):
            yield f"line {node.lineno} runs a text that could not be unpacked without running it"
