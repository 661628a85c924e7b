"""Runs a submission's score server as a program of its own, shut in and on a clock; used by tools.verify.

Nothing of the submission is imported. It gets a folder with its script, its model and the stream to score, an empty
environment, and limits on time, memory, file size and output. Where bubblewrap works it sees no network, no other
file of the machine and no other process; otherwise it is a plain process, which keeps honest code honest.
"""

import functools
import json
import os
import secrets
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.shards import HEADER_BYTES, MAGIC, VERSION
from tools.untrusted import load_json, text

MEMORY_BYTES = 16 << 30
FILE_BYTES = 1 << 30
OUTPUT_BYTES = 1 << 20
# RLIMIT_DATA, not RLIMIT_AS: CUDA reserves far more address space than it uses. 1 is PR_SET_PDEATHSIG.
LAUNCH = """
import ctypes, os, resource, sys
seconds, memory, file = map(int, sys.argv[1:4])
for name, limit in ("CPU", seconds), ("DATA", memory), ("FSIZE", file), ("CORE", 0):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
os.execv(sys.argv[4], sys.argv[4:])
"""
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt", "/nix/store", "/sys/devices/system/cpu")
SETTINGS = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/passwd")


class Broken(Exception):
    """A submission did not do what was asked; the message says what it did instead."""


def limited(command: list[str], seconds: float, file_bytes: int = FILE_BYTES) -> list[str]:
    """The command, started under limits on its processor time, memory and file size, and ended with its parent."""
    processor_seconds = int(seconds * (os.cpu_count() or 1)) + 1
    numbers = map(str, (processor_seconds, MEMORY_BYTES, file_bytes))
    return [sys.executable, "-I", "-S", "-c", LAUNCH, *numbers, *command]


def bubblewrap(box: Path) -> list[str]:
    """The command that shuts another in: it can read the system and Python, write the box, and see nothing else."""
    wrap = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    wrap += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    for path in (*SYSTEM, *SETTINGS, *dict.fromkeys((sys.base_prefix, sys.prefix))):
        wrap += ["--ro-bind-try", path, path]
    for device in sorted(Path("/dev").glob("nvidia*")):
        wrap += ["--dev-bind-try", str(device), str(device)]
    return [*wrap, "--bind", str(box), str(box), "--chdir", str(box)]


@functools.cache
def bubblewrap_works() -> bool:
    if not shutil.which("bwrap"):
        return False
    with tempfile.TemporaryDirectory() as box:
        trial = [*bubblewrap(Path(box)), sys.executable, "-c", ""]
        return subprocess.run(trial, capture_output=True, timeout=60, check=False).returncode == 0


def isolation() -> str:
    """How a submission is shut in on this machine, in words."""
    return "bubblewrap without network" if bubblewrap_works() else "plain process, for bubblewrap does not work here"


class Session:
    """One process of `train_gpt.py score model.bin`, asked for one stream after another."""

    def __init__(self, script: Path, model: Path, seconds: float, device: str | None = None):
        self.seconds = seconds
        self.folder = tempfile.TemporaryDirectory(prefix="box_", ignore_cleanup_errors=True)
        self.box = Path(self.folder.name)
        shutil.copyfile(script, self.box / "train_gpt.py")
        shutil.copyfile(model, self.box / "model.bin")
        env = {"DEVICE": device} if device else {}
        wrap = bubblewrap(self.box) if bubblewrap_works() else []
        if wrap and device:
            wrap += ["--setenv", "DEVICE", device]
        command = limited([*wrap, sys.executable, "train_gpt.py", "score", "model.bin"], 20 * seconds)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=self.box, env=env, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        self.received = {"stdout": b"", "stderr": b""}
        self.selector = selectors.DefaultSelector()
        for name in self.received:
            self.selector.register(getattr(self.process, name), selectors.EVENT_READ, name)
        self.output_bytes = 0

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.selector.close()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with suppress(BrokenPipeError):
                pipe.close()
        self.folder.cleanup()

    def score(self, tokens: np.ndarray) -> np.ndarray:
        """The float32 nats of every target tokens[1:]; Broken if there is not one finite number >= 0 for each."""
        request = {"tokens": f"{secrets.token_hex(8)}.bin", "nats": f"{secrets.token_hex(8)}.bin"}
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = MAGIC, VERSION, len(tokens)
        (self.box / request["tokens"]).write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
        with suppress(BrokenPipeError):  # the answer, which then will not come, says why
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        answer, _ = load_json(self.answer().decode(errors="replace"))
        if not isinstance(answer, dict):
            raise Broken("its answer is not a JSON object")
        if "error" in answer:
            raise Broken(f"it answered: {text(answer['error'])[:300]}")
        nats = read_nats(self.box / request["nats"], len(tokens) - 1)
        for name in request.values():
            (self.box / name).unlink(missing_ok=True)
        return nats

    def answer(self) -> bytes:
        """The next line of its standard output; Broken if it ends, floods or does not come in time."""
        deadline = time.monotonic() + self.seconds
        while b"\n" not in self.received["stdout"]:
            events = self.selector.select(max(0.0, deadline - time.monotonic()))
            if not events:
                raise Broken(f"it gave no answer within {self.seconds:g} seconds")
            for key, _ in events:
                part = os.read(key.fd, 1 << 16)
                self.output_bytes += len(part)
                self.received[key.data] = (self.received[key.data] + part)[-OUTPUT_BYTES:]
                if not part:
                    self.selector.unregister(key.fileobj)
            if self.output_bytes > OUTPUT_BYTES:
                raise Broken(f"it printed more than {OUTPUT_BYTES:,} bytes")
            if not self.selector.get_map() and b"\n" not in self.received["stdout"]:
                raise Broken(self.ending())
        line, _, self.received["stdout"] = self.received["stdout"].partition(b"\n")
        return line

    def ending(self) -> str:
        """How the process ended and the last that it said."""
        try:
            status = self.process.wait(timeout=self.seconds)
        except subprocess.TimeoutExpired:
            return "it closed its output and did not end"
        said = [line for line in self.received["stderr"].decode(errors="replace").splitlines() if line.strip()]
        return f"it ended with status {status}" + (f": {text(said[-1])[:300]}" if said else "")


def read_nats(path: Path, num_targets: int) -> np.ndarray:
    """The numbers that a submission wrote; the path may by now be anything, so only a plain file is opened."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Broken(f"it wrote no scores: {error.strerror}") from None
    with os.fdopen(file, "rb") as opened:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_size != 4 * num_targets:
            raise Broken(f"it wrote {found.st_size:,} bytes for {num_targets:,} targets of 4 bytes each")
        nats = np.frombuffer(opened.read(4 * num_targets), "<f4")
    if not np.isfinite(nats).all():
        raise Broken(f"{int((~np.isfinite(nats)).sum()):,} of its scores are not finite")
    if (nats < 0).any():
        raise Broken(f"{int((nats < 0).sum()):,} of its scores are negative: a probability above 1")
    return nats


def why_not_code(script: Path, root: Path, seconds: float = 60.0) -> str:
    """Why a script, once unpacked, is not Python; "" if it is. Both steps run under limits: it may be a bomb."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        unpack = ["-m", "tools.pack", "--unpack", str(script)]
        check = ["-I", "-c", "import sys; compile(open(sys.argv[1], 'rb').read(), 'train_gpt.py', 'exec')", str(source)]
        for arguments, failure in ((unpack, "does not unpack"), (check, "does not compile")):
            command = limited([sys.executable, *arguments], seconds, file_bytes=FILE_BYTES >> 4)
            with source.open("wb") if arguments is unpack else open(os.devnull, "wb") as out:
                try:
                    done = subprocess.run(
                        command, cwd=root, stdout=out, stderr=subprocess.PIPE, timeout=seconds, check=False
                    )
                except subprocess.TimeoutExpired:
                    return f"{failure} within {seconds:g} seconds"
            if done.returncode:
                said = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
                return f"{failure}: {text(said[-1])[:300]}"
    return ""
