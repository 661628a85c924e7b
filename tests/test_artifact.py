"""model.bin: what is in it, what it costs, and what is refused."""

import dataclasses
import multiprocessing
import random
import re
import resource
import signal
import struct
import time
import zlib

import pytest
import torch
from conftest import ROOT, TINY, result_of, run_script
from test_architectures import CPU, SHAPE, shake, tiny
from torch import nn

import train_gpt
from architectures import load_architecture

PLAN = train_gpt.ScorePlan(64, 64)


def pack(model, bits: int = 8, *clip_and_most) -> bytes:
    return train_gpt.pack_artifact(model, "gpt", "ab" * 32, PLAN, 1.0, bits, *clip_and_most)


def wide():
    """A model with matrices that are coded and, for its few key heads, one that is not."""
    return shake(tiny("gpt", model_dim=64, num_layers=2, num_kv_heads=1))


@pytest.fixture(scope="module", params=["rows", "coded"])
def blob(request) -> bytes:
    return pack(wide() if request.param == "coded" else shake(tiny("gpt")))


def stored(blob: bytes) -> dict[str, torch.Tensor]:
    return train_gpt.read_tensors(*train_gpt.read_header(blob))


@pytest.mark.parametrize("make", [lambda: shake(tiny("gpt")), wide])
def test_control_tensors_come_back_bit_for_bit_and_matrices_within_half_a_step(make):
    model, state = make(), stored(pack(make()))
    for name, p in model.named_parameters():
        if train_gpt.is_control(p):
            assert torch.equal(state[name], p)
        else:
            step = p.abs().amax(dim=-1, keepdim=True) / 127
            assert ((state[name] - p).abs() <= 0.501 * step).all()


def test_fewer_bits_cost_fewer_bytes_and_more_error():
    model = shake(tiny("gpt"))
    sizes = [len(pack(model, bits)) for bits in (8, 7, 6, 5, 4)]
    weight = model.blocks[0].mlp.up.weight
    errors = [
        (stored(pack(model, bits))["blocks.0.mlp.up.weight"] - weight).square().mean().item()
        for bits in (8, 7, 6, 5, 4)
    ]
    assert sizes == sorted(sizes, reverse=True) and errors == sorted(errors)


def test_clipping_a_row_never_adds_error():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight[:, 0] *= 8
    values, scales = train_gpt.quantize_rows(weight, 5)
    plain = weight.abs().amax(dim=1, keepdim=True) / 15
    rounded = (weight / plain).round().clamp(-15, 15) * plain
    assert (values * scales.float() - weight).square().sum() < (rounded - weight).square().sum()


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1), (4, 1)])
def test_stacks_and_odd_shapes_survive(shape):
    values, scales = train_gpt.quantize_rows(torch.randn(shape), 8)
    assert values.shape == (shape[0] * shape[1] if len(shape) == 3 else shape[0], shape[-1]) and len(scales) == len(
        values
    )


class Shared(load_architecture("gpt")[0]):
    """One block, used in every layer, and a buffer that costs nothing."""

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList([self.blocks[0]] * config.num_layers)
        self.register_buffer("free", torch.randn(500, 500), persistent=False)


def test_shared_tensors_are_stored_once_and_non_persistent_buffers_never():
    Config = load_architecture("gpt")[1]
    torch.manual_seed(0)
    shared, separate = shake(Shared(Config(**SHAPE))), shake(tiny("gpt"))
    assert len(pack(shared)) < 0.6 * len(pack(separate))
    state = stored(pack(shared))
    assert set(state) == set(shared.state_dict()) and torch.equal(
        state["blocks.0.mlp.up.weight"], state["blocks.3.mlp.up.weight"]
    )


def test_loading_needs_no_environment_and_moves_no_random_numbers(blob, monkeypatch):
    monkeypatch.setenv("NUM_LAYERS", "7")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model, plan, header = train_gpt.load_artifact(blob, CPU.device)
    assert torch.equal(before, torch.get_rng_state())
    assert (
        model.config.num_layers == header["config"]["num_layers"] != 7
        and plan == PLAN
        and header["tokenizer_sha256"] == "ab" * 32
    )


def forged(blob: bytes, **changes) -> bytes:
    """The artifact with another header, checksum and all: what a malicious hand could write."""
    import json

    header, frame = train_gpt.read_header(blob)
    text = json.dumps(header | changes).encode()
    return train_gpt.ARTIFACT_PREFIX.pack(b"PGOLFKIT", 2, len(text), zlib.crc32(text)) + text + bytes(frame)


def test_wrong_files_are_refused_with_one_clear_line(blob):
    head = train_gpt.ARTIFACT_PREFIX
    cases = {
        b"": "does not begin with PGOLFKIT",
        b"x" * 100: "does not begin with PGOLFKIT",
        blob[:12]: "does not begin with PGOLFKIT",
        blob[:-1]: "cut short or damaged",
        blob + b"!": "cut short or damaged",
        head.pack(b"PGOLFKIT", 1, 10, 0) + blob[head.size :]: "artifact version 1; this script reads version 2",
        head.pack(b"PGOLFKIT", 2, 2**31, 0) + blob[head.size :]: "over the file's end or the limit",
        forged(blob, arch="nothing"): "ARCH=nothing is not a file",
        forged(blob, raw_bytes=None): "artifact claims None bytes of tensors",
        forged(blob, raw_bytes=10): "artifact claims 10 bytes of tensors",
        forged(blob, config={"wings": 2}): "artifact does not fit this script",
        forged(blob, frame_bytes=7): "of tensors, its frame|does not fit this script",
        forged(blob, tensors=[]): "bytes that belong to no tensor|do not end where they should",
        forged(blob, tensors=[["a", "coded", [10**9, 10**9]]]): "claims more than",
        forged(blob, tensors=[["a", "coded", [-1, -5]]]): "does not fit its data",
        forged(pack(shake(tiny("gpt"))), tensors=[["a", "rows", [10**9, 10**9]]]): "does not fit its data",
        forged(pack(shake(tiny("gpt"))), tensors=[["a", "rows", [-1, 5]]]): "does not fit its data",
    }
    for content, sentence in cases.items():
        with pytest.raises(ValueError, match=sentence) as caught:
            train_gpt.load_artifact(content, CPU.device)
        assert "\n" not in str(caught.value)


def test_no_cut_and_no_flipped_bit_gets_through(blob):
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(blob)
        if rng.random() < 0.5:
            damaged = damaged[: rng.randrange(len(blob))]
        else:
            damaged[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
        with pytest.raises(ValueError) as caught:
            train_gpt.load_artifact(bytes(damaged), CPU.device)
        assert "\n" not in str(caught.value)


def test_forged_headers_never_raise_anything_but_one_line(blob):
    rng, header = random.Random(0), train_gpt.read_header(blob)[0]
    junk = [None, -1, 0, 1e300, "x", [], {}, [[]], True, [["a"]], [["a", "coded"]], {"seq_len": -1, "stride": 0}]
    for _ in range(40):
        key = rng.choice(list(header))
        content = forged(blob, **{key: rng.choice(junk)})
        try:
            train_gpt.load_artifact(content, CPU.device)
        except ValueError as error:
            assert "\n" not in str(error)


def write_under_a_size_limit(path, blob: bytes) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        train_gpt.save_atomically(path, blob)
    except OSError as error:
        if "make room and run again" in str(error):
            raise SystemExit(7) from None


def write_for_ever(path, blob: bytes) -> None:
    while True:
        train_gpt.save_atomically(path, blob)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    process = multiprocessing.get_context("fork").Process(target=write_under_a_size_limit, args=(path, b"n" * 5000))
    process.start()
    process.join(30)
    assert (
        process.exitcode == 7 and [p.name for p in tmp_path.iterdir()] == ["model.bin"] and path.read_bytes() == b"old"
    )


def test_a_kill_while_writing_leaves_a_whole_file(tmp_path):
    path, new = tmp_path / "model.bin", b"n" * 3_000_000
    path.write_bytes(b"old")
    for pause in (0.0, 0.01, 0.03, 0.1):
        process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path, new))
        process.start()
        time.sleep(pause)
        process.kill()
        process.join(30)
        assert path.read_bytes() in (b"old", new)


def test_header_layout_is_what_the_docstring_says(blob):
    magic, version, size, checksum = struct.unpack_from("<8sIII", blob)
    assert (magic, version) == (b"PGOLFKIT", 2) and zlib.crc32(blob[20 : 20 + size]) == checksum
    assert dataclasses.asdict(PLAN) == train_gpt.read_header(blob)[0]["score"]


def test_a_clip_is_the_largest_number_of_a_row_in_its_root_mean_squares():
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 64)[:, None]
    values, scales = train_gpt.quantize_rows(weight, 6, 3.0)
    spread = weight.square().mean(dim=1).sqrt()
    torch.testing.assert_close(31 * scales.float()[:, 0], 3.0 * spread, rtol=1e-3, atol=0)
    assert (values.abs().amax(dim=1) == 31).all()


@pytest.mark.parametrize("share", [0.8, 0.65, 0.5])
@pytest.mark.parametrize("bits", [8, 6])
def test_the_clip_is_widened_until_the_artifact_just_fits(bits, share):
    plain = pack(wide(), bits)
    most = int(share * len(plain))
    blob = pack(wide(), bits, None, most)
    assert 0.995 * most <= len(blob) <= most and stored(blob).keys() == stored(plain).keys()


def test_what_fits_is_packed_as_without_a_limit_and_what_never_fits_at_the_coarsest_clip():
    plain = pack(wide())
    assert pack(wide(), 8, None, len(plain)) == plain
    blob = pack(wide(), 8, None, 100)
    assert train_gpt.read_header(blob)[0]["quant_clip"] == 127 and len(blob) < 0.5 * len(plain)


@pytest.mark.parametrize(
    "settings", [dict(quant_clip=0.5), dict(quant_clip=40.0, quant_bits=6), dict(artifact_bytes=0)]
)
def test_a_clip_or_size_that_cannot_be_is_refused(settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=f"{name.upper()}={settings[name]} must be"):
        train_gpt.RunConfig(**settings)


def test_a_run_over_the_cap_is_stored_at_a_clip_that_fits(data, tmp_path):
    settings = TINY | dict(DATA_PATH=data, OUT_DIR=tmp_path, MODEL_DIM=128, ITERATIONS=2)
    plain = result_of(run_script(settings | dict(RUN_ID="plain")))
    cap = plain["bytes_total"] - plain["bytes_model"] // 5
    capped = tmp_path / "capped.py"
    capped.write_text(f"import sys, train_gpt\ntrain_gpt.BYTE_CAP = {cap}\nsys.exit(train_gpt.main([]))\n")
    done = run_script(settings | dict(RUN_ID="capped", PYTHONPATH=ROOT), script=capped)
    result = result_of(done)
    assert 0.99 * cap < result["bytes_total"] <= cap and result["bytes_code"] == plain["bytes_code"]
    assert re.search(r"^quant_clip:\d\S* bytes_model:", done.stdout, flags=re.M)
    assert not result["invalid_reasons"]
