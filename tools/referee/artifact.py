"""The referee's own reader and writer of model.bin, which shares no code with the script that is judged.

Magic, version, header length and checksum; a JSON header; one zstd frame with the tensors one after another, each as
all first bytes of its numbers, all second bytes and so on.
"""

import hashlib
import json
import math
import struct
import zlib
from typing import NamedTuple

import numpy as np
import zstandard

from tools.untrusted import load_json, text

MAGIC, VERSION, PREFIX = b"PGOLFKIT", 1, struct.Struct("<8sIII")  # magic, version, bytes and crc32 of the header
DTYPES = {name: np.dtype(name).newbyteorder("<") for name in
          ("float32", "float16", "int64", "int32", "uint8", "int8", "bool")}
MAX_RAW_BYTES, MAX_TENSORS = 1 << 28, 10_000
PIECE = 1 << 10  # of a frame, which unpacks to at most 32 MiB


class Foreign(Exception):
    """An artifact is not in the kit's format; the message says why."""


class Tensor(NamedTuple):
    """One tensor of an artifact; names are all that share it, data the bytes as they are stored."""

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
    if version != VERSION or zlib.crc32(raw) != checksum or not isinstance(header, dict):
        raise Foreign(f"its header is damaged or of another version {reason}".strip())
    frame = blob[PREFIX.size + header_bytes :]
    try:
        data, behind = unpack(frame)
        tensors, left = split(header["tensors"], data)
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


def split(entries: list, data: bytes) -> tuple[list[Tensor], int]:
    """The tensors that lie one after another in the data, and the bytes behind them."""
    tensors, position = {}, 0
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
        size = count + 2 * math.prod(shape[:-1]) if kind == "rows" and shape else count * DTYPES[kind].itemsize
        if position + size > len(data):
            raise ValueError(f"{text(name)[:100]} is longer than its data")
        tensors[name] = Tensor([name], kind, shape, data[position : position + size])
        position += size
    return list({id(tensor): tensor for tensor in tensors.values()}.values()), len(data) - position


def write_artifact(header: dict, tensors: list[Tensor], values: dict[str, np.ndarray]) -> bytes:
    """A model.bin with other values for some tensors, by their first name."""
    entries, chunks = [], []
    for tensor in tensors:
        kind, data = tensor.kind, tensor.data
        if tensor.name in values:
            value = np.ascontiguousarray(values[tensor.name])
            kind, data = value.dtype.name, value.reshape(-1).view(np.uint8).reshape(-1, value.itemsize).T.tobytes()
        entries += [[tensor.name, kind, tensor.shape], *([name, "same", tensor.name] for name in tensor.names[1:])]
        chunks.append(data)
    payload = b"".join(chunks)
    frame = zstandard.ZstdCompressor(level=1).compress(payload)
    header = header | {"tensors": entries, "raw_bytes": len(payload), "frame_sha256": hashlib.sha256(frame).hexdigest()}
    raw = json.dumps(header, separators=(",", ":")).encode()
    return PREFIX.pack(MAGIC, VERSION, len(raw), zlib.crc32(raw)) + raw + frame
