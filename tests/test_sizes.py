"""The coder of the artifact's numbers, and tools.sizes, which compares it with others and says what a clip costs."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_architectures import CPU
from test_artifact import pack, stored, wide

import train_gpt
from tools import sizes
from tools.referee.artifact import read_artifact, write_artifact
from tools.referee.stored import Files

RECORD = ROOT / "records/track_non_record_16mb/2026-11-22_gpt_wikitext2_cpu/model_seed1337.bin"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    path = tmp_path / "here" / "model.bin"
    path.parent.mkdir()
    path.write_bytes(pack(wide()))
    return path


def found(path: Path) -> dict:
    (written,) = path.glob("sizes_*.json")
    return json.loads(written.read_text())["models"][0]


def test_an_artifact_of_version_1_is_still_read():
    model, header = sizes.load_model(RECORD)
    assert RECORD.read_bytes()[8] == 1 and header["arch"] == "gpt" and len(sizes.quantised(model, 6, None)) == 25


def test_every_coder_gives_back_what_it_got_and_bits_in_a_row_cost_more(artifact, tmp_path):
    assert sizes.main([str(artifact), "--bits", "5", "--rounds", "1", "--out", str(tmp_path)]) == 0
    rows = {(row["coder"], row["order"]): row["bytes"] for row in found(tmp_path)["coders"]}
    assert {"rans", "zstd-22", "lzma-9e"} <= {coder for coder, _ in rows}
    assert all(rows[coder, "packed"] > rows[coder, "rows"] for coder in ("zstd-22", "lzma-9e"))


def test_scores_go_with_sizes_from_more_to_fewer_bits(artifact, tmp_path, data):
    options = ["--score", str(data), "--score-tokens", "512", "--bits", "8", "--clips", "8,64", "--rounds", "1"]
    assert sizes.main([str(artifact), *options, "--out", str(tmp_path)]) == 0
    base, *rows = found(tmp_path)["scores"]
    assert [row["clip"] for row in rows] == [None, 8.0, 64.0] and base["cost"] == 0
    assert rows[0]["bytes_model"] > rows[1]["bytes_model"] > rows[2]["bytes_model"]
    assert abs(rows[0]["cost"]) < abs(rows[2]["cost"]) and rows[2]["val_bpb"] != base["val_bpb"]


def test_a_coder_that_changes_a_byte_is_found_out():
    with pytest.raises(ValueError, match="broken does not give back"):
        sizes.lap(bytes, lambda blob: blob[:-1] + b"!", b"abc", "broken")


@pytest.mark.parametrize("bits", [4, 5, 6, 7])
def test_bits_in_a_row_are_the_low_bits_of_every_number(bits):
    values = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).astype(np.int8).reshape(-1, 4)
    packed = np.unpackbits(np.frombuffer(sizes.packed([values], bits), np.uint8))[: values.size * bits]
    weights = np.r_[-(2 ** (bits - 1)), 2 ** np.arange(bits - 2, -1, -1)]
    assert np.array_equal(packed.reshape(-1, bits).astype(int) @ weights, values.reshape(-1))


@pytest.mark.parametrize("content", [b"", b"PGOLFKIT" + bytes(40)])
def test_what_is_no_artifact_is_named(tmp_path, content, capsys):
    (tmp_path / "x.bin").write_bytes(content)
    assert sizes.main([str(tmp_path / "x.bin")]) == 1
    assert "x.bin is no artifact" in capsys.readouterr().err


def coded(values: np.ndarray, classes: np.ndarray | None = None) -> tuple[bytes, np.ndarray, np.ndarray]:
    """(stream, classes, tables) of a list of bytes."""
    classes = np.zeros(len(values), np.uint8) if classes is None else classes
    symbols = classes * np.uint16(256) + values.view(np.uint8)
    counts = np.bincount(symbols, minlength=train_gpt.SIZE_CLASSES * 256).reshape(-1, 256)
    tables = train_gpt.frequencies(counts)
    return train_gpt.rans_encode(symbols, tables), classes, tables


RNG = np.random.default_rng(0)
BYTES = {
    "nothing": np.empty(0, np.int8),
    "one number": np.array([-128], np.int8),
    "one value": np.full(20_000, 7, np.int8),
    "the extremes": np.array([-128, 127, 0, -1] * 5000, np.int8),
    "one rare value": np.r_[np.zeros(400_000, np.int8), np.int8(1)],
    "all values alike": RNG.integers(-128, 128, 30_000).astype(np.int8),
    "a bell": np.round(RNG.standard_normal(30_001) * 9).astype(np.int8),
}


@pytest.mark.parametrize("name", BYTES)
def test_coded_numbers_come_back_bit_for_bit(name):
    values = BYTES[name]
    for classes in (None, RNG.integers(0, train_gpt.SIZE_CLASSES, len(values)).astype(np.uint8)):
        stream, classes, tables = coded(values, classes)
        assert np.array_equal(train_gpt.rans_decode(memoryview(stream), classes, tables).view(np.int8), values)


def test_a_damaged_stream_is_refused_within_a_second():
    stream, classes, tables = coded(BYTES["a bell"][:400])
    rng = random.Random(0)
    for _ in range(200):
        damaged = bytearray(stream)
        if rng.random() < 0.3:
            damaged = damaged[: rng.randrange(len(stream))]
        else:
            damaged[rng.randrange(len(stream))] ^= 1 << rng.randrange(8)
        began = time.process_time()
        with pytest.raises(ValueError, match="artifact is damaged"):
            train_gpt.rans_decode(memoryview(damaged), classes, tables)
        assert time.process_time() - began < 1
    for wrong in (tables + 1, tables * 0, -tables):
        with pytest.raises(ValueError, match="do not add up"):
            train_gpt.rans_decode(memoryview(stream), classes, wrong)


def test_a_large_matrix_costs_at_most_a_hundredth_more_than_its_entropy_and_less_if_its_rows_and_columns_differ():
    sizes = np.exp(RNG.standard_normal((1000, 1))), np.exp(0.5 * RNG.standard_normal(500))
    for spread, low, high in ((np.float64(1), 0.0, 0.01), (sizes[0] * sizes[1], -1.0, -0.05)):
        values = np.clip(np.round(6 * spread * RNG.standard_normal((1000, 500))), -127, 127).astype(np.int8)
        rows, columns = train_gpt.size_classes(values)
        stream, _, _ = coded(values.reshape(-1), train_gpt.class_of(rows, columns))
        share = np.bincount(values.reshape(-1).view(np.uint8)) / values.size
        entropy = -(share[share > 0] * np.log2(share[share > 0])).sum() * values.size / 8
        assert low <= len(stream) / entropy - 1 < high


def test_the_referee_reads_coded_tensors_and_its_altered_copy_loads():
    blob = pack(wide())
    kinds = {entry[1] for entry in train_gpt.read_header(blob)[0]["tensors"]}
    header, tensors, unread = read_artifact(blob)
    expected, found = stored(blob), {name: t.value() for t in tensors for name in t.names}
    assert kinds >= {"coded", "rows", "float32"} and unread == 0 and set(found) == set(expected)
    assert all(np.array_equal(found[name], expected[name].numpy()) for name in expected)
    model, _, _ = train_gpt.load_artifact(
        write_artifact(header, tensors, {tensors[0].name: -tensors[0].value()}), CPU.device
    )
    state = model.state_dict()
    assert torch.equal(state[tensors[0].name], -expected[tensors[0].name])
    assert torch.equal(state[tensors[3].name], expected[tensors[3].name])


def test_the_search_for_kept_text_sees_what_is_coded():
    blob = pack(wide())
    coded = read_artifact(blob)[1][0].data
    assert coded not in blob and any(coded in found for _, found in Files().unpacked("model.bin", blob))
