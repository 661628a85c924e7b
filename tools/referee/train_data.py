"""The data folder that a short training run gets: a copy of the judge's, or a made-up one; and taking it away again."""

import json
import math
import os
import stat
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.shards import SplitWriter, file_identity, write_manifest
from data.tokenizers import BYTE260
from tools.referee.case import Case, Data
from tools.referee.rules import Skip
from tools.referee.sandbox import Box, Broken
from tools.referee.streams import MADE_UP_DOCUMENT, made_up_text
from tools.untrusted import text

DATA_BYTES = 1 << 30  # of train shards that are copied
MADE_UP_TOKENS = {"train": 1 << 16, "val": 1 << 13}


class TrainingData(NamedTuple):
    """The files of a data folder, by name; which of them are train shards; and tokens to score."""

    files: dict[str, Path]
    train: list[str]
    tokens: np.ndarray


def judges_files(data: Data) -> TrainingData:
    splits = data.manifest["splits"]
    train, val = ([shard["file"] for shard in splits[split]["shards"]] for split in ("train", "val"))
    needed = ["manifest.json", data.manifest["tokenizer"]["file"], *train, *val]
    for name in needed:
        if not (data.folder / name).is_file():
            raise Skip(f"{data.folder / name} is not there; this needs the training text too")
    size = sum((data.folder / name).stat().st_size for name in train)
    if size > DATA_BYTES:
        raise Skip(f"the train shards of {data.name} have {size:,} bytes; the referee copies at most {DATA_BYTES:,}, "
                   "to take them away when time is up")
    return TrainingData({name: data.folder / name for name in needed}, train, data.tokens)


def make_up_data(folder: Path, vocab_size: int, seq_len: int, case: Case) -> TrainingData:
    """A small data folder of made-up text in bytes, for the short check without data."""
    folder.mkdir()
    config = BYTE260["config"] | {"byte_count": min(256, vocab_size - BYTE260["config"]["byte_offset"])}
    offset, bos_id = config["byte_offset"], config["bos_id"]
    size = offset + config["byte_count"]
    (folder / "tokenizer.json").write_text(json.dumps(BYTE260 | {"config": config, "vocab_size": size}))
    about = {"kind": "byte260", "file": "tokenizer.json", "vocab_size": size, "bos_id": bos_id,
             "sha256": file_identity(folder / "tokenizer.json")["sha256"]}
    manifest, texts = {"format": 1, "name": "made_up", "tokenizer": about, "splits": {}}, {}
    for split, least in MADE_UP_TOKENS.items():
        length = -(-max(least, 4 * seq_len) // MADE_UP_DOCUMENT) * MADE_UP_DOCUMENT
        tokens = made_up_text(size - offset, length, case.random(f"{split} text")).astype(np.uint16) + offset
        tokens[::MADE_UP_DOCUMENT] = bos_id
        writer = SplitWriter(folder, split, length)
        for place, document in enumerate(tokens.reshape(-1, MADE_UP_DOCUMENT)):
            writer.add(f"{place:032x}", MADE_UP_DOCUMENT - 1, document.astype("<u2").tobytes())
        manifest["splits"][split], texts[split] = writer.close(), tokens
    write_manifest(folder, manifest)
    train = [shard["file"] for shard in manifest["splits"]["train"]["shards"]]
    return TrainingData({path.name: path for path in folder.iterdir()}, train, texts["val"])


def open_inside(folder: Path, *names: str, flags: int) -> int:
    """A descriptor of a plain file below the folder. No name is followed as a link: the submission may lay some."""
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in names[:-1]:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
            os.close(place)
            place = inner
        file = os.open(names[-1], flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place)
    finally:
        os.close(place)
    about = os.fstat(file)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1:
        os.close(file)
        raise OSError(f"{names[-1]} is not a plain file")
    return file


class Shards:
    """The train shards in the box, held open so that they can be emptied wherever they are moved to."""

    def __init__(self, box: Box, names: list[str]):
        self.timer, self.due, self.emptied, self.files = None, math.inf, None, []
        try:
            for name in names:
                self.files.append(open_inside(box.folder, "data", name, flags=os.O_RDWR))
        except OSError as error:
            self.close()
            raise Broken(f"it changed its data folder as it started: {text(str(error))[:200]}") from None

    def empty_at(self, moment: float) -> None:
        """Empties them then, if not before."""
        if moment < self.due:
            if self.timer:
                self.timer.cancel()
            self.due, self.timer = moment, threading.Timer(max(0.0, moment - time.monotonic()), self.empty)
            self.timer.start()

    def empty(self) -> None:
        if self.emptied is None:
            self.emptied = time.monotonic()
            for file in self.files:
                os.ftruncate(file, 0)

    def close(self) -> None:
        if self.timer:
            self.timer.cancel()
            self.timer.join()
        for file in self.files:
            os.close(file)
