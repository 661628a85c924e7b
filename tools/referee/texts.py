"""The rules about the judge's text: what its tokens spell (P06), and what of it was there to train on (P08).

All is computed here again, from the tokens and the tokenizer's own decoder; nothing comes from train_gpt.py.
"""

import hashlib
import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np

from data.shards import read_shard
from tools.referee.case import Case, Data, sha256
from tools.referee.rules import RULES, Found, Skip, Table, check
from tools.referee.windows import share_seen
from tools.untrusted import text

SHOWN = 20  # rows of a table of each kind, and problems of a kind
TRAIN_TOKENS = 1 << 30  # that are searched for validation text: about a minute on one core
VAL_TOKENS = 1 << 23  # whose windows are searched for


def judges_data(case: Case) -> Data:
    """The judge's data, whose tokenizer fits; Skip says what is missing."""
    if case.data is None:
        raise Skip("no --data folder with the validation text")
    if not case.data.tokenizer.is_file() or sha256(case.data.tokenizer) != case.data.tokenizer_sha256:
        raise Skip(f"{case.data.tokenizer} is not the tokenizer that manifest.json describes; prepare the data again")
    if case.data.tokens.max() >= case.data.vocab_size:
        raise Skip(f"{case.data.name} holds token {case.data.tokens.max()}, its tokenizer has {case.data.vocab_size} "
                   "tokens; prepare the data again")
    return case.data


class Spelling:
    """What the tokens of a data folder spell, found by decoding."""

    def __init__(self, data: Data):
        if data.tokenizer.suffix == ".json":
            config = json.loads(data.tokenizer.read_text())["config"]
            spelled = [b""] * config["byte_offset"] + [bytes([byte]) for byte in range(config["byte_count"])]
            self.after = self.first = spelled
            self.is_byte = np.array([bool(byte) for byte in spelled])
            self.decode = lambda ids: b"".join(spelled[token] for token in ids)
        else:
            from sentencepiece import SentencePieceProcessor

            model = SentencePieceProcessor(model_file=str(data.tokenizer))
            ids, before = range(model.vocab_size()), model.encode("x")
            # A token's bytes are those that it adds behind an x; at a document's start the decoder may drop a space.
            self.after = [one.encode()[len(model.decode(before)):] for one in model.decode([[*before, i] for i in ids])]
            self.first = [one.encode() for one in model.decode([[i] for i in ids])]
            for token in filter(model.is_byte, ids):  # alone it is no text: the decoder writes U+FFFD, three bytes
                self.after[token] = self.first[token] = bytes([int(model.id_to_piece(token)[3:5], 16)])
            self.is_byte = np.array([model.is_byte(i) for i in ids])
            self.decode = lambda ids: model.decode(ids).encode()
        if len(self.after) != data.vocab_size:
            raise Skip(f"{data.tokenizer} has {len(self.after)} tokens, manifest.json says {data.vocab_size}; prepare "
                       "the data again")

    def bytes_of(self, tokens: np.ndarray, bos_id: int) -> np.ndarray:
        """(N,) bytes of each token, given the token before it; the first of all and BOS spell nothing."""
        after, first = (np.array([len(one) for one in spelled]) for spelled in (self.after, self.first))
        at_start = np.concatenate(([True], tokens[:-1] == bos_id))
        return np.where(tokens == bos_id, 0, np.where(at_start, first[tokens], after[tokens]))


def documents(tokens: np.ndarray, bos_id: int) -> list[tuple[int, int]]:
    """(place of its BOS, end) of every document."""
    starts = np.flatnonzero(tokens == bos_id)
    return list(pairwise([*starts.tolist(), len(tokens)]))


def read_list(data: Data, split: str) -> list[tuple[str, int, int]] | None:
    """(hash, bytes, tokens) of each document as the data folder lists them; None if there is no list."""
    entry = data.manifest["splits"][split]
    path = data.folder / Path(str(entry.get("documents_file", f"{split}_docs.txt"))).name
    if not path.is_file():
        return None
    if "documents_sha256" in entry and sha256(path) != entry["documents_sha256"]:
        raise Skip(f"{path} is not the list that manifest.json describes; prepare the data again")
    return [(digest, int(size), int(count)) for digest, size, count in map(str.split, path.read_text().splitlines())]


def named_mistakes(data: Data, spelling: Spelling, decoded: list[bytes]) -> dict[int, str]:
    """Byte counts that known mistakes would give for the validation text."""
    total, is_byte = sum(map(len, decoded)), int(spelling.is_byte[data.tokens].sum())
    with_space = np.array([one.startswith(b" ") for one in spelling.after])[data.tokens].sum()
    return {total + int(with_space): "a leading space counted twice",
            total - int(with_space): "leading spaces not counted",
            total + 2 * is_byte: "a byte token counted as U+FFFD, three bytes",
            sum(len(one.decode(errors="replace")) for one in decoded): "characters counted, not bytes",
            total + len(decoded): "a byte counted for each BOS"} if total else {}


def wrong_denominators(case: Case, total: int, mistakes: dict[int, str]) -> tuple[list[str], Table]:
    """What is wrong with the bytes that the record divides by, and its scores over the bytes that there are."""
    problems, rows, right, num_targets = [], [], [], len(case.data.tokens) - 1
    for name, result in case.results.items():
        if result["val_tokens"] != num_targets:  # its nats are those of another text, and say nothing of this one
            problems.append(f"{text(name)} scores {result['val_tokens']:,} tokens, the text has {num_targets:,}")
            continue
        right.append(result["nats_sum"] / math.log(2) / total)
        rows.append([text(name), result["val_bytes"], result["val_bpb"], right[-1]])
        if result["val_bytes"] != total:
            why = f" ({mistakes[result['val_bytes']]})" if result["val_bytes"] in mistakes else ""
            problems.append(f"{text(name)} divides by {result['val_bytes']:,} bytes{why}, the text has {total:,}: its "
                            f"score of {result['val_bpb']:.6f} becomes {right[-1]:.6f} bits per byte")
    said = case.submission
    mean = fmean(right) if right else math.nan
    rows.append(["submission.json", said["val_bytes"], said["val_bpb"], mean])
    if said["val_bytes"] != total:
        problems.append(f"submission.json divides by {text(said['val_bytes'])} bytes, the text has {total:,}: its "
                        f"score of {text(said['val_bpb'])} becomes {mean:.6f} bits per byte")
    return problems, Table("Scores over the bytes that there are", ["file", "bytes", "claimed", "bits per byte"], rows)


@check("P06")
def ledger(case: Case) -> Found:
    data = judges_data(case)
    spelling, listed, spans = Spelling(data), read_list(data, "val"), documents(data.tokens, data.bos_id)
    sums = np.concatenate(([0], np.cumsum(spelling.bytes_of(data.tokens, data.bos_id))))
    decoded = [spelling.decode(data.tokens[start + 1 : end].tolist()) for start, end in spans]
    problems, rows = [], []
    if not spans or spans[0][0]:
        problems.append(f"{data.name}: the validation text does not begin with a document (token {data.bos_id})")
    if listed is not None and len(listed) != len(spans):
        problems.append(f"{data.name} holds {len(spans):,} validation documents, val_docs.txt lists {len(listed):,}")
    for number, ((start, end), raw) in enumerate(zip(spans, decoded, strict=True)):
        by_table, digest = int(sums[end] - sums[start]), hashlib.sha256(raw).hexdigest()[:32]
        name, size = listed[number][:2] if listed and number < len(listed) else (digest, len(raw))
        rows.append([number, name, end - start, by_table, len(raw), size])
        if not by_table == len(raw) == size:
            problems.append(f"document {number} ({text(name)}): its tokens count {by_table:,} bytes and decode to "
                            f"{len(raw):,}, val_docs.txt says {size:,}")
        elif digest != name:
            problems.append(f"document {number} decodes to a text of hash {digest}, val_docs.txt says {text(name)}")
    more = len(problems) - SHOWN
    problems = problems[:SHOWN] + ([f"and {more:,} more documents"] if more > 0 else [])
    total, table_total = sum(map(len, decoded)), int(sums[-1])
    if not data.val_bytes == total == table_total:
        problems.append(f"manifest.json says {data.val_bytes:,} bytes; the tokens count {table_total:,} and decode to "
                        f"{total:,}")
    wrong, scores = wrong_denominators(case, total, named_mistakes(data, spelling, decoded))
    problems += wrong
    if listed is None and not problems:
        raise Skip(f"{data.name} has no val_docs.txt to compare its documents with; prepare the data again")
    head = ["document", "sha256", "tokens", "bytes counted", "bytes decoded", "bytes listed"]
    worst = sorted(rows, key=lambda row: max(row[3:]) - min(row[3:]), reverse=True)[:SHOWN]
    first = Table("Byte ledger: the first documents", head, [*rows[:SHOWN], ["all", "", len(data.tokens), table_total,
                                                                             total, data.val_bytes]])
    apart = Table("Byte ledger: the documents that differ most", head, [row for row in worst if len({*row[3:]}) > 1])
    detail = f"{len(spans):,} documents, {total:,} bytes in tokens, text and manifest"
    if data.manifest.get("normalised") or data.manifest.get("rewritten_bytes"):
        changed = data.manifest.get("rewritten", {}).get("val", {})
        sizes = f" ({changed['bytes_before']:,} bytes became {changed['bytes_after']:,})" if changed else ""
        detail += f"; bits per byte are of a rewritten text{sizes}, not of the original"
    return Found(detail, problems, [first, *([apart] if apart.rows else []), scores])


def train_shards(data: Data, num_tokens: int = TRAIN_TOKENS) -> tuple[list[np.ndarray], int]:
    """The first num_tokens training tokens, shard by shard, and how many there are in all."""
    entries, shards = data.manifest["splits"]["train"]["shards"], []
    for entry in entries:
        if not (data.folder / entry["file"]).is_file():
            raise Skip(f"{data.folder / entry['file']} is not there; this needs the training text too")
        shards.append(read_shard(data.folder / entry["file"])[: max(0, num_tokens - sum(map(len, shards)))])
    return shards, sum(entry["tokens"] for entry in entries)


def shared_documents(data: Data, shards: list[np.ndarray]) -> tuple[list[list], np.ndarray]:
    """Rows of the documents that stand in both splits, and the lengths in tokens of those in the shards.

    Tokens are compared, not text: one tokenizer made both, and it gives equal texts equal tokens.
    """
    spans = documents(data.tokens, data.bos_id)
    known = {data.tokens[start + 1 : end].tobytes(): number for number, (start, end) in enumerate(spans)}
    lengths_known, rows, begins = np.unique([end - start for start, end in spans]), [], []
    offset, tail = 0, np.empty(0, np.uint16)  # a document may begin in one shard and end in the next
    for last, shard in ((number == len(shards) - 1, shard) for number, shard in enumerate(shards)):
        tokens = np.concatenate((tail, shard))
        starts = np.append(np.flatnonzero(tokens == data.bos_id), len(tokens))
        whole = len(starts) - 1 if last else max(0, len(starts) - 2)
        lengths = np.diff(starts)[:whole]
        begins.append(lengths)
        for number in np.flatnonzero(np.isin(lengths, lengths_known)):
            start = starts[number]
            same = known.get(tokens[start + 1 : starts[number + 1]].tobytes())
            if same is not None:
                rows.append([same, sum(map(len, begins[:-1])) + int(number), offset + int(start), int(lengths[number])])
        offset, tail = offset + int(starts[whole]), tokens[starts[whole]:]
    return rows, np.concatenate(begins)


@check("P08")
def overlap(case: Case) -> Found:
    data, limit = judges_data(case), RULES["P08"]["limit"]
    shards, num_tokens = train_shards(data, TRAIN_TOKENS >> 5 if case.pre else TRAIN_TOKENS)
    rows, lengths = shared_documents(data, shards)
    natural, searched = data.manifest.get("train_documents_in_val", 0), sum(map(len, shards))
    lists, problems = {split: read_list(data, split) for split in ("train", "val")}, []
    shared = len(rows)
    if lists["train"] is not None and lists["val"] is not None:
        known = {digest: number for number, (digest, *_) in enumerate(lists["val"])}
        both = [(known[digest], number) for number, (digest, *_) in enumerate(lists["train"]) if digest in known]
        shared, found = max(shared, len(both)), {tuple(row[:2]) for row in rows}
        rows += [[*pair, "", lists["train"][pair[1]][2]] for pair in both if pair not in found]
        whole = len(lengths) - (searched < num_tokens)  # the last may be cut where the search ends
        if lengths[:whole].tolist() != [count for *_, count in lists["train"][:whole]] or \
                (searched == num_tokens and len(lengths) != len(lists["train"])):
            problems.append(f"{data.name}: train_docs.txt does not list the documents of the train shards")
    if shared > natural:
        pairs = ", ".join(f"{row[1]} in train is {row[0]} in val" for row in rows[:3])
        problems.append(f"{shared:,} training documents are validation documents, manifest.json lists {natural:,}: "
                        f"number {pairs}{' ...' if len(rows) > 3 else ''}")
    rate = share_seen(data.tokens[:VAL_TOKENS], shards, limit["tokens"])
    if not rate <= limit.get("rate", 1.0):
        problems.append(f"{rate:.2%} of the validation tokens stand in training in pieces of {limit['tokens']} tokens, "
                        f"more than {limit['rate']:.2%}")
    part = f" (the first {searched:,} of {num_tokens:,} train tokens)" if searched < num_tokens else ""
    part += f" (the first {VAL_TOKENS:,} validation tokens)" if len(data.tokens) > VAL_TOKENS else ""
    head = ["in val", "in train", "first token in train", "tokens", "sha256", "bytes"]
    rows = [[*row, *(lists["val"][row[0]][:2] if lists["val"] else ("", ""))] for row in rows[:200]]
    evidence = [Table("Documents in both splits", head, rows)]
    return Found(f"{shared:,} shared documents; {rate:.2%} of the validation tokens stand in training in pieces of "
                 f"{limit['tokens']} tokens{part}", problems, evidence if rows else [])
