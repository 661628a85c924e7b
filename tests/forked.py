"""Runs Python programs in forks of a process that has imported torch, which costs more than most of them do.

A fork has arguments, environment, folder and streams of its own, as a started program has; it shares what is imported,
and the seed of the hashes. Other systems than Linux do not fork well, so there programs are started.
"""

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from types import ModuleType
from typing import IO, NoReturn

SERVER = "import sys; sys.path[0] = sys.argv[1]; import forked; forked.serve()"
ONE_AT_A_TIME = threading.Lock()  # some tests ask from several threads


def run_forked(
    words: Sequence[object], env: dict[str, str], cwd: Path, timeout: float, given: str = ""
) -> subprocess.CompletedProcess[str]:
    """`python WORDS...`, a file or -c CODE and arguments, in a fork of a process that knows nothing of this one."""
    command = [sys.executable, *map(str, words)]
    if sys.platform != "linux":
        return subprocess.run(command, cwd=cwd, env=env, input=given, capture_output=True, text=True, timeout=timeout)
    with ONE_AT_A_TIME:
        asked = server()
        asked.stdin.write(json.dumps([command[1:], env, str(cwd), timeout, given]) + "\n")
        asked.stdin.flush()
        answer = json.loads(asked.stdout.readline())
    if answer is None:
        raise subprocess.TimeoutExpired(command, timeout)
    return subprocess.CompletedProcess(command, *answer)


@cache
def server() -> subprocess.Popen:
    """A process with torch and nothing of the kit; it ends when this one does."""
    command = [sys.executable, "-c", SERVER, str(Path(__file__).parent)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(started.communicate)  # ends its input, and waits
    return started


def serve() -> None:
    """Answers each line of standard input, what to run, with [status, output, errors], or null if time ran out."""
    import torch._dynamo  # noqa: F401  training needs the compiler's package too, also where it compiles nothing

    for line in sys.stdin:
        print(json.dumps(fork(*json.loads(line))), flush=True)


def fork(words: list[str], env: dict[str, str], cwd: str, timeout: float, given: str) -> tuple[int, str, str] | None:
    with ExitStack() as opened:
        streams = [opened.enter_context(TemporaryFile("w+", encoding="utf-8")) for _ in range(3)]
        streams[0].write(given)
        streams[0].seek(0)
        if not (child := os.fork()):
            become(words, env, cwd, streams)
        ended = os.pidfd_open(child)
        in_time = select.select([ended], [], [], timeout)[0]
        os.close(ended)
        if not in_time:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for stream in streams:
            stream.seek(0)
        return (status, streams[1].read(), streams[2].read()) if in_time else None


def become(words: list[str], env: dict[str, str], cwd: str, streams: list[IO]) -> NoReturn:
    """Turn this process into the program, until its end."""
    status = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream.fileno(), number)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        sys.modules["numpy"].random.seed()  # a fork would go on with the numbers of the others
        run_program(words)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_program(words: list[str]) -> None:
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if words[0] == "-c":
        sys.argv, sys.path[:] = ["-c", *words[2:]], ["", *paths, *sys.path[1:]]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(main))
    else:
        sys.argv, sys.path[:] = words, [os.path.dirname(os.path.abspath(words[0])), *paths, *sys.path[1:]]
        runpy.run_path(words[0], run_name="__main__")
