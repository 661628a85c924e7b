"""python data/prepare.py                                     Python's own documentation, no download
python data/prepare.py --text wiki.train.zst --split-at '^ = [^=].* = $' --val-text wiki.valid.zst
python data/prepare.py --jsonl documents.jsonl.zst --vocab-size 4096

Turns documents into a tokenizer, token shards and a manifest in data/datasets/<name>/, which train_gpt.py reads.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

if not __package__:  # run as a script: modules are found from the kit's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from data.encoding import Encoder, benchmark
from data.shards import SPLITS, SplitWriter, partial_folder, read_manifest, report, write_manifest
from data.sources import Document, Source, file_identity, spool
from data.tokenizers import BYTE260, describe_tokenizer, load_tokenizer, train_tokenizer

__all__ = ["benchmark", "main", "parse_options", "prepare"]


def parse_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("documents (default: the documentation inside this Python)")
    kind = source.add_mutually_exclusive_group()
    kind.add_argument("--text", nargs="+", default=[], metavar="FILE", help="text files (.zst, .gz), a document each")
    kind.add_argument("--jsonl", nargs="+", default=[], metavar="FILE", help="JSON lines (.zst, .gz)")
    kind.add_argument("--hf", metavar="NAME", help="a data set of the Hugging Face hub, streamed")
    source.add_argument("--split-at", metavar="REGEX", help="a line that matches starts a new document of a text file")
    source.add_argument("--hf-config", metavar="NAME")
    source.add_argument("--hf-split", metavar="NAME", default="train")
    source.add_argument("--field", metavar="NAME", default="text", help="holds the text in --jsonl and --hf")
    source.add_argument("--max-documents", type=int, metavar="N", help="read no more than the first N")
    source.add_argument("--dedupe", action="store_true", help="drop repeated train documents; else they are counted")
    split = parser.add_argument_group("validation (default: the documents whose hash falls below --val-fraction)")
    kind = split.add_mutually_exclusive_group()
    kind.add_argument("--val-text", nargs="+", default=[], metavar="FILE")
    kind.add_argument("--val-jsonl", nargs="+", default=[], metavar="FILE")
    split.add_argument("--val-fraction", type=float, default=0.05, metavar="F")
    split.add_argument("--val-documents", type=int, metavar="N", help="the first N documents, upstream's way")
    tokens = parser.add_argument_group("tokens")
    kind = tokens.add_mutually_exclusive_group()
    kind.add_argument("--vocab-size", type=int, metavar="N", help="of the tokenizer trained on train (default 1024)")
    kind.add_argument("--tokenizer", metavar="FILE.model", help="an existing SentencePiece model, or byte260")
    tokens.add_argument("--normalise", action="store_true", help="rewrite documents to what the tokenizer can hold")
    tokens.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N")
    tokens.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path(__file__).with_name("datasets"), metavar="FOLDER")
    output.add_argument("--name", help="default: <source>_<tokenizer>")
    output.add_argument("--force", action="store_true", help="replace what is there")
    options = parser.parse_args(argv)

    if options.split_at and not (options.text or options.val_text):
        raise ValueError("--split-at cuts --text files; pass one, or drop it")
    if not 0 < options.val_fraction < 1:
        raise ValueError(f"--val-fraction {options.val_fraction} must lie between 0 and 1")
    for name in ("max_documents", "val_documents", "shard_tokens", "processes"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    if options.name and not re.fullmatch(r"\w[\w.-]*", options.name, re.ASCII):
        raise ValueError(f"--name {options.name!r} must be a folder name of letters, digits and _ . -")
    options.vocab_size = None if options.tokenizer else options.vocab_size or 1024
    return options


class Splits:
    """Deals the documents to train and val."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        kind = "text" if options.text else "jsonl" if options.jsonl else "hf" if options.hf else "pydocs"
        self.source = Source(kind, tuple(options.text or options.jsonl), options.split_at, options.field,
                             options.hf, options.hf_config, options.hf_split)
        files = tuple(options.val_text or options.val_jsonl)
        kind = "text" if options.val_text else "jsonl"
        self.validation = Source(kind, files, options.split_at, options.field) if files else None
        self.empty = dict.fromkeys(SPLITS, 0)

    def identity(self) -> dict:
        """Returns everything that decides what is written; equal identities give equal data sets."""
        options = self.options
        split = {"validation": self.validation.identity()} if self.validation else \
            {"val_documents": options.val_documents} if options.val_documents else \
            {"val_fraction": options.val_fraction}
        tokenizer = options.tokenizer if options.tokenizer in (None, "byte260") else \
            file_identity(Path(options.tokenizer))["sha256"]
        return {**self.source.identity(), **split, "max_documents": options.max_documents, "dedupe": options.dedupe,
                "vocab_size": options.vocab_size, "tokenizer": tokenizer, "normalise": options.normalise,
                "shard_tokens": options.shard_tokens}

    def documents(self, split: str) -> Iterator[Document]:
        """Yields the documents of a split that are not empty; each call reads the source anew."""
        self.empty[split] = 0
        if self.validation and split == "val":
            yield from self.not_empty(split, self.validation)
            return
        documents = islice(self.not_empty(split, self.source), self.options.max_documents)
        for index, (where, raw) in enumerate(documents):
            if self.is_validation(index, raw) == (split == "val"):
                yield where, raw

    def not_empty(self, split: str, source: Source) -> Iterator[Document]:
        for where, raw in tqdm(source.documents(), split, unit=" documents", disable=not sys.stderr.isatty()):
            if raw:
                yield where, raw
            else:
                self.empty[split] += 1

    def is_validation(self, index: int, raw: bytes) -> bool:
        if self.validation:
            return False
        if self.options.val_documents:
            return index < self.options.val_documents
        # The text decides, not the position: a document stays in its split when others are added.
        return int.from_bytes(hashlib.sha256(raw).digest()[:8]) < self.options.val_fraction * 2**64

    def refuse_empty(self, split: str) -> None:
        options = self.options
        if self.validation and split == "val":
            raise ValueError(f"{self.validation.files[0]} holds no documents; pass another validation file")
        cause = "the source" if self.validation else f"--val-documents {options.val_documents}" \
            if options.val_documents else f"--val-fraction {options.val_fraction}"
        cut = "cut the text into documents with --split-at, " if options.text and not options.split_at else ""
        raise ValueError(f"{cause} leaves no {split} document; {cut}add documents, or pass --val-text FILE")


def write_tokenizer(options: argparse.Namespace, splits: Splits, folder: Path) -> Path:
    """Puts the tokenizer that was asked for into the folder; a trained one has seen train documents only."""
    path = folder / ("tokenizer.json" if options.tokenizer == "byte260" else "tokenizer.model")
    if options.tokenizer == "byte260":
        path.write_text(json.dumps(BYTE260, indent=1) + "\n")
    elif options.tokenizer:
        shutil.copyfile(options.tokenizer, path)
    else:
        print(f"training a tokenizer of {options.vocab_size} tokens on the train documents", flush=True)
        path.write_bytes(train_tokenizer(splits.documents("train"), options.vocab_size))
    if not load_tokenizer(path).lossless and not options.normalise:
        raise ValueError(f"--tokenizer {options.tokenizer} changes text (line breaks, spaces or characters), so its "
                         "tokens do not give the documents back; pass --normalise to rewrite the documents first")
    return path


def write_splits(options: argparse.Namespace, splits: Splits, folder: Path, tokenizer: Path) -> dict:
    """Writes shards and lists of documents; returns the manifest's counts of them."""
    counts = {"rewritten_bytes": 0, "dropped_duplicates": 0, "kept_duplicates": 0, "empty_documents": 0,
              "rewritten": {}, "splits": {}}
    in_validation = set()
    with Encoder(tokenizer, options.normalise, options.processes) as encoder:
        for split in ("val", "train"):  # validation first: what is in it is not trained on
            writer, seen = SplitWriter(folder, split, options.shard_tokens), set()
            rewritten = {"documents": 0, "bytes_before": 0, "bytes_after": 0}
            for document in encoder.encode(splits.documents(split)):
                digest = bytes.fromhex(document.digest)
                repeated = digest in seen
                if document.bytes_raw == 0:  # nothing was left of it by --normalise
                    counts["empty_documents"] += 1
                elif digest in in_validation or (repeated and options.dedupe and split == "train"):
                    counts["dropped_duplicates"] += 1
                    continue
                else:
                    seen.add(digest)
                    counts["kept_duplicates"] += repeated
                    writer.add(document.digest, document.bytes_raw, document.tokens)
                if document.changed:
                    rewritten["documents"] += 1
                    rewritten["bytes_before"] += document.bytes_before
                    rewritten["bytes_after"] += document.bytes_raw
            if not writer.documents:
                splits.refuse_empty(split)
            in_validation |= seen if split == "val" else set()
            counts["empty_documents"] += splits.empty[split]
            counts["rewritten_bytes"] += rewritten["bytes_before"]
            counts["rewritten"][split] = rewritten
            counts["splits"][split] = writer.close()
    counts["splits"] = {split: counts["splits"][split] for split in SPLITS}
    return counts


def prepare(options: argparse.Namespace) -> Path:
    """Makes the data set unless it is there already; returns its folder."""
    splits = Splits(options)
    identity = json.loads(json.dumps(splits.identity()))
    folder = options.out / (options.name or default_name(options))
    if folder.exists() and not options.force:
        manifest = read_manifest(folder)
        if manifest is None:
            raise ValueError(f"{folder} exists and is no data set; pass --force to replace it, or another --name")
        if manifest["source"] != identity:
            changed = sorted(key for key in identity.keys() | manifest["source"].keys()
                             if identity.get(key) != manifest["source"].get(key))
            raise ValueError(f"{folder} was prepared from something else (other {', '.join(changed)}); pass --force to "
                             "replace it, or another --name")
        print(f"already prepared: {folder}")
    else:
        with partial_folder(folder) as partial:
            if splits.source.kind == "hf":  # a stream can be read once, and this needs two or three readings
                splits.source = spool(splits.source, partial / "documents.jsonl.zst", options.max_documents)
            tokenizer = write_tokenizer(options, splits, partial)
            counts = write_splits(options, splits, partial, tokenizer)
            (partial / "documents.jsonl.zst").unlink(missing_ok=True)
            manifest = {"format": 1, "name": folder.name, "source": identity,
                        "tokenizer": describe_tokenizer(tokenizer), "normalised": options.normalise, **counts}
            write_manifest(partial, manifest)
    print(report(folder, manifest))
    return folder


def default_name(options: argparse.Namespace) -> str:
    given = Path((options.text or options.jsonl or [options.hf or "pydocs"])[0]).name.split(".")[0]
    source = re.sub(r"[^a-z0-9_-]+", "_", given.lower()).strip("_") or "text"
    if options.tokenizer == "byte260":
        return f"{source}_byte260"
    return f"{source}_sp{options.vocab_size or load_tokenizer(Path(options.tokenizer)).vocab_size}"


def main(argv: list[str] | None = None) -> int:
    try:
        prepare(parse_options(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
