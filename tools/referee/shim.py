"""Runs inside the box, before the submission's first line: keeps a ledger of what it opens, and where nothing else
shuts it in, refuses what is not its own. Its text is handed to the interpreter, so it imports nothing of the kit.

    python -c <this file> LEDGER_FD BLOCK PROCESSES OWN ROOTS train_gpt.py ARGUMENTS...

OWN are the folders it may write, the box first; ROOTS those that it may read besides.
"""

import json
import os
import runpy
import sys

PROCESSES = {"os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.exec", "os.system", "subprocess.Popen",
             "pty.spawn"}
NETWORK = {"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo",
           "socket.gethostbyname"}
LINKS = {"os.link", "os.symlink"}
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.truncate", "os.utime",
           "shutil.rmtree", *LINKS}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watch(ledger: int, block: bool, processes: bool, own: tuple[str, ...], roots: tuple[str, ...]) -> None:
    """From now on every file that Python code opens, every program and every connection is written to the ledger."""
    seen, busy = set(), [False]
    dumps, write, absolute, decode, pid = json.dumps, os.write, os.path.abspath, os.fsdecode, os.getpid()

    def place(path: object) -> str:
        return absolute(decode(path)) if isinstance(path, str | bytes | os.PathLike) else ""  # a descriptor

    def inside(path: str, folders: tuple[str, ...]) -> bool:
        return any(path == folder or path.startswith(folder + "/") for folder in folders)

    def judge(event: str, args: tuple) -> tuple[str, str, bool] | None:
        """What kind of act it is, on what, and whether it is allowed."""
        if event == "open":
            path = place(args[0])
            kind = "write" if (args[2] or 0) & WRITING else "read"
            allowed = inside(path, own) or (kind == "read" and inside(path, roots))
            return (kind, path, allowed) if path and not (allowed and inside(path, roots)) else None
        if event in CHANGES:
            path = place(args[1] if event in ("os.rename", *LINKS) else args[0])
            return "write", path, inside(path, own) and event not in LINKS
        if event in ("os.listdir", "os.scandir"):
            path = place(args[0]) if args[0] is not None else own[0]
            return None if not path or inside(path, (*own, *roots)) else ("list", path, False)
        if event in NETWORK:
            return "network", repr(args[1:])[:200], False
        if event in PROCESSES:
            return "process", repr(args[0] if args else event)[:200], processes
        if event == "os.kill":
            return None if args[0] == pid else ("process", f"kill {args[0]}", processes)
        return None

    def hook(event: str, args: tuple) -> None:
        if busy[0]:
            return
        busy[0] = True
        try:
            found = judge(event, args)
            if found is None:
                return
            if found not in seen:
                seen.add(found)
                write(ledger, dumps(found).encode() + b"\n")
        finally:
            busy[0] = False
        if block and not found[2]:
            raise PermissionError(f"the referee does not allow this: {found[0]} {found[1]}")

    sys.addaudithook(hook)


def main() -> None:
    ledger, block, processes = (int(word) for word in sys.argv[1:4])
    own, roots = (tuple(word.split(os.pathsep)) for word in sys.argv[4:6])
    script, sys.argv[:] = sys.argv[6], sys.argv[6:]
    sys.path[:] = [own[0], *(entry for entry in sys.path if entry)]
    watch(ledger, bool(block), bool(processes), own, roots)
    runpy.run_path(script, run_name="__main__")


main()
