"""Runs a submission as a program of its own, shut in, watched and on a clock.

Nothing of the submission is imported. It gets a folder with the files that it declares, an empty environment, and
limits on time, memory, file size and output. Where bubblewrap works it sees no network, no other file of the machine
but the system and Python, and no other process; elsewhere an audit hook in its interpreter refuses these, which keeps
honest code honest. Either way the hook keeps a ledger of what it opens, starts and connects to.
"""

import functools
import json
import os
import secrets
import selectors
import shutil
import signal
import site
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.shards import HEADER_BYTES, MAGIC, VERSION
from tools.untrusted import load_json, text

MEMORY_BYTES = 16 << 30  # RLIMIT_DATA, not RLIMIT_AS: CUDA reserves far more address space than it uses
FILE_BYTES = 1 << 30
OUTPUT_BYTES = 1 << 20  # of standard output, of standard error and of the ledger
GRACE_SECONDS = 5.0  # for a killed program to be gone
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt", "/nix/store", "/sys/devices/system/cpu")
SETTINGS = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/passwd", "/etc/localtime")
ABOUT_ITSELF = ("self", "cpuinfo", "meminfo", "stat", "filesystems", "version", "sys")  # under /proc
DEVICES = ("null", "zero", "random", "urandom")  # under /dev
SUPERVISE, SHIM = (Path(__file__).with_name(name).read_text() for name in ("supervise.py", "shim.py"))


class Broken(Exception):
    """A submission did not do what was asked; the message says what it did instead."""


class Act(NamedTuple):
    """An entry of the ledger: read, write, list, process or network; on what; whether it was allowed."""

    kind: str
    what: str
    allowed: bool


def limited(command: list[str], seconds: float, file_bytes: int = FILE_BYTES) -> list[str]:
    """The command under limits on its processor time, memory and file size; all that it starts ends with it."""
    processor_seconds = int(seconds * (os.cpu_count() or 1)) + 1
    numbers = map(str, (processor_seconds, MEMORY_BYTES, file_bytes))
    return [sys.executable, "-I", "-S", "-c", SUPERVISE, *numbers, *command]


def readable() -> tuple[str, ...]:
    """The folders of the machine that a submission may read: the system and Python."""
    return tuple(dict.fromkeys((*SYSTEM, *SETTINGS, sys.base_prefix, sys.prefix, site.getusersitepackages())))


def bubblewrap(box: Path, env: Mapping[str, str]) -> list[str]:
    """The command that shuts another in: it can read the system and Python, write the box, and see nothing else."""
    wrap = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    wrap += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    for path in readable():
        wrap += ["--ro-bind-try", path, path]
    for device in sorted(Path("/dev").glob("nvidia*")):
        wrap += ["--dev-bind-try", str(device), str(device)]
    for name, value in env.items():
        wrap += ["--setenv", name, value]
    return [*wrap, "--bind", str(box), str(box), "--remount-ro", "/", "--chdir", str(box)]


@functools.cache
def bubblewrap_works() -> bool:
    if not shutil.which("bwrap"):
        return False
    with tempfile.TemporaryDirectory() as box:
        trial = [*bubblewrap(Path(box), {}), sys.executable, "-c", ""]
        return subprocess.run(trial, capture_output=True, timeout=60, check=False).returncode == 0


def isolation() -> str:
    """How a submission is shut in on this machine, in words."""
    if bubblewrap_works():
        return "bubblewrap: no network, no other files, no other processes"
    return "plain process with an empty environment and an audit hook (apt install bubblewrap shuts it in)"


class Box:
    """A program in a folder of its own, and all that it says."""

    def __init__(self, files: Mapping[str, Path], arguments: list[str], env: Mapping[str, str], seconds: float,
                 processes: bool = False, program: str = "train_gpt.py"):
        """files are copied in by name; arguments follow program; processes: whether it may start programs."""
        self.seconds = seconds
        self.temporary = tempfile.TemporaryDirectory(prefix="box_", ignore_cleanup_errors=True)
        self.folder = Path(self.temporary.name).resolve()
        for name, source in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, self.folder / name)
        env = {key: os.environ[key] for key in ("OMP_NUM_THREADS",) if key in os.environ} | dict(env)
        shut_in = bubblewrap_works()
        own = [str(self.folder), "/dev/null", *(["/dev/shm"] if shut_in else [])]
        (self.folder / "tmp").mkdir()
        env["TMPDIR"] = str(self.folder / "tmp")
        ledger, write_end = os.pipe()
        roots = (*readable(), *(f"/proc/{name}" for name in ABOUT_ITSELF), *(f"/dev/{name}" for name in DEVICES))
        words = write_end, int(not shut_in), int(processes), os.pathsep.join(own), os.pathsep.join(roots)
        # -B: an honest import must not try to leave compiled files beside a package
        command = [sys.executable, "-B", "-c", SHIM, *map(str, words), program, *arguments]
        command = limited([*(bubblewrap(self.folder, env) if shut_in else []), *command], 20 * seconds)
        pipe = subprocess.PIPE
        self.started = time.monotonic()
        self.process = subprocess.Popen(command, cwd=self.folder, env=env, stdin=pipe, stdout=pipe, stderr=pipe,
                                        start_new_session=True, pass_fds=[write_end])
        os.close(write_end)
        self.ledger = os.fdopen(ledger, "rb")
        self.received = {"stdout": b"", "stderr": b"", "ledger": b""}
        self.output_bytes = dict.fromkeys(self.received, 0)
        self.selector = selectors.DefaultSelector()
        for name, source in zip(self.received, (self.process.stdout, self.process.stderr, self.ledger), strict=True):
            self.selector.register(source, selectors.EVENT_READ, name)

    def __enter__(self) -> "Box":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()  # the supervisor kills all below it
        try:
            self.process.wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with suppress(ProcessLookupError, PermissionError):  # what a killed supervisor left behind
            os.killpg(self.process.pid, signal.SIGKILL)
        self.selector.close()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr, self.ledger):
            with suppress(BrokenPipeError):
                pipe.close()
        with suppress(RecursionError):  # folders nested deeper than Python counts
            self.temporary.cleanup()
        if self.folder.exists():
            subprocess.run(["rm", "-rf", "--", str(self.folder)], stderr=subprocess.DEVNULL, check=False)

    def send(self, line: bytes) -> None:
        with suppress(BrokenPipeError):  # the answer, which then will not come, says why
            self.process.stdin.write(line + b"\n")
            self.process.stdin.flush()

    def line(self, seconds: float | None = None) -> bytes:
        """The next line of its standard output; Broken if it ends, floods or does not come in time."""
        seconds = self.seconds if seconds is None else seconds
        deadline = time.monotonic() + seconds
        while b"\n" not in self.received["stdout"]:
            if not any(key.data != "ledger" for key in self.selector.get_map().values()):
                raise Broken(self.ending())
            if not self.receive(deadline - time.monotonic()):
                raise Broken(f"it gave no answer within {seconds:g} seconds")
        line, _, self.received["stdout"] = self.received["stdout"].partition(b"\n")
        return line

    def receive(self, seconds: float) -> bool:
        """Takes in what it says next; False if that is nothing within the time."""
        events = self.selector.select(max(0.0, seconds))
        for key, _ in events:
            part = os.read(key.fd, 1 << 16)
            self.output_bytes[key.data] += len(part)
            self.received[key.data] += part
            if self.output_bytes[key.data] > OUTPUT_BYTES:
                raise Broken("it opened more files than the ledger holds" if key.data == "ledger" else
                             f"it printed more than {OUTPUT_BYTES:,} bytes")
            if not part:
                self.selector.unregister(key.fileobj)
        return bool(events)

    def ending(self) -> str:
        """How the process ended and the last that it said."""
        try:
            status = self.process.wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its output and did not end"
        said = [line for line in self.received["stderr"].decode(errors="replace").splitlines() if line.strip()]
        return f"it ended with status {status}" + (f": {text(said[-1])[:300]}" if said else "")

    def acts(self) -> list[Act]:
        """The ledger so far. A submission could write to it too, so an entry that cannot be read is an act as well."""
        while self.output_bytes["ledger"] <= OUTPUT_BYTES and any(
            key.data == "ledger" for key, _ in self.selector.select(0.0)
        ):
            with suppress(Broken):
                self.receive(0.0)
        found = []
        for line in self.received["ledger"].splitlines():
            value, _ = load_json(line.decode(errors="replace"))
            whole = isinstance(value, list) and len(value) == 3 and isinstance(value[2], bool)
            act = Act(text(value[0]), str(value[1]), value[2]) if whole else Act("write", "the ledger", False)
            found.append(act)
        return list(dict.fromkeys(found))


class Session:
    """A box with `train_gpt.py score model.bin`, asked for one stream after another."""

    def __init__(self, script: Path, model: Path, seconds: float, device: str | None = None):
        files = {"train_gpt.py": script, "model.bin": model}
        env = {"DEVICE": device} if device else {}
        self.box = Box(files, ["score", "model.bin"], env, seconds, processes=device == "cuda")

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *details: object) -> None:
        self.box.__exit__(*details)

    def score(self, tokens: np.ndarray) -> np.ndarray:
        """The float32 nats of every target tokens[1:]; Broken if there is not one finite number >= 0 for each."""
        box, request = self.box, {"tokens": f"{secrets.token_hex(8)}.bin", "nats": f"{secrets.token_hex(8)}.bin"}
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = MAGIC, VERSION, len(tokens)
        try:
            (box.folder / request["tokens"]).write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
        except OSError as error:
            raise Broken(f"its folder can no longer be written: {error.strerror}") from None
        box.send(json.dumps(request).encode())
        answer, _ = load_json(box.line().decode(errors="replace"))
        if not isinstance(answer, dict):
            raise Broken("its answer is not a JSON object")
        if "error" in answer:
            raise Broken(f"it answered: {text(answer['error'])[:300]}")
        nats = read_nats(box.folder / request["nats"], len(tokens) - 1)
        for name in request.values():
            with suppress(OSError):
                (box.folder / name).unlink()
        return nats


def read_nats(path: Path, num_targets: int) -> np.ndarray:
    """The numbers that a submission wrote; the path may by now be anything, so only a plain file is opened."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Broken(f"it wrote no scores: {error.strerror}") from None
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_size != 4 * num_targets:
        os.close(file)
        raise Broken(f"it wrote {found.st_size:,} bytes for {num_targets:,} targets of 4 bytes each")
    with os.fdopen(file, "rb") as opened:
        nats = np.frombuffer(opened.read(4 * num_targets), "<f4")
    if not np.isfinite(nats).all():
        raise Broken(f"{int((~np.isfinite(nats)).sum()):,} of its scores are not finite")
    if (nats < 0).any():
        raise Broken(f"{int((nats < 0).sum()):,} of its scores are negative: a probability above 1")
    return nats
