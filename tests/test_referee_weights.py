"""Rule P23: an artifact whose every tensor matters passes; weights that nothing reads are named."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from test_record import filed_record

from tools.referee.artifact import PREFIX, Foreign, Tensor, read_artifact, write_artifact
from tools.referee.case import Case, read_data
from tools.referee.rules import Finding, judge
from tools.referee.weights import changed
from train_gpt import load_artifact, read_header, read_tensors

LOADING = "        model.load_state_dict(state)\n"
LENIENT = "        model.load_state_dict(state, strict=False)\n"
SCORING = "    return result\n\n\n@dataclass\nclass Score:"
DECOY = "        self.decoy = nn.Parameter(torch.zeros(1000, 100))\n"
INIT = "        self.compute_dtype = torch.float32"


@pytest.fixture(scope="module")
def honest(data: Path, workshop: Path) -> Path:
    return filed_record(data, workshop)


@pytest.fixture
def copy(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / honest.name))


def examine(folder: Path, data: Path) -> Finding:
    return judge(Case(folder, read_data(data), seconds=60.0, seed=7), "P23")


def change_script(folder: Path, *changes: tuple[str, str]) -> None:
    path = folder / "train_gpt.py"
    source = path.read_text()
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    path.write_text(source)


def change_model(folder: Path, change: Callable[[list[Tensor]], list[Tensor]]) -> None:
    path = folder / "model_seed1337.bin"
    header, tensors, _ = read_artifact(path.read_bytes())
    path.write_bytes(write_artifact(header, change(tensors), {}))


def add_decoy(folder: Path) -> None:
    decoy = Tensor(["decoy"], "float32", [1000, 100], bytes(400_000))
    change_model(folder, lambda tensors: [*tensors, decoy])


def test_the_reader_agrees_with_that_of_the_script(honest):
    blob = (honest / "model_seed1337.bin").read_bytes()
    expected, (_, tensors, unread) = read_tensors(*read_header(blob)), read_artifact(blob)
    found = {name: tensor.value() for tensor in tensors for name in tensor.names}
    assert unread == 0 and set(found) == set(expected)
    assert all(np.array_equal(found[name], expected[name].numpy()) for name in expected)


def test_an_altered_copy_loads_with_the_altered_values(honest):
    header, tensors, _ = read_artifact((honest / "model_seed1337.bin").read_bytes())
    values = {t.name: changed(t.value(), "negated", np.random.default_rng(0)) for t in tensors[:3]}
    model, _, _ = load_artifact(write_artifact(header, tensors, values), torch.device("cpu"))
    state = model.state_dict()
    assert all(np.array_equal(state[name].numpy(), value) for name, value in values.items())
    assert np.array_equal(state[tensors[3].name].numpy(), tensors[3].value())


@pytest.mark.parametrize("how", ["noise", "scaled", "negated"])
@pytest.mark.parametrize("value", [np.zeros((3, 4), "<f4"), np.ones(5, "<f2"), np.arange(6), np.ones(1, bool)])
def test_every_change_keeps_shape_and_type_and_all_but_scaled_zeros_differ(how, value):
    other = changed(value, how, np.random.default_rng(0))
    assert other.shape == value.shape and other.dtype == value.dtype
    assert not np.array_equal(other, value) or (how != "noise" and not value.any())


def damaged(blob: bytes, what: str) -> bytes:
    header, tensors, _ = read_artifact(blob)
    if what == "another magic":
        return b"x" + blob[1:]
    if what == "a cut frame":
        return blob[:-100]
    if what == "a bomb":
        frame = zstandard.ZstdCompressor().compress(bytes(300 << 20))
        raw = json.dumps(header).encode()
        return PREFIX.pack(b"PGOLFKIT", 1, len(raw), zlib.crc32(raw)) + raw + frame
    entries = {
        "a shape of no numbers": [["a", "rows", "b"]],
        "a negative shape": [["a", "float32", [-1]]],
        "a shape beyond the data": [["a", "float32", [1 << 40]]],
        "an unknown type": [["a", "complex", [1]]],
        "a copy of nothing": [["a", "same", "b"]],
        "no list": 3,
        "two numbers for a tensor": [[1, 2]],
        "a name that is a list": [[[], "float32", [1]]],
    }[what]
    frame = zstandard.ZstdCompressor().compress(b"".join(t.data for t in tensors))
    raw = json.dumps(header | {"tensors": entries}).encode()
    return PREFIX.pack(b"PGOLFKIT", 1, len(raw), zlib.crc32(raw)) + raw + frame


@pytest.mark.parametrize("what", [
    "another magic", "a cut frame", "a bomb", "a shape of no numbers", "a negative shape", "a shape beyond the data",
    "an unknown type", "a copy of nothing", "no list", "two numbers for a tensor", "a name that is a list",
])
def test_the_reader_refuses(honest, what):
    blob = (honest / "model_seed1337.bin").read_bytes()
    with pytest.raises(Foreign):
        read_artifact(damaged(blob, what))


def test_an_honest_record_uses_all_its_weights(honest, data):
    found = examine(honest, data)
    assert found.status == "PASS", found.problems
    rows = found.evidence[0].rows
    assert len(rows) == len(read_artifact((honest / "model_seed1337.bin").read_bytes())[1])
    assert all(nats > 1e-6 for _, _, nats, _ in rows)


def test_a_zero_projection_hides_nothing(copy, data):
    def clear(tensors: list[Tensor]) -> list[Tensor]:
        return [t._replace(data=bytes(len(t.data))) if t.name.endswith("mixer.out.weight") else t for t in tensors]

    change_model(copy, clear)
    found = examine(copy, data)
    assert found.status == "PASS", found.problems
    assert "only after all others were shaken" in found.detail


def test_a_tensor_that_loading_ignores_is_named(copy, data):
    add_decoy(copy)
    change_script(copy, (LOADING, LENIENT))
    found = examine(copy, data)
    assert found.status == "FAIL" and len(found.problems) == 1
    assert "no score depends on decoy (400,000 bytes" in found.problems[0]


def test_a_parameter_that_nothing_reads_is_named(copy, data):
    add_decoy(copy)
    change_script(copy, (INIT, DECOY + INIT))
    assert "decoy" in "; ".join(examine(copy, data).problems)


def test_a_script_that_pretends_to_use_a_parameter_is_caught(copy, data):
    add_decoy(copy)
    lie = f"{LOADING}        if __name__ != '__main__':\n            nats = model.nats\n" \
          "            model.nats = lambda *ids: nats(*ids) + model.decoy.sum()\n"
    change_script(copy, (INIT, DECOY + INIT), (LOADING, lie))
    assert "pretends to use decoy" in "; ".join(examine(copy, data).problems)


def test_a_script_that_answers_with_a_constant_is_caught(copy, data):
    change_script(copy, (SCORING, SCORING.replace("return result", "return np.full_like(result, 2.05)")))
    found = examine(copy, data)
    assert found.status == "FAIL" and "pretends to use" in found.problems[0]


def test_a_script_that_hides_its_loader_is_judged_from_outside(copy, data):
    add_decoy(copy)
    hide = "if __name__ != '__main__':\n    del load_artifact\n\n\ndef main(argv: list[str]) -> int:"
    change_script(copy, (LOADING, LENIENT), ("def main(argv: list[str]) -> int:", hide))
    found = examine(copy, data)
    assert "from outside only" in found.detail and len(found.problems) == 1
    assert "no score depends on decoy" in found.problems[0]


def test_weights_that_loading_turns_into_others_count(copy, data):
    late = "        up = model.blocks[0].mlp.up\n        kept = up.weight.detach().clone()\n" \
           "        up.forward = lambda x: F.linear(x, kept.to(x.dtype))\n"
    change_script(copy, (LOADING, LOADING + late))
    found = examine(copy, data)
    assert found.status == "PASS", found.problems
    changes = {name: how for name, _, _, how in found.evidence[0].rows}
    assert changes["blocks.0.mlp.up.weight"] == "noise, seen from outside"


def test_bytes_that_belong_to_no_tensor_are_counted(copy, data):
    path = copy / "model_seed1337.bin"
    header, tensors, _ = read_artifact(path.read_bytes())
    blob = write_artifact(header, [*tensors, Tensor(["x"], "uint8", [1000], bytes(1000))], {})
    _, version, length, _ = PREFIX.unpack_from(blob)
    entries = json.loads(blob[PREFIX.size : PREFIX.size + length])
    entries["tensors"].pop()
    raw = json.dumps(entries).encode()
    path.write_bytes(PREFIX.pack(b"PGOLFKIT", version, len(raw), zlib.crc32(raw)) + raw + blob[PREFIX.size + length :])
    change_script(copy, ("    if position != len(data):\n", "    if False:\n"))
    assert examine(copy, data).problems == ["1,000 bytes of the artifact belong to no tensor"]


def test_a_foreign_artifact_is_skipped(copy, data):
    (copy / "model_seed1337.bin").write_bytes(b"PK\x03\x04 a zip file")
    found = examine(copy, data)
    assert found.status == "SKIP" and "not in the kit's format" in found.detail


def test_without_data_nothing_is_run(honest):
    assert judge(Case(honest), "P23").status == "SKIP"
