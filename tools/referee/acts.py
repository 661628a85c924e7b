"""What the text of a script says that it does: which names it uses that no submission may, or that a judge should see.

Names are followed through imports, so `from os import system as s` is os.system, but not through clever code: that a
script hides nothing better is shown by P19, which watches it run.
"""

import ast
import re
import sys
from collections.abc import Iterator

NETWORK = ["socket", "ssl", "socketserver", "http.client", "http.server", "urllib.request", "urllib3", "requests",
           "httpx", "aiohttp", "ftplib", "smtplib", "telnetlib", "xmlrpc", "huggingface_hub", "datasets", "wget",
           "gdown", "boto3", "paramiko", "websocket", "websockets", "fsspec", "kagglehub", "wandb", "torch.hub",
           "torch.utils.model_zoo"]
REFUSED = [(re.compile(pattern), why) for pattern, why in (
    (r"(builtins\.)?(exec|eval|compile|__import__)|code|codeop", "runs text as code"),
    (r"marshal|runpy|imp|zipimport|zipapp|types\.(FunctionType|CodeType)|importlib\.machinery"
     r"|importlib\.util\.(spec_from_\w+|module_from_spec)|sys\.(meta_path|path_hooks)", "makes code of data"),
    (r"subprocess|pty|pexpect|os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*)", "starts another program"),
    ("|".join(map(re.escape, NETWORK)), "reaches the network"),
    (r"cffi|ctypes\.\w*FUNC\w*|torch\.(jit\.load|package|export\.load|_inductor\.aoti_load_package)"
     r"|torch\.utils\.cpp_extension\.load", "runs machine code that nobody can read"),
    (r".*\.\*|.*\.__dict__|__builtins__|builtins\.__\w+__", "hides what it uses"),
)]
METHODS = {  # of any object
    **dict.fromkeys(("from_pretrained", "hf_hub_download", "snapshot_download", "urlopen"), "reaches the network"),
    "load_library": "runs machine code that nobody can read",
    **dict.fromkeys(("__subclasses__", "__builtins__", "__globals__"), "hides what it uses"),
}
NOTED = re.compile(r"importlib|pickle|dill|cloudpickle|ctypes|multiprocessing|inspect|gc\.get_objects|os\.fork\w*"
                   r"|sys\.(modules|path|_getframe|settrace)|torch\.load|torch\.utils\.cpp_extension\.load_inline")
GUARDED = ("os", "sys", "builtins", "importlib", "ctypes", "types")  # modules whose names must be written out
BUILTIN = ("exec", "eval", "compile", "__import__", "__builtins__", "getattr", "open", "__file__")
DECODER = re.compile(r"[ab](16|32|64|85)\w*decode|decodebytes|\w*decompress\w*|unhexlify|fromhex|frombuffer|fromstring")
SYSTEM_LIBRARY = re.compile(r"lib[\w.+-]+")
LONG_LITERAL = 64  # letters
MOST = 1000  # rows of each kind
# Lines that made earlier entries wrong, by the number of the failure.
LINEAGE = [(failure, re.compile(pattern, re.I), what) for failure, pattern, what in (
    ("R01", r"ctx_hash\s*\^|\^\s*\(?\s*\w*(target|tgt)\w*\s*\*\s*\w*prime", "a cache keyed by a hash of the target"),
    ("R02", r"ttt_adapt_adamw|adapt\w*\(\s*val_tokens|pre_?quant_?ttt", "training on validation tokens before scoring"),
    ("R04", r"\bslot_(steps|lr|delta|enabled)", "a correction fitted to the tokens that are then scored"),
    ("R05", r"len\(\s*piece[^\n]{0,80}\)\s*\+\s*1\b", "a byte more for a leading space, which scoring may add again"),
    ("R06", r"two_?pass|rescor(e|ing)\b|min_over_(passes|trajectories)", "a second pass over what was scored"),
    ("R07", r"--val-docs", "a split by a number of documents, which two programs may count differently"),
    ("R09", r"force_stop|gptq_reserve|precompute_outside", "a clock that a setting moves"),
    ("R10", r"open\([^)\n]{0,80}\.py\b", "code read from another file"),
    ("R12", r"is_new_word|ngram_tilt|tilt_hint", "a hint that reads the target"),
)]


def imported_names(tree: ast.AST) -> dict[str, str]:
    """What every name stands for that an import binds, anywhere in the script."""
    bound = {name: name for name in BUILTIN}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0]
                      for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            bound |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return bound


def dotted(node: ast.AST | None, bound: dict[str, str]) -> str:
    """`os.system` for an expression that means it, however os was imported; "" for anything that is not imported."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id in bound:
        return ".".join([bound[node.id], *reversed(parts)])
    return ""


def means(pattern: re.Pattern, name: str) -> bool:
    """Whether the pattern is a dotted name or something that the name is part of."""
    words = name.split(".")
    return any(pattern.fullmatch(".".join(words[:end])) for end in range(1, len(words) + 1))


def why_refused(name: str) -> str:
    if name.startswith("."):
        return "imports a file that lies beside it"
    why = next((why for pattern, why in REFUSED if means(pattern, name)), "")
    return why or METHODS.get(name.rpartition(".")[2], "")


def names_used(node: ast.AST, bound: dict[str, str]) -> list[str]:
    """The dotted names that one node of a script uses."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Attribute):
        return [dotted(node, bound) or f"?.{node.attr}"]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id != "compile":
        return [dotted(node, bound)]  # compile is a good name for a setting, so only a call of it counts
    return []


def acts_of_call(node: ast.Call, bound: dict[str, str]) -> Iterator[tuple[str, str, bool]]:
    """(what, why, refused?) for what only the arguments of a call tell."""
    function, arguments = dotted(node.func, bound), [*node.args, None, None]
    first, second = (arg.value if isinstance(arg, ast.Constant) else None for arg in arguments[:2])
    name = function.rpartition(".")[2] or getattr(node.func, "attr", "")
    if function == "compile":
        yield "compile", "runs text as code", True
    if function == "open" and isinstance(first, str):
        yield f"open {first}", "names a file", False
    if function.startswith("ctypes.") and re.search(r"(DLL|LoadLibrary)$", function):
        known = isinstance(node.args[0] if node.args else None, ast.Constant) \
            and (first is None or SYSTEM_LIBRARY.fullmatch(str(first)))
        yield f"{function} {first}", "loads a library", not known
    if name == "import_module":
        yield f"import_module {first or '...'}", why_refused(first) if first else "hides what it uses", \
            not isinstance(first, str) or bool(why_refused(first))
    owner = dotted(arguments[0], bound)
    if function == "getattr" and owner:
        why = why_refused(f"{owner}.{second}") if isinstance(second, str) else ""
        hidden = owner in GUARDED and not isinstance(second, str)
        if why or hidden:
            yield f"getattr {owner} {second or '...'}", why or "hides what it uses", True
    if DECODER.fullmatch(name) and isinstance(first, str | bytes) and len(first) > LONG_LITERAL:
        yield f"{name} of {len(first):,} letters", "decodes data that is part of the script", False


def acts_of(node: ast.AST, bound: dict[str, str]) -> Iterator[tuple[str, str, bool]]:
    """(what, why, refused?) for one node of a script."""
    for name in filter(None, names_used(node, bound)):
        if why := why_refused(name):
            yield name, why, True
        elif means(NOTED, name):
            yield name, "worth a look", False
        elif name == "__file__":
            yield name, "knows where it lies", False
    if isinstance(node, ast.Call):
        yield from acts_of_call(node, bound)


def examine(source: str) -> dict:
    """What a script does, by line: acts (line, what, why, refused?), foreign imports, lines with a history."""
    tree = ast.parse(source)
    bound, found, imports = imported_names(tree), {}, set()
    for node in ast.walk(tree):
        for what, why, refused in acts_of(node, bound):
            found.setdefault((node.lineno, not refused, why), (node.lineno, what[:100], why, refused))
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports |= {name.split(".")[0] for name in names_used(node, bound)} - sys.stdlib_module_names
    lineage = [(number, failure, what, line.strip()[:100]) for number, line in enumerate(source.splitlines(), 1)
               for failure, pattern, what in LINEAGE if pattern.search(line)]
    acts = sorted(found.values(), key=lambda act: (not act[3], act[0]))  # the refused ones first
    return {"acts": acts[:MOST], "imports": sorted(imports)[:MOST], "lineage": lineage[:MOST]}
