"""How small do trained weights get: coders compared, and what fewer bits and wider clips cost in bits per byte.

    python -m tools.sizes MODEL.bin...                       bytes, speed and distance to the entropy of each coder
    python -m tools.sizes MODEL.bin --score data/datasets/NAME       and val_bpb after the round trip, by QUANT_CLIP
    python -m tools.sizes fp32.bin --bits 8,4 --clips 4,16 --score-tokens 65536

Table here, all numbers in records/benchmarks/sizes_<machine>.json. Weights are quantised again as training would, so
those of an 8-bit artifact carry its rounding too. Coders get one byte a weight; `packed` has its bits in a row instead.
"""

import argparse
import json
import lzma
import math
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch
import zstandard

from architectures import load_architecture
from architectures.layers import LanguageModel, is_control
from tools.referee.artifact import Foreign, read_artifact
from train_gpt import (
    CODED_SIDE,
    SIZE_CLASSES,
    Dataset,
    Machine,
    ScorePlan,
    class_of,
    coarsest_clip,
    fill_generated,
    frequencies,
    hardware_name,
    load_artifact,
    pack_artifact,
    quantize_rows,
    rans_decode,
    rans_encode,
    save_atomically,
    score,
    size_classes,
)

ROOT = Path(__file__).resolve().parent.parent
CLIPS = (2.5, 3.5, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
Codec = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]  # pack, unpack


def load_model(path: Path) -> tuple[LanguageModel, dict]:
    """(the model of an artifact of any version, its header); ValueError if it is none or fits no architecture here."""
    try:
        header, tensors, _ = read_artifact(path.read_bytes())
        Model, Config = load_architecture(header["arch"])
        model = Model(Config(**header["config"]))
        model.load_state_dict({name: torch.tensor(t.value()) for t in tensors for name in t.names})
    except (Foreign, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is no artifact of this kit's architectures: {str(error).splitlines()[0]}") from None
    fill_generated(model.eval().requires_grad_(False))
    return model, header


def quantised(model: LanguageModel, bits: int, clip: float | None) -> list[np.ndarray]:
    """The int8 values (rows, columns) of every matrix that an artifact codes."""
    weights = [p for p in model.folded().parameters() if not is_control(p) and p.dim() > 1]
    found = [quantize_rows(p, bits, clip)[0].numpy() for p in weights]
    return [values for values in found if min(values.shape) >= CODED_SIDE]


def joined(matrices: Iterable[np.ndarray]) -> bytes:
    return b"".join(values.tobytes() for values in matrices)


def packed(matrices: list[np.ndarray], bits: int) -> bytes:
    """The numbers one after another at `bits` bits each."""
    numbers = np.frombuffer(joined(matrices), np.uint8)
    return np.packbits(np.unpackbits(numbers[:, None], axis=1)[:, 8 - bits :]).tobytes()


def rans_codec(shapes: list[tuple[int, int]]) -> Codec:
    """The artifact's own coder for matrices of these shapes, the tables and classes that it needs counted."""
    ends = np.cumsum([0, 2 * 256 * SIZE_CLASSES, *(side for shape in shapes for side in shape)]).tolist()

    def pack(raw: bytes) -> bytes:
        at = np.cumsum([0, *(math.prod(shape) for shape in shapes)])
        values = [np.frombuffer(raw, np.int8)[at[i] : at[i + 1]].reshape(shape) for i, shape in enumerate(shapes)]
        parts = [size_classes(matrix) for matrix in values]
        symbols = np.concatenate([class_of(*part) for part in parts]) * np.uint16(256) + np.frombuffer(raw, np.uint8)
        tables = frequencies(np.bincount(symbols, minlength=SIZE_CLASSES * 256).reshape(SIZE_CLASSES, 256))
        planes = tables.astype("<u2").reshape(-1).view(np.uint8).reshape(-1, 2).T.tobytes()
        side = zstandard.ZstdCompressor(level=22).compress(
            planes + b"".join(x.tobytes() for part in parts for x in part)
        )
        return len(side).to_bytes(4, "little") + side + rans_encode(symbols, tables)

    def unpack(blob: bytes) -> bytes:
        begin = 4 + int.from_bytes(blob[:4], "little")
        side = np.frombuffer(zstandard.ZstdDecompressor().decompress(blob[4:begin]), np.int8)
        planes, *parts = (side[i:j] for i, j in pairwise(ends))
        tables = planes.view(np.uint8).reshape(2, -1).T.copy().view("<u2").reshape(SIZE_CLASSES, 256).astype(np.int64)
        classes = [class_of(*part) for part in zip(parts[::2], parts[1::2], strict=True)]
        return rans_decode(memoryview(blob)[begin:], np.concatenate(classes), tables).tobytes()

    return pack, unpack


def codecs(shapes: list[tuple[int, int]]) -> dict[str, Codec]:
    """Every coder there is here, by name; brotli is no dependency of the kit."""
    level = zstandard.ZstdCompressor(level=22)
    found = {
        "rans": rans_codec(shapes),
        "zstd-22": (level.compress, zstandard.ZstdDecompressor().decompress),
        "lzma-9e": (lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
    }
    if find_spec("brotli"):
        import brotli

        found["brotli-11"] = (lambda raw: brotli.compress(raw, quality=11, lgwin=24), brotli.decompress)
    return found


def entropy_bytes(raw: bytes) -> float:
    """Bytes of the order-0 entropy of bytes."""
    counts = np.bincount(np.frombuffer(raw, np.uint8))
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def compare_coders(matrices: list[np.ndarray], bits: int, rounds: int) -> list[dict]:
    """A row for each coder and order of the numbers; ValueError if what comes back differs from what went in."""
    orders = {"rows": joined(matrices), "columns": joined(values.T for values in matrices)}
    orders |= {"packed": packed(matrices, bits)} if bits < 8 else {}
    count, least, rows = len(orders["rows"]), entropy_bytes(orders["rows"]), []
    for name, (pack, unpack) in codecs([values.shape for values in matrices]).items():
        for order, raw in orders.items():
            if name == "rans" and order != "rows":
                continue
            size = (laps := [lap(pack, unpack, raw, f"{name} {order}") for _ in range(rounds)])[0][2]
            rows.append(dict(bits=bits, coder=name, order=order, numbers=count, entropy_bytes=round(least), bytes=size))
            rows[-1] |= dict(bits_per_weight=round(8 * size / count, 4), over_entropy=round(size / least - 1, 5))
            rows[-1] |= dict(pack_seconds=[r[0] for r in laps], unpack_seconds=[r[1] for r in laps])
    return rows


def lap(pack: Callable, unpack: Callable, raw: bytes, name: str) -> tuple[float, float, int]:
    """(seconds to pack, to unpack, bytes packed) of one round trip, in this process's own processor time."""
    times = [time.process_time()]
    blob = pack(raw)
    times.append(time.process_time())
    again = unpack(blob)
    times.append(time.process_time())
    if again != raw:
        raise ValueError(f"{name} does not give back what it was given")
    return round(times[1] - times[0], 4), round(times[2] - times[1], 4), len(blob)


def score_sizes(model: LanguageModel, header: dict, folder: str, options: argparse.Namespace) -> list[dict]:
    """A row for each number of bits and clip: bytes of model.bin and val_bpb of what comes back; the first as it is."""
    tokens, val_bytes, _ = Dataset(folder, None).validation(options.score_tokens)
    plan, machine = ScorePlan(**header["score"]), Machine(torch.device("cpu"))
    base = score(model, tokens, val_bytes, plan, machine, None)
    rows = [dict(bits=None, clip=None, bytes_model=None, val_bpb=base.val_bpb, cost=0.0)]
    for bits in options.bits:
        for clip in [None, *(k for k in options.clips if k <= coarsest_clip(bits))]:
            blob = pack_artifact(model, header["arch"], None, plan, header["progress"], bits, clip)
            found = score(load_artifact(blob, machine.device)[0], tokens, val_bytes, plan, machine, None)
            row = dict(bits=bits, clip=clip, bytes_model=len(blob), val_bpb=found.val_bpb)
            rows.append(row | dict(cost=found.val_bpb - base.val_bpb, val_tokens=found.val_tokens))
            print(score_line(rows[-1]), flush=True)
    return rows


def score_line(row: dict) -> str:
    clip = f"{row['clip']:g}" if row["clip"] else "least error"
    return f"{row['bits']:>4} {clip:>11} {row['bytes_model']:>11,} {row['val_bpb']:>9.5f} {row['cost']:>+9.5f}"


def coder_line(row: dict) -> str:
    seconds = median(row["pack_seconds"]), median(row["unpack_seconds"])
    return (
        f"{row['bits']:>4} {row['coder']:>10} {row['order']:>8} {row['bytes']:>11,} {row['bits_per_weight']:>9.4f} "
        f"{row['over_entropy']:>+9.2%} {seconds[0]:>8.2f} {seconds[1]:>8.2f}"
    )


def measure(path: Path, options: argparse.Namespace) -> dict:
    """All that is asked of one artifact, printed as it is found."""
    model, header = load_model(path)
    name, coders = f"{path.resolve().parent.name}/{path.name}", []
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {path.stat().st_size:,} bytes")
    print("bits      coder    order       bytes    bits/w  /entropy   pack s   back s")
    for bits in options.bits:
        matrices = quantised(model, bits, None)
        if not matrices:
            raise ValueError(f"{name} has no matrix of at least {CODED_SIDE} x {CODED_SIDE} to compare coders on")
        rows = compare_coders(matrices, bits, options.rounds)
        coders += rows
        print(*map(coder_line, rows), sep="\n", flush=True)
    found = dict(model=name, config=header["config"], stored_bits=header["quant_bits"], coders=coders)
    if options.score:
        found["dataset"] = Path(options.score).name
        print("bits        clip   model.bin   val_bpb      cost")
        found["scores"] = score_sizes(model, header, options.score, options)
    return found


def numbers(kind: type) -> Callable[[str], list]:
    return lambda text: [kind(word) for word in text.split(",")]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--score", metavar="DATA", help="data folder whose validation text is scored")
    parser.add_argument("--score-tokens", type=int, default=16_384, help="of it, from the beginning")
    parser.add_argument("--bits", type=numbers(int), default=[8, 6, 5, 4])
    parser.add_argument("--clips", type=numbers(float), default=list(CLIPS))
    parser.add_argument("--rounds", type=int, default=3, help="that every coder is timed")
    parser.add_argument("--out", type=Path, default=ROOT / "records" / "benchmarks")
    options = parser.parse_args(argv)
    try:
        if not all(4 <= bits <= 8 for bits in options.bits):
            raise ValueError(f"--bits {','.join(map(str, options.bits))} must each be 4 to 8")
        hardware = hardware_name(Machine(torch.device("cpu")))
        machine = dict(hardware=hardware, threads=torch.get_num_threads(), python=platform.python_version())
        head = dict(part="sizes", date=str(date.today()), machine=machine, torch=torch.__version__)
        path = options.out / f"sizes_{re.sub('[^a-z0-9]+', '_', hardware.lower()).strip('_')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        found = []
        for model in options.models:  # written after each: a long measurement that is stopped keeps what it has
            found.append(measure(model, options))
            save_atomically(path, json.dumps(head | dict(models=found), indent=1).encode() + b"\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
