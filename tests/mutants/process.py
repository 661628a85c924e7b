"""Programs that do not do what is asked, or more."""

from tests.mutants import answer, mutant, swap


def at_start(source: str, line: str) -> str:
    """The script with a line run when it begins to serve scores."""
    begin = "    blob = Path(artifact).read_bytes()\n"
    return swap(source, begin, f"    {line}\n{begin}")


@mutant("P04", "leaves out the last score")
def too_few(source: str) -> str:
    return swap(source, 'nats.astype("<f4").tobytes()', 'nats[:-1].astype("<f4").tobytes()')


@mutant("P04", "one score is not a number")
def not_a_number(source: str) -> str:
    return swap(source, 'nats.astype("<f4").tobytes()', 'np.append(nats[:-1], np.nan).astype("<f4").tobytes()')


@mutant("P04", "hangs at its third request", answer_seconds=8.0)
def hangs(source: str) -> str:
    return swap(source, "            request = json.loads(line)\n",
                "            request = json.loads(line)\n            serve.n = getattr(serve, 'n', 0) + 1\n"
                "            time.sleep(3600 * (serve.n == 3))\n")


@mutant("P04", "floods its output")
def floods(source: str) -> str:
    return at_start(source, "print('x' * 10_000_000)")


@mutant("P04", "starts another program and lets it live on")
def forks(source: str) -> str:
    return at_start(source, "os.fork() or (os.setsid(), time.sleep(3600))")


@mutant("P04", "crashes on the second request")
def crashes(source: str) -> str:
    return swap(source, "        print(json.dumps(answer), flush=True)\n    return 0",
                "        print(json.dumps(answer), flush=True)\n        serve.n = getattr(serve, 'n', 0) + 1\n"
                "        1 // (2 - serve.n)\n    return 0")


@mutant("P19", "looks for training data beside its folder when it scores")
def reads_outside(source: str) -> str:
    return at_start(source, "try:\n        open('/srv/train.bin').close()\n    except OSError:\n        pass")


@mutant("P19", "asks a server when it scores, and goes on without an answer")
def calls_home(source: str) -> str:
    return at_start(source, "__import__('socket').socket().connect_ex(('127.0.0.1', 9))")


@mutant("P20", "a random number in every score")
def random_scores(source: str) -> str:
    return answer(source, "nats = nats + np.random.rand(len(nats)).astype(np.float32) * np.float32(0.01)")


@mutant("P20", "the run's own score is better than that of its files")
def better_in_memory(source: str) -> str:
    return swap(source, "    total = torch.tensor([nats.sum(dtype=np.float64)]",
                "    total = torch.tensor([0.99 * nats.sum(dtype=np.float64)]")


def in_training(source: str, line: str) -> str:
    begin = "    Model, _ = load_architecture(arch)\n    dataset, model_config"
    return swap(source, begin, f"    {line}\n{begin}")


@mutant("P15", "reads a file of the folder that it was trained in")
def missing_file(source: str) -> str:
    return in_training(source, "Path('notes.txt').read_text()")


@mutant("P15", "calls a server when training begins, and goes on without an answer")
def trains_online(source: str) -> str:
    return in_training(source, "__import__('socket').socket().connect_ex(('127.0.0.1', 9))")
