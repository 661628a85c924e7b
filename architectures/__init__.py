"""Every architecture is one file in this folder; `ARCH=<file name>` selects it.

A file defines `Config` (a ModelConfig: each field is also an environment variable) and `Model` (a LanguageModel).
Nothing is registered anywhere: adding the file is adding the architecture. Blocks that two or more of them need
live in layers.py, those for weights shared over depth in the other shelf files. Architectures never import each other.
"""

import difflib
import importlib
from pathlib import Path

SHELF = {"__init__", "layers", "time_index", "time_gates", "ode", "generated", "recurrence", "documents", "masks"}


def names() -> list[str]:
    """The architectures there are: the file names in this folder, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in SHELF)


def load_architecture(name: str):
    """The (Model, Config) pair that architectures/<name>.py defines."""
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f" Did you mean ARCH={close[0]}?" if close else ""
        raise ValueError(f"ARCH={name} is not a file in architectures/.{hint} Available: {', '.join(names())}")
    module = importlib.import_module(f"architectures.{name}")
    return module.Model, module.Config
