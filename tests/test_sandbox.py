"""The box of a submission: what it must not reach, what the ledger shows of it, and that nothing outlives it."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tools.referee import sandbox
from tools.referee.sandbox import GRACE_SECONDS, Act, Box, Broken, Session, limited

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = "import ctypes, json, os, shutil, signal, socket, sqlite3, subprocess, sys, time\n"
ANSWER = IMPORTS + """try:
    found = {}
except Exception as error:
    found = type(error).__name__
print(found, flush=True)
"""


@pytest.fixture(params=["bubblewrap", "plain"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to be shut in, one after the other."""
    if request.param == "plain":
        monkeypatch.setattr(sandbox, "bubblewrap_works", lambda: False)
    elif not sandbox.bubblewrap_works():
        pytest.skip("no bubblewrap here")
    return request.param


@pytest.fixture
def only_bubblewrap() -> None:
    if not sandbox.bubblewrap_works():
        pytest.skip("no bubblewrap here")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of the judge, with a secret in it."""
    (tmp_path / "secret.txt").write_text("what nobody may read")
    return tmp_path


def processes_with(word: str) -> list[str]:
    """The command lines of this machine that hold the word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [line] if word in line else []
    return found


def wait_until_gone(word: str) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    while found := processes_with(word):
        assert time.monotonic() < deadline, found[0][-200:]
        time.sleep(0.01)


def run(tmp_path: Path, program: str, seconds: float = 5.0, **options: object) -> SimpleNamespace:
    """The first line that a program says, or how it broke, and its acts; nothing of it may be left afterwards."""
    script = tmp_path / f"{secrets.token_hex(4)}.py"
    script.write_text(program)
    with Box({"train_gpt.py": script}, [], {}, seconds, **options) as box:
        try:
            said = box.line().decode()
        except Broken as broken:
            said = f"broken: {broken}"
        acts, ending = box.acts(), time.monotonic()
    assert time.monotonic() - ending < GRACE_SECONDS + 1
    assert not box.folder.exists()
    wait_until_gone(box.folder.name)
    return SimpleNamespace(said=said, acts=acts, folder=str(box.folder))


def forbidden(acts: list[Act], kind: str) -> list[str]:
    return [act.what for act in acts if act.kind == kind and not act.allowed]


OUTSIDE = {
    "reads a file": ("open({home!r} + '/secret.txt').read()", "read", "secret.txt"),
    "reads a file by descriptor": ("os.read(os.open({home!r} + '/secret.txt', 0), 9)", "read", "secret.txt"),
    "reads a file through /proc": ("open('/proc/self/root' + {home!r} + '/secret.txt').read()", "read", "secret.txt"),
    "reads a file above its folder": ("open(os.path.relpath({home!r}) + '/secret.txt').read()", "read", "secret.txt"),
    "reads a file from another folder": ("[os.chdir('/'), open('etc/hostname').read()]", "read", "/etc/hostname"),
    "reads the machine's name": ("open('/etc/hostname').read()", "read", "/etc/hostname"),
    "reads the records": ("open({root!r} + '/README.md').read()", "read", "README.md"),
    "reads by an object that is a path": (
        "open(type('P', (), dict(__fspath__=lambda p: {home!r} + '/secret.txt'))()).read()", "read", "secret.txt"),
    "reads by a text that lies": (
        "open(type('P', (str,), dict(startswith=lambda *_: True))({home!r} + '/secret.txt')).read()", "read",
        "secret.txt"),
    "opens a database": ("sqlite3.connect({home!r} + '/data.db').execute('create table t(x)')", "write", "data.db"),
    "loads a library": ("ctypes.CDLL({home!r} + '/secret.so')", "read", "secret.so"),
    "writes a file": ("open({home!r} + '/new', 'w').write('x')", "write", "/new"),
    "writes into the system": ("open('/usr/lib/new', 'w').write('x')", "write", "/usr/lib/new"),
    "makes a folder": ("os.mkdir({home!r} + '/new')", "write", "/new"),
    "removes a file": ("os.remove({home!r} + '/secret.txt')", "write", "secret.txt"),
    "takes a file": ("os.rename({home!r} + '/secret.txt', 'mine')", "write", "secret.txt"),
    "puts a file": ("os.rename('train_gpt.py', {home!r} + '/new')", "write", "/new"),
    "changes rights": ("os.chmod({home!r} + '/secret.txt', 0o777)", "write", "secret.txt"),
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_a_program_that_goes_outside_is_stopped_and_seen(mode, home, what):
    code, kind, place = OUTSIDE[what]
    before = {path.name for path in home.iterdir()}
    found = run(home, ANSWER.format(code.format(home=str(home), root=str(ROOT))))
    assert found.said in ("PermissionError", "FileNotFoundError", "OSError", "OperationalError")
    assert any(seen.endswith(place) for seen in forbidden(found.acts, kind)), found.acts
    after = {path.name for path in home.iterdir() if path.suffix != ".py"}
    assert after == before and (home / "secret.txt").read_text() == "what nobody may read"


@pytest.mark.parametrize("place", ["{home}", "{root}", "..", "/", "/tmp"])
def test_a_folder_outside_shows_nothing_and_the_look_is_seen(mode, home, place):
    folder = place.format(home=home, root=ROOT)
    found = run(home, ANSWER.format(f"os.listdir({folder!r})"))
    assert forbidden(found.acts, "list") == [os.path.abspath(os.path.join(found.folder, folder))]
    assert "secret" not in found.said and "README" not in found.said and home.parent.name not in found.said


LINKS = {"symbolic": "os.symlink({secret!r}, 'x') or open('x').read()", "hard": "os.link({secret!r}, 'x')"}


@pytest.mark.parametrize("what", LINKS)
def test_a_link_is_seen_and_leads_nowhere(mode, home, what):
    found = run(home, ANSWER.format(LINKS[what].format(secret=str(home / "secret.txt"))))
    assert found.said.endswith("Error") and forbidden(found.acts, "write")


def test_files_of_its_own_are_allowed_and_those_it_opens_are_listed(mode, tmp_path):
    code = "[open('new', 'w').write('x'), os.rename('new', 'other'), open('other').read(), os.listdir('.')]"
    found = run(tmp_path, ANSWER.format(code + "[2]"))
    assert found.said == "x" and all(act.allowed for act in found.acts)
    assert Act("read", f"{found.folder}/other", True) in found.acts


def test_temporary_files_and_files_about_itself_leave_no_forbidden_act(mode, tmp_path):
    program = (
        "import tempfile, os\nwith tempfile.TemporaryFile() as file:\n    os.ftruncate(file.fileno(), 10)\n"
        "open('/proc/self/status').read()\nopen('/proc/cpuinfo').read()\nopen('/dev/urandom', 'rb').read(1)\n"
        "import sys\nprint(sys.flags.dont_write_bytecode, flush=True)"
    )
    found = run(tmp_path, program)
    assert found.said == "1" and all(act.allowed for act in found.acts)


def test_no_connection_leaves_the_box(mode, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        found = run(tmp_path, ANSWER.format(f"socket.create_connection(('127.0.0.1', {port}), 1)"))
        with pytest.raises(TimeoutError):
            server.accept()
    assert found.said.endswith("Error") and any("127.0.0.1" in what for what in forbidden(found.acts, "network"))


@pytest.mark.parametrize("code", ["socket.getaddrinfo('example.org', 80)", "socket.gethostbyname('example.org')"])
def test_looking_up_a_name_fails_and_is_seen(mode, tmp_path, code):
    found = run(tmp_path, ANSWER.format(code))
    assert found.said in ("PermissionError", "gaierror")
    assert any("example.org" in what for what in forbidden(found.acts, "network"))


STARTS = {
    "subprocess": "subprocess.run(['true'])",
    "fork": "os.fork() or os._exit(0)",
    "forkpty": "os.forkpty()[0] or os._exit(0)",
    "posix_spawn": "os.posix_spawn(sys.executable, ['python', '-c', ''], {{}})",
    "system": "os.system('true')",
    "popen": "os.popen('true').read()",
    "a forked pool": "__import__('multiprocessing').get_context('fork').Process(target=int).start()",
    "a spawned pool": "__import__('multiprocessing').get_context('spawn').Process(target=int).start()",
    "a fresh copy of what subprocess uses": "[sys.modules.pop('_posixsubprocess'), __import__('_posixsubprocess')][0]",
    "fork of the C library": "ctypes.CDLL(None).fork() or os._exit(0)",
    "exec": "os.execv(sys.executable, ['python', '-c', 'print(1, flush=True)'])",
}


@pytest.mark.parametrize("what", STARTS)
def test_starting_a_process_is_seen(mode, tmp_path, what):
    found = run(tmp_path, ANSWER.format(STARTS[what].replace("{{}}", "{}")))
    assert forbidden(found.acts, "process")
    assert mode == "bubblewrap" or found.said == "PermissionError"


def test_a_program_that_may_start_others_does(mode, tmp_path):
    code = "subprocess.run([sys.executable, '-c', 'print(7)'], stdout=-1).stdout.decode().strip()"
    found = run(tmp_path, ANSWER.format(code), processes=True)
    assert found.said == "7" and not forbidden(found.acts, "process")


DAEMON = """import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.execv(sys.executable, ["python", "-c", "import time; time.sleep(60)", "{marker}"])
    os._exit(0)
time.sleep(0.1)
print("started", flush=True)
{then}
"""


@pytest.mark.parametrize("then", ["sys.stdin.read()", "os._exit(0)"])
def test_a_daemon_does_not_outlive_the_box(mode, tmp_path, then):
    marker = secrets.token_hex(8)
    found = run(tmp_path, DAEMON.format(marker=marker, then=then), processes=True)
    assert found.said == "started"
    wait_until_gone(marker)


def test_a_daemon_is_there_while_the_box_is_open(mode, tmp_path):
    marker = secrets.token_hex(8)
    (tmp_path / "daemon.py").write_text(DAEMON.format(marker=marker, then="sys.stdin.read()"))
    with Box({"train_gpt.py": tmp_path / "daemon.py"}, [], {}, 5.0, processes=True) as box:
        assert box.line() == b"started" and processes_with(marker)


STUBBORN = {
    "ignores the request to end": "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)",
    "hangs at its exit": "import atexit; atexit.register(time.sleep, 60); print(1, flush=True)",
    "leaves a thread": "import threading; threading.Thread(target=time.sleep, args=[60]).start(); print(1, flush=True)",
    "stops itself": "print(1, flush=True); os.kill(os.getpid(), signal.SIGSTOP)",
    "closes its output": "print(1, flush=True); os.close(1); os.close(2); time.sleep(60)",
}


@pytest.mark.parametrize("what", STUBBORN)
def test_the_box_closes_on_a_program_that(mode, tmp_path, what):
    assert run(tmp_path, IMPORTS + STUBBORN[what]).said == "1"


BROKEN = {
    "says nothing": ("time.sleep(60)", "no answer within 0.5 seconds"),
    "closes its output and lives on": ("os.close(1); os.close(2); time.sleep(60)", "no answer within 0.5 seconds"),
    "says half a line": ("print('half', end='', flush=True); time.sleep(60)", "no answer within 0.5 seconds"),
    "ends": ("sys.exit('that was all')", "status 1: that was all"),
    "crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "status 139"),
    "floods its output": ("os.write(1, b'x' * (1 << 21))", "printed more than"),
    "floods its errors": ("os.write(2, b'x' * (1 << 21))", "printed more than"),
    "floods the ledger": (
        "for n in range(1 << 13):\n    try:\n        open(f'{n:0200}')\n    except OSError:\n        pass",
        "more files than the ledger",
    ),
    "closes the ledger": ("os.closerange(3, 99); open('x', 'w')", "took the referee's ledger away"),
    "replaces the ledger": (
        "null = os.open('/dev/null', os.O_WRONLY); [os.dup2(null, n) for n in range(3, 30)]; open('x', 'w')",
        "took the referee's ledger away",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_referee_says_what_is_wrong_with_a_program_that(mode, tmp_path, what):
    code, words = BROKEN[what]
    assert words in run(tmp_path, IMPORTS + code, seconds=3.0 if "ledger" in what else 0.5).said


def test_nonsense_in_the_ledger_is_an_act(mode, tmp_path):
    code = "for n in range(3, 30):\n    try:\n        os.write(n, b'[1, 2\\n')\n    except OSError:\n        pass\n"
    found = run(tmp_path, IMPORTS + code + "print(1, flush=True)")
    assert Act("write", "the ledger", False) in found.acts


def test_a_flood_of_output_does_not_hide_the_acts_before_it(mode, home):
    code = f"try:\n    open({str(home / 'secret.txt')!r})\nexcept OSError:\n    pass\nos.write(1, b'x' * (1 << 21))"
    assert forbidden(run(home, IMPORTS + code, seconds=0.5).acts, "read")


LIMITS = {
    "memory": ("len(bytearray(20 << 30))", "MemoryError"),
    "the size of a file": ("open('big', 'wb').truncate(2 << 30)", "OSError"),
}


@pytest.mark.parametrize("what", LIMITS)
def test_there_is_a_limit_on(mode, tmp_path, what):
    code, error = LIMITS[what]
    assert run(tmp_path, ANSWER.format(code)).said == error


def test_the_environment_is_empty_but_for_what_is_given(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    found = run(tmp_path, IMPORTS + "print(json.dumps(dict(os.environ)), flush=True)")
    assert set(json.loads(found.said)) <= {"TMPDIR", "OMP_NUM_THREADS", "LC_CTYPE", "PWD"}


def test_looking_for_other_processes_is_seen(mode, tmp_path):
    found = run(tmp_path, ANSWER.format("len([name for name in os.listdir('/proc') if name.isdigit()])"))
    assert "/proc" in forbidden(found.acts, "list")
    assert found.said == ("PermissionError" if mode == "plain" else "2")  # itself and its init


def test_killing_the_parent_is_seen_and_does_not_help(mode, tmp_path):
    found = run(tmp_path, ANSWER.format("os.kill(os.getppid(), signal.SIGKILL)"))
    assert forbidden(found.acts, "process") and found.said in ("None", "PermissionError")


def test_a_program_ends_with_its_supervisor(mode, tmp_path):
    (tmp_path / "sleeper.py").write_text("import time\nprint(1, flush=True)\ntime.sleep(60)")
    with Box({"train_gpt.py": tmp_path / "sleeper.py"}, [], {}, 5.0) as box:
        box.line()
        box.process.kill()
        wait_until_gone(box.folder.name)
    assert not box.folder.exists()


def test_a_command_under_limits_ends_with_its_supervisor():
    marker = secrets.token_hex(8)
    command = limited([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)", marker], 60.0)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.kill()
    wait_until_gone(marker)


def test_limits_do_not_exceed_those_of_the_referee_itself():
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_FSIZE)[0])"
    words = " ".join(f"'{word}'" for word in limited([sys.executable, "-c", code], 60.0)[:4])
    rest = limited([sys.executable, "-c", code], 60.0)[4:]
    shell = f'ulimit -f 1000; exec {words} "$@"'
    done = subprocess.run(["bash", "-c", shell, "bash", *rest], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.strip() == str(1000 * 1024), done.stderr


def test_folders_nested_deeper_than_python_counts_are_removed(mode, tmp_path):
    code = "for n in range(1500):\n    os.mkdir('d')\n    os.chdir('d')\nprint(1, flush=True)"
    assert run(tmp_path, IMPORTS + code).said == "1"


@pytest.fixture
def scorer(tmp_path: Path, mode: str) -> Iterator[Session]:
    """A session with a program that answers after it did what the test put in its place."""
    yield lambda code: Session(write(tmp_path, code), write(tmp_path, "a model"), 2.0)


def write(folder: Path, content: str) -> Path:
    path = folder / secrets.token_hex(4)
    path.write_text(content)
    return path


def test_a_session_reports_a_program_that_unlinks_its_own_folder(scorer):
    with scorer(IMPORTS + "shutil.rmtree(os.getcwd(), ignore_errors=True); print('{}', flush=True)\n"
                          "sys.stdin.readline()") as session, pytest.raises(Broken):
        session.box.line()
        session.score(np.zeros(9, np.uint16))
    assert not session.box.folder.exists()


ANSWERS = {
    "a pipe": "os.mkfifo(nats)",
    "a folder": "os.mkdir(nats)",
    "a file that is too long": "open(nats, 'wb').truncate(1 << 29)",
    "nothing": "None",
}


@pytest.mark.parametrize("what", ANSWERS)
def test_a_session_refuses_scores_that_are(scorer, what):
    code = f"nats = json.loads(sys.stdin.readline())['nats']; {ANSWERS[what]}; print('{{}}', flush=True)\n"
    with scorer(IMPORTS + code + "sys.stdin.read()") as session, pytest.raises(Broken, match="wrote"):
        session.score(np.zeros(9, np.uint16))
    assert not session.box.folder.exists()


UNSEEN = {
    "opens a file by the C library": "ctypes.CDLL(None).open({secret!r}.encode(), 0)",
    "asks for a file's size": "os.path.exists({secret!r})",
    "looks at processes by the C library": "ctypes.CDLL(None).access({proc!r}.encode(), 0)",
}


@pytest.mark.parametrize("what", UNSEEN)
def test_bubblewrap_stops_what_the_hook_cannot_see(only_bubblewrap, home, what):
    code = UNSEEN[what].format(secret=str(home / "secret.txt"), proc=f"/proc/{os.getpid()}/environ")
    assert run(home, ANSWER.format(code)).said in ("-1", "False")


def test_bubblewrap_has_no_network_for_the_c_library(only_bubblewrap, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = b"\x02\x00" + server.getsockname()[1].to_bytes(2, "big") + socket.inet_aton("127.0.0.1") + bytes(8)
        found = run(tmp_path, ANSWER.format(f"(c := ctypes.CDLL(None)).connect(c.socket(2, 1, 0), {address!r}, 16)"))
        with pytest.raises(TimeoutError):
            server.accept()
    assert found.said == "-1"


def test_bubblewrap_gives_every_box_its_own_temporary_and_shared_folders(only_bubblewrap, tmp_path):
    name = secrets.token_hex(8)
    for folder in ("/tmp", "/dev/shm"):
        code = f"os.path.exists('{folder}/{name}') or ctypes.CDLL(None).creat(b'{folder}/{name}', 0o600) > 0"
        assert run(tmp_path, ANSWER.format(code)).said == "True"
        assert not Path(folder, name).exists()
        assert run(tmp_path, ANSWER.format(f"os.path.exists('{folder}/{name}')")).said == "False"
