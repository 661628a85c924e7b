"""Reads files and values that strangers wrote: whatever they hold, the answer is a plain value, never an exception."""

import json
import os
import stat
from pathlib import Path

MAX_BYTES = 16 * 1024 * 1024
MAX_DEPTH = 32
MAX_FILES = 2_000  # of one folder, folders among them
MAX_FOLDERS_DEEP = 8
LARGEST = 1e15


def read_bytes(path: Path, problems: list[str], max_bytes: int = MAX_BYTES) -> bytes:
    """Returns at most max_bytes of a file; b"" and a problem if it cannot be read or is a pipe or a device."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe that nobody writes to would wait
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError("not a file")
            raw = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        problems.append(f"cannot read {text(path.name)}: {type(error).__name__}")
        return b""
    if len(raw) > max_bytes:
        problems.append(f"{text(path.name)} has more than {max_bytes:,} bytes; the rest was not read")
    return raw[:max_bytes]


def read_text(path: Path, problems: list[str], max_bytes: int = MAX_BYTES) -> str:
    """Returns the file's text whatever its encoding, at most max_bytes of it; "" and a problem if it cannot be read."""
    raw = read_bytes(path, problems, max_bytes)
    wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")  # a Windows shell redirects to UTF-16
    return raw.decode("utf-16" if wide else "utf-8-sig", errors="replace")


def plain_files(folder: Path, problems: list[str]) -> list[Path]:
    """Returns the files under a folder, sorted; a problem for links, which are not followed, pipes and devices."""
    files, waiting, seen = [], [(folder, 0)], 0
    while waiting:
        inside, depth = waiting.pop()
        try:
            with os.scandir(inside) as entries:
                for entry in entries:
                    seen += 1
                    if seen > MAX_FILES:
                        problems.append(f"{text(folder.name)} holds more than {MAX_FILES} files; the rest was not read")
                        return sorted(files)
                    path = Path(entry.path)
                    if entry.is_file(follow_symlinks=False):
                        files.append(path)
                    elif not entry.is_dir(follow_symlinks=False):
                        problems.append(f"{text(entry.name)} is a link, a pipe or a device; it was not read")
                    elif depth < MAX_FOLDERS_DEEP:
                        waiting.append((path, depth + 1))
                    else:
                        problems.append(f"{text(entry.name)} lies more than {MAX_FOLDERS_DEEP} folders deep; "
                                        "it was not read")
        except (OSError, ValueError) as error:
            problems.append(f"cannot list {text(inside.name)}: {type(error).__name__}")
    return sorted(files)


def load_json(content: str) -> tuple[object, str]:
    """Returns the parsed value and "", or None and the reason; what it returns is safe to walk by recursion."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        return None, text(str(error))
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list)
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return (None, "nested too deep") if level else (value, "")


def text(value: object) -> str:
    """Returns one printable line: no control or bidirectional characters, no lone surrogates."""
    if isinstance(value, dict):
        value = ", ".join(f"{key} {inner}" for key, inner in list(value.items())[:20])
    elif isinstance(value, list):
        value = ", ".join(str(inner) for inner in value[:20])
    if value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) > 10**18):
        return ""
    line = str(value)[:4000]
    return " ".join("".join(char if char.isprintable() else " " for char in line).split())


def number(value: object) -> float | None:
    """Returns a float below LARGEST from a number or a string that is one ("1.2244", "15,863,489"), else None."""
    if isinstance(value, str):
        value = value.replace(",", "").replace("_", "").strip()[:40]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if abs(found) < LARGEST else None  # neither infinite nor NaN


def count(value: object) -> int | None:
    """Returns a positive whole number, else None."""
    found = number(value)
    return round(found) if found is not None and found > 0 else None


def first(data: dict, *keys: str) -> object:
    """Returns the first of these values that is there and not empty, else None."""
    return next((data[key] for key in keys if data.get(key) not in (None, "", [], {})), None)
