"""A record under examination and the judge's own data: what is there, and of which type."""

import hashlib
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data.shards import read_shard
from tools.logs import Log, read_log
from tools.pack import unpack
from tools.untrusted import load_json, read_text, text

# The fields that rules rely on. A number may be whole or not; a whole number may not have a fraction.
SUBMISSION = {
    **dict.fromkeys(("author", "github_id", "name", "blurb", "date", "track", "arch", "dataset", "hardware"), str),
    **dict.fromkeys(("val_loss", "val_bpb", "cap_seconds"), float),
    **dict.fromkeys(("bytes_code", "bytes_model_max", "bytes_total", "val_bytes", "val_tokens", "params"), int),
    **{"torch": str, "seeds": list, "seed_results": dict, "verdict": dict},
}
SEED_RESULT = {
    **dict.fromkeys(("val_loss", "val_bpb"), float), "steps": int,
    **dict.fromkeys(("train_seconds", "score_seconds"), float),
    **dict.fromkeys(("bytes_model", "bytes_total"), int), "artifact_sha256": str,
}
RESULT = {
    **SEED_RESULT,
    **dict.fromkeys(("seed", "bytes_code", "val_tokens", "val_bytes", "params", "world_size"), int),
    **dict.fromkeys(("eval_seq_len", "eval_stride"), int), **dict.fromkeys(("nats_sum", "cap_seconds"), float),
    **dict.fromkeys(("valid", "partial", "interrupted"), bool),
    **dict.fromkeys(("arch", "code_sha256", "config_sha256", "data_sha256", "tokenizer_sha256"), str),
    **dict.fromkeys(("dataset", "device", "hardware", "torch", "python"), str),
}
WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list",
         dict: "an object"}


def mistyped(value: object, fields: dict[str, type]) -> list[str]:
    """Returns what is wrong with the fields of a value from JSON."""
    if not isinstance(value, dict):
        return ["it is not an object"]
    problems = []
    for key, kind in fields.items():
        found = value.get(key)
        if key not in value:
            problems.append(f"{key} is missing")
        elif type(found) is not kind and not (kind is float and type(found) is int):
            problems.append(f"{key} must be {WORDS[kind]}")
        elif kind in (int, float) and not (-2**63 < found < 2**63 and math.isfinite(found)):
            problems.append(f"{key} is out of range")
    return problems


def config_of(path: Path) -> dict:
    """Returns the settings in the first line of a log of the kit, {} if it is not config:{json}."""
    first = next(iter(read_text(path, []).splitlines()), "")
    value = load_json(first.removeprefix("config:"))[0] if first.startswith("config:") else None
    return value if isinstance(value, dict) else {}


def is_plain(path: Path) -> bool:
    """Whether it is a file, not a link, pipe or device that opening would follow or wait for."""
    return path.is_file() and not path.is_symlink()


def sha256(path: Path) -> str:
    if not is_plain(path):
        raise ValueError(f"{path.name} is missing or not a plain file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class Data:
    """The judge's validation text, from a data folder of its own and never from a submission."""

    folder: Path
    manifest: dict
    manifest_sha256: str
    tokens: np.ndarray  # uint16

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def tokenizer(self) -> Path:
        return self.folder / self.manifest["tokenizer"]["file"]

    @property
    def tokenizer_sha256(self) -> str:
        return self.manifest["tokenizer"]["sha256"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def bos_id(self) -> int:
        return self.manifest["tokenizer"]["bos_id"]

    @property
    def val_bytes(self) -> int:
        return self.manifest["splits"]["val"]["bytes"]


def read_data(folder: Path) -> Data:
    """Returns the validation text of a data folder; ValueError if it is not whole."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no manifest.json; --data takes a folder that data/prepare.py made")
    manifest, reason = load_json(read_text(path, []))
    try:
        shards = [folder / shard["file"] for shard in manifest["splits"]["val"]["shards"]]
        for shard, stated in zip(shards, manifest["splits"]["val"]["shards"], strict=True):
            if sha256(shard) != stated["sha256"]:
                raise ValueError(f"{shard} is not the file that manifest.json describes; prepare it again")
        data = Data(folder.resolve(), manifest, sha256(path), np.concatenate([read_shard(shard) for shard in shards]))
        whole = data.tokenizer_sha256 and data.vocab_size > 1 and data.bos_id >= 0 and data.val_bytes > 0
    except (LookupError, TypeError, OSError) as error:
        raise ValueError(f"{path} is not a manifest of data/prepare.py: {reason or type(error).__name__} "
                         f"{text(str(error))[:100]}") from None
    if not whole or len(data.tokens) < 2:
        raise ValueError(f"{folder} holds no validation text")
    return data


@dataclass
class Case:
    """One record under examination. Nothing in it is trusted to be there or of its type."""

    folder: Path
    data: Data | None = None
    shadow: Data | None = None  # a text that nobody could train on, as another data folder
    pre: bool = False  # the short check: fewer and shorter streams, a few seconds of training
    seconds: float = 1800.0  # for scoring one stream
    seed: int | None = None  # of the places that are probed; None: from the record's own files
    say: Callable[[str], None] = lambda line: None

    @cached_property
    def record_sha256(self) -> str:
        """A hash of all that the record claims and ships, its verdict apart."""
        digest = hashlib.sha256()
        kept = {key: value for key, value in self.submission.items() if key != "verdict"}
        digest.update(json.dumps(kept, sort_keys=True).encode())
        for path in [self.script, *self.models.values(), *(log.path for log in self.logs)]:
            digest.update(sha256(path).encode() if is_plain(path) else b"missing")
        return digest.hexdigest()

    @property
    def probe_seed(self) -> int:
        """What the probes draw from: given by the judge, or the hash, so that it is not known before filing."""
        return self.seed if self.seed is not None else int(self.record_sha256[:8], 16)

    def random(self, purpose: str) -> random.Random:
        """Draws for one purpose: another for each record, the same when it is examined again."""
        return random.Random(f"{self.probe_seed} {purpose}")

    @property
    def script(self) -> Path:
        return self.folder / "train_gpt.py"

    @cached_property
    def submission(self) -> dict:
        path = self.folder / "submission.json"
        value, _ = load_json(read_text(path, []) if is_plain(path) else "")
        return value if isinstance(value, dict) else {}

    @cached_property
    def logs(self) -> list[Log]:
        return [read_log(path) for path in sorted(self.folder.glob("logs/*.log")) if is_plain(path)]

    @cached_property
    def results(self) -> dict[str, dict]:
        """The result line of every log, by the log's file name."""
        return {log.path.name: log.result or {} for log in self.logs}

    @cached_property
    def models(self) -> dict[int, Path]:
        """The artifacts in the folder, by seed."""
        named = [(re.fullmatch(r"model_seed(\d{1,18})", path.stem), path) for path in self.folder.glob("*.bin")]
        return {int(match[1]): path for match, path in sorted(named, key=str) if match and is_plain(path)}

    @cached_property
    def source(self) -> str:
        """The text of train_gpt.py, unpacked if it is compressed; "" if that fails."""
        try:
            return unpack(read_text(self.script, []))
        except (ValueError, RecursionError):
            return ""
