"""Compile the kit's Triton kernels for Hopper on any machine, and read from the result what it will cost there.

No GPU is needed: Triton brings ptxas and cuobjdump. What there is to compile, the modules of architectures/kernels say
that have `hopper_cases()`, a list of dicts: name, kernel (the @triton.jit function), signature {argument: type},
constexprs {argument: value}, num_warps, num_stages, bytes and flops of a launch, and matmul, whether it multiplies
matrices. Pointers are taken to be 16-byte aligned, as PyTorch's allocations are.
"""

import importlib
import os
import re
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import architectures.kernels

BYTES_PER_SECOND = 3.35e12  # memory of an H100 SXM
FLOPS = 989e12  # bf16, dense
CAPABILITY = 90
REPORTED = {"registers": r"\bREG:(\d+)", "stack": r"\bSTACK:(\d+)"}


def discover() -> list[dict]:
    """The cases of every kernel of the kit."""
    if find_spec("triton") is None:
        raise ValueError("the kernels are compiled by Triton, which is not installed: pip install triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 makes kernels that cannot be compiled; unset it")
    folder = Path(architectures.kernels.__file__).parent
    modules = [importlib.import_module(f"architectures.kernels.{path.stem}") for path in sorted(folder.glob("*.py"))]
    return [case for module in modules if hasattr(module, "hopper_cases") for case in module.hopper_cases()]


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, to which ptxas spills: 0 is none."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {word: int(re.search(pattern, report)[1]) for word, pattern in REPORTED.items()}


def compile_case(case: dict) -> dict[str, str | int | float]:
    """A row of the table: what the compiled kernel takes and has, and the least time that a launch takes on an H100."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: case["signature"].get(name, "constexpr") for name in case["kernel"].arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    options = {name: case[name] for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
    source = ASTSource(case["kernel"], types, case["constexprs"], aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "what": case["name"],
        **resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "wgmma": len(re.findall(r"\bwgmma\.mma_async\b", ptx)),
        "mma": len(re.findall(r"\bmma\.sync\b", ptx)),
        "GB": case["bytes"] / 1e9,
        "GFLOP": case["flops"] / 1e9,
        "us": 1e6 * max(case["bytes"] / BYTES_PER_SECOND, case["flops"] / FLOPS),
    }


def measure_kernels(cases: list[dict]) -> dict:
    """Every case compiled; not ok if one spills, or multiplies matrices by anything but wgmma."""
    from triton import __version__

    rows = [compile_case(case) for case in cases]
    spills = [row["what"] for row in rows if row["stack"]]
    slow = [r["what"] for r, case in zip(rows, cases, strict=True) if case["matmul"] and (r["mma"] or not r["wgmma"])]
    notes = [
        f"{'FAIL' if spills else 'ok  '} nothing spills, except: {'; '.join(spills) or 'none'}",
        f"{'FAIL' if slow else 'ok  '} matrices are multiplied by wgmma alone, except: {'; '.join(slow) or 'none'}",
        f"us: the least on an H100, of GB at {BYTES_PER_SECOND / 1e12} TB/s and GFLOP at {FLOPS / 1e12:.0f} TFLOP/s",
    ]
    return dict(triton=__version__, rows=rows, notes=notes, ok=not spills and not slow)
