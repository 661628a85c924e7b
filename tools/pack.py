"""Turn train_gpt.py and one architecture into ONE self-contained file, whose size is what the competition counts.

    python -m tools.pack gpt -o packed.py                     layers.py, gpt.py and train_gpt.py in reading order
    python -m tools.pack gpt NUM_LAYERS=11 MATRIX_LR=0.03     settings become defaults: it runs with a bare environment
    python -m tools.pack gpt --compress                       the same text as a self-extracting script
    python -m tools.pack --unpack packed.py                   print the text inside

A packed and an unpacked run of the same settings give the same losses and the same artifact, byte for byte.
"""

import argparse
import ast
import base64
import lzma
import os
import re
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
MAX_SOURCE_BYTES = 1 << 24  # of a script that a stranger has packed
# Without the linecache line, @triton.jit cannot find the source of a kernel that lives in a string.
STUB = """import base64,lzma,linecache
s=lzma.decompress(base64.b85decode({payload!r}),lzma.FORMAT_RAW,None,{filters}).decode()
linecache.cache["packed"]=len(s),None,s.splitlines(True),"packed"
exec(compile(s,"packed","exec"))
"""
KIT_IMPORT = re.compile(r"^# BEGIN KIT IMPORT.*?^# END KIT IMPORT\n", flags=re.M | re.S)
ON_CUDA = """if torch.cuda.is_available() and importlib.util.find_spec("triton"):  # imported only where used

"""
INLINED = '''{banner}

def load_architecture(name: str):
    """The (Model, Config) pair in this file, which holds one architecture."""
    if name != "{arch}":
        raise ValueError(f"ARCH={{name}} is not in this script, which holds ARCH={arch} alone")
    return Model, Config


for setting in {settings!r}.items():
    os.environ.setdefault(*setting)
'''


def kit_imports(source: str) -> list[ast.ImportFrom]:
    """The import statements anywhere in the source that name a module of the kit."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
    return [n for n in nodes if (n.module or "").split(".")[0] == "architectures"]


def drop_kit_imports(source: str, path: Path) -> str:
    """The source without its `from architectures...` lines, which have nothing to import from once all is one file."""
    lines: list[str | None] = list(source.splitlines())
    for node in kit_imports(source):
        if any(alias.asname for alias in node.names):
            raise ValueError(f"{path.name}: an aliased kit import cannot be inlined: {ast.unparse(node)}")
        lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line for line in lines if line is not None).strip() + "\n"


def imported_files(node: ast.ImportFrom) -> list[Path]:
    """The files of the kit that an import names."""
    module = ROOT / Path(*node.module.split("."))
    names = [module / alias.name for alias in node.names] if module.is_dir() else [module]
    return [name.with_suffix(".py") for name in names]


def kit_parts(arch: str) -> tuple[list[Path], list[Path]]:
    """The files that an architecture needs, each after those that it imports: shelf, kernels, architecture.

    The second list has those that are imported inside functions alone: kernels, which not every machine can import.
    """
    order: list[Path] = []

    def visit(path: Path, found: list[Path]) -> None:
        if not path.is_file():
            raise ValueError(f"{path.relative_to(ROOT)} does not exist")
        for node in kit_imports(path.read_text()):
            for other in imported_files(node) if not node.col_offset else ():
                visit(other, found)
        if path not in [*order, *found]:
            found.append(path)

    visit(ROOT / "architectures/layers.py", order)
    visit(ROOT / f"architectures/{arch}.py", order)
    later: list[Path] = []
    for path in order:
        for node in kit_imports(path.read_text()):
            for other in imported_files(node) if node.col_offset else ():
                visit(other, later)
    return order, later


def top_level_names(source: str) -> set[str]:
    """Functions, classes and constants that a module defines at its top level."""
    defined = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        defined |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return defined


def refuse_clashes(parts: dict[str, str]) -> None:
    """Stop when two files define one name: in a single file the later would replace the earlier."""
    seen: dict[str, str] = {}
    for file, source in parts.items():
        for name in sorted(top_level_names(source)):
            if name in seen:
                raise ValueError(f"{seen[name]} and {file} both define {name}; rename one")
            seen[name] = file


def configs_of(arch: str) -> list[type]:
    """The two config classes whose fields are the settings of a run of this architecture."""
    from architectures import load_architecture
    from train_gpt import RunConfig

    return [RunConfig, load_architecture(arch)[1]]


def settings_of(arch: str) -> set[str]:
    """The environment variables that a run of this architecture reads, ARCH aside."""
    return {f.name.upper() for config in configs_of(arch) for f in fields(config)}


def check_settings(arch: str, settings: dict[str, str]) -> None:
    """Stop on a setting that a run of this architecture would refuse."""
    from train_gpt import from_env, reject_typos

    reject_typos(configs_of(arch), settings)
    if unknown := sorted(set(settings) - settings_of(arch)):
        raise ValueError(f"{unknown[0]} is not a setting of ARCH={arch}")
    for config in configs_of(arch):
        from_env(config, settings)


def settings_from_env(arch: str) -> dict[str, str]:
    """The settings of a run that the environment gives, except those that may differ between runs of one script."""
    names = sorted(settings_of(arch) - {"SEED", "RUN_ID", "OUT_DIR"})
    return {name: os.environ[name] for name in names if name in os.environ}


def flatten(arch: str, settings: dict[str, str] | None = None) -> str:
    """train_gpt.py with the kit files put in place of its marked import lines."""
    paths, later = kit_parts(arch)
    script = (ROOT / "train_gpt.py").read_text()
    if len(KIT_IMPORT.findall(script)) != 1:
        raise ValueError("train_gpt.py must contain the BEGIN KIT IMPORT and END KIT IMPORT lines exactly once")
    parts = {path.name: drop_kit_imports(path.read_text(), path) for path in [*paths, *later]}
    refuse_clashes(parts | {"train_gpt.py": KIT_IMPORT.sub("", script)})
    line = "# " + "-" * 77
    titled = {path: f"{line}\n# {path.relative_to(ROOT)}\n\n{parts[path.name]}\n\n" for path in [*paths, *later]}
    files = "".join(titled[path] for path in paths)
    if later:
        files += ON_CUDA + textwrap.indent("".join(titled[path] for path in later), "    ")
    inlined = INLINED.format(
        banner=f"{line}\n# This file: ARCH={arch}, settings baked in.\n",
        arch=arch,
        settings={"ARCH": arch} | (settings or {}),
    )
    return KIT_IMPORT.sub(lambda _: files + inlined, script)


def compress(source: str) -> str:
    """A script that unpacks and runs the source."""
    payload = base64.b85encode(lzma.compress(source.encode(), lzma.FORMAT_RAW, filters=LZMA_FILTERS)).decode()
    return STUB.format(payload=payload, filters=LZMA_FILTERS)


def unpack(packed: str) -> str:
    """The source inside a packed script; the script itself if it is not compressed."""
    match = re.search(r"b85decode\('(.*)'\)", packed) if packed.startswith("import base64,lzma,linecache") else None
    if not match:
        return packed
    try:
        opener = lzma.LZMADecompressor(lzma.FORMAT_RAW, None, LZMA_FILTERS)
        source = opener.decompress(base64.b85decode(match[1]), max_length=MAX_SOURCE_BYTES)
        if not opener.eof:
            raise ValueError(f"it is cut short, or holds more than {MAX_SOURCE_BYTES} bytes")
        if opener.unused_data:  # lzma.decompress would go on and run that too
            raise ValueError("it holds more behind the end of its text")
        return source.decode()
    except (ValueError, lzma.LZMAError) as error:
        raise ValueError(f"the compressed script is damaged: {error}") from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", nargs="?")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("-o", "--output", type=Path, default=Path("packed.py"))
    parser.add_argument("--compress", action="store_true")
    parser.add_argument("--from-env", action="store_true", help="bake in the settings in the environment too")
    parser.add_argument("--unpack", type=Path, metavar="SCRIPT")
    args = parser.parse_intermixed_args()
    try:
        if args.unpack:
            print(unpack(args.unpack.read_text()), end="")
            return 0
        if not args.arch:
            raise ValueError("name the architecture to pack, such as gpt")
        if bad := [s for s in args.settings if "=" not in s]:
            raise ValueError(f"{bad[0]} is not NAME=VALUE")
        settings = dict(setting.split("=", 1) for setting in args.settings)
        if args.from_env:
            settings |= settings_from_env(args.arch)
        check_settings(args.arch, settings)
        source = flatten(args.arch, settings)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(compress(source) if args.compress else source)
        print(f"{args.output}: {args.output.stat().st_size} bytes")
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
