"""Starts a program under limits and ends all that it leaves behind; its text is handed to an interpreter of its own.

    python -I -S -c <this file> CPU_SECONDS MEMORY_BYTES FILE_BYTES COMMAND...

As the reaper of its descendants it finds also those that changed their session or whose parents are gone.
"""

import ctypes
import os
import resource
import signal
import sys
from contextlib import suppress

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def descendants() -> list[int]:
    """The processes under this one, by their parents in /proc."""
    parent = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat") as file:  # it may have ended
            parent[int(name)] = int(file.read().rpartition(")")[2].split()[1])
    found = {os.getpid()}
    while more := {pid for pid, above in parent.items() if above in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def reap(*_: object) -> None:
    """Kill every descendant, again until none is left, and go."""
    while sys.platform == "linux" and (left := descendants()):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def main() -> None:
    for name, limit in zip(("CPU", "DATA", "FSIZE", "CORE"), (*map(int, sys.argv[1:4]), 0), strict=True):
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: None
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: (reap(), os._exit(143)))
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            os.execv(sys.argv[4], sys.argv[4:])
        finally:
            os._exit(127)
    status = os.waitpid(child, 0)[1]
    reap()
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


main()
