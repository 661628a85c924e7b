"""Kernels compiled for Hopper neither spill nor leave the matrix units, and those that do are found."""

from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("Triton, which compiles the kernels, is not installed", allow_module_level=True)

import triton
import triton.language as tl

from tools import bench, hopper

CASES = {case["kernel"].__name__: case for case in reversed(hopper.discover())}  # the first of each kernel


@triton.jit
def product(x, y, size: tl.constexpr):
    """y = x x^T, of one tile."""
    at = tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :]
    tile = tl.load(x + at)
    tl.store(y + at, tl.dot(tile, tl.trans(tile)))


def case_of(size: int, num_warps: int) -> dict:
    case = dict(name="product", kernel=product, signature={"x": "*bf16", "y": "*fp32"}, constexprs={"size": size})
    return case | dict(num_warps=num_warps, num_stages=1, bytes=6 * size**2, flops=2 * size**3, matmul=True)


@pytest.mark.parametrize("name", CASES)
def test_every_kernel_of_the_kit_stays_in_registers_and_on_the_matrix_units(name):
    found = hopper.measure_kernels([CASES[name]])
    assert found["ok"], found["notes"]


def test_kernels_are_found_in_every_module_that_names_cases():
    assert {"scan_forward", "scan_dq", "scan_dkv", "segment_states", "join_segments"} <= CASES.keys()
    assert all(case["bytes"] > 0 and case["flops"] > 0 for case in CASES.values())


def test_a_spill_is_found():
    found = hopper.measure_kernels([case_of(128, num_warps=1)])
    assert found["rows"][0]["stack"] > 0 and not found["ok"]


def test_a_product_off_the_wgmma_units_is_found():
    row, tile = (hopper.compile_case(case_of(size, num_warps=4)) for size in (16, 64))
    assert (row["wgmma"], row["mma"] > 0) == (0, True) and (tile["wgmma"] > 0, tile["mma"]) == (True, 0)
    assert not hopper.measure_kernels([case_of(16, num_warps=4)])["ok"]


def test_the_least_time_is_that_of_what_takes_longer():
    rows = [hopper.compile_case(case_of(64, 4) | dict(bytes=b, flops=f)) for b, f in ((3.35e9, 1), (1, 989e9))]
    assert [row["us"] for row in rows] == [pytest.approx(1000), pytest.approx(1000)]


def test_the_bench_writes_what_it_found_and_fails_on_a_spill(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "discover", lambda: [case_of(128, num_warps=1)])
    assert bench.main(["--kernels", "--out", str(tmp_path)]) == 1
    assert "FAIL nothing spills, except: product" in capsys.readouterr().out
    assert [path.name.split("_")[0] for path in tmp_path.iterdir()] == ["kernels"]


def test_kernels_for_the_interpreter_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="unset it"):
        hopper.discover()
