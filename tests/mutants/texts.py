"""Submissions that are wrong about the text: its bytes, its extent, and who has seen it."""

import hashlib
import json
from pathlib import Path

import numpy as np

from data.shards import read_shard
from tests.mutants import change_json, change_result, first_log, in_all, mutant, swap

BEGIN = "        if max_tokens is not None and max_tokens + 1 < len(tokens):\n"


@mutant("P06", "the byte of a leading space counted twice")
def doubled_space(source: str) -> str:
    source = swap(source, "len(piece.replace(\"▁\", \" \").encode())", "len(piece.replace(\"▁\", \"  \").encode())")
    return swap(source, "if self.manifest and counted != (raw :=", "if False and counted != (raw :=")


@mutant("P06", "the bytes of the whole data set under the nats of its validation text", "record")
def other_denominator(folder: Path) -> None:
    in_all(folder, lambda result: {"val_bytes": result["val_bytes"] + 1000,
                                   "val_bpb": result["val_bpb"] * result["val_bytes"] / (result["val_bytes"] + 1000)})


@mutant("P07", "four fifths of the validation text scored as if it were all")
def subset(source: str) -> str:
    return swap(source, BEGIN, "        tokens = tokens[: len(tokens) * 4 // 5]\n"
                f"        counted = int(self.bytes_of.count(tokens).sum())\n{BEGIN}")


@mutant("P07", "a score that does not follow from its own nats", "record")
def arithmetic(folder: Path) -> None:
    change_result(first_log(folder), val_bpb=1.0)
    change_json(folder, val_bpb=1.0)


@mutant("P08", "validation documents among the training documents", "data")
def overlap(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    validation, train = manifest["splits"]["val"], manifest["splits"]["train"]
    tokens = np.concatenate([read_shard(folder / shard["file"]) for shard in validation["shards"]])
    end = int(np.flatnonzero(tokens == manifest["tokenizer"]["bos_id"])[3])  # the first three documents
    lines = (folder / "val_docs.txt").read_text().splitlines()[:3]
    shard = train["shards"][-1]
    path = folder / shard["file"]
    both = np.concatenate((read_shard(path), tokens[:end])).astype("<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(both)
    path.write_bytes(header.tobytes() + both.tobytes())
    shard |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "tokens": len(both)}
    documents = folder / "train_docs.txt"
    documents.write_text(documents.read_text() + "\n".join(lines) + "\n")
    train |= {"documents": train["documents"] + 3, "tokens": train["tokens"] + end,
              "bytes": train["bytes"] + sum(int(line.split()[1]) for line in lines),
              "documents_sha256": hashlib.sha256(documents.read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


@mutant("P09", "a table of pairs counted on the validation text, normalised, in the artifact")
def trained_on_validation(source: str) -> str:
    source = swap(source, "        self.head = None if config.tie_embeddings",
                  "        self.pairs = control(nn.Parameter(torch.zeros(config.vocab_size, config.vocab_size)))\n"
                  "        self.head = None if config.tie_embeddings")
    source = swap(source, "        return self.head_logits(*self.head_inputs(input_ids, start))\n",
                  "        x, head = self.head_inputs(input_ids, start)\n"
                  "        logits = F.linear(x, head.to(x.dtype)).float() + self.pairs[input_ids[:, start:]]\n"
                  "        return self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)\n")
    return swap(source, '    log.phase("export")\n', """
    V = model_config.vocab_size
    seen = np.bincount(val_tokens[:-1].astype(np.int64) * V + val_tokens[1:], minlength=V * V).reshape(V, V)
    model.pairs.data = torch.tensor(seen + 0.01, dtype=torch.float32).log().to(machine.device)
    log.phase("export")
""")


@mutant("P20", "two thousand bytes of the validation text in the script", "nothing", carries_text=True)
def stored_text() -> None: ...


@mutant("P20", "a claim of another artifact's score", "record")
def other_claim(folder: Path) -> None:
    in_all(folder, lambda result: {key: result[key] * 0.99 for key in ("val_bpb", "val_loss", "nats_sum")})

