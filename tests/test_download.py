"""data/download.py against a small hub on loopback, which serves a made-up FineWeb in upstream's layout."""

import hashlib
import http.server
import json
import os
import re
import struct
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

from tests.corpora import documents, manifest_of, read_back, run, train_normalising, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
REPO, COMMIT = "someone/golf", "c" * 40
SHARD = "datasets/datasets/fineweb10B_sp1024/fineweb_train_000001.bin"


class Hub(http.server.ThreadingHTTPServer):
    """Speaks as much of the hub's protocol as hf_hub_download and get_paths_info need, and can misbehave."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(files)
        self.fetched: list[tuple[str, str | None]] = []  # path and Range of every GET
        self.cut_at: dict[str, int] = {}  # the first GET of a path ends after so many bytes
        self.flipped: set[str] = set()  # a path that arrives with one bit changed
        self.claimed: dict[str, int] = {}  # a size to claim
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        infos = []
        for path in form["paths"]:
            if path in self.server.files:
                data = self.server.files[path]
                size = self.server.claimed.get(path, len(data))
                info = {
                    "type": "file",
                    "path": path,
                    "size": size,
                    "oid": hashlib.sha1(b"blob %d\0%s" % (len(data), data)).hexdigest(),
                }
                if not path.endswith(".json"):
                    info["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
                infos.append(info)
        self.answer(200, json.dumps(infos).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, urllib.parse.unquote(self.path)
        if path.startswith(f"/api/datasets/{REPO}"):
            return self.answer(200, json.dumps({"id": REPO, "sha": COMMIT}).encode(), Content_Type="application/json")
        found = re.fullmatch(f"/datasets/{REPO}/resolve/{COMMIT}/(.*)", path)
        if not found:
            return self.answer(404, b"", X_Error_Code="RepoNotFound")
        data = hub.files.get(found[1])
        if data is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        wanted = self.headers.get("Range")
        digest = hashlib.sha256(data).hexdigest()
        headers = {
            "X_Repo_Commit": COMMIT,
            "ETag": f'"{digest}"',
            "X_Linked_Etag": f'"{digest}"',
            "X_Linked_Size": str(len(data)),
            "Accept_Ranges": "bytes",
        }
        if found[1] in hub.flipped:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if self.command == "GET":
            hub.fetched.append((found[1], wanted))
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and found[1] in hub.cut_at:
            self.close_connection = True
            return self.answer(200, data[: hub.cut_at.pop(found[1])], **headers, Content_Length=str(len(data)))
        return self.answer(206 if start else 200, data[start:], **headers)


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> dict[str, bytes]:
    """Three train shards and two of validation, made from 75 documents with a tokenizer like upstream's."""
    folder = tmp_path_factory.mktemp("published")
    file = write_jsonl(folder / "x.jsonl", documents(75))
    assert (
        run(
            "--jsonl",
            file,
            "--tokenizer",
            train_normalising(folder),
            "--normalise",
            "--val-documents",
            "30",
            "--shard-tokens",
            "6000",
            "--out",
            str(folder),
            "--name",
            "x",
        )
        == 0
    )
    counts = {split: len(list((folder / "x").glob(f"fineweb_{split}_*.bin"))) for split in ("train", "val")}
    assert counts["train"] >= 3 and counts["val"] >= 2
    manifest = {
        "datasets": [
            {
                "name": "fineweb10B_sp1024",
                "tokenizer_name": "sp_bpe_1024",
                "path": "datasets/fineweb10B_sp1024",
                "stats": {f"files_{split}": count for split, count in counts.items()},
            }
        ],
        "tokenizers": [{"name": "sp_bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model"}],
    }
    files = {
        f"datasets/datasets/fineweb10B_sp1024/{path.name}": path.read_bytes()
        for path in (folder / "x").glob("fineweb_*.bin")
    }
    return {
        **files,
        "datasets/manifest.json": json.dumps(manifest).encode(),
        "datasets/tokenizers/fineweb_1024_bpe.model": (folder / "x" / "tokenizer.model").read_bytes(),
    }


@pytest.fixture
def hub(published) -> Hub:
    with Hub(published) as server:
        yield server
        server.shutdown()


def download(hub: Hub, out: Path, *argv: str, shards: int = 2, repo: str = REPO) -> subprocess.CompletedProcess:
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(out / "home"),
        "MATCHED_FINEWEB_REPO_ID": repo,
        "HF_HUB_OFFLINE": "0",
    }
    env.pop("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", None)
    return subprocess.run(
        [
            sys.executable,
            str(ROOT / "data" / "download.py"),
            "--train-shards",
            str(shards),
            "--out",
            str(out),
            "--processes",
            "1",
            *argv,
        ],
        env=env,
        cwd=out,
        capture_output=True,
        text=True,
    )


def assert_refused(done: subprocess.CompletedProcess, message: str, out: Path) -> None:
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and message in done.stderr
    assert not (out / "fineweb10B_sp1024").exists() and not list(out.glob("*/manifest.json"))


def test_download_gives_a_data_set_with_exact_counts(hub, published, tmp_path):
    done = download(hub, tmp_path, "--processes", "2")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "fineweb10B_sp1024"
    assert sorted(path.name for path in folder.iterdir()) == [
        "fineweb_train_000000.bin",
        "fineweb_train_000001.bin",
        "fineweb_val_000000.bin",
        "fineweb_val_000001.bin",
        "manifest.json",
        "tokenizer.model",
        "train_docs.txt",
        "upstream_manifest.json",
        "val_docs.txt",
    ]
    manifest = manifest_of(folder)
    for split, entry in manifest["splits"].items():
        texts = read_back(folder, split)
        lines = (folder / f"{split}_docs.txt").read_text().split("\n")[:-1]
        assert [line.split()[0] for line in lines] == [hashlib.sha256(text).hexdigest()[:32] for text in texts]
        assert entry["bytes"] == sum(map(len, texts)) == sum(int(line.split()[1]) for line in lines)
        assert entry["tokens"] == sum(int(line.split()[2]) for line in lines)
        for shard in entry["shards"]:
            data = published[f"datasets/datasets/fineweb10B_sp1024/{shard['file']}"]
            assert (folder / shard["file"]).read_bytes() == data
            assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["normalised"] and manifest["source"]["revision"] == COMMIT
    assert manifest["train_documents_in_val"] == 0 and manifest["splits"]["val"]["documents"] == 30


def test_second_call_fetches_nothing_and_more_shards_fetch_only_those(hub, tmp_path):
    assert download(hub, tmp_path).returncode == 0
    hub.fetched.clear()
    again = download(hub, tmp_path)
    assert again.returncode == 0 and "already downloaded" in again.stdout and not hub.fetched
    assert download(hub, tmp_path, shards=3).returncode == 0
    assert {path for path, _ in hub.fetched if path.endswith(".bin")} == {SHARD.replace("01.bin", "02.bin")}
    assert len(manifest_of(tmp_path / "fineweb10B_sp1024")["splits"]["train"]["shards"]) == 3
    fewer = download(hub, tmp_path, shards=1)
    assert fewer.returncode == 2 and "holds 3 train shards, more than --train-shards 1" in fewer.stderr


def test_connection_that_is_cut_continues_where_it_was(hub, tmp_path):
    tokens = hub.files[SHARD][1024:] * 1000  # the hub's client writes, and continues at, multiples of 10 MiB
    hub.files[SHARD] = struct.pack("<256i", 20240520, 1, len(tokens) // 2, *[0] * 253) + tokens
    hub.cut_at[SHARD] = 11 * 2**20
    assert download(hub, tmp_path).returncode == 0
    ranges = [wanted for path, wanted in hub.fetched if path == SHARD]
    assert len(ranges) == 2 and ranges[1].startswith(f"bytes={10 * 2**20}-")


def test_flipped_bit_is_an_error_and_the_next_call_repairs_it(hub, tmp_path):
    hub.flipped.add(SHARD)
    assert_refused(download(hub, tmp_path), "fineweb_train_000001.bin arrived with another hash", tmp_path)
    hub.flipped.clear()
    hub.fetched.clear()
    assert download(hub, tmp_path).returncode == 0
    assert [path for path, _ in hub.fetched if path.endswith(".bin")] == [SHARD]


def test_damaged_file_on_disk_is_fetched_again(hub, published, tmp_path):
    assert download(hub, tmp_path).returncode == 0
    shard = tmp_path / "fineweb10B_sp1024" / "fineweb_train_000001.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    hub.fetched.clear()
    assert download(hub, tmp_path).returncode == 0
    assert shard.read_bytes() == data and [path for path, _ in hub.fetched if path.endswith(".bin")] == [SHARD]


def test_missing_shard_is_an_error_before_anything_is_fetched(hub, tmp_path):
    del hub.files[SHARD]
    assert_refused(download(hub, tmp_path), "fineweb_train_000001.bin is not in someone/golf", tmp_path)
    assert not [path for path, _ in hub.fetched if path.endswith(".bin")]


def test_full_disk_is_an_error_before_anything_is_fetched(hub, tmp_path):
    hub.claimed[SHARD] = 10**18
    assert_refused(download(hub, tmp_path), "bytes are still to be fetched but", tmp_path)


def test_what_the_hub_does_not_have_is_named(hub, tmp_path):
    assert_refused(
        download(hub, tmp_path, "--variant", "sp8192"),
        "--variant sp8192 is not in someone/golf, which has fineweb10B_sp1024",
        tmp_path,
    )
    assert_refused(download(hub, tmp_path, shards=99), "--train-shards 99: someone/golf has", tmp_path)
    assert_refused(download(hub, tmp_path, repo="no/body"), "no/body is no public data set", tmp_path)
    hub.files["datasets/manifest.json"] = b"{}"
    assert_refused(download(hub, tmp_path), "is not laid out as upstream's (KeyError: 'datasets')", tmp_path)


def test_no_network_is_one_sentence(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    assert_refused(download(hub, tmp_path), "could not be fetched from http://127.0.0.1", tmp_path)
