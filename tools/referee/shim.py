"""Runs inside the box, before the submission's first line: keeps a ledger of what it opens, and where nothing else
shuts it in, refuses what is not its own. Its text is handed to the interpreter, so it imports nothing of the kit.

    python -B -c <this file> LEDGER_FD BLOCK PROCESSES OWN ROOTS PROGRAM ARGUMENTS...

OWN are the folders it may write, the box first; ROOTS those that it may read besides.
"""

import _posixsubprocess
import json
import os
import runpy
import sys

PROCESSES = {"os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.exec", "os.system", "subprocess.Popen",
             "pty.spawn", "os.killpg"}
C_PROCESSES = {"fork", "vfork", "clone", "posix_spawn", "posix_spawnp", "system", "popen", "execv", "execve", "execvp",
               "execl", "syscall", "kill", "killpg"}  # of the C library, by ctypes
LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}
NETWORK = {"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", *LOOKUPS}
LINKS = {"os.link", "os.symlink"}
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.truncate", "os.utime",
           "os.setxattr", "os.removexattr", "shutil.rmtree", "sqlite3.connect", *LINKS}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
LONGEST = 300  # letters of a path in the ledger: what is written to a pipe in one piece is at most 4,096 bytes


def watch(ledger: int, block: bool, processes: bool, own: tuple[str, ...], roots: tuple[str, ...]) -> None:
    """From now on every file that Python code opens, every program and every connection is written to the ledger."""
    seen, dumps, write, fstat, leave, pid = set(), json.dumps, os.write, os.fstat, os._exit, os.getpid()
    absolute, real, decode, plain = os.path.abspath, os.path.realpath, os.fsdecode, str.__str__
    pipe = fstat(ledger)

    def place(path: object) -> str:
        if not isinstance(path, str | bytes | os.PathLike):
            return ""  # a descriptor
        path = absolute(plain(decode(path)))
        return real(path) if path.startswith("/proc/") else path  # /proc/self/root leads everywhere

    def inside(path: str, folders: tuple[str, ...]) -> bool:
        return any(path == folder or path.startswith(folder + "/") for folder in folders)

    def judge(event: str, args: tuple) -> tuple[str, str, bool] | None:
        """What kind of act it is, on what, and whether it is allowed."""
        if event == "open":
            path = place(args[0])
            kind = "write" if (args[2] or 0) & WRITING else "read"
            allowed = inside(path, own) or (kind == "read" and inside(path, (*roots, f"/proc/{pid}")))
            return (kind, path, allowed) if path and (inside(path, own) or not allowed) else None
        if event in CHANGES:
            paths = [place(path) for path in args[: 2 if event in ("os.rename", *LINKS) else 1]]
            outside = [path for path in paths if path and not inside(path, own)]
            return ("write", (outside or paths)[-1], not outside and event not in LINKS) if any(paths) else None
        if event in ("os.listdir", "os.scandir"):
            path = place(args[0]) if args[0] is not None else own[0]
            return None if not path or inside(path, (*own, *roots)) else ("list", path, False)
        if event == "ctypes.dlopen":
            path = place(args[0]) if args[0] and "/" in decode(args[0]) else ""
            return None if not path or inside(path, roots) else ("read", path, inside(path, own))
        if event in ("ctypes.dlsym", "ctypes.dlsym/handle"):
            name = decode(args[1]) if isinstance(args[1], str | bytes) else ""
            return ("process", f"{name} of the C library", processes) if name in C_PROCESSES else None
        if event in NETWORK:
            return "network", repr(args if event in LOOKUPS else args[1:]), False
        if event in PROCESSES:
            return "process", repr(args[0] if args else event), processes
        if event == "import" and args[0] == "_posixsubprocess":  # a fresh copy, which announce_children does not know
            return "process", "import _posixsubprocess", processes
        if event == "os.kill":
            return None if args[0] == pid else ("process", f"kill {args[0]}", processes)
        return None

    def note(found: tuple[str, str, bool]) -> None:
        try:
            now = fstat(ledger)
        except OSError:
            now = None
        if now is None or (now.st_dev, now.st_ino) != (pipe.st_dev, pipe.st_ino):
            write(2, b"the program took the referee's ledger away\n")
            leave(1)
        write(ledger, dumps(found).encode() + b"\n")

    def hook(event: str, args: tuple) -> None:
        found = judge(event, args)
        if found is None:
            return
        found = found[0], found[1][:LONGEST], found[2]
        if found not in seen:
            note(found)
            seen.add(found)
        if block and not found[2]:
            raise PermissionError(f"the referee does not allow this: {found[0]} {found[1]}")

    sys.addaudithook(hook)


def announce_children() -> None:
    """multiprocessing starts programs by a function of C that raises no event; from now on it does."""
    fork_exec = _posixsubprocess.fork_exec

    def announced(args: list, *more: object) -> int:
        sys.audit("subprocess.Popen", args[0], args, None, None)
        return fork_exec(args, *more)

    _posixsubprocess.fork_exec = announced


def main() -> None:
    ledger, block, processes = (int(word) for word in sys.argv[1:4])
    own, roots = (tuple(word.split(os.pathsep)) for word in sys.argv[4:6])
    script, sys.argv[:] = sys.argv[6], sys.argv[6:]
    sys.path[:] = [own[0], *(entry for entry in sys.path if entry)]
    announce_children()
    watch(ledger, bool(block), bool(processes), own, roots)
    runpy.run_path(script, run_name="__main__")


main()
