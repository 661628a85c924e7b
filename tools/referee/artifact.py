"""The referee's own reader and writer of model.bin, which shares no code with the script that is judged.

Magic, version, header length and checksum; a JSON header; one zstd frame with the tensors one after another, each as
all first bytes of its numbers, all second bytes and so on. In version 2 the numbers of large matrices lie behind that
frame as tools/referee/rans.py reads them, and what they need for it comes first in the frame.
"""

import hashlib
import json
import math
import struct
import zlib
from typing import NamedTuple

import numpy as np
import zstandard

from tools.referee.rans import EMPTY, TABLE_BYTES, read_coded
from tools.untrusted import load_json, text

MAGIC, VERSIONS, PREFIX = b"PGOLFKIT", (1, 2), struct.Struct("<8sIII")  # magic, version, bytes, crc32 of the header
DTYPES = {name: np.dtype(name).newbyteorder("<") for name in
          ("float32", "float16", "int64", "int32", "uint8", "int8", "bool")}
MAX_RAW_BYTES, MAX_TENSORS = 1 << 28, 10_000
PIECE = 1 << 10  # of a frame, which unpacks to at most 32 MiB


class Foreign(Exception):
    """An artifact is not in the kit's format; the message says why."""


class Tensor(NamedTuple):
    """One tensor of an artifact; names are all that share it, data its bytes as they are stored, or were coded."""

    names: list[str]
    kind: str
    shape: list[int]
    data: bytes

    @property
    def name(self) -> str:
        return self.names[0]

    def value(self) -> np.ndarray:
        """Its numbers, quantised rows multiplied out."""
        if self.kind != "rows":
            return unshuffled(self.data, DTYPES[self.kind]).reshape(self.shape)
        count = math.prod(self.shape)
        values, scales = unshuffled(self.data[:count], DTYPES["int8"]), unshuffled(self.data[count:], DTYPES["float16"])
        return (values.reshape(-1, self.shape[-1]) * scales.astype(np.float32)[:, None]).reshape(self.shape)


def unshuffled(data: bytes, dtype: np.dtype) -> np.ndarray:
    """Numbers that are stored as all first bytes, all second bytes and so on."""
    return np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1).T.copy().view(dtype).reshape(-1)


def read_artifact(blob: bytes) -> tuple[dict, list[Tensor], int]:
    """(header, tensors, bytes that belong to no tensor) of a model.bin; Foreign if it is not in the kit's format."""
    if len(blob) < PREFIX.size or not blob.startswith(MAGIC):
        raise Foreign("it does not begin with PGOLFKIT")
    _, version, header_bytes, checksum = PREFIX.unpack_from(blob)
    raw = blob[PREFIX.size : PREFIX.size + header_bytes]
    header, reason = load_json(raw.decode(errors="replace"))
    if version not in VERSIONS or zlib.crc32(raw) != checksum or not isinstance(header, dict):
        raise Foreign(f"its header is damaged or of another version {reason}".strip())
    body = blob[PREFIX.size + header_bytes :]
    try:
        end = len(body) if version == 1 else header["frame_bytes"]
        data, behind = unpack(body[:end])
        coded = []
        if version > 1:
            shapes = [shape for _, kind, shape in header["tensors"] if kind == "coded"]
            coded, used = read_coded(data, body[end:], shapes)
            data = data[used:]
        tensors, left = split(header["tensors"], data, coded)
    except (zstandard.ZstdError, TypeError, LookupError, OverflowError, AttributeError, ValueError) as error:
        raise Foreign(f"its tensors cannot be read: {text(str(error))[:200] or type(error).__name__}") from None
    return header, tensors, left + behind


def unpack(frame: bytes) -> tuple[bytes, int]:
    """(what a zstd frame holds, the bytes behind it); a small piece at a time, for its stated size may be a lie."""
    opener, parts, room = zstandard.ZstdDecompressor().decompressobj(), [], MAX_RAW_BYTES
    for begin in range(0, len(frame), PIECE):
        parts.append(opener.decompress(frame[begin : begin + PIECE]))
        room -= len(parts[-1])
        if room < 0:
            raise ValueError(f"they are more than {MAX_RAW_BYTES:,} bytes")
        if opener.eof:
            return b"".join(parts), len(opener.unused_data) + max(0, len(frame) - begin - PIECE)
    raise ValueError("they are cut short")


def split(entries: list, data: bytes, coded: list[bytes]) -> tuple[list[Tensor], int]:
    """The tensors that lie one after another in the data, and the bytes behind them; coded numbers go to their rows."""
    tensors, position, numbers = {}, 0, iter(coded)
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"there are {len(entries):,}, more than {MAX_TENSORS:,}")
    for name, kind, shape in entries:
        if kind == "same":
            tensors[shape].names.append(name)
            tensors[name] = tensors[shape]
            continue
        if not all(type(size) is int and size >= 0 for size in shape) or not isinstance(name, str) or name in tensors:
            raise ValueError(f"{text(name)[:100]} has no name of its own or no shape")
        count = math.prod(shape)
        rows = kind in ("rows", "coded") and shape
        size = 2 * math.prod(shape[:-1]) + count * (kind == "rows") if rows else count * DTYPES[kind].itemsize
        if position + size > len(data):
            raise ValueError(f"{text(name)[:100]} is longer than its data")
        values = next(numbers) if kind == "coded" else b""
        tensors[name] = Tensor([name], "rows" if rows else kind, shape, values + data[position : position + size])
        position += size
    return list({id(tensor): tensor for tensor in tensors.values()}.values()), len(data) - position


def write_artifact(header: dict, tensors: list[Tensor], values: dict[str, np.ndarray]) -> bytes:
    """A model.bin of the header's version with other values for some tensors, by their first name; nothing is coded."""
    entries, chunks = [], []
    for tensor in tensors:
        kind, data = tensor.kind, tensor.data
        if tensor.name in values:
            value = np.ascontiguousarray(values[tensor.name])
            kind, data = value.dtype.name, value.reshape(-1).view(np.uint8).reshape(-1, value.itemsize).T.tobytes()
        entries += [[tensor.name, kind, tensor.shape], *([name, "same", tensor.name] for name in tensor.names[1:])]
        chunks.append(data)
    version = 2 if "frame_bytes" in header else 1
    payload = b"".join(chunks if version == 1 else [bytes(TABLE_BYTES), *chunks])
    frame = zstandard.ZstdCompressor(level=1).compress(payload)
    body, header = frame, header | {"tensors": entries, "raw_bytes": len(payload)}
    if version > 1:
        body, header["frame_bytes"] = frame + EMPTY, len(frame)
    header["frame_sha256" if version == 1 else "body_sha256"] = hashlib.sha256(body).hexdigest()
    raw = json.dumps(header, separators=(",", ":")).encode()
    return PREFIX.pack(MAGIC, version, len(raw), zlib.crc32(raw)) + raw + body
