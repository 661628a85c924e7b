"""The referee reads scripts: what may not be in them, what a judge should see, and that they are what they seem."""

import base64
import lzma
import re
import shutil
from pathlib import Path

import pytest
from test_record import filed_record
from test_referee_files import compress, edit, judged, problems

from architectures import names
from tools import pack
from tools.referee import acts, constants
from tools.referee.code import Unreadable, readable


@pytest.fixture
def record(data: Path, tmp_path: Path, workshop: Path) -> Path:
    """A record that is free to be spoilt."""
    honest = filed_record(data, workshop)
    return Path(shutil.copytree(honest, tmp_path / honest.parent.name / honest.name))


def test_a_compressed_script_with_its_text_beside_it_passes(record):
    compress(record)
    assert problems(record, "P13") == ""
    assert "train_gpt_readable" not in problems(record, "P12")
    assert "unpacks to train_gpt_readable.py" in judged(record, "P13").detail


SOURCES = {
    "exec(zlib.decompress(base64.b85decode(x)))": "exec runs text as code",
    "f = eval": "eval runs text as code",
    "compile('1', 'x', 'eval')": "compile runs text as code",
    "import builtins as b\nb.exec('1')": "builtins.exec runs text as code",
    "getattr(__builtins__, 'ex' + 'ec')": "__builtins__ hides what it uses",
    "from os import system as s\ns('ls')": "os.system starts another program",
    "import os\ngetattr(os, 'sys' + 'tem')('ls')": "getattr os ... hides what it uses",
    "import os\nvars = os.__dict__": "os.__dict__ hides what it uses",
    "import subprocess": "subprocess starts another program",
    "import marshal": "marshal makes code of data",
    "import importlib\nimportlib.import_module('sub' + 'process')": "import_module ... hides what it uses",
    "from importlib import import_module\nimport_module('requests')": "import_module requests reaches the network",
    "import urllib.request": "urllib.request reaches the network",
    "from huggingface_hub import hf_hub_download": "huggingface_hub.hf_hub_download reaches the network",
    "import torch\ntorch.hub.load('a', 'b')": "torch.hub.load reaches the network",
    "m = Model.from_pretrained('gpt2')": "?.from_pretrained reaches the network",
    "import ctypes\nctypes.CDLL('./fast.so')": "ctypes.CDLL ./fast.so loads a library",
    "import torch\ntorch.ops.load_library('x.so')": "torch.ops.load_library runs machine code that nobody can read",
    "from torch.utils.cpp_extension import load": "torch.utils.cpp_extension.load runs machine code",
    "from . import helper": "..helper imports a file that lies beside it",
    "from os import *": "os.* hides what it uses",
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_script_may_not_say(source):
    refused = [f"{what} {why}" for _, what, why, refused in acts.examine(source)["acts"] if refused]
    assert any(SOURCES[source] in found for found in refused)


HARMLESS = (
    "model.eval()", "import re\nre.compile('x')", "import torch\ntorch.compile(model)",
    "class C:\n    compile: bool = True\n    def f(self):\n        return self.compile",
    "import importlib\nimportlib.import_module('flash_attn_interface')", "import ctypes\nctypes.CDLL(None)",
    "import torch\ntorch.load('model.bin')", "import pickle", "code = requests = datasets = []\ncode.append(1)",
    "from torch.utils.cpp_extension import load_inline", "import urllib.parse", "import os\nos.path.join('a')",
    "import torch\ngetattr(torch, name)", "import base64\nbase64.b85decode('x' * 3)",
)


@pytest.mark.parametrize("source", HARMLESS)
def test_a_script_may_say(source):
    assert not [act for act in acts.examine(source)["acts"] if act[3]]


def test_a_refused_act_fails_the_record_and_names_the_line(record):
    edit(record / "train_gpt.py", r"^import math$", "import math, socket")
    line = (record / "train_gpt.py").read_text().splitlines().index("import math, socket") + 1
    found = judged(record, "P13")
    assert found.status == "FAIL" and f"line {line}: socket reaches the network" in found.problems


def test_lines_with_a_history_are_evidence_and_no_failure(record):
    edit(record / "train_gpt.py", r"^import math$", "import math\nGPTQ_RESERVE_SECONDS = 0.5")
    found = judged(record, "P13")
    assert found.status == "PASS" and "1 line(s) like those of earlier wrong entries" in found.detail
    rows = next(table.rows for table in found.evidence if "earlier entries" in table.title)
    assert rows[0][1:] == ["R09", "a clock that a setting moves", "GPTQ_RESERVE_SECONDS = 0.5"]


def test_what_stands_behind_the_end_of_a_compressed_text_is_refused():
    layers = [lzma.compress(source, lzma.FORMAT_RAW, filters=pack.LZMA_FILTERS) for source in (b"a = 1\n", b"b = 2\n")]
    packed = pack.STUB.format(payload=base64.b85encode(b"".join(layers)).decode(), filters=pack.LZMA_FILTERS)
    bound = {}
    exec(packed, bound)
    assert bound["b"] == 2  # it does run
    with pytest.raises(Unreadable, match="behind the end of its text"):
        readable(packed.encode())


UNREADABLE = {
    "another wrapper around a compressed text": (pack.compress("a = 1\n") + "b = 2\n", "its wrapper is not the one"),
    "an encoding of its own": ("# coding: utf-7\na = 1\n", "declares the encoding utf-7"),
    "bytes that are no text": (b"a = '\xff'\n", "does not unpack"),
    "letters that turn the line": ("a = 1 # \u202e b\n", "U+202E in line 1"),
    "a zero byte": ("a = 1\0\n", "does not compile"),
    "no Python": ("def", "does not compile: SyntaxError"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_script_is_refused_for(what):
    source, words = UNREADABLE[what]
    with pytest.raises(Unreadable, match=re.escape(words)):
        readable(source if isinstance(source, bytes) else source.encode())


def test_a_script_that_the_parser_cannot_hold_is_a_problem_and_no_crash(record):
    (record / "train_gpt.py").write_text("x = " + "-" * 100_000 + "1\n")
    found = judged(record, "P13")
    assert found.status == "FAIL" and found.problems[0].startswith("train_gpt.py ")


TABLES = {
    "a list of numbers": (f"x = [{', '.join(str(i) for i in range(65))}]", "65 numbers in one table"),
    "rows of numbers": (f"x = torch.tensor([{', '.join('(1, -2.5)' for _ in range(40))}])", "80 numbers in one table"),
    "a long text": (f"x = 'a b' + {'c d ' * 500!r}", "2,003 letters in one statement"),
    "bytes": (f"x = {bytes(range(256)) * 8!r}", "2,048 letters in one statement"),
    "a number as long as a text": (f"x = {hex(7 ** 3500)}", "letters in one statement"),
    "many exact numbers": ("\n".join(f"x{i} = 0.{12345 + i}1" for i in range(65)), "65 precise numbers in all"),
    "words in comments": ("\n".join(f"# {i:03d}abcdefghijklmnopqrstuvwxyz0123456789ABCDEF" for i in range(50)),
                          "letters in long words in all"),
}


@pytest.mark.parametrize("what", TABLES)
def test_a_judge_has_to_look_at(record, what):
    source, words = TABLES[what]
    (record / "train_gpt.py").write_text(f'"""{"A docstring is no parameter. " * 100}"""\n{source}\n')
    found = judged(record, "P22")
    assert found.status == "HOLD" and len(found.problems) == 1 and words in found.problems[0]


def test_calls_with_few_numbers_each_are_no_table():
    source = f"@autotune(configs=[{', '.join('Config(64, 32, num_warps=4)' for _ in range(40))}])\ndef f(): pass\n"
    assert max(size for _, kind, size, _ in constants.find(source)["rows"] if kind == "numbers") == 3


@pytest.mark.parametrize("arch", names())
def test_the_packed_script_passes_the_rules_on_code_with(record, arch):
    (record / "train_gpt.py").write_text(pack.flatten(arch))
    assert [judged(record, rule).problems for rule in ("P13", "P22")] == [[], []]
    compress(record)
    assert [judged(record, rule).problems for rule in ("P13", "P22")] == [[], []]
