"""The data folder: shards in upstream's format, lists of documents, and the manifest that makes it a data set."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data.sources import file_identity

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SPLITS = ("train", "val")


class SplitWriter:
    """Writes one split's documents; a document may begin in one shard and end in the next, as upstream's do."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.shard_bytes = folder, split, 2 * shard_tokens
        self.waiting = bytearray()
        self.shards: list[dict] = []
        self.documents = self.bytes = self.tokens = 0
        self.list = (folder / f"{split}_docs.txt").open("w", encoding="ascii", newline="\n")

    def add(self, digest: str, bytes_raw: int, tokens: bytes) -> None:
        self.list.write(f"{digest} {bytes_raw} {len(tokens) // 2}\n")
        self.documents += 1
        self.bytes += bytes_raw
        self.tokens += len(tokens) // 2
        self.waiting += tokens
        while len(self.waiting) >= self.shard_bytes:
            self.write_shard(self.shard_bytes)

    def write_shard(self, size: int) -> None:
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = MAGIC, VERSION, size // 2
        file = f"fineweb_{self.split}_{len(self.shards):06d}.bin"
        with memoryview(self.waiting) as waiting, (self.folder / file).open("wb") as shard:
            digest = hashlib.sha256(header.tobytes())
            digest.update(waiting[:size])
            shard.write(header.tobytes())
            shard.write(waiting[:size])
        del self.waiting[:size]
        self.shards.append({"file": file, "sha256": digest.hexdigest(), "tokens": size // 2})

    def close(self) -> dict:
        """Returns the split's part of the manifest."""
        if self.waiting:
            self.write_shard(len(self.waiting))
        self.list.close()
        return {"shards": self.shards, "documents": self.documents, "tokens": self.tokens, "bytes": self.bytes,
                "documents_file": Path(self.list.name).name,
                "documents_sha256": file_identity(Path(self.list.name))["sha256"]}


def read_shard(path: Path) -> np.ndarray:
    """Returns the tokens of a shard, mapped from disk."""
    header = np.fromfile(path, "<i4", 3)
    if header.size < 3 or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"{path} does not start as a shard does ({MAGIC}, {VERSION}); make it again with --force")
    if path.stat().st_size != HEADER_BYTES + 2 * int(header[2]):
        raise ValueError(f"{path} should hold {header[2]} tokens, but has {path.stat().st_size} bytes; make it again "
                         "with --force")
    return np.memmap(path, "<u2", "r", HEADER_BYTES, (int(header[2]),))


def read_manifest(folder: Path) -> dict | None:
    """Returns the manifest of a complete data set, None where there is none; an error names what is damaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    manifest = json.loads(path.read_text())
    small = {manifest["tokenizer"]["file"]: manifest["tokenizer"]["sha256"]}
    for entry in manifest["splits"].values():
        small[entry["documents_file"]] = entry["documents_sha256"]
        for shard in entry["shards"]:  # their sizes only: this is called often, and a hash takes a second per shard
            file = folder / shard["file"]
            if not file.is_file() or len(read_shard(file)) != shard["tokens"]:
                raise ValueError(f"{file} is missing or short; make it again with --force")
    for name, digest in small.items():
        if not (folder / name).is_file() or file_identity(folder / name)["sha256"] != digest:
            raise ValueError(f"{folder / name} is missing or not what was written; make it again with --force")
    return manifest


def write_manifest(folder: Path, manifest: dict) -> None:
    temporary = folder / "manifest.json.partial"
    temporary.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "manifest.json")


def report(folder: Path, manifest: dict) -> str:
    """Returns what a user wants to know at the end: what is where, what was changed, what to do next."""
    lines = [f"data: {folder}"]
    for split, entry in manifest["splits"].items():
        sizes = [f"{entry[key]:,} {key}" for key in ("documents", "tokens", "bytes")]
        lines.append(f"{split}: {', '.join(sizes)}, {entry['bytes'] / entry['tokens']:.4f} bytes per token")
    counts = {"dropped_duplicates": "dropped duplicates", "empty_documents": "dropped empty",
              "kept_duplicates": "kept duplicates", "train_documents_in_val": "train documents that are in val too"}
    lines.append(", ".join(f"{words}: {manifest[key]:,}" for key, words in counts.items() if key in manifest))
    for split, entry in manifest.get("rewritten", {}).items():
        if entry["documents"]:
            lines.append(f"rewritten in {split}: {entry['documents']:,} documents, {entry['bytes_before']:,} bytes "
                         f"became {entry['bytes_after']:,}; a score on this text is not one on the original")
    shortest = min(os.path.relpath(folder), str(folder), key=len)
    return "\n".join([*lines, f"next: DATA_PATH={shortest} python train_gpt.py"])


@contextmanager
def partial_folder(folder: Path, keep: bool = False) -> Iterator[Path]:
    """Yields a folder to write into, which replaces `folder` at the end; an error removes it, a kill leaves it.

    With keep, what an earlier run left there stays (a download resumes)."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{partial} is being written by another process; wait for it, or choose another --name") \
                from None
        (partial / "manifest.json").unlink(missing_ok=True)
        if not keep:
            empty(partial)
        try:
            yield partial
        except BaseException:
            if not keep:
                shutil.rmtree(partial)
            raise
        if folder.exists():
            (folder / "manifest.json").unlink(missing_ok=True)  # first: what is half removed is no data set
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        os.close(lock)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
