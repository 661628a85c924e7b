"""Where documents come from: the Python documentation, text files, JSON lines, the Hugging Face hub."""

import ast
import functools
import gc
import gzip
import hashlib
import io
import json
import platform
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

Document = tuple[str, bytes]  # (where it comes from, its raw UTF-8)
NOT_PROSE = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "site-packages",
             "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Source:
    kind: str  # pydocs, text, jsonl or hf
    files: tuple[str, ...] = ()
    split_at: str | None = None
    field: str = "text"
    hf_name: str | None = None
    hf_config: str | None = None
    hf_split: str = "train"

    def documents(self) -> Iterator[Document]:
        """Yields the documents in a fixed order, empty ones included; every one is valid UTF-8."""
        if self.kind == "pydocs":
            yield from pydocs()
        elif self.kind == "hf":
            yield from hf_documents(self.hf_name, self.hf_config, self.hf_split, self.field)
        else:
            for path in map(Path, self.files):
                yield from text_documents(path, self.split_at) if self.kind == "text" \
                    else jsonl_documents(path, self.field)

    def identity(self) -> dict:
        """Returns what a manifest records: two sources with equal identities give equal documents."""
        if self.kind == "pydocs":
            return {"kind": "pydocs", "python": platform.python_version()}
        if self.kind == "hf":
            return {"kind": "hf", "hf": self.hf_name, "config": self.hf_config, "split": self.hf_split,
                    "field": self.field}
        how = {"split_at": self.split_at} if self.kind == "text" else {"field": self.field}
        return {"kind": self.kind, "files": [file_identity(Path(file)) for file in self.files], **how}


def file_identity(path: Path) -> dict:
    """Returns the name, size and hash of a file; not its folder, which is nobody's business but its owner's."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; name one on disk, which can be read twice")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


class ZstdStream(io.RawIOBase):
    """The decompressed bytes of a .zst file; unlike zstandard's own reader it notices a file that was cut short."""

    def __init__(self, path: Path):
        self.file = path.open("rb")
        self.frame = None
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.ready:
            left_over = b""
            if self.frame is None or self.frame.eof:  # a file may be several frames
                left_over = self.frame.unused_data if self.frame else b""
                self.frame = None
            data = left_over or self.file.read(1 << 17)
            if not data and self.frame is None:
                return 0
            if not data:
                raise EOFError
            self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
            self.ready = memoryview(self.frame.decompress(data))
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def open_stream(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".zst":
        return io.BufferedReader(ZstdStream(path), 1 << 20)
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def read_lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a plain, .gz or .zst file with their line feeds; a lone carriage return ends no line."""
    with open_stream(path) as stream:
        try:
            yield from stream
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise ValueError(f"{path} is damaged or cut short ({error or 'it ends early'}); fetch it again") from None


def text_documents(path: Path, split_at: str | None) -> Iterator[Document]:
    """Yields one document per file, or one per line that matches; their concatenation is the file."""
    try:
        starts_document = re.compile(split_at) if split_at else None
    except re.error as error:
        raise ValueError(f"--split-at {split_at!r} is not a regular expression ({error})") from None
    index, lines, blank = 0, [], True
    for line in read_lines(path):
        starts = starts_document and starts_document.search(line.decode("utf-8", "replace").rstrip("\r\n"))
        if starts and not blank:  # blank lines before the first title belong to its document
            yield checked(f"{path.name} document {index}", b"".join(lines))
            index, lines, blank = index + 1, [], True
        lines.append(line)
        blank = blank and line.isspace()
    yield checked(f"{path.name} document {index}", b"".join(lines))


def checked(where: str, raw: bytes) -> Document:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}; convert it first "
                         "(iconv -t utf-8)") from None
    return where, raw


def jsonl_documents(path: Path, field: str) -> Iterator[Document]:
    for number, line in enumerate(read_lines(path), 1):
        if line.isspace():
            continue
        where = f"{path.name} line {number}"
        try:
            text = json.loads(line)[field]
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} is not JSON ({error}); each line must be an object with {field!r}") from None
        except (KeyError, TypeError, IndexError):
            raise ValueError(f"{where} has no field {field!r}; name the one that holds the text with --field") from None
        yield where, encoded(where, field, text)


def encoded(where: str, field: str, text: str) -> bytes:
    if type(text) is not str:
        raise ValueError(f"{where}: field {field!r} holds {type(text).__name__}, not text; choose another with --field")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: character {error.start} is half of a surrogate pair, which UTF-8 cannot hold; "
                         "repair or remove the document") from None


def hf_documents(name: str, config: str | None, split: str, field: str) -> Iterator[Document]:
    for index, row in enumerate(hf_rows(name, config, split)):
        where = f"{name} row {index}"
        if field not in row:
            raise ValueError(f"{where} has no field {field!r} but {sorted(row)}; choose one with --field")
        yield where, encoded(where, field, row[field])


def hf_rows(name: str, config: str | None, split: str) -> Iterator[dict]:
    import datasets  # only here: they take seconds to import
    import httpx

    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except (OSError, RuntimeError, ValueError, httpx.HTTPError) as error:
        message = " ".join(str(error).split())[:300]
        raise ValueError(f"--hf {name} cannot be read ({type(error).__name__}: {message}); check the name, "
                         "--hf-config, --hf-split and the network, and start again") from None


def spool(source: Source, path: Path, limit: int | None) -> Source:
    """Writes the documents of a source to a JSON lines file (of at most `limit` not empty ones) and returns that."""
    with zstandard.open(path, "wt", encoding="utf-8") as file:
        for _, raw in source.documents():
            file.write(json.dumps({"text": raw.decode()}, ensure_ascii=False) + "\n")
            limit = limit - bool(raw) if limit else limit
            if limit == 0:
                break
    return Source("jsonl", (str(path),))


@functools.cache  # parsing takes seconds, the text is two megabytes, and it is read two or three times
def pydocs() -> tuple[Document, ...]:
    """Returns the documentation inside this Python: one document per help topic, one per standard-library module."""
    from pydoc_data.topics import topics

    documents = {}
    for where, text in [*sorted(topics.items()), *module_docs(Path(sysconfig.get_paths()["stdlib"]))]:
        raw = text.encode("utf-8", "backslashreplace")
        if raw.strip() and raw not in documents:
            documents[raw] = f"pydocs {where}"
    return tuple((where, raw) for raw, where in documents.items())


def module_docs(stdlib: Path) -> list[tuple[str, str]]:
    """Returns (relative path, docstrings in source order) of each module, read from source: nothing is imported."""
    docs = []
    gc.disable()  # syntax trees are many small objects that the collector would walk again and again: 3x the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules have invalid escapes
            for path in sorted(stdlib.rglob("*.py"), key=lambda path: path.relative_to(stdlib).as_posix()):
                relative = path.relative_to(stdlib)
                if NOT_PROSE.intersection(relative.parts):
                    continue
                try:
                    tree = ast.parse(path.read_bytes())
                except (SyntaxError, ValueError):  # templates of other tools
                    continue
                docs.append((relative.as_posix(), "\n\n".join(docstrings(tree))))
    finally:
        gc.enable()
    return docs


def docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):  # definitions hide in if, try and with
            yield from docstrings(child)
