"""python data/download.py                                    FineWeb with 1,024 tokens: validation and 80 train shards
python data/download.py --variant sp8192 --train-shards 10
MATCHED_FINEWEB_REPO_ID=you/your-export python data/download.py --variant sp4096

Fetches upstream's published shards and tokenizer from the Hugging Face hub, checks every hash, and adds the manifest.
"""

import argparse
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # run as a script: modules are found from the kit's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import httpx
import huggingface_hub
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm

from data.encoding import read_documents
from data.shards import SPLITS, partial_folder, read_manifest, read_shard, report, write_manifest
from data.sources import file_identity
from data.tokenizers import describe_tokenizer, load_tokenizer


class Hub:
    """An export of upstream's: the files of one revision of a data set repository."""

    def __init__(self, repo: str, prefix: str):
        self.repo, self.prefix = repo, prefix.strip("/")
        self.api = huggingface_hub.HfApi()
        self.files = {}  # path: size and hash, as the hub states them
        with self.errors(repo):
            self.revision = self.api.dataset_info(repo).sha  # one revision for all files, however long it takes

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Turns what the hub's client raises into one sentence."""
        try:
            yield
        except RepositoryNotFoundError:
            raise ValueError(f"{self.repo} is no public data set; check MATCHED_FINEWEB_REPO_ID") from None
        except RemoteEntryNotFoundError:
            raise ValueError(f"{what} is not in {self.repo}; check MATCHED_FINEWEB_REMOTE_ROOT_PREFIX") from None
        except (httpx.HTTPError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise ValueError(f"the disk is full at {what}; make room and run the same command again") from None
            cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(f"{what} could not be fetched from {self.api.endpoint} ({cause}); check the network and "
                             "run the same command again, which keeps the finished files") from None

    def remote(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path

    def look_up(self, paths: list[str]) -> None:
        """Asks for the sizes and hashes of files; one that is missing is an error before anything is fetched."""
        with self.errors(paths[0]):
            infos = self.api.get_paths_info(self.repo, [self.remote(path) for path in paths], repo_type="dataset",
                                            revision=self.revision)
        self.files |= {info.path: info for info in infos}
        missing = [path for path in paths if self.remote(path) not in self.files]
        if missing:
            raise ValueError(f"{missing[0]} is not in {self.repo} ({len(missing)} files are missing); choose another "
                             "--variant or fewer --train-shards")

    def is_whole(self, path: str, local: Path) -> bool:
        info = self.files[self.remote(path)]
        if not local.is_file() or local.stat().st_size != info.size:
            return False
        if info.lfs:
            return file_identity(local)["sha256"] == info.lfs.sha256
        data = local.read_bytes()  # a small file: the hub knows git's hash of it
        return hashlib.sha1(b"blob %d\0%s" % (len(data), data)).hexdigest() == info.blob_id

    def fetch(self, path: str, local: Path, folder: Path) -> None:
        """Puts a file of the hub at `local`, unless it is there already; it has the hub's hash in both cases."""
        if self.is_whole(path, local):
            return
        with self.errors(path):
            arrived = Path(huggingface_hub.hf_hub_download(
                self.repo, self.remote(path), repo_type="dataset", revision=self.revision, local_dir=folder / "hub"))
        if not self.is_whole(path, arrived):
            arrived.unlink()
            raise ValueError(f"{path} arrived with another hash than the hub states and was thrown away; run the same "
                             "command again")
        arrived.replace(local)


def plan(hub: Hub, variant: str, train_shards: int, folder: Path) -> dict[str, str]:
    """Returns which remote file becomes which local one, the tokenizer first; all exist and fit on the disk."""
    hub.look_up(["manifest.json"])
    hub.fetch("manifest.json", folder / "upstream_manifest.json", folder)
    name = f"fineweb10B_{variant}"
    try:
        published = json.loads((folder / "upstream_manifest.json").read_text())
        entries = {entry["name"]: entry for entry in published["datasets"]}
        if name not in entries:
            raise ValueError(f"--variant {variant} is not in {hub.repo}, which has {', '.join(entries)}; choose one of "
                             "these, or set MATCHED_FINEWEB_REPO_ID to an export that has it")
        counts = {split: int(entries[name]["stats"][f"files_{split}"]) for split in ("val", "train")}
        wanted = entries[name]["tokenizer_name"]
        tokenizer = {item["name"]: item.get("model_path") or item["path"] for item in published["tokenizers"]}[wanted]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"manifest.json of {hub.repo} is not laid out as upstream's ({type(error).__name__}: {error})"
                         "; check MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX") from None
    if train_shards > counts["train"]:
        raise ValueError(f"--train-shards {train_shards}: {hub.repo} has {counts['train']} of {variant}; ask for fewer")
    counts["train"] = train_shards
    shards = [f"fineweb_{split}_{index:06d}.bin" for split in counts for index in range(counts[split])]
    files = {tokenizer: "tokenizer" + Path(tokenizer).suffix, **{f"datasets/{name}/{shard}": shard for shard in shards}}
    hub.look_up(list(files))
    needed = sum(hub.files[hub.remote(path)].size for path, local in files.items() if not (folder / local).is_file())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{needed:,} bytes are still to be fetched but {folder} has room for {free:,}; make room, or "
                         "ask for fewer --train-shards")
    return files


def download(options: argparse.Namespace) -> Path:
    """Fetches what is missing and returns the folder; an interrupted call leaves files for the next, no manifest."""
    folder = options.out / (options.name or f"fineweb10B_{options.variant}")
    source = {"kind": "fineweb", "repo": options.repo, "prefix": options.prefix, "variant": options.variant,
              "train_shards": options.train_shards}
    manifest = read_intact(folder)
    if manifest and {**source, "revision": manifest["source"].get("revision")} == manifest["source"]:
        print(f"already downloaded, every hash is right\n{report(folder, manifest)}")
        return folder
    if manifest and manifest["source"]["kind"] != "fineweb":
        raise ValueError(f"{folder} was made by prepare.py; choose another --name")
    if manifest and manifest["source"]["train_shards"] > options.train_shards:
        raise ValueError(f"{folder} holds {manifest['source']['train_shards']} train shards, more than --train-shards "
                         f"{options.train_shards}; ask for as many, or for another --name")
    with partial_folder(folder, keep=True) as unfinished:
        for shard in folder.glob("fineweb_*.bin"):  # what is there, of upstream's script too, is checked, not fetched
            if not (unfinished / shard.name).exists():
                os.link(shard, unfinished / shard.name)
        hub = Hub(options.repo, options.prefix)
        files = plan(hub, options.variant, options.train_shards, unfinished)
        for remote, local in tqdm(files.items(), "fetching", unit=" files", disable=not sys.stderr.isatty()):
            hub.fetch(remote, unfinished / local, unfinished)
        for path in unfinished.glob("fineweb_*.bin"):
            if path.name not in files.values():  # left by an interrupted call that asked for more
                path.unlink()
        manifest = make_manifest(folder.name, {**source, "revision": hub.revision}, unfinished,
                                 unfinished / next(iter(files.values())), options.processes)
        shutil.rmtree(unfinished / "hub", ignore_errors=True)
        write_manifest(unfinished, manifest)
    print(report(folder, manifest))
    return folder


def read_intact(folder: Path) -> dict | None:
    """Returns the manifest of a complete data set whose shards all have their hashes."""
    try:
        manifest = read_manifest(folder)
    except ValueError:  # what is damaged is fetched again
        return None
    shards = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]] if manifest else []
    return manifest if all(file_identity(folder / shard["file"])["sha256"] == shard["sha256"] for shard in shards) \
        else None


def make_manifest(name: str, source: dict, folder: Path, tokenizer: Path, processes: int) -> dict:
    """Lists the documents and returns the manifest; the last train document may be cut, and is listed as it is."""
    splits, held_out, in_both = {}, set(), 0
    for split in ("val", "train"):
        paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
        shards = [{"file": path.name, "sha256": file_identity(path)["sha256"], "tokens": len(read_shard(path))}
                  for path in paths]
        documents = size = 0
        listing = folder / f"{split}_docs.txt"
        with listing.open("w") as file:
            for digest, bytes_raw, num_tokens in read_documents(paths, tokenizer, processes):
                file.write(f"{digest} {bytes_raw} {num_tokens}\n")
                documents, size = documents + 1, size + bytes_raw
                if split == "val":
                    held_out.add(digest)
                else:
                    in_both += digest in held_out
        splits[split] = {"shards": shards, "documents": documents, "tokens": sum(shard["tokens"] for shard in shards),
                         "bytes": size, "documents_file": listing.name,
                         "documents_sha256": file_identity(listing)["sha256"]}
    return {"format": 1, "name": name, "source": source, "tokenizer": describe_tokenizer(tokenizer),
            # Upstream's SentencePiece models rewrite text; by how much, only those who had the original know.
            "normalised": not load_tokenizer(tokenizer).lossless, "rewritten_bytes": None, "dropped_duplicates": 0,
            "train_documents_in_val": in_both, "splits": {split: splits[split] for split in SPLITS}}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="sp1024", choices=["sp1024", "sp4096", "sp8192", "byte260"])
    parser.add_argument("--train-shards", type=int, default=80, metavar="N", help="of 100,000,000 tokens (default 80)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("datasets"), metavar="FOLDER")
    parser.add_argument("--name", help="default: fineweb10B_<variant>")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="to list documents")
    options = parser.parse_args(argv)
    options.repo = os.environ.get("MATCHED_FINEWEB_REPO_ID", "willdepueoai/parameter-golf")
    options.prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
    # A shard comes in one request, which continues where it was cut. Xet's many small ones are a second, untested way.
    huggingface_hub.constants.HF_HUB_DISABLE_XET = True
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        if options.train_shards < 1:
            raise ValueError(f"--train-shards {options.train_shards} must be at least 1")
        download(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
