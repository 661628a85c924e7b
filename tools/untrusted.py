"""Reads files and values that strangers wrote: whatever they hold, the answer is a plain value, never an exception."""

import json
from pathlib import Path

MAX_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 32
LARGEST = 1e15


def read_text(path: Path, problems: list[str]) -> str:
    """Returns the file's text whatever its encoding, at most MAX_BYTES of it; "" and a problem if it cannot be read."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES)
    except (OSError, ValueError) as error:
        problems.append(f"cannot read {text(path.name)}: {type(error).__name__}")
        return ""
    wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")  # a Windows shell redirects to UTF-16
    return raw.decode("utf-16" if wide else "utf-8-sig", errors="replace")


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
