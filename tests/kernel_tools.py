"""What tests of Triton kernels share.

Triton's interpreter is chosen before Triton is imported: so a test file runs itself as a script.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

TESTS = Path(__file__).resolve().parent


def run_in_interpreter(file: str) -> dict | list:
    """What this test file prints, as JSON, when it runs as a script in the interpreter, on one thread."""
    if find_spec("triton") is None:
        pytest.skip("Triton, which these kernels are written in, is not installed")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    done = subprocess.run([sys.executable, file], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def multiply_bf16() -> None:
    """From here on the interpreter, which keeps bf16 as bit patterns and multiplies those, multiplies their values."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def values(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: plain(self, values(a), values(b), *rest)


def watch_costs(work: Callable[[], object]) -> list[int]:
    """(bytes that kernels load and store, operations of their products) while work runs."""
    from triton.runtime.interpreter import InterpreterBuilder

    found, plain = [0, 0], {}

    def watch(name: str, cost: Callable[..., tuple[int, int]]) -> None:
        plain[name] = getattr(InterpreterBuilder, name)

        def watched(self, *args):
            index, amount = cost(*args)
            found[index] += amount
            return plain[name](self, *args)

        setattr(InterpreterBuilder, name, watched)

    watch(
        "create_masked_load", lambda x, mask, *_: (0, int(mask.data.sum()) * x.get_element_ty().primitive_bitwidth // 8)
    )
    watch("create_masked_store", lambda x, value, mask, *_: (0, int(mask.data.sum()) * value.data.itemsize))
    watch("create_dot", lambda a, b, *_: (1, 2 * a.data.size * b.data.shape[-1]))
    work()
    for name, method in plain.items():
        setattr(InterpreterBuilder, name, method)
    return found


def outputs(function: Callable, tensors: list[Tensor]) -> list[Tensor]:
    """y and the gradients of a weighted sum of it."""
    y = function(*tensors)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    return [y, *torch.autograd.grad((y * weights).sum(), tensors)]


def compiled_difference(function: Callable, tensors: list[Tensor]) -> float:
    """Between torch.compile without graph breaks, forward and backward, and eager."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    pairs = zip(outputs(compiled, tensors), outputs(function, tensors), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def operators_called(function: Callable, *shapes: tuple[int, ...], device: str) -> list[str]:
    """Names of the operators that function calls on bf16 tensors of these shapes, which needs no such device."""
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), Watch():
        function(*(torch.empty(shape, device=device, dtype=torch.bfloat16) for shape in shapes))
    return called
